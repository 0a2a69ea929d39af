"""Legends from files, and data sets built with other legends, bands and modalities."""

import json
import pathlib
import subprocess

import numpy as np
import pytest
import rasterio

from cromss_jax import presets, sensors
from cromss_jax.data import input_pipeline
from data_prep import errors
from data_prep.datasets import downstream
from data_prep.options import Options
from data_prep.reading import legends
from tests import commands
from tests.data_prep import trees

CSV = "value,name,colour\n111,urban,#E6004D\n311,forest,#80ff00\n"
QML = """<!DOCTYPE qgis PUBLIC 'http://mrcc.com/qgis.dtd' 'SYSTEM'>
<qgis version="3.28"><pipe><rasterrenderer type="paletted" band="1"><colorPalette>
<paletteEntry value="0" color="#000000" label="no data" alpha="0"/>
<paletteEntry value="111" color="#e6004d" label="urban" alpha="255"/>
<paletteEntry value="311" color="#80ff00" label="forest" alpha="255"/>
</colorPalette></rasterrenderer></pipe></qgis>"""


def write(path: pathlib.Path, text: str, encoding: str = "utf-8") -> str:
    path.write_bytes(text.encode(encoding))
    return str(path)


def read_csv(tmp_path, text):
    return legends.read_legend(write(tmp_path / "legend.csv", text))


def test_a_preset_by_its_name():
    assert legends.read_legend("worldcover") is presets.WORLDCOVER


def test_csv(tmp_path):
    legend = read_csv(tmp_path, CSV)
    assert legend.names == ("urban", "forest")
    assert legend.colours == ("#e6004d", "#80ff00")
    assert (legend.values, legend.ignored) == (((111,), (311,)), ())
    for text in (
        "\ufeff" + CSV,
        CSV.replace(",", ";"),
        CSV.replace(",", "\t"),
        CSV.replace("colour", "Color").replace("\n", "\r\n") + "\r\n,,\r\n",
        "name,value,colour,area\nurban,111.0,#e6004d,3\nforest,311,#80ff00,4\n",
    ):
        assert read_csv(tmp_path, text) == legend


def test_several_values_become_one_class(tmp_path):
    """By the names of classes, or by their labels; nothing stands for ignored."""
    rows = ["311,broad-leaved,#80ff00,{f}", "111,urban,#e6004d,{u}", "312,conifers,#00a600,{f}"]
    text = "\n".join(["value,name,colour,class", *rows, "999,no data,#ffffff,"])
    legend = read_csv(tmp_path, text.format(f="forest", u="urban"))
    assert legend.names == ("forest", "urban")
    assert legend.colours == ("#80ff00", "#e6004d")
    assert (legend.values, legend.ignored) == (((311, 312), (111,)), (999,))
    legend = read_csv(tmp_path, text.format(f="1", u="0"))
    assert legend.names == ("urban", "broad-leaved")
    assert (legend.values, legend.ignored) == (((111,), (311, 312)), (999,))


def test_qgis_styles(tmp_path):
    legend = legends.read_legend(write(tmp_path / "style.qml", QML))
    assert legend == read_csv(tmp_path, CSV + "").__class__(
        ("urban", "forest"), ("#e6004d", "#80ff00"), ((111,), (311,)), (0,)
    )
    exact = QML.replace("<colorPalette>", "<colorrampshader colorRampType='EXACT'>")
    exact = exact.replace("</colorPalette>", "</colorrampshader>").replace("paletteEntry", "item")
    assert legends.read_legend(write(tmp_path / "exact.qml", exact)) == legend


def write_raster(path, colours, names=(), nodata=None, tags=None):
    with rasterio.open(
        path, "w", driver="GTiff", width=4, height=4, count=1, dtype="uint8", nodata=nodata,
        crs="EPSG:32632", transform=rasterio.Affine(10, 0, 0, 0, -10, 0),
    ) as file:  # fmt: skip
        file.write(np.zeros((1, 4, 4), np.uint8))
        if colours:
            file.write_colormap(1, colours)
        file.update_tags(**(tags or {}))
    if names:
        text = "".join(f"<Category>{name}</Category>" for name in names)
        pathlib.Path(f"{path}.aux.xml").write_text(
            f'<PAMDataset><PAMRasterBand band="1"><CategoryNames>{text}</CategoryNames>'
            "</PAMRasterBand></PAMDataset>"
        )
    return str(path)


