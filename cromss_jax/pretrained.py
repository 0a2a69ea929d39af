"""Weights as one object that people use from Python: `cromss_jax.load`.

Everything a scientist needs between raw pixels and class probabilities, with the numbers of the
commands. Dimensions: B batch, H height, W width, K bands, C classes.
"""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from cromss_jax import files, presets, sensors
from cromss_jax.networks import decoders
from cromss_jax.networks.resnet import ResNetEncoder
from cromss_jax.weights import files as weight_files
from cromss_jax.weights.layouts import check_bands
from cromss_jax.weights.network import Network, Weights, WeightsError

__all__ = ["Pretrained", "WeightsError", "load"]

_SENSOR_BANDS = {"s1": sensors.S1_BANDS, "s2": sensors.S2_BANDS}
# Products of processing baseline 04.00 add it to reflectance * 10000.
_S2_OFFSET = 1000


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Pretrained:
    """A network with its weights and what is known of them; made by `load`.

    Attributes:
      network: the module, float32. Call it in evaluation mode, `network(images, train=False)`, with
        images by modality as for `predict` but of sizes that suit it; it returns logits by
        modality. Of one encoder alone it is the `ResNetEncoder`, called with an array; of two an
        `nnx.Dict` of `encoder1` (S1) and `encoder` (S2).
      bands: names of the bands by modality ("s1", "s2"), in the order of the input's channels.
      legend: the classes in the order of the output's channels, each with its colour "#rrggbb",
        or None where none is known. None for encoders alone, and where nothing says what the
        classes are.
      card: what is known of the weights: input scaling, classes, recipe, scores, versions, licence.
        Empty for a file that comes without.
      notes: what was assumed or left out when the weights were read, a sentence each.
      description: fusion, depth, decoder and number of classes.
      source: the path that was loaded.
    """

    network: nnx.Module
    bands: Mapping[str, tuple[str, ...]]
    legend: Mapping[str, str | None] | None
    card: Mapping[str, Any]
    notes: tuple[str, ...]
    description: Network
    source: str
    _limits: Mapping[str, tuple[float, float]]

    def __repr__(self) -> str:
        what = f"Pretrained({self.description}, from {self.source})"
        return "\n  note: ".join((what, *self.notes))

    def preprocess(self, image: ArrayLike, bands: Sequence[str]) -> np.ndarray:
        """Scales raw values to what the network takes.

        Each band goes to whole grey levels from 0 to 255 (`grey_levels`, which says what `image`
        and `bands` must be), then to float32 in [0, 1], to the last digit as in the data sets that
        the commands use. Runs on the host; use it outside of `jax.jit`.

        Returns:
          [..., H, W, K] float32, the network's bands in its order.

        Raises:
          ValueError: as `grey_levels`.
        """
        return _grey_levels()[self.grey_levels(image, bands)]

    def grey_levels(self, image: ArrayLike, bands: Sequence[str]) -> np.ndarray:
        """Scales raw values to the grey levels that data sets hold.

        Args:
          image: [..., H, W, k] raw values of one sensor, all bands on the same 10 m grid.
            Sentinel-1 in dB, float32 or float64. Sentinel-2 L1C as reflectance * 10000, integers,
            float32 or float64; of products of processing baseline 04.00 and later, subtract their
            offset of 1000 first (as integers with sign). Values below 0 then count as 0.
          bands: the name of each of the k channels. More than the network takes are left out.

        Returns:
          [..., H, W, K] uint8, the network's bands in its order.

        Raises:
          ValueError: for names that are unknown or repeated, bands that are missing, another number
            of channels, values that are masked, NaN, infinite, of another dtype or unit.
        """
        modality = _sensor_of(bands)
        names = tuple(bands)
        if modality not in self.bands:
            needed = " and ".join(m.upper() for m in self.bands)
            raise ValueError(
                f"bands {', '.join(names)} are of {modality.upper()}; these weights need {needed}: "
                "choose other weights or other imagery"
            )
        missing = [band for band in self.bands[modality] if band not in names]
        if missing:
            raise ValueError(
                f"missing bands {', '.join(missing)}; these weights need "
                f"{', '.join(self.bands[modality])}: add them, or choose weights of fewer bands"
            )
        values = _host_array(image, names)
        raw = {band: values[..., names.index(band)] for band in self.bands[modality]}
        if modality == "s2" and _is_float(values.dtype):
            _check_unit_s2(raw)
        check = _check_s1 if modality == "s1" else _check_s2
        return self.scale({band: check(pixels, band) for band, pixels in raw.items()})

    def scale(self, raw: Mapping[str, np.ndarray]) -> np.ndarray:
        """The grey levels of `grey_levels`, of values that were looked at.

        Of a part of an image the unit cannot be told: dark water is as dark as a wrong unit.

        Args:
          raw: [..., H, W] values of each band that the network takes of a sensor, in its order;
            finite, and of Sentinel-2 at least 0.

        Returns:
          [..., H, W, K] uint8.
        """
        scaled = [_scaled(pixels, band, self._limits[band]) for band, pixels in raw.items()]
        return np.stack(scaled, axis=-1)

    def features(self, images: Mapping[str, jax.Array | np.ndarray]) -> dict[str, list[jax.Array]]:
        """The feature pyramid of each modality's encoder. Compiled; can be part of a `jax.jit`.

        Args:
          images: by modality, all that `bands` names: [B, H, W, K], float, from `preprocess`.
            Sizes that don't suit the network are padded as in `predict`.

        Returns:
          By modality the maps that the decoder uses, all five of an encoder alone, finest first:
          [B, ceil(H / s), ceil(W / s), channels] float32, of strides s = 2, 4, 8, ... (see
          `networks.resnet.ResNetEncoder`).

        Raises:
          ValueError: for other modalities, shapes or dtypes.
        """
        return {
            modality: _features(*nnx.split(self._encoder(modality)), image, self._stride)
            for modality, image in self._checked(images).items()
        }

    def predict(self, images: Mapping[str, jax.Array | np.ndarray]) -> dict[str, jax.Array]:
        """Class probabilities of each modality. Compiled; can be part of a `jax.jit`.

        Args:
          images: by modality, all that `bands` names: [B, H, W, K], float, from `preprocess`.
            Sizes that are no multiple of the network's stride are padded by reflection, and the
            result is cropped, as the commands do when they score.

        Returns:
          [B, H, W, C] float32 by modality; the classes are those of `legend`.

        Raises:
          ValueError: for other modalities, shapes or dtypes, and for encoders alone.
        """
        if self.description.num_classes is None:
            raise ValueError(
                f"{self.source} holds a {self.description}, without decoder and head; predict "
                "needs a whole network: use features(), or fine-tune it and load that run"
            )
        definition, state = nnx.split(self.network)
        return _probabilities(definition, state, self._checked(images), self._stride)

    @property
    def _stride(self) -> int:
        return decoders.STRIDES[self.description.decoder]

    def _encoder(self, modality: str) -> ResNetEncoder:
        """The part of the network that is called so in its keys."""
        if isinstance(self.network, ResNetEncoder):
            return self.network
        path = self.description.prefixes[modality, "encoder"]
        return functools.reduce(getattr, path.strip(".").split("."), self.network)

    def _checked(self, images: Mapping[str, jax.Array | np.ndarray]) -> dict[str, jax.Array]:
        """The images as float32 arrays in the order of `bands`, if they are what is needed."""
        if not isinstance(images, Mapping):
            raise ValueError(
                f"images are of type {type(images).__name__}; give a dict of arrays by modality, "
                f"{_example(self.bands)}"
            )
        if set(images) != set(self.bands):
            raise ValueError(
                f"images are of {', '.join(map(str, images)) or 'no modality'}; the network needs "
                f"{' and '.join(self.bands)}: give {_example(self.bands)}"
            )
        checked = {}
        for modality, bands in self.bands.items():
            image = images[modality]
            if not isinstance(image, np.ndarray | jax.Array):
                raise ValueError(
                    f"images of {modality} are of type {type(image).__name__}; give a NumPy or JAX "
                    f"array [B, H, W, {len(bands)}]"
                )
            if not jnp.issubdtype(image.dtype, jnp.floating):
                raise ValueError(
                    f"images of {modality} are {image.dtype}; the network needs float32 in [0, 1]: "
                    "scale raw values by preprocess()"
                )
            if image.ndim != 4 or image.shape[-1] != len(bands) or 0 in image.shape:
                hint = "; add the batch's axis by image[None]" if image.ndim == 3 else ""
                raise ValueError(
                    f"images of {modality} have shape {image.shape}; the network needs "
                    f"[B, H, W, {len(bands)}], the bands {' '.join(bands)}{hint}"
                )
            checked[modality] = jnp.asarray(image, jnp.float32)
        return checked


