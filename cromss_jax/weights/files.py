"""Files of weights, including PyTorch's, whose code is never run. `load` also accepts folders.

This is the only module that imports torch, and only for `.pt` and `.ckpt`. `.safetensors` does not
need it.
"""

import argparse
import dataclasses
import hashlib
import io
import json
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from cromss_jax import files
from cromss_jax.weights import cards, folders
from cromss_jax.weights.layouts import check_bands, from_layout
from cromss_jax.weights.network import Weights, WeightsError

SUFFIXES = (".safetensors", ".pt", ".ckpt")

# Other names for the formats of PyTorch.
_READ_SUFFIXES = (*SUFFIXES, ".pth", ".tar")

# The key of a file's card in safetensors' metadata and in Lightning's hyper_parameters.
_CARD = "cromss_jax"

# Keys of a network's tensors in checkpoints of Lightning and MoCo, of DINO, and of DeCUR.
_STATE_DICTS = ("state_dict", "teacher", "model")

# In older versions, reading with `weights_only` could still run code (CVE-2025-32434) or write out
# of bounds in memory (CVE-2026-24747).
_SAFE_TORCH = (2, 10)


def load(path: str, bands: Mapping[str, tuple[str, ...]] | None = None) -> Weights:
    """Loads weights from a folder or a file.

    Args:
      path: the folder of a run, of one of its checkpoints or of converted weights; or a file.
      bands: for a file, names of the bands by modality; needed if neither the file's card nor the
        number of bands determines them.

    Raises:
      WeightsError: if there are no weights, or if they are damaged or of an unsupported network.
    """
    try:
        full = files.absolute(path)
        if full.is_dir():
            if bands:
                raise WeightsError("a folder states its own bands: do not set bands for it")
            return folders.load_run(folders.find_checkpoint(full))
        arrays, card = read(full)
        known = card and check_bands(card.get("bands"))
        if known and bands and known != dict(bands):
            raise WeightsError(
                f"the file's card states the bands {known}, and the given bands are "
                f"{dict(bands)}: do not set bands for this file"
            )
        known = known or bands
        found = from_layout(arrays, known or None)
        return dataclasses.replace(found, card=card)
    except (WeightsError, OSError) as error:
        sentence = str(error)
        raise WeightsError(sentence if path in sentence else f"{path}: {sentence}") from error


def _check_suffix(path: epath.Path, suffixes: tuple[str, ...]) -> None:
    if path.suffix not in suffixes:
        raise WeightsError(f"{path}: the name of a weights file must end in {', '.join(suffixes)}")


def _torch(path: epath.Path):
    try:
        import torch
    except ImportError as error:
        raise WeightsError(
            f"{path.suffix} files need PyTorch, which is not installed: run `pip install torch`, "
            "or use .safetensors, which does not need it"
        ) from error
    version = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2]))
    if version < _SAFE_TORCH:
        raise WeightsError(
            f"PyTorch {torch.__version__} does not read {path.suffix} files safely: install "
            f"{'.'.join(map(str, _SAFE_TORCH))} or later, or use .safetensors"
        )
    return torch


def read(path: epath.Path) -> tuple[dict[str, np.ndarray], dict]:
    """Reads a file of weights.

    Args:
      path: ends in `.safetensors`, `.pt`, `.ckpt`, `.pth` or `.tar`. From a Lightning file or
        another method's checkpoint, only the network's tensors are read.

    Returns:
      The arrays by the file's keys, float16 and bfloat16 converted to float32. And the card of this
      project, from the file itself or from `FILE.json` next to it; an empty dict if there is none.

    Raises:
      WeightsError: if the file does not exist, is damaged, or is a pickle that contains anything
        other than tensors and plain values.
    """
    _check_suffix(path, _READ_SUFFIXES)
    if not path.is_file():
        raise WeightsError(f"{path} does not exist")
    reader = _read_safetensors if path.suffix == ".safetensors" else _read_pickle
    content = path.read_bytes()
    arrays, card = reader(path, content)
    card_path = path.with_name(f"{path.name}.json")
    if not card and card_path.is_file():
        try:
            card = json.loads(card_path.read_text())
        except ValueError as error:
            raise WeightsError(
                f"{card_path}, the card of {path.name}, is damaged ({error}): restore or delete it"
            ) from error
        # A card written for other weights with the same file name is ignored.
        if isinstance(card, Mapping) and card.get("sha256") != hashlib.sha256(content).hexdigest():
            card = {}
    is_ours = isinstance(card, Mapping) and card.get("format") == cards.FORMAT
    return arrays, dict(card) if is_ours else {}


