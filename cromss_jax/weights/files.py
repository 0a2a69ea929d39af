"""Files of weights, PyTorch's among them, from which nothing is run; `load` takes folders, too.

The only module that imports torch, and only for `.pt` and `.ckpt`: `.safetensors` needs none.
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
# What others call the same.
_READ_SUFFIXES = (*SUFFIXES, ".pth", ".tar")
# Where a file keeps its card: an entry of safetensors' metadata and of Lightning's settings.
_CARD = "cromss_jax"
# Under which files keep a network's tensors: Lightning, MoCo; DINO; DeCUR.
_STATE_DICTS = ("state_dict", "teacher", "model")
# Before it, a file that asks for tensors alone could still run code (CVE-2025-32434) or write
# outside of its memory (CVE-2026-24747).
_SAFE_TORCH = (2, 10)


def load(path: str, bands: Mapping[str, tuple[str, ...]] | None = None) -> Weights:
    """Loads weights from whatever holds them.

    Args:
      path: the folder of a run, of one of its checkpoints or of converted weights; or a file.
      bands: of a file, by modality, where neither its card nor their number tells them.

    Raises:
      WeightsError: if there are none, if they are damaged, or no network of ours.
    """
    try:
        full = files.absolute(path)
        if full.is_dir():
            if bands:
                raise WeightsError("a folder knows its bands, they can't be said anew")
            return folders.load_run(folders.find_checkpoint(full))
        arrays, card = read(full)
        known = card and check_bands(card.get("bands"))
        if known and bands and known != dict(bands):
            raise WeightsError(f"its card says the bands are {known}, not {dict(bands)}")
        known = known or bands
        found = from_layout(arrays, known or None)
        return dataclasses.replace(found, card=card)
    except (WeightsError, OSError) as error:
        sentence = str(error)
        raise WeightsError(sentence if path in sentence else f"{path}: {sentence}") from error


def _check_suffix(path: epath.Path, suffixes: tuple[str, ...]) -> None:
    if path.suffix not in suffixes:
        raise WeightsError(f"{path}: a file of weights ends in {', '.join(suffixes)}")


def _torch(path: epath.Path):
    try:
        import torch
    except ImportError as error:
        raise WeightsError(
            f"{path.suffix} files need PyTorch: install it (`pip install torch`), or use "
            ".safetensors, which needs none"
        ) from error
    version = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2]))
    if version < _SAFE_TORCH:
        raise WeightsError(
            f"PyTorch {torch.__version__} can't be trusted to read {path.suffix} files safely: "
            f"install {'.'.join(map(str, _SAFE_TORCH))} or later, or use .safetensors"
        )
    return torch


def read(path: epath.Path) -> tuple[dict[str, np.ndarray], dict]:
    """Reads a file of weights.

    Args:
      path: ends in `.safetensors`, `.pt`, `.ckpt`, `.pth` or `.tar`; of a Lightning file or another
        method's checkpoint, the tensors of its network are taken.

    Returns:
      The arrays under the file's keys, float16 and bfloat16 as float32; and our card, from inside
      the file or from beside it (`FILE.json`), an empty dict if there is none.

    Raises:
      WeightsError: if there is no such file, if it is damaged, or if it is a pickle that asks for
        anything but tensors and plain values.
    """
    _check_suffix(path, _READ_SUFFIXES)
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    reader = _read_safetensors if path.suffix == ".safetensors" else _read_pickle
    content = path.read_bytes()
    arrays, card = reader(path, content)
    beside = path.with_name(f"{path.name}.json")
    if not card and beside.is_file():
        try:
            card = json.loads(beside.read_text())
        except ValueError as error:
            raise WeightsError(
                f"{beside}: the card beside {path.name} is damaged: {error}"
            ) from error
        # One that was written for other weights of this name says nothing of these.
        if isinstance(card, Mapping) and card.get("sha256") != hashlib.sha256(content).hexdigest():
            card = {}
    is_ours = isinstance(card, Mapping) and card.get("format") == cards.FORMAT
    return arrays, dict(card) if is_ours else {}


def _read_safetensors(path: epath.Path, content: bytes) -> tuple[dict[str, np.ndarray], dict]:
    try:
        arrays = safetensors.numpy.load_file(path)  # unlike load, it knows bfloat16
        # The header: its length in 8 bytes, then JSON.
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        card = json.loads(header.get("__metadata__", {}).get(_CARD, "{}"))
    except (safetensors.SafetensorError, KeyError, ValueError, AttributeError) as error:
        raise WeightsError(f"{path}: damaged or no safetensors file: {error}") from error
    return {key: _widened(array) for key, array in arrays.items()}, card


def _read_pickle(path: epath.Path, content: bytes) -> tuple[dict[str, np.ndarray], dict]:
    torch = _torch(path)
    try:
        # weights_only: tensors and plain values, nothing else is built. Lightning keeps its
        # settings in a Namespace, a bag of attributes.
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # What torch advises here would run the file.
        asked = re.search(r"GLOBAL (\S+)", str(error))
        why = f"asks for {asked[1]}, more than weights: nothing of it was run" if asked else ""
        raise WeightsError(f"{path}: {why or 'damaged, or no file of PyTorch'}") from error
    except (RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError,
            struct.error, zipfile.BadZipFile, OSError) as error:  # fmt: skip
        raise WeightsError(f"{path}: damaged: {_first_line(error)}") from error
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
            f"{path}: expected plain tensors; none are " + ", ".join(map(str, other[:5]))
        )
    arrays = {
        str(key): _widened(
            (value.float() if value.dtype == torch.bfloat16 else value).detach().numpy()
        )
        for key, value in tensors.items()
    }
    return arrays, card


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _widened(array: np.ndarray) -> np.ndarray:
    """float32 for shorter floats; everything else as it is."""
    is_short = array.dtype.kind in "fV" and array.dtype.itemsize < 4
    return array.astype(np.float32) if is_short else array


def write(path: epath.Path, arrays: Mapping[str, np.ndarray], card: Mapping) -> None:
    """Writes a file of weights and its cards, `FILE.json` and `FILE.md`, each whole or not at all.

    A Lightning file has its arrays in a `state_dict`. It and `.safetensors` hold the card, too.

    Args:
      path: ends in `.safetensors`, `.pt` or `.ckpt`.
      arrays: by key.
      card: of `cards.make`.

    Raises:
      WeightsError: for another suffix.
      OSError: if it can't be written.
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
    beside = path.with_name(f"{path.name}.json")
    # An older card must not speak for the new weights, should this be cut off.
    beside.unlink(missing_ok=True)
    files.write_whole(path, content)
    sealed = {**card, "sha256": hashlib.sha256(content).hexdigest()}
    files.write_whole(beside, (json.dumps(sealed, indent=2) + "\n").encode())
    files.write_whole(path.with_name(f"{path.name}.md"), text)


def _tensor(torch, array: np.ndarray):
    if array.dtype == jnp.bfloat16:  # which torch doesn't know from NumPy
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