def test_rasters_with_colours_and_names(tmp_path):
    colours = {0: (0, 0, 0), 1: (230, 0, 77), 3: (128, 255, 0)}
    names = ("nothing", "urban", "", "forest &amp; wood")
    legend = legends.read_legend(write_raster(tmp_path / "a.tif", colours, names, nodata=0))
    assert legend.names == ("urban", "forest & wood")
    assert legend.colours == ("#e6004d", "#80ff00")
    assert (legend.values, legend.ignored) == (((1,), (3,)), (0,))


def test_worldcover_says_its_own_legend(shared):
    (path,) = (shared / "real" / "worldcover").glob("*.tif")
    assert legends.read_legend(str(path)) == presets.WORLDCOVER


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("nowhere.csv", None, "the legend .*nowhere.csv does not exist: give a preset"),
        ("corine", None, "the legend .*corine is not a preset .* a .csv file, a .qml file"),
        ("x.csv", "", "the first line is '': it names the columns, value,name,colour and"),
        ("x.csv", "value,name\n1,a\n", "the first line is 'value,name': it names the columns"),
        ("x.csv", "value,name,colour,colour\n", "it names the columns, value,name,colour"),
        ("x.csv", "value,name,colour\n", "the legend has 0 classes: 2 to 250"),
        ("x.csv", "value,name,colour\n1,a\n", "line 2 has 2 cells, the header 3: put text that"),
        ("x.csv", "value,name,colour\n1,a,b,#000000\n", "line 2 has 4 cells, the header 3"),
        ("x.csv", CSV + "a,b,#000000\n", "the value 'a' of line 4 is not a whole number"),
        ("x.csv", CSV + "1.5,b,#000000\n", "the value '1.5' of line 4 is not a whole number"),
        ("x.csv", CSV + "111,b,#000000\n", "111 is in the legend twice, as 'urban' and as 'b'"),
        ("x.csv", CSV + "1,urban,#000000\n", "2 classes are called 'urban': give each its own"),
        ("x.csv", CSV + "1,,#000000\n", "a class of value 1 is called '': it needs a name"),
        ("x.csv", CSV + "1,b,#12\n", "the colour of 'b' is '#12': it is written #rrggbb"),
        ("x.csv", CSV + "255,b,#000000\n", "the value 255 of 'b' means ignored everywhere"),
        (
            "x.csv",
            "value,name,colour,class\n1,a,#000000,0\n2,b,#000000,2\n",
            "the labels in the column class are 0, 2: they must be 0 to 1 without gaps, or names",
        ),
        (
            "x.csv",
            "value,name,colour,class\n1,a,#000000,a\n2,b,#000000,b\n3,c,,\n3,d,,\n",
            "value 3 is in the legend twice, as 'c' and as 'd'",
        ),
        (
            "x.csv",
            "value,name,colour,class\n1,a,#000000,a\n2,b,#000000,b\n2,c,,\n",
            "value 2 is in the legend twice, as 'b' and as 'c'",
        ),
        ("x.qml", "<qgis>", "the QGIS style is not XML .*: save it again in QGIS"),
        ("x.qml", "<qgis/>", "the QGIS style has no classes: style the layer as paletted/unique"),
        ("x.qml", QML.replace('"111"', '"1-5"'), "the value '1-5' of the QGIS entry 'urban' is no"),
        ("x.tif", "not a raster", "the raster cannot be read"),
    ],
)  # fmt: skip
def test_wrong_files(tmp_path, name, text, message):
    path = str(tmp_path / name)
    if text is not None:
        write(tmp_path / name, text)
    with pytest.raises(errors.BuildError, match=message) as found:
        legends.read_legend(path)
    assert path in str(found.value)
    assert "\n" not in str(found.value)


def test_a_csv_in_another_encoding(tmp_path):
    path = write(tmp_path / "x.csv", CSV.replace("forest", "forêt"), "latin-1")
    with pytest.raises(errors.BuildError, match="the text is not in UTF-8: save the file in this"):
        legends.read_legend(path)


def test_rasters_without_a_legend(tmp_path):
    colours = {1: (230, 0, 77), 2: (128, 255, 0)}
    for name, arguments, message in (
        ("a.tif", ({},), "the raster has no colour table: write its legend as a CSV file"),
        ("b.tif", (colours,), "the raster has a colour table but no category names: write its"),
    ):
        with pytest.raises(errors.BuildError, match=message):
            legends.read_legend(write_raster(tmp_path / name, *arguments))


# ------------------------------------------------------------------ builds


def build_command(*flags) -> subprocess.CompletedProcess:
    return commands.run("data_prep.build", *flags)


@pytest.fixture(scope="module")
def nol(tmp_path_factory):
    return trees.sample("nol", tmp_path_factory.mktemp("nol") / "tree", 2)


