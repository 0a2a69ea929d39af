"""Scenes of any size, CRS and resolution, by a table: cut into tiles on one grid each scene.

The grid of a scene is that of its Sentinel-2 bands at `resolution`, so that the finest of them are
not interpolated, or that of its label map, which then is not.
"""

import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import rasterio
import tensorflow_datasets as tfds

from cromss_jax import blocks, files, sensors
from data_prep import errors, parallel, report
from data_prep.datasets import scene_scan, scene_table, scene_tiles
from data_prep.datasets.scene_table import Acquisition
from data_prep.options import DEFAULT, Options
from data_prep.reading import pairing, warping
from data_prep.reading.rasters import Layer
from data_prep.reading.warping import Grid
from data_prep.writing import builder, cleaning

_WGS84 = rasterio.CRS.from_epsg(4326).to_wkt()
_WEB_MERCATOR = 3857
# Bands of 20 m and Sentinel-1 of 20 m are brought onto 10 m.
_MAX_ENLARGED = 2.5
# Share of a pixel by which the pixels of files of one label map may be apart: rounding.
_OFF_THE_LATTICE = 1e-3


@dataclasses.dataclass(frozen=True)
class Cutting:
    """How scenes are cut into tiles, and how these are split.

    Attributes:
      tile_size: T, side of a tile in pixels.
      stride: pixels from a tile to the next; less than `tile_size` makes them overlap.
      grid: "s2" or "labels", the map whose grid is that of the tiles.
      resolution: metres of a pixel, with the grid "s2".
      min_labelled: smallest share of the pixels of a tile that must have a label.
      test_fraction: share of the tiles that is held back, by blocks, as the split test.
      block_size: side of a block in metres; 0 for 2 to 8 tiles, by the number of tiles.
      block_gap: metres that tiles of the two splits are apart at least; those that touch always
        count as too close.
      split_seed: of the draw of blocks.
    """

    tile_size: int = 264
    stride: int = 264
    grid: str = "s2"
    resolution: float = 10.0
    min_labelled: float = 0.1
    test_fraction: float = 0.1
    block_size: float = 0.0
    block_gap: float = 0.0
    split_seed: int = 0


