"""Trees in the forms in which publishers release them, made from those of the sample command."""

import csv
import hashlib
import pathlib
import shutil
import zipfile

import numpy as np
import rasterio

from data_prep.datasets import downstream, ssl4eo_s12_nol
from data_prep.sample import downstream as sample_downstream
from data_prep.sample import nol

TILE_SIZE = 36
BUILDERS = {
    "nol": ssl4eo_s12_nol.Ssl4eoS12Nol,
    "dw": downstream.Ssl4eoS12Dw,
    "osm": downstream.Ssl4eoS12Osm,
    "dfc2020": downstream.Dfc2020,
}


def sample(name: str, root: pathlib.Path, locations: int = 5) -> pathlib.Path:
    """A tree of the sample command: three tiles to train on, two to test on, or locations."""
    if name == "nol":
        nol.write_sample(root, locations, seasons=2, tile_size=TILE_SIZE, seed=3)
    else:
        sample_downstream.write_sample(root, name, locations, tile_size=TILE_SIZE, seed=3)
    return root


def build(name, source_dir, data_dir, **options):
    builder = BUILDERS[name](source_dir=source_dir, data_dir=data_dir, **options)
    builder.build()
    return builder


def records(builder, split="train"):
    return list(builder.as_data_source(split))


def digests(builder) -> dict[str, str]:
    """A digest of each file of records."""
    files = sorted(pathlib.Path(builder.data_path).glob("*array_record*"))
    assert files
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def pixels(builder) -> dict[str, str]:
    """A digest of the arrays of each record, by split and location, whatever else differs."""
    found = {}
    for split in builder.info.splits:
        for record in builder.as_data_source(split):
            digest = hashlib.sha256()
            for name in ("s1", "s2", "labels"):
                digest.update(record[name].tobytes())
            found[f"{split} {record['location_id'].decode()}"] = digest.hexdigest()
    return found


def skipped(builder_or_dir, name=None) -> list[tuple[str, str, str]]:
    """The rows of the report of skipped locations."""
    path = (
        builder_or_dir.report.path if name is None else builder_or_dir / f"{name}.bad_locations.csv"
    )
    with path.open(newline="") as file:
        return [tuple(row.values()) for row in csv.DictReader(file)]


def rewrite(path, change=lambda pixels: pixels, **options):
    """Writes a GeoTIFF again, with other pixels [K,H,W] or options of rasterio."""
    with rasterio.open(path) as file:
        changed, profile = change(file.read()), file.profile
    count, height, width = changed.shape
    profile |= {"count": count, "height": height, "width": width, "dtype": changed.dtype}
    profile.pop("blockysize", None)
    tags = options.pop("tags", {})
    scale = options.pop("scale", None)
    descriptions = options.pop("descriptions", None)
    with rasterio.open(path, "w", **(profile | options)) as file:
        file.write(changed)
        file.update_tags(**tags)
        if scale:
            file.scales, file.offsets = [scale[0]] * count, [scale[1]] * count
        if descriptions:
            file.descriptions = descriptions


def read(path) -> np.ndarray:
    with rasterio.open(path) as file:
        return file.read()


def move(source: pathlib.Path, target: pathlib.Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(source, target)


def zip_folder(folder: pathlib.Path, path: pathlib.Path, prefix: str = "") -> None:
    """Packs the files of a folder, under a prefix in the archive."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, prefix + str(file.relative_to(folder)))


def slice_file(path: pathlib.Path, parts: int, name="{}.part{}") -> list[pathlib.Path]:
    """Cuts a file into byte slices, as `split` does, and removes it."""
    data = path.read_bytes()
    size = -(-len(data) // parts)
    made = []
    for i in range(parts):
        slice_path = path.with_name(name.format(path.name, "a" + chr(ord("a") + i)))
        slice_path.write_bytes(data[i * size : (i + 1) * size])
        made.append(slice_path)
    path.unlink()
    return made


def contest(tree: pathlib.Path, root: pathlib.Path) -> pathlib.Path:
    """DFC2020 as on IEEE DataPort: `ROIs0000_test/{s1_0,s2_0,dfc_0}` beside ROIs0000_validation."""
    for folder in sorted(tree.iterdir()):
        kind, _, split = folder.name.partition("_")
        name = folder.name if split == "validation" else f"{kind}_0"
        shutil.copytree(folder, root / f"ROIs0000_{split}" / name)
    return root


# City and season of tiles by their number.
CITIES = [("autumn", "Mumbai"), ("spring", "BlackForest"), ("winter", "KippaRing")]


def public_bundle(tree: pathlib.Path, root: pathlib.Path) -> pathlib.Path:
    """DFC2020 by season and city, with MODIS land cover `lc` beside it."""
    for file in sorted(tree.rglob("*.tif")):
        _, _, kind, _, number = file.stem.split("_")
        season, city = CITIES[int(number[1:]) % len(CITIES)]
        target = root / "DFC_Public_Dataset" / f"ROIs0000_{season}"
        copy = target / f"{kind}_{city}" / f"ROIs0000_{season}_{kind}_{city}_{number}.tif"
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
        if kind == "dfc":
            lc = target / f"lc_{city}" / copy.name.replace("_dfc_", "_lc_")
            lc.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, lc)
    return root


def sen12ms(tree: pathlib.Path, root: pathlib.Path) -> pathlib.Path:
    """SEN12MS: a folder a season, in it one a scene and sensor; `lc` has four bands of MODIS."""
    seasons = ["ROIs1158_spring", "ROIs2017_winter"]
    for file in sorted(tree.rglob("*.tif")):
        kind, number = file.stem.split("_")[2], file.stem.rpartition("_p")[2]
        kind, season, scene = kind.replace("dfc", "lc"), seasons[int(number) % 2], int(number) + 1
        target = root / season / f"{kind}_{scene}" / f"{season}_{kind}_{scene}_p30.tif"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
        if kind == "lc":
            side = read(target).shape[1]
            modis = np.random.default_rng(int(number)).integers(1, 18, (4, side, side), np.uint8)
            rewrite(target, lambda _, modis=modis: modis)
    return root


def released_tiles(tree: pathlib.Path, root: pathlib.Path, labels: str) -> pathlib.Path:
    """DW or OSM as in the published zip: folders `dw_train`, p as decimal point, S2 as int16."""
    for file in sorted(tree.rglob("*.tif")):
        split, folder, name = file.relative_to(tree).parts
        if split == "test":
            stem, date = file.stem.rsplit("-", 1)
            name = f"{stem.replace('.', 'p')}-{date}.tif"
        target = root / f"{labels}_{split}" / folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
        if folder == "image_s2":
            rewrite(target, lambda pixels: pixels.astype(np.int16))
    return root
