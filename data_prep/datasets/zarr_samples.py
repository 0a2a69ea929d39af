"""Reads the samples of data sets of Zarr stores: TerraMesh, SSL4EO-S12 v1.1.

A store has an array `bands` (T, K, H, W), all bands at 10 m, and beside it `time`, `x`, `y`, the
CRS and, with Sentinel-2, `cloud_mask` (T, H, W).
"""

import dataclasses
import datetime
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import rasterio.errors
import tensorflow_datasets as tfds
from affine import Affine

from cromss_jax import sensors
from cromss_jax.legend import IGNORE_LABEL, Legend
from data_prep import errors
from data_prep.datasets.zarr_shards import Sample
from data_prep.options import Options
from data_prep.reading import bands, geotiff, grids, labels, nodata, offsets, pairing, zarr_stores
from data_prep.report import Finding
from data_prep.writing import records

# Of `cloud_mask`: thin and thick cloud, shadow, nodata.
CLOUDS = (3, 4, 5, 6)
_LULC_VALUES = 9
_ARRAYS = ("bands", "band", "time", "x", "y", "crs", "cloud_mask")
_UNITS = {"nanosecond": "ns", "microsecond": "us", "millisecond": "ms", "second": "s",
          "minute": "m", "hour": "h", "day": "D"}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Cube:
    """The arrays of a store.

    Attributes:
      path: of the store, for errors.
      pixels: (T, K, H, W).
      names: [K] of the bands; empty where neither the store nor their number tells them.
      dates: [T].
      crs: WKT; empty if there is none.
      transform: see `geotiff.Image`.
      clouds: (T, H, W), or None.
      metadata: all attributes as text.
    """

    path: str
    pixels: np.ndarray
    names: tuple[str, ...]
    dates: tuple[datetime.datetime, ...]
    crs: str
    transform: Affine
    clouds: np.ndarray | None
    metadata: str

    def image(self, time: int, names: Sequence[str] = ()) -> geotiff.Image:
        """One date, all bands or some of them.

        Raises:
          errors.BadFileError: if one is missing.
        """
        pixels = self.pixels[time]
        if names:
            missing = [name for name in names if name not in self.names]
            if missing:
                found = ", ".join(self.names) or f"{len(pixels)} bands without names"
                raise errors.BadFileError(self.path, f"has no band {missing[0]}, but {found}")
            pixels = pixels[[self.names.index(name) for name in names]]
        valid = np.isfinite(pixels) if np.issubdtype(pixels.dtype, np.floating) else None
        if valid is not None:
            # float16 has a step of 0.016 at -20 dB, and arithmetic would add to it.
            pixels = pixels.astype(np.float32)
        ones = (1.0,) * len(pixels)
        return geotiff.Image(
            pixels, valid, self.crs, self.transform, ones, (0.0,) * len(pixels),
            tuple(names) or self.names, {},
        )  # fmt: skip


def read_cube(sample: Sample, folder: str, arrays: Sequence[str] = _ARRAYS) -> Cube:
    """Reads a store.

    Raises:
      errors.BadFileError: if it is damaged, or an array is missing or has another form.
    """
    path = sample.name(folder)
    try:
        store = zarr_stores.read(sample.read(folder), tuple(arrays))
    except zarr_stores.ZarrError as error:
        raise errors.BadFileError(path, str(error)) from error
    found = store.arrays
    missing = [name for name in ("bands", "time", "x", "y") if name not in found]
    if missing:
        raise errors.BadFileError(path, f"has no array {missing[0]}")
    pixels = found["bands"]
    if pixels.ndim != 4:
        raise errors.BadFileError(
            path, f"bands have {pixels.ndim} dimensions, 4 are needed: time, band, y, x"
        )
    dates = _dates(path, found["time"], store.attributes.get("time", {}))
    if len(dates) != len(pixels):
        raise errors.BadFileError(path, f"has {len(dates)} dates for {len(pixels)} images")
    return Cube(
        path,
        pixels,
        _names(found.get("band"), pixels.shape[1]),
        dates,
        _crs(path, found.get("crs"), store.attributes.get("spatial_ref", {})),
        _transform(path, found["x"], found["y"], pixels.shape[2:]),
        found.get("cloud_mask"),
        json.dumps(dict(store.attributes), default=str),
    )


def _names(given: np.ndarray | None, count: int) -> tuple[str, ...]:
    """The names of bands: as the store gives them, otherwise by their number in the usual order."""
    if given is not None:
        return tuple(bands.band_name(str(name)) for name in given.ravel())
    usual = (sensors.S1_BANDS, *(tuple(level) for level in sensors.S2_STATISTICS.values()))
    return next((names for names in usual if len(names) == count), ())


