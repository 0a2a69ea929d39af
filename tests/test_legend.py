"""Legends: classes by value, presets against the publishers' codes, and every wrong legend."""

import dataclasses
import json

import numpy as np
import pytest

from cromss_jax import presets, sensors
from cromss_jax.legend import IGNORE_LABEL, MAX_CLASSES, Legend, LegendError

TWO = {"a": "#000000", "b": "#ffffff"}


def test_values_become_labels():
    legend = Legend.of({**TWO, "c": "#00ff00"}, ((311, 312), 5, 999), ignored=(0,))
    values = np.array([[311, 5, 0], [999, 312, 255]])
    expected = [[0, 1, 255], [2, 0, 255]]
    for dtype in (np.int16, np.uint16, np.int64, np.float32):
        labels, unknown = legend.classes_of(values.astype(dtype))
        assert labels.dtype == np.uint8
        np.testing.assert_array_equal(labels, expected)
        assert unknown.size == 0
    labels, unknown = legend.classes_of(np.array([5, -7, 6, 70_000, 6, -7]))
    np.testing.assert_array_equal(labels, [1, 255, 255, 255, 255, 255])
    np.testing.assert_array_equal(unknown, [-7, 6, 70_000])
    labels, unknown = dataclasses.replace(legend, ignored=None).classes_of(np.array([5, 6]))
    assert (labels.tolist(), unknown.tolist()) == ([1, 255], [])
    extremes = np.iinfo(np.int32)  # whose difference is no int32
    labels, unknown = dataclasses.replace(legend, ignored=None).classes_of(
        np.array([extremes.min, 5, extremes.max], np.int32)
    )
    assert unknown.size == 0
    assert labels[0] == labels[2] == 255
    _, unknown = legend.classes_of(np.array([5, 2.5, np.nan]))
    np.testing.assert_array_equal(unknown, [2.5, np.nan])
    labels, unknown = legend.classes_of(np.zeros((0, 3), np.uint8))
    assert (labels.shape, unknown.size) == ((0, 3), 0)


def test_every_value_as_by_a_dict():
    """Sparse codes of both signs, through the table and through sorting."""
    rng = np.random.default_rng(0)
    codes = rng.choice(np.arange(-3000, 3000), 244, replace=False)
    codes = codes[codes != IGNORE_LABEL].tolist()
    names = {f"class {i}": f"#{i:06x}" for i in range(len(codes))}
    legend = Legend.of(names, codes, ignored=None)
    label_of = {value: label for label, value in enumerate(codes)}
    values = rng.integers(-3000, 3000, (40, 40))
    expected = [[label_of.get(v, 255) for v in row] for row in values.tolist()]
    np.testing.assert_array_equal(legend.classes_of(values)[0], expected)
    np.testing.assert_array_equal(legend.classes_of(values * 1.0)[0], expected)
    most = np.full((2, 2), 2**64 - 1, np.uint64)
    np.testing.assert_array_equal(legend.classes_of(most)[0], np.full((2, 2), 255))


def test_presets_have_the_publishers_values():
    known = {
        "dynamic_world": (tuple(range(9)), ()),
        "worldcover": ((10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 100), (0,)),
        "esri": ((1, 2, 4, 5, 7, 8, 9, 11), (0, 10)),
        "scl": ((4, 5, 6, 11), (0, 1, 2, 3, 7, 8, 9, 10)),
        "dfc2020": ((10, 1, 4, 5, 6, 2, 7, 9), None),
        "osm": (tuple(range(1, 14)), (0,)),
    }
    assert set(presets.LEGENDS) == set(known)
    for name, (values, ignored) in known.items():
        legend = presets.LEGENDS[name]
        assert (legend.values, legend.ignored) == (tuple((v,) for v in values), ignored)
    # Both directions of the published table from IGBP over DFC2020 to the paper's classes.
    igbp = [0, 1, 1, 1, 1, 1, 2, 2, 3, 3, 4, 5, 6, 7, 6, 8, 9, 10]
    through, _ = presets.DFC2020.classes_of(np.array(igbp))
    np.testing.assert_array_equal(presets.DFC2020_OF_IGBP.classes_of(np.arange(18))[0], through)


def test_a_legend_survives_metadata():
    for legend in (*presets.LEGENDS.values(), presets.DFC2020_OF_IGBP):
        assert Legend.from_dict(json.loads(json.dumps(legend.to_dict()))) == legend
    # As data sets of earlier versions have it.
    pairs = [list(pair) for pair in presets.DYNAMIC_WORLD.pairs()]
    assert Legend.from_dict(pairs) == presets.DYNAMIC_WORLD


