"""What the device does to records: PIL's upsampling, band order, one view for all arrays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import scipy.ndimage

from cromss_jax import sensors
from cromss_jax.data import preprocess
from cromss_jax.method import smoothing

pytestmark = pytest.mark.numeric

T, SIZE, B, S = 48, 32, 6, 3


def make_records(seed=0, tile=T):
    rng = np.random.default_rng(seed)
    shapes = {
        "s1": (tile, tile, 2),
        "s2_10m": (tile, tile, 4),
        "s2_20m": (tile // 2, tile // 2, 6),
        "s2_60m": (tile // 6, tile // 6, 3),
    }
    records = {k: rng.integers(0, 256, (B, *s), dtype=np.uint8) for k, s in shapes.items()}
    records["labels"] = rng.integers(0, 9, (B, S, tile, tile), dtype=np.uint8)
    records["truth"] = rng.integers(0, 9, (B, tile, tile), dtype=np.uint8)
    records["season"] = rng.integers(0, S, B).astype(np.int32)
    return records


@pytest.mark.parametrize("factor", [2, 6])
@pytest.mark.parametrize("kind", ["noise", "edges"])
def test_upsampling_is_pils(factor, kind):
    rng = np.random.default_rng(factor)
    band = rng.integers(0, 256, (44, 30), dtype=np.uint8)
    if kind == "edges":  # overshoots that must be clipped
        band = np.where(band > 127, 255, 0).astype(np.uint8)
    large = PIL.Image.fromarray(band).resize((30 * factor, 44 * factor), PIL.Image.BICUBIC)
    upsample = jax.jit(preprocess.upsample, static_argnums=1)
    found = np.asarray(upsample(band[None, ..., None], factor))[0, ..., 0]
    difference = np.abs(found - np.asarray(large, np.float32))
    # PIL's taps are 22-bit fixed point, ours float32: a value within 1e-4 of a half may round the
    # other way. At 2x the taps are exact in both, but for the renormalised ones at the border.
    assert difference.max() <= 1
    assert (difference > 0).mean() < 2e-3
    if factor == 2:
        assert not difference[4:-4, 4:-4].any()


@pytest.mark.parametrize("num_bands", [3, 9, 12, 13])
def test_band_order(num_bands):
    records = {k: jnp.asarray(v) for k, v in make_records().items()}
    bands = sensors.S2_BAND_SUBSETS[num_bands]
    stacked = preprocess.stack_bands(records, "s2", bands)
    assert stacked.shape == (B, T, T, num_bands)
    for index, band in enumerate(bands):
        resolution = next(r for r, g in sensors.S2_BANDS_BY_RESOLUTION.items() if band in g)
        position = sensors.S2_BANDS_BY_RESOLUTION[resolution].index(band)
        native = records[f"s2_{resolution}m"][..., position : position + 1]
        alone = preprocess.upsample(native, resolution // 10)[..., 0]
        # On a GPU the products of one band are not always those of several, to the last bit.
        np.testing.assert_allclose(stacked[..., index], alone, rtol=0, atol=255 * 2**-21)


@pytest.mark.parametrize("chosen", [("B4", "B3", "B2"), ("B12", "B1"), sensors.S2_BANDS])
def test_bands_of_a_data_set_at_10_metres(chosen):
    stored = sensors.preset_bands(is_native=False)
    names = sensors.arrays_of(stored)["s2"]
    image = np.random.default_rng(0).integers(0, 256, (2, 6, 6, len(names)), np.uint8)
    found = preprocess.stack_bands({"s2": jnp.asarray(image)}, "s2", chosen, bands=stored)
    for index, band in enumerate(chosen):
        np.testing.assert_array_equal(found[..., index], image[..., list(names).index(band)])
    again = preprocess.stack_bands({"s2": jnp.asarray(image)}, "s2", chosen)
    np.testing.assert_array_equal(found, again)


def geometry_of(top=0, left=0, flip_rows=False, flip_columns=False, angle=0.0):
    full = lambda value, dtype: jnp.full((B,), value, dtype)
    return preprocess.Geometry(
        full(top, jnp.int32),
        full(left, jnp.int32),
        full(flip_rows, bool),
        full(flip_columns, bool),
        full(angle, jnp.float32),
    )


@pytest.mark.parametrize("flip_rows", [False, True])
@pytest.mark.parametrize("flip_columns", [False, True])
def test_crop_and_flip_are_slices(flip_rows, flip_columns):
    crop = geometry_of(3, 7, flip_rows, flip_columns).crop(SIZE, 1)

    def cut(image):
        image = np.asarray(image)[:, 3 : 3 + SIZE, 7 : 7 + SIZE]
        return image[:, :: -1 if flip_rows else 1, :: -1 if flip_columns else 1]

    @jax.jit
    def seen(records, crop):
        stacked = preprocess.stack_bands(records, "s2", sensors.S2_BANDS, crop)
        labels = records["labels"]
        return stacked, smoothing.smoothing_prior(labels, labels[:, 0], 9, "ts", crop)

    records = make_records()
    (found, found_prior), (whole, whole_prior) = seen(records, crop), seen(records, None)
    np.testing.assert_array_equal(found, cut(whole))
    # Sums of 25 x 25 products in another order, in float32.
    np.testing.assert_allclose(found_prior, cut(whole_prior), atol=1e-6)


def rotated(images, angle):
    angle = jnp.broadcast_to(jnp.asarray(angle, jnp.float32), (len(images),))
    labels = jnp.zeros((*images.shape[:3], 1))
    rotate = jax.jit(preprocess.rotate_some, static_argnums=3)
    return rotate({"images": images}, {"labels": labels}, angle, 1)[0]["images"]


def test_quarter_turn_is_rot90():
    images = jax.random.uniform(jax.random.key(1), (B, SIZE, SIZE, 2))
    # cos(pi/2) is 4e-8 in float32: a coordinate is off by up to 2e-6 pixels.
    expected = np.rot90(images, axes=(1, 2))
    np.testing.assert_allclose(rotated(images, np.pi / 2), expected, atol=1e-5)


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_labels_are_turned_to_the_nearest_pixel(quarters):
    labels = np.random.default_rng(quarters).integers(0, 256, (2, 16, 16, 1)).astype(np.float32)
    angle = jnp.full(2, quarters * np.pi / 2, jnp.float32)
    _, found = preprocess.rotate_some(
        {"x": jnp.asarray(labels)}, {"labels": jnp.asarray(labels)}, angle, 1
    )
    # Coordinates are off by rounding, to either side: the nearest pixel is the exact one.
    np.testing.assert_array_equal(found["labels"], np.rot90(labels, quarters, axes=(1, 2)))


@pytest.mark.parametrize("degrees", [-70.0, 33.0])
def test_rotation_is_scipys(degrees):
    images = jax.random.uniform(jax.random.key(2), (B, SIZE, SIZE, 1))
    found = rotated(images, np.deg2rad(degrees))
    expected = [
        scipy.ndimage.rotate(
            np.asarray(i, np.float64), degrees, reshape=False, order=1, mode="mirror"
        )
        for i in images[..., 0]
    ]
    # Coordinates are float32: off by 2e-6 pixels, times a slope of at most 1 a pixel in each axis.
    np.testing.assert_allclose(found[..., 0], expected, atol=1e-5)


def test_samples_are_rotated_one_by_one():
    images = jax.random.uniform(jax.random.key(2), (B, SIZE, SIZE, 2))
    angles = np.array([0, 0.3, 0, 0, -1.2, 0], np.float32)
    found = rotated(images, angles)
    np.testing.assert_array_equal(found[angles == 0], images[angles == 0])
    for i in np.flatnonzero(angles):
        alone = rotated(images[i : i + 1], angles[i])[0]
        # Coordinates are float32, 2e-6 pixels, and summed in whatever order.
        np.testing.assert_allclose(found[i], alone, atol=1e-5)


def viewed(prior_kind):
    """Random views of records, and what makes their examples by some options."""
    geometry = preprocess.random_geometry(
        jax.random.key(3), B, T - SIZE, flip_probability=0.5, rotation_probability=0.5, max_angle=90
    )

    def make(**options):
        examples = functools.partial(
            preprocess.examples,
            modalities=("s1", "s2"),
            s2_bands=sensors.S2_BANDS,
            crop_size=SIZE,
            num_classes=9,
            prior_kind=prior_kind,
            **options,
        )
        return jax.jit(examples)(make_records(), geometry)

    return geometry, make


@pytest.mark.parametrize("prior_kind", ["ts", None])
def test_packed_examples_are_the_same_pixels(prior_kind):
    _, make = viewed(prior_kind)
    plain, packed = make(), make(cell=4)
    assert plain.keys() == packed.keys()
    for name, x in plain.items():
        # By hand: cells of 4 x 4 pixels.
        cells = np.asarray(x).reshape(B, SIZE // 4, 4, SIZE // 4, 4, -1)
        if name in ("s1", "s2"):
            expected = cells.transpose(0, 1, 3, 2, 4, 5)
        else:
            expected = cells.transpose(0, 2, 4, 1, 3, 5)
        # Products in another order, in float32, of what is rotated and of the prior.
        np.testing.assert_allclose(packed[name], expected.reshape(packed[name].shape), atol=1e-6)


def test_examples_in_bfloat16_are_those_in_float32_rounded():
    geometry, make = viewed("ts")
    exact, rounded = make(), make(dtype=jnp.bfloat16)
    for name in ("labels", "truth"):
        np.testing.assert_array_equal(rounded[name], exact[name])
    still = np.asarray(geometry.angle) == 0
    assert 0 < still.sum() < B
    for name in ("s1", "s2"):
        # Grey levels are exact, so is what is resampled of them to them.
        expected = exact[name][still].astype(jnp.bfloat16)
        np.testing.assert_array_equal(rounded[name][still], expected)
    for name, roundings in (("s1", 2), ("s2", 2), ("prior", 3)):
        # By up to 2^-8 each: turned, divided; of the prior filtered along rows, as it is, turned.
        assert rounded[name].dtype == jnp.bfloat16
        np.testing.assert_allclose(
            rounded[name].astype(jnp.float32), exact[name], rtol=1.01 * roundings * 2**-8
        )


def views_of_parcels(seed):
    """Imagery, labels and truth that show the same parcels of 16 pixels, and random views."""
    rng = np.random.default_rng(seed)
    classes = np.kron(rng.integers(0, 9, (B, 3, 3)), np.ones((1, 16, 16), int)).astype(np.uint8)
    records = make_records(tile=T)
    records["s1"] = np.stack([classes, classes], axis=-1)
    records["labels"] = np.stack([classes] * S, axis=1)
    records["truth"] = classes
    geometry = preprocess.random_geometry(
        jax.random.key(seed),
        B,
        T - SIZE,
        flip_probability=0.5,
        rotation_probability=1.0,
        max_angle=90,
    )
    return {k: jnp.asarray(v) for k, v in records.items()}, geometry


def test_every_array_is_seen_alike():
    # Imagery, labels and truth that show the same thing must still do so after any view.
    view = jax.jit(
        functools.partial(
            preprocess.examples,
            modalities=("s1",),
            s2_bands=(),
            crop_size=SIZE,
            num_classes=9,
            prior_kind="ts",
        )
    )
    for seed in range(4):
        records, geometry = views_of_parcels(seed)
        batch = view(records, geometry)
        labels = np.asarray(batch["labels"])
        np.testing.assert_array_equal(labels, batch["truth"])
        # Within a parcel: no other label within three pixels, of which one is interpolated.
        windows = np.lib.stride_tricks.sliding_window_view(labels, (7, 7), axis=(1, 2))
        inside = np.ptp(windows, axis=(3, 4)) == 0
        assert inside.mean() > 0.2
        seen = batch["s1"][:, 3:-3, 3:-3, 0] * 255
        # Weights of float32 sum to one up to rounding.
        np.testing.assert_allclose(seen[inside], labels[:, 3:-3, 3:-3][inside], atol=1e-3)
        np.testing.assert_allclose(batch["prior"].sum(-1), 1.0, rtol=1e-5)

    @jax.jit
    def turned(labels, geometry):
        crop, drawn = geometry.crop(SIZE, 1), labels[:, 0].astype(jnp.int32)
        prior = smoothing.smoothing_prior(labels, drawn, 9, "ts", crop)
        return preprocess.rotate_some({"prior": prior}, {"x": prior}, geometry.angle, 1)

    expected, _ = turned(records["labels"], geometry)
    # Compiled together or one by one, and on a GPU of one array or several: sums in another order.
    np.testing.assert_allclose(batch["prior"], expected["prior"], rtol=0, atol=1e-6)


def test_draws_are_pinned_by_the_key():
    # Literal: others would make old runs irreproducible.
    geometry = preprocess.random_geometry(
        jax.random.key(0), 4, 8, flip_probability=0.5, rotation_probability=0.5, max_angle=90
    )
    assert geometry.top.tolist() == [1, 8, 1, 1]
    assert geometry.left.tolist() == [1, 7, 4, 7]
    assert geometry.flip_rows.tolist() == [True, False, False, True]
    assert geometry.flip_columns.tolist() == [False, True, False, True]
    np.testing.assert_allclose(np.rad2deg(geometry.angle), [-62.34, 0, 0, -8.7], atol=0.01)


def test_draws_depend_on_the_key_alone_and_have_the_stated_odds():
    draw = lambda seed: preprocess.random_geometry(
        jax.random.key(seed), 40000, 8, flip_probability=0.5, rotation_probability=0.2, max_angle=90
    )
    one, again, other = draw(5), draw(5), draw(6)
    for name in ("top", "left", "flip_rows", "flip_columns", "angle"):
        np.testing.assert_array_equal(getattr(one, name), getattr(again, name))
        assert np.any(getattr(one, name) != getattr(other, name))
    assert set(np.unique(one.top)) == set(range(9))
    # Three standard errors of a share of 40,000 draws: 0.0075 at most.
    kinds = [(False, False), (True, False), (False, True), (True, True)]
    for (rows, columns), share in zip(kinds, (1 / 2, 1 / 6, 1 / 6, 1 / 6), strict=True):
        found = np.mean((one.flip_rows == rows) & (one.flip_columns == columns))
        assert abs(found - share) < 0.0075
    assert abs(np.mean(one.angle != 0) - 0.2) < 0.0075
    # Of 8,000 angles from U(-limit, limit): three standard errors of the mean and of the share of
    # each quarter are 0.03 and 0.015.
    turned = np.asarray(one.angle[one.angle != 0]) / (np.pi / 2)
    assert np.abs(turned).max() <= 1
    assert abs(turned.mean()) < 0.03
    shares = np.histogram(turned, [-1, -0.5, 0, 0.5, 1])[0] / len(turned)
    np.testing.assert_allclose(shares, 0.25, atol=0.015)


def test_the_drawn_seasons_labels():
    labels = jnp.arange(2 * 3 * 4, dtype=jnp.uint8).reshape(2, 3, 2, 2)
    found = preprocess.drawn_labels({"labels": labels, "season": jnp.array([2, 0])})
    np.testing.assert_array_equal(found, [[[8, 9], [10, 11]], [[12, 13], [14, 15]]])
    assert found.dtype == jnp.int32


def test_the_central_crop():
    geometry = preprocess.centre_geometry(2, 7)
    rows, columns = geometry.crop(4, 1)
    np.testing.assert_array_equal(rows, [[3, 4, 5, 6]] * 2)
    np.testing.assert_array_equal(columns, [[3, 4, 5, 6]] * 2)
    assert geometry.angle is None


def test_the_drawn_seasons_labels_are_taken():
    records = make_records()
    examples = functools.partial(
        preprocess.examples,
        modalities=("s2",),
        s2_bands=sensors.S2_BANDS,
        crop_size=SIZE,
        num_classes=9,
        prior_kind=None,
    )
    batch = jax.jit(examples)(records, preprocess.centre_geometry(B, T - SIZE))
    middle = slice((T - SIZE) // 2, (T - SIZE) // 2 + SIZE)
    for i, season in enumerate(records["season"]):
        expected = records["labels"][i, season, middle, middle]
        np.testing.assert_array_equal(batch["labels"][i], expected)
    assert set(batch) == {"s2", "labels", "truth"}
    # A quarter of an int32's traffic.
    assert batch["labels"].dtype == batch["truth"].dtype == jnp.uint8