def load(
    path: str | os.PathLike,
    bands: Mapping[str, Sequence[str]] | Sequence[str] | None = None,
) -> Pretrained:
    """Loads a network from whatever holds its weights.

        import cromss_jax

        model = cromss_jax.load("runs/dfc2020_s2_frozen/seed_42")
        image = model.preprocess(tile, bands=("B1", "B2", ...))  # raw values [H, W, K]
        probabilities = model.predict({"s2": image[None]})["s2"]  # [1, H, W, C]
        features = model.features({"s2": image[None]})["s2"]  # strides 2, 4, 8, ...

    Args:
      path: the folder of a run (its newest checkpoint is taken), of one of its checkpoints, or of
        converted weights; or a file that ends in `.safetensors`, `.pt`, `.pth`, `.ckpt` or `.tar`,
        of `cromss_jax.convert`, of the published code, or of another ResNet encoder. All but
        `.safetensors` need PyTorch.
      bands: of a file that does not tell its bands, such as one of 9 or 12 channels without a card:
        names in the order of the channels, by modality or of the only one.

    Returns:
      The network, in float32, whatever it was trained in.

    Raises:
      WeightsError: (a ValueError) if there are no weights, if they are damaged, or of a network
        that this program does not know.
      ValueError: for `bands` that don't exist.
    """
    path = os.fspath(path)
    try:
        exists = files.absolute(path).exists()
    except files.PathError as error:
        raise WeightsError(str(error)) from error
    if not exists:
        raise WeightsError(
            f"{path}: no such file or folder; give the folder of a run, of a checkpoint or of "
            f"converted weights, or a file ({', '.join(weight_files.SUFFIXES)})"
        )
    if bands is not None:
        by_modality = bands if isinstance(bands, Mapping) else {_sensor_of(bands): tuple(bands)}
        bands = check_bands(by_modality)
    weights = weight_files.load(path, bands)
    notes = weights.notes
    limits = _limits(weights, path)
    if not weights.card.get("input"):
        notes += (
            "nothing says how its raw values were scaled; preprocess() assumes this program's own "
            "scaling (sensors.scale_to_uint8)",
        )
    module = weights.module()
    return Pretrained(
        network=module.encoder if weights.network.fusion == "encoder" else module,
        bands=dict(weights.network.bands),
        legend=_legend(weights, path),
        card=dict(weights.card),
        notes=notes,
        description=weights.network,
        source=path,
        _limits=limits,
    )