@pytest.fixture(scope="module")
def dfc(tmp_path_factory):
    return trees.sample("dfc2020", tmp_path_factory.mktemp("dfc") / "tree", 3)


def say(name, source, target, **options):
    """A data set built with these options, opened as training opens it."""
    builder = trees.build(name, source, target, options=Options(**options))
    return input_pipeline.open_dataset(str(target), builder.name)


def test_labels_by_another_legend(nol, tmp_path):
    """By the command: two of the sample's values become one class, one is ignored."""
    rows = [
        f"{value},{name},{colour},{'' if value == 8 else 'green' if value in (1, 2) else name}"
        for value, (name, colour) in enumerate(presets.DYNAMIC_WORLD.pairs())
    ]
    legend = write(tmp_path / "l.csv", "\n".join(["value,name,colour,class", *rows]))
    flags = ["--dataset=ssl4eo_s12_nol", f"--source_dir={nol}", "--num_workers=1"]
    flags += [f"--data_dir={tmp_path / 'data'}"]
    assert build_command(*flags, f"--legend={legend}").returncode == 0
    dataset = input_pipeline.open_dataset(str(tmp_path / "data"), "ssl4eo_s12_nol")
    assert len(dataset.legend) == 7
    assert dataset.legend.names[:3] == ("water", "green", "flooded vegetation")
    assert dataset.legend.ignored == (8,)
    plain = say("nol", nol, tmp_path / "plain")
    table = np.array([0, 1, 1, 2, 3, 4, 5, 6, 255, *[255] * 247], np.uint8)
    for ours, theirs in zip(dataset.source, plain.source, strict=True):
        for name in ("labels", "truth"):
            np.testing.assert_array_equal(ours[name], table[theirs[name]])
        np.testing.assert_array_equal(ours["s2_20m"], theirs["s2_20m"])
    for more, message in (
        (["--legend=dynamic_world"], "was built with another legend than --legend=dynamic_world"),
        (["--s2_level=L2A"], "was built with --s2_level=L1C"),
        (["--modalities=s1"], "was built with --modalities=s1,s2"),
        (["--labels=lc"], "--labels=lc is for --dataset=dfc2020"),
    ):
        finished = build_command(*flags, *more)
        assert finished.returncode == 1
        assert message in finished.stderr
        assert finished.stderr.count("\n") == 1
    assert "exists, nothing was done" in build_command(*flags, f"--legend={legend}").stdout


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--legend=corine", "the legend corine is not a preset (dynamic_world, worldcover,"),
        ("--modalities=s3", "--modalities names s3: choose from s1, s2"),
        ("--modalities=", "--modalities is empty: choose s1, s2 or both"),
        ("--s2_bands=B2,B99", "--s2_bands names B99: choose from B1, B2"),
    ],
)
def test_wrong_flags(nol, tmp_path, flag, message):
    finished = build_command(
        "--dataset=ssl4eo_s12_nol", f"--source_dir={nol}", f"--data_dir={tmp_path}", flag
    )
    assert finished.returncode == 1
    assert message in finished.stderr


def test_a_value_that_the_legend_does_not_have(nol, tmp_path):
    with pytest.raises(errors.BuildError, match=r"label.tif: labels 1, 2, .* are not 0, 10, 20"):
        say("nol", nol, tmp_path, legend=presets.WORLDCOVER)


def test_bands_by_name(nol, tmp_path):
    """A subset at native sizes, L2A's scaling, and the bands that one resolution is left of."""
    whole = say("nol", nol, tmp_path / "whole")
    some = say("nol", nol, tmp_path / "some", s2_bands=("B2", "B8", "B11"))
    assert sensors.arrays_of(some.bands) == {
        "s1": ("VV", "VH"), "s2_10m": ("B2", "B8"), "s2_20m": ("B11",),
    }  # fmt: skip
    for ours, theirs in zip(some.source, whole.source, strict=True):
        np.testing.assert_array_equal(ours["s2_10m"], theirs["s2_10m"][..., [0, 3]])
        np.testing.assert_array_equal(ours["s2_20m"], theirs["s2_20m"][..., [4]])
    fine = say("nol", nol, tmp_path / "fine", s2_bands=("B2", "B4"), s2_offset=0)
    assert sensors.arrays_of(fine.bands) == {"s1": ("VV", "VH"), "s2": ("B2", "B4")}
    assert fine.source[0]["s2"].shape == (36, 36, 2)
    l2a = say("nol", nol, tmp_path / "l2a", s2_level="L2A", s2_offset=0)
    assert [b.name for b in l2a.bands if b.array == "s2_60m"] == ["B1", "B9"]
    assert all("L2A" in b.unit for b in l2a.bands if b.modality == "s2")
    granule = whole.source[0]["s2_granule"].decode()
    (path,) = nol.glob(f"s2c/*/{granule}/B12.tif")
    expected = sensors.scale_to_uint8(trees.read(path)[0], "B12", sensors.S2_STATISTICS["L2A"])
    np.testing.assert_array_equal(l2a.source[0]["s2_20m"][..., -1], expected)