def test_text_of_values():
    assert presets.OSM.values_text() == "0..13, 255"
    assert presets.WORLDCOVER.values_text() == "0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 100, 255"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Legend.of({"a": "#000000"}), "the legend has 1 classes: 2 to 250 are possible"),
        (
            lambda: Legend.of({str(i): "#000000" for i in range(MAX_CLASSES + 1)}),
            "the legend has 251 classes: 2 to 250 are possible",
        ),
        (
            lambda: Legend(("a", "b"), ("#000000",), ((0,), (1,))),
            "2 names, 1 colours and 2 sets of values: each class needs one of each",
        ),
        (
            lambda: Legend(("a", "a"), ("#000000",) * 2, ((0,), (1,))),
            "2 classes are called 'a': give each its own name, or make them one class",
        ),
        (lambda: Legend.of({**TWO, " ": "#000000"}), "a class of value 2 is called ' ': it needs"),
        (lambda: Legend.of({**TWO, "x\ny": "#000000"}), "it needs a name of printable characters"),
        (
            lambda: Legend.of({"a": "red", "b": "#ffffff"}),
            "the colour of 'a' is 'red': it is writt",
        ),
        (lambda: Legend.of({"a": "#ABCDEF", "b": "#ffffff"}), "the colour of 'a' is '#ABCDEF'"),
        (lambda: Legend.of(TWO, ((), 1)), "the class 'a' has no value: give it one, or leave it"),
        (lambda: Legend.of(TWO, (0, 0)), "value 0 is in the legend twice, as 'a' and as 'b'"),
        (lambda: Legend.of(TWO, ((0, 0), 1)), "value 0 is in the legend twice, as 'a' and as 'a'"),
        (lambda: Legend.of(TWO, ignored=(1,)), "value 1 is both ignored and of the class 'b'"),
        (lambda: Legend.of(TWO, (0, 255)), "the value 255 of 'b' means ignored everywhere"),
        (lambda: Legend.of(TWO, (0, 1.5)), "the value 1.5 of 'b' is not a whole number"),
        (lambda: Legend.from_dict({"classes": [{}]}), "the saved legend .* has no classes with na"),
        (
            lambda: Legend.from_dict([("a", "#000000"), ("a", "#ffffff"), ("b", "#ff0000")]),
            "2 classes are called 'a'",
        ),
        (lambda: Legend.of(TWO, ignored=("x",)), "the ignored value 'x' is not a whole number"),
        (lambda: Legend.from_dict([1, 2]), "the saved legend .* has no classes with name, colour"),
    ],
)
def test_wrong_legends(make, message):
    with pytest.raises(LegendError, match=message):
        make()


def test_bands_and_their_scaling():
    """The statistics of the preset are stated, and L2A has others for the same names."""
    bands = sensors.preset_bands(is_native=True)
    assert len(bands) == 15
    arrays = sensors.arrays_of(bands)
    assert {name: len(names) for name, names in arrays.items()} == {
        "s1": 2, "s2_10m": 4, "s2_20m": 6, "s2_60m": 3,
    }  # fmt: skip
    assert [band.metres for band in bands] == [10] * 6 + [20] * 6 + [60] * 3
    b2 = next(band for band in bands if band.name == "B2")
    assert (b2.low, b2.high) == (1390.78157673 - 2 * 850.34818441, 1390.78157673 + 2 * 850.34818441)
    assert b2.unit == "reflectance * 10000 (L1C)"
    rows = json.loads(json.dumps([band.to_row() for band in bands]))
    assert sensors.bands_of_rows(rows) == bands
    l2a = sensors.preset_bands(("s2",), s2_level="L2A")
    assert [band.name for band in l2a] == list(sensors.S2_BAND_SUBSETS[12])
    assert {band.array for band in l2a} == {"s2"}
    assert l2a[0].mean == 752.40087073
    ends = np.array([l2a[0].low, l2a[0].mean, l2a[0].high])
    scaled = sensors.scale_to_uint8(ends, "B1", sensors.S2_STATISTICS["L2A"])
    assert scaled.tolist() == [0, 127, 255]
    back = sensors.values_of_uint8(scaled, "B1", sensors.S2_STATISTICS["L2A"])
    np.testing.assert_allclose(back, ends, atol=4 * l2a[0].std / 255)