def _dates(
    path: str, values: np.ndarray, attributes: Mapping[str, Any]
) -> tuple[datetime.datetime, ...]:
    """Dates as xarray stores them: numbers since a date that the attributes name, or since 1970."""
    values = np.atleast_1d(values)
    if not np.issubdtype(values.dtype, np.datetime64):
        match = re.fullmatch(r"(\w+?)s? since (\S+(?: \S+)?)", attributes.get("units", ""))
        unit, since = (match[1], match[2]) if match else ("nanosecond", "1970-01-01")
        if unit not in _UNITS:
            raise errors.BadFileError(path, f"has times in {unit}, which are not known")
        start = np.datetime64(since.replace(" ", "T"), "ns")
        values = start + values.astype(np.int64) * np.timedelta64(1, _UNITS[unit])
    return tuple(values.astype("datetime64[us]").astype(datetime.datetime).tolist())


def _crs(path: str, code: np.ndarray | None, attributes: Mapping[str, Any]) -> str:
    """The CRS as WKT, from a number of EPSG or from the attributes."""
    given = attributes.get("crs_wkt") or attributes.get("spatial_ref")
    if not given and code is None:
        return ""
    try:
        if given:
            return rasterio.CRS.from_wkt(given).to_wkt()
        text = str(np.ravel(code)[0])
        return rasterio.CRS.from_string(text if ":" in text else f"EPSG:{text}").to_wkt()
    except rasterio.errors.CRSError as error:
        raise errors.BadFileError(path, f"its CRS cannot be used: {error}") from error


def _transform(path: str, x: np.ndarray, y: np.ndarray, size: tuple[int, int]) -> Affine:
    """The transform of pixels whose centres are given.

    Raises:
      errors.BadFileError: if they are not evenly spaced, from north to south and west to east.
    """
    x, y = np.ravel(x).astype(np.float64), np.ravel(y).astype(np.float64)
    if (len(y), len(x)) != size or min(size) < 2:
        raise errors.BadFileError(path, f"has {len(y)} x {len(x)} coordinates for {size} pixels")
    a, e = (x[-1] - x[0]) / (len(x) - 1), (y[-1] - y[0]) / (len(y) - 1)
    even = np.abs(np.diff(x) - a).max() < 0.01 * abs(a) and np.abs(
        np.diff(y) - e
    ).max() < 0.01 * abs(e)
    if not even or a <= 0 or e >= 0:
        raise errors.BadFileError(
            path, "coordinates are not evenly spaced from north to south and west to east"
        )
    return Affine(a, 0, x[0] - a / 2, 0, e, y[0] - e / 2)


@dataclasses.dataclass(frozen=True)
class _Season:
    """One date of a sample.

    Attributes:
      example: its imagery.
      labels: (T,T) uint8.
      measures: see `records.Reading`.
    """

    example: records.Example
    labels: np.ndarray
    measures: tuple[tuple[str, float], ...]


def read_sample(
    sample: Sample,
    *,
    band_list: Sequence[sensors.Band],
    legend: Legend,
    max_seasons: int,
    tile_size: int,
    ignore_clouds: bool,
    options: Options,
) -> records.Reading:
    """Reads all dates of a sample.

    Args:
      sample: the sample.
      band_list: of the records, with their scaling.
      legend: of LULC.
      max_seasons: S, the number of seasons to which `labels` are padded; 0 for that of the sample.
      tile_size: T, pixels along a side; 0 for that of the sample.
      ignore_clouds: whether pixels that `cloud_mask` calls cloud or shadow have no label.
      options: see `Options`.

    Returns:
      The record of each date of Sentinel-2 (without it, of Sentinel-1) by date: s1 (T,T,2), s2
      (T,T,K), labels (S,T,T), all uint8, and what `features` names. Sentinel-1 is paired by date.

    Raises:
      errors.BadFileError: if a store is damaged, or the stores do not belong together.
    """
    cubes = {}
    for array in options.modalities:
        folder = next(f for f in FOLDERS[array](options.s2_level) if f in sample.stores)
        cubes[array] = read_cube(sample, folder)
    main = cubes.get("s2") or cubes["s1"]
    lulc = read_cube(sample, "LULC")
    findings: tuple[Finding, ...] = ()
    reference = main.image(0)
    for cube in (*cubes.values(), lulc):
        findings += grids.compare(reference, cube.path, cube.image(0), main.path)
        side = tile_size or reference.size[0]
        bands.check_size(cube.path, cube.image(0), (side, side))
    order = sorted(range(len(main.dates)), key=main.dates.__getitem__)
    pairs = _pair(cubes, order, options.max_days)
    l1c = _twin(sample, options)
    kept: list[_Season] = []
    for time, s1_time in zip(order, pairs, strict=True):
        if s1_time is None:
            detail = f"no Sentinel-1 image within {options.max_days:g} days"
            findings += (Finding("not paired", f"{main.path} {main.dates[time]:%Y-%m-%d}", detail),)
            continue
        season, found = _read_season(
            cubes, lulc, l1c, (time, s1_time), band_list, legend, ignore_clouds, options
        )
        findings += found
        if season is not None:
            kept.append(season)
    if all(s1_time is None for s1_time in pairs):
        raise errors.BadFileError(
            main.path,
            f"no Sentinel-1 image is within {options.max_days:g} days of one of Sentinel-2: raise "
            "--max_days, or read one of them with --modalities",
        )
    return _reading(sample, main, kept, max_seasons or len(order), findings)