def test_bands_of_tiles_by_name(dfc, tmp_path):
    """Some of a whole product of L1C by position; L2A is not taken for it."""
    whole = say("dfc2020", dfc, tmp_path / "whole")
    some = say("dfc2020", dfc, tmp_path / "some", s2_bands=("B3", "B4"))
    assert sensors.arrays_of(some.bands) == {"s1": ("VV", "VH"), "s2": ("B3", "B4")}
    for ours, theirs in zip(some.source, whole.source, strict=True):
        np.testing.assert_array_equal(ours["s2"], theirs["s2"][..., 2:4])
    l2a = pathlib.Path(trees.shutil.copytree(dfc, tmp_path / "l2a"))
    for path in l2a.glob("s2_*/*.tif"):
        trees.rewrite(path, lambda pixels: np.delete(pixels, 10, axis=0))
    for bands in ((), ("B3", "B4")):
        with pytest.raises(errors.BuildError, match="has 12 bands, .* are needed"):
            say("dfc2020", l2a, tmp_path / "no", s2_bands=bands)
    dataset = say("dfc2020", l2a, tmp_path / "yes", s2_level="L2A", s2_bands=("B12",), s2_offset=0)
    path = l2a / "s2_validation" / "ROIs0000_validation_s2_0_p0.tif"
    expected = sensors.scale_to_uint8(trees.read(path)[11], "B12", sensors.S2_STATISTICS["L2A"])
    np.testing.assert_array_equal(dataset.source[0]["s2"][..., 0], expected)


def test_all_bands_at_10_metres(nol, tmp_path):
    """Files of 10 m for every band become one array in the usual order."""
    tree = pathlib.Path(trees.shutil.copytree(nol, tmp_path / "tree"))
    for path in tree.glob("s2c/*/*/*.tif"):
        with rasterio.open(path) as file:
            factor = 36 // file.height
            at_10 = file.transform @ rasterio.Affine.scale(1 / factor)
        trees.rewrite(
            path, lambda p, f=factor: p.repeat(f, axis=1).repeat(f, axis=2), transform=at_10
        )
    dataset = say("nol", tree, tmp_path / "data")
    assert sensors.arrays_of(dataset.bands)["s2"] == sensors.S2_BANDS
    native = say("nol", nol, tmp_path / "native")
    for ours, theirs in zip(dataset.source, native.source, strict=True):
        assert ours["s2"].shape == (36, 36, 13)
        np.testing.assert_array_equal(ours["s2"][..., [1, 2, 3, 7]], theirs["s2_10m"])
        np.testing.assert_array_equal(ours["s2"][::6, ::6, 10], theirs["s2_60m"][..., 2])


def test_single_modalities(nol, dfc, tmp_path):
    """Folders of the other sensor need not exist; labels and pixels are those of both."""
    for modality, folder, other in (("s1", "s1", "s2c"), ("s2", "s2c", "s1")):
        tree = pathlib.Path(trees.shutil.copytree(nol, tmp_path / f"nol_{modality}"))
        trees.shutil.rmtree(tree / other)
        both = say("nol", nol, tmp_path / f"both_{modality}")
        one = say("nol", tree, tmp_path / f"one_{modality}", modalities=(modality,))
        assert {band.modality for band in one.bands} == {modality}
        assert len(one.source) == len(both.source) > 0
        for ours, theirs in zip(one.source, both.source, strict=True):
            for name in {*one.features} - {"crs", "transform"}:
                np.testing.assert_array_equal(ours[name], theirs[name])
        assert folder
        tiles = pathlib.Path(trees.shutil.copytree(dfc, tmp_path / f"dfc_{modality}"))
        for unneeded in tiles.glob("s2_*" if modality == "s1" else "s1_*"):
            trees.shutil.rmtree(unneeded)
        both = say("dfc2020", dfc, tmp_path / f"tiles_both_{modality}")
        one = say("dfc2020", tiles, tmp_path / f"tiles_one_{modality}", modalities=(modality,))
        assert "s1" in one.features or "s2" in one.features
        assert not {"s1", "s2"} <= set(one.features)
        for ours, theirs in zip(one.source, both.source, strict=True):
            for name in one.features:
                np.testing.assert_array_equal(ours[name], theirs[name])