def _read_safetensors(path: epath.Path, content: bytes) -> tuple[dict[str, np.ndarray], dict]:
    try:
        arrays = safetensors.numpy.load_file(path)  # `load` does not support bfloat16
        # The file starts with the header's length in 8 bytes, then the header as JSON.
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        card = json.loads(header.get("__metadata__", {}).get(_CARD, "{}"))
    except (safetensors.SafetensorError, KeyError, ValueError, AttributeError) as error:
        raise WeightsError(f"{path} is damaged or not a safetensors file: {error}") from error
    return {key: _at_least_float32(array) for key, array in arrays.items()}, card


def _read_pickle(path: epath.Path, content: bytes) -> tuple[dict[str, np.ndarray], dict]:
    torch = _torch(path)
    try:
        # With weights_only, torch builds only tensors and plain values. Lightning also stores its
        # hyper_parameters in an argparse.Namespace, which holds attributes and runs no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own message advises to load without weights_only, which would run the file's code.
        asked = re.search(r"GLOBAL (\S+)", str(error))
        why = (
            f"contains {asked[1]}, which is not weights; none of its code was run" if asked else ""
        )
        raise WeightsError(f"{path} {why or 'is damaged or not a PyTorch file'}") from error
    except (RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError,
            struct.error, zipfile.BadZipFile, OSError) as error:  # fmt: skip
        raise WeightsError(f"{path} is damaged: {_first_line(error)}") from error
    tensors, card = found, {}
    if isinstance(found, Mapping):
        name = next((n for n in _STATE_DICTS if isinstance(found.get(n), Mapping)), None)
        tensors = found if name is None else found[name]
        settings = found.get("hyper_parameters")
        card = settings.get(_CARD, {}) if isinstance(settings, Mapping) else {}
    if not isinstance(tensors, Mapping) or not tensors:
        raise WeightsError(f"{path}: expected a dict of tensors, found {type(tensors).__name__}")
    plain = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
    plain |= {torch.float16, torch.bfloat16, torch.float32, torch.float64}
    other = [
        key
        for key, value in tensors.items()
        if not isinstance(value, torch.Tensor)
        or value.dtype not in plain
        or value.layout != torch.strided
        or value.is_meta
    ]
    if other:
        raise WeightsError(
            f"{path}: expected plain tensors, which these are not: "
            + ", ".join(map(str, other[:5]))
        )
    arrays = {
        str(key): _at_least_float32(
            (value.float() if value.dtype == torch.bfloat16 else value).detach().numpy()
        )
        for key, value in tensors.items()
    }
    return arrays, card


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _at_least_float32(array: np.ndarray) -> np.ndarray:
    """Converts floats of 8 and 16 bits to float32; other arrays stay unchanged."""
    is_short = array.dtype.kind in "fV" and array.dtype.itemsize < 4
    return array.astype(np.float32) if is_short else array


def write(path: epath.Path, arrays: Mapping[str, np.ndarray], card: Mapping) -> None:
    """Writes a file of weights and its cards, `FILE.json` and `FILE.md`.

    A killed process leaves no partial file. A Lightning file has its arrays in a `state_dict`.
    Lightning and `.safetensors` files also contain the card.

    Args:
      path: ends in `.safetensors`, `.pt` or `.ckpt`.
      arrays: arrays by key.
      card: card from `cards.make`.

    Raises:
      WeightsError: if the file name has another suffix.
      OSError: if a file cannot be written.
    """
    _check_suffix(path, SUFFIXES)
    text = cards.text(card, path.name).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        metadata = {"format": "pt", _CARD: json.dumps(card)}
        content = safetensors.numpy.save(dict(arrays), metadata=metadata)
    else:
        torch = _torch(path)
        found = {key: _tensor(torch, array) for key, array in arrays.items()}
        if card["layout"] == "lightning":
            found = {"state_dict": found, "hyper_parameters": {_CARD: dict(card)}}
        buffer = io.BytesIO()
        torch.save(found, buffer)
        content = buffer.getvalue()
    card_path = path.with_name(f"{path.name}.json")
    # Deleted first, so that an old card never describes the new weights if the process is killed.
    card_path.unlink(missing_ok=True)
    files.write_whole(path, content)
    sealed = {**card, "sha256": hashlib.sha256(content).hexdigest()}
    files.write_whole(card_path, (json.dumps(sealed, indent=2) + "\n").encode())
    files.write_whole(path.with_name(f"{path.name}.md"), text)


def _tensor(torch, array: np.ndarray):
    if array.dtype == jnp.bfloat16:  # torch cannot convert this dtype from NumPy
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