class Scenes(builder.LocationBuilder):
    """Tiles of scenes with their own noisy labels, a record for each date of each tile."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(
        self,
        *,
        table: str | os.PathLike,
        data_dir: str | os.PathLike,
        cutting: Cutting = Cutting(),
        num_workers: int = 1,
        max_bad_locations: int = 0,
        options: Options = DEFAULT,
    ):
        """Reads the table, looks at each acquisition, and lays out the tiles.

        Args:
          table: see `scene_table`.
          data_dir: the folder of TFDS data sets.
          cutting: see `Cutting`.
          num_workers: processes that read.
          max_bad_locations: number of acquisitions and of tiles that may be skipped.
          options: see `Options`. It has a legend. Of Sentinel-2, all bands of the first acquisition
            are read where it names none; the level counts where the files do not say theirs.

        Raises:
          errors.BuildError: if the table is wrong, or too many acquisitions or tiles are skipped.
        """
        data_dir = files.absolute(data_dir)
        findings = report.Report(data_dir, self.name, max_bad_locations)
        acquisitions = _acquisitions(scene_table.read(table), options, findings)
        levels, given = [a.s2_level for a in acquisitions if a.s2_level], options
        options = dataclasses.replace(
            options,
            modalities=tuple(m for m in sensors.MODALITIES if getattr(acquisitions[0], m)),
            s2_level=(levels or [options.s2_level])[0],
            s2_bands=acquisitions[0].s2_bands,
        )
        band_list = options.described_bands(is_native=False)
        tiles = _find_tiles(_scenes(acquisitions), cutting, options, num_workers, findings)
        splits = _split(tiles, cutting, findings)
        max_seasons = max(len(tile.seasons) for tile in tiles)
        has_truth, side = bool(acquisitions[0].truth), cutting.tile_size
        super().__init__(
            data_dir=data_dir,
            splits=splits,
            read=cleaning.cleaned(
                functools.partial(
                    scene_tiles.read_tile,
                    band_list=band_list,
                    max_seasons=max_seasons,
                    min_labelled=cutting.min_labelled,
                    options=options,
                ),
                options.cleaning,
            ),
            features=scene_tiles.features(side, max_seasons, band_list, has_truth),
            metadata={
                "tile_size": side,
                "max_seasons": max_seasons,
                "has_truth": has_truth,
                **options.metadata(options.legend, band_list, f"{self.name} in {table}"),
                **dataclasses.asdict(cutting),
                "chosen": given.choices(),  # before the files were looked at
                "blocks": {split: [] for split in splits},
            },
            location_bytes=max_seasons * side**2 * (len(band_list) + max_seasons + has_truth),
            num_workers=num_workers,
            findings=findings,
        )

    def _count(self, split: str, location: scene_tiles.SceneTile, num_records: int) -> None:
        super()._count(split, location, num_records)
        if num_records:
            self._metadata["blocks"][split].append(location.block)


def _acquisitions(
    rows: Sequence[scene_table.Row], options: Options, findings: report.Report
) -> list[Acquisition]:
    """The rows of the table whose files can be opened.

    Raises:
      errors.BuildError: if too many cannot, or they have different bands.
    """
    found: list[Acquisition] = []
    for row in rows:
        try:
            acquisition = scene_table.acquisition(row, options)
            findings.add(_dates_differ(acquisition, options))
        except errors.BadFileError as bad:
            findings.skip(f"{row.scene} {row.date:%Y-%m-%d}", bad)
        else:
            found.append(acquisition)
    if not found:
        findings.write_summary()
        raise errors.BuildError(f"no acquisition can be used; {findings.path} lists why")
    if not found[0].s1 and not found[0].s2:
        raise errors.BuildError(
            f"the table has no column {' or '.join(options.modalities)}, which --modalities names"
        )
    stated = next((a for a in found if a.s2_level), found[0])
    level = stated.s2_level or options.s2_level
    if level == "L2A" and "B10" in found[0].s2_bands:
        raise errors.BuildError(
            f"{found[0].name} has B10, which L2A has not: leave --s2_level=L2A out, or B10 with "
            "--s2_bands"
        )
    for other in found:
        if other.s2_bands != found[0].s2_bands:
            raise errors.BuildError(
                f"{other.name} has the bands {', '.join(other.s2_bands)}, {found[0].name} has "
                f"{', '.join(found[0].s2_bands)}: choose those that all have with --s2_bands"
            )
        if other.s2_level and other.s2_level != stated.s2_level:
            raise errors.BuildError(
                f"{other.name} is {other.s2_level}, {stated.name} is {stated.s2_level}, whose "
                "values differ: build a data set from one of them"
            )
    return found


def _dates_differ(acquisition: Acquisition, options: Options) -> list[report.Finding]:
    """A finding where the files of Sentinel-2 are of another day than their row.

    Raises:
      errors.BadFileError: if they are further apart than is accepted.
    """
    if acquisition.s2_date is None:
        return []
    own, said = acquisition.s2_date, acquisition.date
    days = pairing.days_between(own, said)
    path = acquisition.s2[0][0].path
    text = f"is of {own:%Y-%m-%d} by its name, its row of {said:%Y-%m-%d}"
    if days > options.max_days:
        raise errors.BadFileError(
            path, f"{text}: correct the date of the row, or raise --max_days={options.max_days:g}"
        )
    return [report.Finding("date differs", path, text)] if days > 1 else []


def _scenes(acquisitions: Sequence[Acquisition]) -> dict[str, list[Acquisition]]:
    """The acquisitions of each scene by date."""
    scenes: dict[str, list[Acquisition]] = {}
    for acquisition in sorted(acquisitions, key=lambda a: a.date):
        scenes.setdefault(acquisition.scene, []).append(acquisition)
    return dict(sorted(scenes.items()))


def _find_tiles(
    scenes: dict[str, list[Acquisition]],
    cutting: Cutting,
    options: Options,
    num_workers: int,
    findings: report.Report,
) -> list[scene_tiles.SceneTile]:
    """Looks at each acquisition, and lays out the tiles that probably have content.

    Raises:
      errors.BuildError: if too many acquisitions cannot be used, or there is no such tile.
    """
    grids = {name: _grid(dates[0], cutting) for name, dates in scenes.items()}
    windows = {name: list(_windows(grid, cutting)) for name, grid in grids.items()}
    scans = _scan(scenes, grids, windows, cutting, options, num_workers, findings)
    tiles = _tiles(scans, grids, windows, cutting)
    probable = functools.partial(
        scene_tiles.has_content, min_labelled=cutting.min_labelled, options=options
    )
    kept = list(parallel.map_in_order(probable, tiles, num_workers))
    findings.add_table(
        "Tiles",
        [
            {"tiles": "laid out", "number": len(tiles)},
            {"tiles": "empty, left out", "number": kept.count(False)},
        ],
    )
    if not any(kept):
        findings.write_summary()
        raise errors.BuildError(
            "no tile has valid imagery and labels in one place: do the label maps cover the "
            "scenes, and is --legend theirs?"
        )
    return list(itertools.compress(tiles, kept))


def _grid(acquisition: Acquisition, cutting: Cutting) -> Grid:
    """The grid of a scene: that of one layer, or metres of the UTM zone where it has no metres.

    Raises:
      errors.BuildError: if a CRS cannot be transformed.
    """
    image = (acquisition.s2 or acquisition.s1)[0][0]
    try:
        _check_resolution(image, cutting)
        if cutting.grid == "labels":
            return _labels_grid(image, acquisition.labels)
        crs = rasterio.CRS.from_wkt(image.crs)
        _, b, _, d, _, _ = image.transform
        is_metric = crs.is_projected and crs.linear_units_factor[1] == 1
        if is_metric and crs.to_epsg() != _WEB_MERCATOR and not (b or d):
            left, bottom, right, top = image.bounds
            return _spanned(image.crs, left, bottom, right, top, cutting.resolution)
        utm = _utm(warping.bounds_in(image.path, image.bounds, image.crs, _WGS84))
        left, bottom, right, top = warping.bounds_in(image.path, image.bounds, image.crs, utm)
        size = cutting.resolution
        return _spanned(
            utm, math.floor(left / size) * size, bottom, right, math.ceil(top / size) * size, size
        )
    except errors.BadFileError as bad:
        raise errors.BuildError(str(bad)) from bad


def _check_resolution(image: Layer, cutting: Cutting) -> None:
    """Refuses a grid much finer than the finest band, whose pixels would all be interpolated.

    Raises:
      errors.BadFileError: naming the resolution to choose.
    """
    metres = image.metres
    if cutting.grid == "s2" and metres and metres > _MAX_ENLARGED * cutting.resolution:
        raise errors.BadFileError(
            image.path,
            f"is the finest band and has pixels of {metres:g} m, but tiles would have "
            f"{cutting.resolution:g} m: give --resolution={metres:g}, or finer bands",
        )


def _spanned(crs: str, left: float, bottom: float, right: float, top: float, size: float) -> Grid:
    """Square pixels from the upper left corner on."""
    height = math.ceil((top - bottom) / size - 1e-6)
    width = math.ceil((right - left) / size - 1e-6)
    return Grid(crs, (size, 0.0, left, 0.0, -size, top), height, width)


def _labels_grid(image: Layer, maps: Sequence[Layer]) -> Grid:
    """The pixels of a label map, which may be in several files, as far as the imagery goes."""
    labels = maps[0]
    a, b, c, d, e, f = labels.transform
    if b or d or a < 0 or e > 0:
        raise errors.BadFileError(
            labels.path, "is turned, so that --grid=labels cannot be: choose --grid=s2"
        )
    for other in maps[1:]:
        steps = (other.transform[2] - c) / a, (other.transform[5] - f) / e
        same = (other.crs, *np.delete(other.transform, (2, 5))) == (labels.crs, a, b, d, e)
        if not same or np.abs(np.subtract(steps, np.round(steps))).max() > _OFF_THE_LATTICE:
            raise errors.BadFileError(
                other.path,
                f"has other pixels than {labels.path}, so that --grid=labels cannot be: choose "
                "--grid=s2",
            )
    west, south, east, north = np.transpose([own.bounds for own in maps])
    left, bottom, right, top = warping.bounds_in(image.path, image.bounds, image.crs, labels.crs)
    left, right = max(left, west.min()), min(right, east.max())
    bottom, top = max(bottom, south.min()), min(top, north.max())
    column, row = math.floor((left - c) / a + 1e-6), math.floor((top - f) / e + 1e-6)
    width = math.ceil((right - c) / a - 1e-6) - column
    height = math.ceil((bottom - f) / e - 1e-6) - row
    if width <= 0 or height <= 0:
        raise errors.BadFileError(labels.path, f"does not cover {image.path}")
    return Grid(labels.crs, labels.transform, labels.height, labels.width).window(
        row, column, height, width
    )


def _utm(bounds: blocks.Bounds) -> str:
    """The UTM zone of the middle of bounds in degrees, as WKT."""
    west, south, east, north = bounds
    if west > east:  # across the antimeridian
        east += 360
    zone = int(((west + east) / 2 + 180) // 6) % 60 + 1
    return rasterio.CRS.from_epsg((32600 if south + north >= 0 else 32700) + zone).to_wkt()


def _windows(grid: Grid, cutting: Cutting) -> Iterator[tuple[int, int]]:
    """Row and column of each tile; four that lie together follow each other.

    Processes read four tiles at a time, which then share the blocks of their files. The last tiles
    of a row or column go over the edge, where pixels are invalid.
    """
    side, stride = cutting.tile_size, cutting.stride
    rows = range(0, max(grid.height - side + stride, 1), stride)
    columns = range(0, max(grid.width - side + stride, 1), stride)
    for above in range(0, len(rows), 2):
        for left in range(0, len(columns), 2):
            yield from itertools.product(rows[above : above + 2], columns[left : left + 2])


def _scan(
    scenes: dict[str, list[Acquisition]],
    grids: dict[str, Grid],
    windows: dict[str, list[tuple[int, int]]],
    cutting: Cutting,
    options: Options,
    num_workers: int,
    findings: report.Report,
) -> dict[str, tuple[scene_scan.Scan, ...]]:
    """Looks at all acquisitions; those that cannot be used are reported and left out."""
    todo = [(name, acquisition) for name, dates in scenes.items() for acquisition in dates]
    look = functools.partial(_look, grids=grids, windows=windows, cutting=cutting, options=options)
    workers = min(num_workers, len(todo))
    found: dict[str, list[scene_scan.Scan]] = {}
    rows = []
    for (name, acquisition), result in zip(
        todo, parallel.map_in_order(look, todo, workers), strict=True
    ):
        if isinstance(result, errors.BadFileError):
            findings.skip(acquisition.name, result)
            continue
        findings.add(result.findings)
        rows.append(result.facts | _since(found.get(name, ()), acquisition))
        found.setdefault(name, []).append(result)
    if not found:
        findings.write_summary()
        raise errors.BuildError(f"no acquisition can be used; {findings.path} lists why")
    findings.add_table("Acquisitions", rows)
    return {name: tuple(dates) for name, dates in found.items()}


def _look(
    item: tuple[str, Acquisition],
    grids: dict[str, Grid],
    windows: dict[str, list[tuple[int, int]]],
    cutting: Cutting,
    options: Options,
) -> scene_scan.Scan | errors.BadFileError:
    """Looks at one acquisition."""
    name, acquisition = item
    side = cutting.tile_size
    tiles = [grids[name].window(row, column, side, side) for row, column in windows[name]]
    return scene_scan.scan(acquisition, tiles, options)


def _since(earlier: Sequence[scene_scan.Scan], acquisition: Acquisition) -> dict[str, Any]:
    """The days since the date before of the same scene, for the report."""
    if not earlier:
        return {}
    days = (acquisition.date - earlier[-1].acquisition.date).total_seconds() / 86400
    return {"days since the date before": f"{days:.0f}"}


def _tiles(
    scans: dict[str, tuple[scene_scan.Scan, ...]],
    grids: dict[str, Grid],
    windows: dict[str, list[tuple[int, int]]],
    cutting: Cutting,
) -> list[scene_tiles.SceneTile]:
    """All tiles; the number of their block is not known yet."""
    side = cutting.tile_size
    return [
        scene_tiles.SceneTile(
            f"{name}_{row}_{column}", grids[name].window(row, column, side, side), dates, -1
        )
        for name, dates in scans.items()
        for row, column in windows[name]
    ]


def _split(
    tiles: Sequence[scene_tiles.SceneTile], cutting: Cutting, findings: report.Report
) -> dict[str, list[scene_tiles.SceneTile]]:
    """The tiles of each split.

    Raises:
      errors.BuildError: if blocks are too large for the area.
    """
    bounds = [warping.bounds_in(t.location_id, t.grid.bounds, t.grid.crs, _WGS84) for t in tiles]
    # About 20 blocks or more, so that a tenth of the tiles can be held back.
    num_sides = min(max(math.sqrt(len(tiles) / 20), 2), 8)
    size = cutting.block_size or num_sides * blocks.side_of(bounds)
    centres = [blocks.block_of_centre(b, size) for b in bounds]
    numbers = {block: i for i, block in enumerate(sorted(set(centres)))}
    numbered = [
        dataclasses.replace(tile, block=numbers[centre])
        for tile, centre in zip(tiles, centres, strict=True)
    ]
    if not cutting.test_fraction:
        return {"train": numbered}
    advice = (
        "choose a smaller --block_size or --block_gap, or --test_fraction=0 to hold back nothing"
    )
    try:
        kinds = blocks.split(
            bounds, cutting.test_fraction, size, cutting.block_gap, cutting.split_seed
        )
    except ValueError as error:
        raise errors.BuildError(f"{error} of {size / 1000:.1f} km: {advice}") from error
    splits = {
        name: [numbered[i] for i in np.flatnonzero(kinds == kind).tolist()]
        for name, kind in (("train", 0), ("test", 1), ("left out, too close to test", -1))
    }
    rows = [{"split": name, "tiles": len(found)} for name, found in splits.items()]
    findings.add_table("Splits", rows)
    if not splits["train"]:
        raise errors.BuildError(
            f"no tile would be trained on, as all {len(tiles)} are held back or close to those "
            f"that are: {advice}"
        )
    return {name: splits[name] for name in ("train", "test")}