def test_sen12ms(dfc, tmp_path):
    tree = trees.sen12ms(dfc, tmp_path / "SEN12MS")
    (tree / "ROIs1158_spring.csv").write_text("")
    built = downstream.Sen12Ms(source_dir=tree, data_dir=tmp_path / "data")
    built.build()
    assert built.report.counts == {"not read": 1}
    dataset = input_pipeline.open_dataset(str(tmp_path / "data"), "sen12ms")
    assert dataset.legend == presets.DFC2020_OF_IGBP
    assert not dataset.has_truth
    ids = [record["location_id"].decode() for record in dataset.source]
    assert ids == sorted(ids)
    assert {name.rpartition("_")[0].rpartition("_")[0] for name in ids} == {
        "ROIs1158_spring", "ROIs2017_winter",
    }  # fmt: skip
    table = np.full(256, 255)
    for label, values in enumerate(presets.DFC2020_OF_IGBP.values):
        table[list(values)] = label
    for record, name in zip(dataset.source, ids, strict=True):
        season, scene, patch = name.rsplit("_", 2)
        (lc,) = tree.glob(f"{season}/lc_{scene}/{season}_lc_{scene}_{patch}.tif")
        np.testing.assert_array_equal(record["labels"][0], table[trees.read(lc)[0]])
        s2 = trees.read(str(lc).replace("lc_", "s2_"))
        want = sensors.scale_to_uint8(s2[1], "B2")
        np.testing.assert_array_equal(record["s2"][..., 1], want)
    next(tree.rglob("*_lc_*.tif")).unlink()
    with pytest.raises(errors.BuildError, match=r"lc_\d+_p30.tif: missing"):
        downstream.Sen12Ms(source_dir=tree, data_dir=tmp_path / "more").build()


@pytest.mark.parametrize("is_bundle", [False, True])
def test_modis_labels_and_the_contests_truth(dfc, tmp_path, is_bundle):
    """`lc` in its first band is the noisy label, `dfc` the truth; both by the published table."""
    tree = pathlib.Path(trees.shutil.copytree(dfc, tmp_path / "tree"))
    rng = np.random.default_rng(0)
    for path in sorted(tree.glob("dfc_*/*.tif")):
        split = path.parent.name.removeprefix("dfc_")
        lc = tree / f"lc_{split}" / path.name.replace("_dfc_", "_lc_")
        lc.parent.mkdir(exist_ok=True)
        trees.shutil.copy(path, lc)
        modis = rng.integers(1, 18, (4, 36, 36), np.uint8)
        trees.rewrite(lc, lambda _, modis=modis: modis)
    options = {}
    if is_bundle:
        bundle = tmp_path / "bundle"
        for file in sorted(tree.rglob("*.tif")):
            _, split, kind, _, tail = file.stem.split("_")
            city = "Mumbai" if split == "test" else "BlackForest"
            name = f"ROIs0000_spring_{kind}_{city}_{tail}.tif"
            trees.move(file, bundle / "ROIs0000_spring" / f"{kind}_{city}" / name)
        tree, options = bundle, {"test_cities": ("Mumbai",)}
    dataset = say("dfc2020", tree, tmp_path / "data", labels="lc", **options)
    assert dataset.has_truth
    assert dataset.legend == presets.DFC2020_OF_IGBP
    igbp = np.array([0, 1, 1, 1, 1, 1, 2, 2, 3, 3, 4, 5, 6, 7, 6, 8, 9, 10])
    dfc_class = np.array([255, 1, 5, 255, 2, 3, 4, 6, 255, 7, 0])
    assert len(dataset.source) == 2
    for record in dataset.source:
        number = record["location_id"].decode().rpartition("_p")[2]
        split = "BlackForest" if is_bundle else "0"
        (lc,) = (
            tree.rglob(f"*_lc_{split}_p{number}.tif")
            if is_bundle
            else tree.glob(f"lc_validation/*_p{number}.tif")
        )
        truth = pathlib.Path(str(lc).replace("lc_", "dfc_"))
        np.testing.assert_array_equal(record["labels"][0], dfc_class[igbp[trees.read(lc)[0]]])
        np.testing.assert_array_equal(record["truth"], dfc_class[trees.read(truth)[-1]])
    metadata = json.loads(next((tmp_path / "data").glob("*/*/metadata.json")).read_text())
    assert metadata["labels"] == "lc"
    with pytest.raises(errors.BuildError, match="--legend and --labels=lc were given"):
        say("dfc2020", tree, tmp_path / "no", labels="lc", legend=presets.OSM, **options)