@functools.partial(jax.jit, static_argnames=("definition", "stride"))
def _features(
    definition: nnx.GraphDef, state: nnx.State, image: jax.Array, stride: int
) -> list[jax.Array]:
    padded = decoders.pad_to_stride(image, stride)
    _, height, width, _ = padded.shape
    cropped = []
    for features in nnx.merge(definition, state)(padded, train=False):
        rows, columns = height // features.shape[1], width // features.shape[2]
        cropped.append(features[:, : -(-image.shape[1] // rows), : -(-image.shape[2] // columns)])
    return cropped


@functools.partial(jax.jit, static_argnames=("definition", "stride"))
def _probabilities(
    definition: nnx.GraphDef, state: nnx.State, images: dict[str, jax.Array], stride: int
) -> dict[str, jax.Array]:
    padded = {m: decoders.pad_to_stride(image, stride) for m, image in images.items()}
    logits = nnx.merge(definition, state)(padded, train=False)
    return {
        m: jax.nn.softmax(logits[m][:, : image.shape[1], : image.shape[2]])
        for m, image in images.items()
    }


def _example(bands: Mapping[str, Sequence[str]]) -> str:
    """How to write images by modality."""
    return "{" + ", ".join(f'"{m}": [B, H, W, {len(names)}]' for m, names in bands.items()) + "}"


def _sensor_of(bands: Sequence[str]) -> str:
    """The modality whose sensor has all these bands, each named once.

    Raises:
      ValueError: if there is none.
    """
    if isinstance(bands, str):
        raise ValueError(
            f"bands is the text {bands!r}; give a list with the name of each channel, as in "
            "('VV', 'VH')"
        )
    names = tuple(bands)
    known = {band: modality for modality, found in _SENSOR_BANDS.items() for band in found}
    unknown = [str(name) for name in names if name not in known]
    if unknown or not names:
        raise ValueError(
            f"unknown band names {', '.join(unknown) or '(none given)'}; name the channels as S1's "
            f"{', '.join(sensors.S1_BANDS)} or S2's {', '.join(sensors.S2_BANDS)}"
        )
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"repeated band names {', '.join(repeated)}; name each channel once")
    found = {known[name] for name in names}
    if len(found) > 1:
        raise ValueError(
            f"bands {', '.join(names)} are of two sensors; give S1 and S2 one after the other"
        )
    return found.pop()


def _host_array(image: ArrayLike, names: Sequence[str]) -> np.ndarray:
    """An image of raw values with one channel a name.

    Raises:
      ValueError: for another shape, masked pixels, uint8, and within `jax.jit`.
    """
    if isinstance(image, jax.core.Tracer):
        raise ValueError(
            "preprocess() was called within jax.jit, but runs on the host: call it before, and "
            "compile predict() or features()"
        )
    if np.ma.is_masked(image):
        count = np.ma.count_masked(image)
        raise ValueError(f"image holds {count} masked values; fill them or crop them away first")
    values = np.asarray(image)
    if values.ndim < 3 or values.shape[-1] != len(names) or 0 in values.shape:
        is_first = values.ndim >= 3 and values.shape[-3] == len(names)
        hint = ": move the channels from first to last by np.moveaxis(image, -3, -1)"
        raise ValueError(
            f"image has shape {values.shape}; {len(names)} bands are named, so it needs shape "
            f"[..., H, W, {len(names)}]{hint if is_first else ''}"
        )
    if values.dtype == np.uint8:
        raise ValueError(
            "image is uint8, which looks already scaled; preprocess() needs raw values: if it has "
            "this program's scaling, order its bands and divide by 255 as float32 instead"
        )
    return values


def _scaled(values: np.ndarray, band: str, limits: tuple[float, float]) -> np.ndarray:
    """Grey levels of a band.

    Args:
      values: [..., H, W] raw.
      band: its name.
      limits: raw values that become 0 and 255.

    Returns:
      [..., H, W] uint8.
    """
    for statistics in (sensors.BAND_STATISTICS, *sensors.S2_STATISTICS.values()):
        # To the last digit as in the data sets.
        if band in statistics and limits == _limits_of(*statistics[band]):
            return sensors.scale_to_uint8(values, band, statistics)
    low, high = limits
    return np.clip((values - low) / (high - low) * 255, 0, 255).astype(np.uint8)


def _is_float(dtype: np.dtype) -> bool:
    return dtype.kind == "f" and dtype.itemsize in (4, 8)


def _check_finite(values: np.ndarray, band: str) -> None:
    count = values.size - np.count_nonzero(np.isfinite(values))
    if count:
        raise ValueError(
            f"band {band} holds {count} values that are NaN or infinite; fill them or crop them "
            "away first"
        )


def _check_s1(values: np.ndarray, band: str) -> np.ndarray:
    if not _is_float(values.dtype):
        raise ValueError(
            f"band {band} is {values.dtype}; S1 needs dB as float32 or float64: convert it"
        )
    _check_finite(values, band)
    # Backscatter in dB is negative nearly everywhere, power never.
    if (values.min(axis=(-2, -1)) >= 0).any():
        raise ValueError(
            f"band {band} has an image with no value below 0, which looks like linear power; S1 "
            "needs dB: convert it by 10 * log10(power)"
        )
    return values


def _check_unit_s2(raw: Mapping[str, np.ndarray]) -> None:
    """Refuses float bands that are all from 0 to 1; all zeros may be no data."""
    highest = max(pixels.max() for pixels in raw.values())
    if 0 < highest <= 1:
        raise ValueError(
            f"no S2 value is above {highest:g}, which looks like reflectance from 0 to 1; S2 needs "
            "reflectance * 10000: multiply it"
        )


def _check_s2(values: np.ndarray, band: str) -> np.ndarray:
    """Values below 0, which subtracting the offset leaves, count as 0 as in `data_prep`."""
    is_whole = values.dtype.kind in "iu" and values.dtype.itemsize > 1
    if not is_whole and not _is_float(values.dtype):
        raise ValueError(
            f"band {band} is {values.dtype}; S2 needs reflectance * 10000 as integers of at least "
            "16 bits, float32 or float64: convert it"
        )
    _check_finite(values, band)
    if values.min() < -_S2_OFFSET:
        raise ValueError(
            f"band {band} holds {values.min():g}; reflectance * 10000 is never below "
            f"{-_S2_OFFSET}, not even without its offset: fill no-data pixels first"
        )
    return np.maximum(values, 0)


@functools.cache
def _grey_levels() -> np.ndarray:
    """What the networks see of 0..255, as the device divides: XLA's last digit is not NumPy's."""
    return np.asarray(jnp.arange(256, dtype=jnp.float32) / 255.0)


def _limits_of(mean: float, std: float) -> tuple[float, float]:
    """The raw values that `sensors.scale_to_uint8` maps to 0 and 255."""
    return mean - 2 * std, mean + 2 * std


def _limits(weights: Weights, path: str) -> dict[str, tuple[float, float]]:
    """The raw values of each band that become 0 and 255: the card's, where it says some."""
    names = [band for found in weights.network.bands.values() for band in found]
    if not weights.card.get("input"):
        return {band: _limits_of(*sensors.BAND_STATISTICS[band]) for band in names}
    try:
        by_band = weights.card["input"]["by_band"]
        limits = {
            band: (float(by_band[band]["low"]), float(by_band[band]["high"])) for band in names
        }
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{path}: its card does not say how each band is scaled, by `low` and `high` in "
            f"input.by_band ({error!r}); correct it, or convert the weights again"
        ) from error
    for band, (low, high) in limits.items():
        if not (np.isfinite([low, high]).all() and low < high):
            raise WeightsError(
                f"{path}: its card scales band {band} from {low} to {high}; correct it, `low` "
                "must be below `high`"
            )
    return limits


def _legend(weights: Weights, path: str) -> dict[str, str | None] | None:
    """The classes that the card names, with its colours, or those of the recipe or a preset."""
    names = weights.card.get("classes")
    if weights.network.num_classes is None or not names:
        return None
    if len(names) != weights.network.num_classes:
        raise WeightsError(
            f"{path}: its card names {len(names)} classes, the network has "
            f"{weights.network.num_classes}; correct it, or convert the weights again"
        )
    recipe = weights.card.get("recipe") or {}
    colours = weights.card.get("colours")
    if colours and len(colours) == len(names):
        return dict(zip(names, colours, strict=True))
    known = (legend.pairs() for legend in presets.LEGENDS.values())
    for pairs in (recipe.get("legend") or (), *known):
        if [name for name, _ in pairs] == list(names):
            return dict(pairs)
    return dict.fromkeys(names)