def _reading(
    sample: Sample,
    main: Cube,
    kept: Sequence[_Season],
    max_seasons: int,
    findings: tuple[Finding, ...],
) -> records.Reading:
    """The records of the dates of a sample."""
    if not kept:
        return records.Reading([], findings)
    if len(kept) > max_seasons:
        raise errors.BadFileError(
            main.path, f"has {len(kept)} dates, the first sample has {max_seasons}"
        )
    all_labels = np.pad(
        np.stack([season.labels for season in kept]),
        ((0, max_seasons - len(kept)), (0, 0), (0, 0)),
        constant_values=IGNORE_LABEL,
    )
    examples = [
        season.example
        | {
            "labels": all_labels,
            "season": index,
            "location_id": sample.location_id,
            "crs": main.crs,
            "transform": np.array(main.transform[:6], np.float64),
        }
        for index, season in enumerate(kept)
    ]
    measures = tuple(measure for season in kept for measure in season.measures)
    return records.Reading(examples, findings, measures)


# Folders of each modality by the level of Sentinel-2. A sample is in one of them.
FOLDERS = {"s1": lambda _: ("S1RTC", "S1GRD"), "s2": lambda level: (f"S2{level}",)}


def _pair(cubes: Mapping[str, Cube], order: Sequence[int], max_days: float) -> list[int | None]:
    """For each date of Sentinel-2 in order, that of Sentinel-1; the same where one is alone."""
    if len(cubes) < 2:
        return list(order)
    wanted = [cubes["s2"].dates[time] for time in order]
    return pairing.nearest(wanted, cubes["s1"].dates, max_days)


def _twin(sample: Sample, options: Options) -> Cube | None:
    """The L1C store of a sample of which L2A is read, to find the offset by."""
    is_needed = options.s2_level == "L2A" and "s2" in options.modalities
    if is_needed and options.s2_offset is None and "S2L1C" in sample.stores:
        return read_cube(sample, "S2L1C")
    return None


def _values(cube: Cube, time: int, names: Sequence[str]) -> bands.Values:
    """Sentinel-2 values of some bands of one date."""
    values = bands.s2_values(cube.path, cube.image(time, names))
    valid = nodata.mark_zeros(
        dict(zip(names, values.zero, strict=True)), dict(zip(names, values.valid, strict=True))
    )
    return dataclasses.replace(values, valid=np.stack([valid[name] for name in names]))


def _evidence(cube: Cube, time: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Values and valid pixels of all bands of one date."""
    values = _values(cube, time, cube.names)
    return {name: (values.pixels[i], values.valid[i]) for i, name in enumerate(cube.names)}


def _offset(s2: Cube, l1c: Cube | None, time: int) -> offsets.Offset:
    """The offset of one date of Sentinel-2.

    Raises:
      errors.BadFileError: if it cannot be found.
    """
    evidence = _evidence(s2, time)
    if l1c is not None:
        days = [pairing.days_between(date, s2.dates[time]) for date in l1c.dates]
        twin = int(np.argmin(days))
        # The same acquisition: times of the levels may differ by minutes.
        if days[twin] < 0.5 and l1c.pixels.shape[2:] == s2.pixels.shape[2:]:
            other = _evidence(l1c, twin)
            known = offsets.find(l1c.path, other, (l1c.metadata,)).value
            found = offsets.from_l1c(evidence, other, known)
            if found is not None:
                return found
    return offsets.find(s2.path, evidence, (s2.metadata,))


def _read_season(
    cubes: Mapping[str, Cube],
    lulc: Cube,
    l1c: Cube | None,
    times: tuple[int, int],
    band_list: Sequence[sensors.Band],
    legend: Legend,
    ignore_clouds: bool,
    options: Options,
) -> tuple[_Season | None, tuple[Finding, ...]]:
    """One date of a sample; None in place of it if too few pixels are valid. Besides, findings."""
    time, s1_time = times
    main = cubes.get("s2") or cubes["s1"]
    example: records.Example = {}
    valid = np.ones(main.pixels.shape[2:], bool)
    found: tuple[Finding, ...] = ()
    measures: list[tuple[str, float]] = []
    for array, cube in cubes.items():
        own = [band for band in band_list if band.array == array]
        names = [band.name for band in own]
        offset = 0
        if array == "s1":
            when = s1_time
            values = bands.s1_values(cube.path, cube.image(when, names))
        else:
            when = time
            values = _values(cube, when, names)
            if options.s2_offset is None:
                known = _offset(cube, l1c, when)
                offset, found = known.value, found + offsets.findings(cube.path, known)
            else:
                offset = options.s2_offset
            measures.append(("offset subtracted from Sentinel-2", float(offset)))
        statistics = {band.name: (band.mean, band.std) for band in own}
        example[array] = np.stack(
            [
                bands.scale_s2(name, values.pixels[i], values.valid[i], offset, statistics)
                for i, name in enumerate(names)
            ],
            axis=-1,
        )
        example[f"{array}_timestamp"] = cube.dates[when].isoformat()
        seen = values.valid.all(axis=0)
        found += nodata.findings(f"{cube.path} {when}", f"{array.upper()} invalid", seen)
        valid &= seen
    if len(cubes) > 1:
        days = pairing.days_between(cubes["s1"].dates[s1_time], cubes["s2"].dates[time])
        measures.append(("days between Sentinel-1 and Sentinel-2", days))
    share = 1 - float(valid.mean())
    name = f"{main.path} {main.dates[time]:%Y-%m-%d}"
    if share > options.max_invalid:
        detail = f"{share:.1%} of the pixels are invalid"
        return None, (Finding("season skipped", name, detail, share),)
    if ignore_clouds:
        clear = ~np.isin(_clouds(main)[time], CLOUDS)
        found += nodata.findings(name, "masked", clear)
        valid = valid & clear
    label_map, label_found = _labels(lulc, main, time, legend)
    label_map = nodata.ignore(label_map, valid)
    if (label_map == IGNORE_LABEL).all():
        return None, (Finding("season unlabelled", name, "0.0% of the pixels have a label", 1.0),)
    return _Season(example, label_map, tuple(measures)), (*found, *label_found)


def _clouds(cube: Cube) -> np.ndarray:
    """The cloud mask of a store."""
    if cube.clouds is None or cube.clouds.shape != (len(cube.pixels), *cube.pixels.shape[2:]):
        raise errors.BadFileError(
            cube.path, "has no cloud_mask of its size: leave --ignore_clouds out"
        )
    return cube.clouds


def _labels(
    lulc: Cube, main: Cube, time: int, legend: Legend
) -> tuple[np.ndarray, tuple[Finding, ...]]:
    """The labels of one date, and findings."""
    if len(lulc.pixels) not in (1, len(main.pixels)) or lulc.pixels.shape[1] != 1:
        raise errors.BadFileError(
            lulc.path,
            f"has {len(lulc.pixels)} dates of {lulc.pixels.shape[1]} bands; one band is needed, of "
            f"one date or {len(main.pixels)}",
        )
    # In whatever order they are; of equal dates its own.
    nearest = min(
        range(len(lulc.dates)), key=lambda i: (abs(lulc.dates[i] - main.dates[time]), i != time)
    )
    image = lulc.image(nearest)
    known = {value for group in legend.values for value in group} | {*(legend.ignored or ())}
    unknown = image.pixels[(image.pixels > _LULC_VALUES) & (image.pixels != IGNORE_LABEL)]
    if unknown.size and max(known) == _LULC_VALUES:
        shown = labels.values_text(unknown)
        raise errors.BadFileError(
            lulc.path,
            f"labels {shown} are ESRI's own codes, of which others mean another class here: give "
            "--legend=esri, if all shards have them",
        )
    found, findings = labels.read_labels(lulc.path, image, legend, image.size)
    return found, findings


def features(
    tile_size: int, max_seasons: int, band_list: Sequence[sensors.Band]
) -> tfds.features.FeaturesDict:
    """The features of a record; see `read_sample`."""
    array = records.array_feature
    arrays = sensors.arrays_of(band_list)
    names = {name: array(tile_size, tile_size, len(own)) for name, own in arrays.items()}
    names |= {f"{name}_timestamp": tfds.features.Text() for name in arrays}
    names |= {"labels": array(max_seasons, tile_size, tile_size), "season": np.int32}
    names |= {"transform": array(6, dtype=np.float64)}
    names |= {name: tfds.features.Text() for name in ("location_id", "crs")}
    return tfds.features.FeaturesDict(names)
