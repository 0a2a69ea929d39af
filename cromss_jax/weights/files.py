"""Files of weights, including PyTorch's, whose code is never run. `load` also accepts folders.

This is the only module that imports torch, and only for `.pt` and `.ckpt`. `.safetensors` does not
need it.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import pickle
import re
import struct
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from cromss_jax import files
from cromss_jax.weights import cards, folders
from cromss_jax.weights.layouts import check_bands, find_network, from_layout
from cromss_jax.weights.network import Weights, WeightsError

SUFFIXES = (".safetensors", ".pt", ".ckpt")

# Other names for the formats of PyTorch.
_READ_SUFFIXES = (*SUFFIXES, ".pth", ".tar")

# The key of a file's card in safetensors' metadata and in Lightning's hyper_parameters.
_CARD = "cromss_jax"

# The dtypes of PyTorch's tensors that are read.
_PLAIN = ("bool", "uint8", "int8", "int16", "int32", "int64")
_PLAIN += ("float16", "bfloat16", "float32", "float64")

# No network here comes near: with Adam's moments, the paper's has 0.7 GB.
_MAX_BYTES = 8 << 30

# In older versions, reading with `weights_only` could still run code (CVE-2025-32434) or write out
# of bounds in memory (CVE-2026-24747).
_SAFE_TORCH = (2, 10)


class _Ignored(list):
    """Stands for an object beside the weights: takes whatever the file gives it, keeps nothing."""

    def __new__(cls, *_):
        return super().__new__(cls)

    def __init__(self, *_):
        super().__init__()

    def __setstate__(self, _):
        pass

    __hash__ = object.__hash__  # it may be the key of a dict


class _PlainDict:
    """Stands for a dict with a type of its own, which may hold the weights."""

    def __new__(cls, *_):
        return {}


# What is often saved beside weights: settings, scores, dates and paths. None of it is needed, so
# torch's reader puts a stand-in wherever a file names it: the named code is neither imported nor
# run.
_BESIDE_WEIGHTS = {
    "argparse": ("Namespace",),
    "types": ("SimpleNamespace",),
    "builtins": ("bool", "dict", "float", "frozenset", "int", "list", "object", "range", "slice",
                 "str", "tuple"),
    "collections": ("deque",),
    "copyreg": ("_reconstructor",),
    "datetime": ("date", "datetime", "time", "timedelta", "timezone"),
    "numpy": ("dtype", "ndarray"),
    # numpy 2 and 1
    "numpy._core.multiarray": ("_reconstruct", "scalar"),
    "numpy.core.multiarray": ("_reconstruct", "scalar"),
    "omegaconf.base": ("ContainerMetadata", "Metadata"),
    "omegaconf.dictconfig": ("DictConfig",),
    "omegaconf.listconfig": ("ListConfig",),
    "omegaconf.nodes": ("AnyNode", "BooleanNode", "FloatNode", "IntegerNode", "StringNode"),
    # Python up to 3.12 and from 3.14 on; and 3.13
    "pathlib": ("Path", "PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath"),
    "pathlib._local": ("Path", "PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath"),
    "torch.torch_version": ("TorchVersion",),
    "typing": ("Any",),
    "uuid": ("UUID",),
}  # fmt: skip
_DICTS = {
    "collections": ("defaultdict",),
    "pytorch_lightning.utilities.parsing": ("AttributeDict",),
    "lightning_fabric.utilities.data": ("AttributeDict",),
    "lightning.fabric.utilities.data": ("AttributeDict",),
}
_STAND_INS = [
    (stand_in, f"{module}.{name}")
    for stand_in, known in ((_Ignored, _BESIDE_WEIGHTS), (_PlainDict, _DICTS))
    for module, names in known.items()
    for name in names
]

# How someone who trusts a file makes another that holds nothing but weights.
_RESAVE = (
    'if you trust where the file comes from, keep only its weights by `python -c "import torch; '
    "torch.save(torch.load('{name}', weights_only=False)['state_dict'], 'weights.pt')\"` (for a "
    "whole model, .state_dict() instead of ['state_dict']), which runs the code in the file"
)


def load(
    path: str,
    bands: Mapping[str, tuple[str, ...]] | None = None,
    take: str | None = None,
) -> Weights:
    """Loads weights from a folder or a file.

    Args:
      path: the folder of a run, of one of its checkpoints or of converted weights; or a file.
      bands: for a file, names of the bands by modality; needed if neither the file's card, nor its
        keys, nor the number of bands determines them.
      take: for a file that holds several networks, which one to use (`layouts.find_network`).

    Raises:
      WeightsError: if there are no weights, or if they are damaged or of an unsupported network.
    """
    try:
        full = files.absolute(path)
        if full.is_dir():
            if bands:
                raise WeightsError("a folder states its own bands: do not set bands for it")
            if take:
                raise WeightsError("a folder holds one network: remove --take")
            return folders.load_run(folders.find_checkpoint(full))
        tensors, card = read(full)
        known = card and check_bands(card.get("bands"))
        if known and bands and any(known.get(m) != names for m, names in bands.items()):
            raise WeightsError(
                f"the file's card states the bands {known}, and the given bands are "
                f"{dict(bands)}: do not set bands for this file"
            )
        network, prefix, notes = find_network(tensors, take)
        if prefix and not card:
            notes = (f"took the tensors under `{prefix}`", *notes)
        found = from_layout(_arrays(network), known or bands)
        return dataclasses.replace(found, card=card, notes=(*notes, *found.notes))
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


def read(path: epath.Path) -> tuple[dict[str, Any], dict]:
    """Reads a file of weights.

    Args:
      path: ends in `.safetensors`, `.pt`, `.ckpt`, `.pth` or `.tar`.

    Returns:
      The tensors by the file's keys, those of nested dicts joined by dots: NumPy's of a
      `.safetensors` file, else PyTorch's. And the card of this project, from the file itself or
      from `FILE.json` next to it; an empty dict if there is none.

    Raises:
      WeightsError: if the file does not exist, is damaged, or is a pickle that contains objects
        other than tensors, plain values and what `_STAND_INS` lists.
    """
    _check_suffix(path, _READ_SUFFIXES)
    if not path.is_file():
        raise WeightsError(f"{path} does not exist")
    if (size := path.stat().length) > _MAX_BYTES:
        raise WeightsError(
            f"{path} has {size:,} bytes, more than the {_MAX_BYTES:,} that a file of weights may "
            "have: keep only its weights"
        )
    reader = _read_safetensors if path.suffix == ".safetensors" else _read_pickle
    content = path.read_bytes()
    tensors, card = reader(path, content)
    card_path = path.with_name(f"{path.name}.json")
    if not card and card_path.is_file():
        if card_path.stat().length > cards.MAX_BYTES:
            raise WeightsError(
                f"{card_path} has {card_path.stat().length:,} bytes, more than the "
                f"{cards.MAX_BYTES:,} that a card may have: restore or delete it"
            )
        card = parse_card(card_path.read_bytes(), card_path, path.name)
        # A card written for other weights with the same file name is ignored.
        is_own = card.get("sha256") == hashlib.sha256(content).hexdigest()
        return tensors, card if is_own else {}
    return tensors, _checked(card, path)


def _checked(card: Any, path: os.PathLike) -> dict:
    """A card as it was found; an empty one if it is none of ours.

    Raises:
      WeightsError: if it is damaged.
    """
    if not isinstance(card, Mapping) or card.get("format") != cards.FORMAT:
        return {}
    cards.check(card, path)
    return dict(card)


def parse_card(text: str | bytes, path: os.PathLike, name: str) -> dict:
    """The card in a JSON text; an empty one if it is none of ours.

    Args:
      text: the JSON.
      path: where it stands, for errors.
      name: of the file of weights, for errors.

    Raises:
      WeightsError: if it is damaged.
    """
    try:
        card = files.parse_json(text)
    except ValueError as error:
        raise WeightsError(
            f"{path}, the card of {name}, is damaged ({error}): restore or delete it"
        ) from error
    return _checked(card, path)


def _safetensors_header(content: bytes) -> Any:
    """The header of a safetensors file, JSON behind its length in 8 bytes."""
    return files.parse_json(content[8 : 8 + int.from_bytes(content[:8], "little")])


def _float8_tensors(content: bytes) -> list[str]:
    """Names of the tensors of 8-bit floats in a safetensors file, which NumPy lacks."""
    try:
        header = _safetensors_header(content)
        return [name for name, entry in header.items() if str(entry.get("dtype"))[:3] == "F8_"]
    except (ValueError, AttributeError):  # the library says what is wrong with a header
        return []


@contextlib.contextmanager
def _on_disk(path: epath.Path, content: bytes) -> Iterator[str]:
    """The path of a file, or of a copy of what a bucket holds."""
    if not files.in_bucket(path):
        yield os.fspath(path)
        return
    with tempfile.NamedTemporaryFile() as copy:
        copy.write(content)
        copy.flush()
        yield copy.name


def _read_safetensors(path: epath.Path, content: bytes) -> tuple[dict[str, np.ndarray], dict]:
    if found := _float8_tensors(content):
        raise WeightsError(
            f"{path} has float8 tensors, such as {found[0]}: save them as float32 or bfloat16"
        )
    try:
        with _on_disk(path, content) as local:
            arrays = safetensors.numpy.load_file(local)  # `load` does not support bfloat16
        card = files.parse_json(
            _safetensors_header(content).get("__metadata__", {}).get(_CARD, "{}")
        )
    except (safetensors.SafetensorError, KeyError, ValueError, AttributeError) as error:
        raise WeightsError(f"{path} is damaged or not a safetensors file: {error}") from error
    return arrays, card


def _read_pickle(path: epath.Path, content: bytes) -> tuple[dict[str, Any], dict]:
    torch = _torch(path)
    _check_unpacked_size(path, content)
    try:
        with torch.serialization.safe_globals(_STAND_INS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # for the authors of the file
            found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own message advises to load without weights_only, which would run the file's code.
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if not asked and not zipfile.is_zipfile(io.BytesIO(content)):
            raise WeightsError(f"{path} is damaged or not a PyTorch file") from error
        found = asked[1] if asked else "something"
        raise WeightsError(
            f"{path} contains {found}, which is not weights; none of its code was run: "
            + _RESAVE.format(name=path.name)
        ) from error
    except (RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError,
            AssertionError, struct.error, zipfile.BadZipFile, OSError) as error:  # fmt: skip
        if "TorchScript" in str(error):
            raise WeightsError(
                f"{path} is a TorchScript program, which is not weights; none of it was run: if "
                "you trust where it comes from, keep its weights alone by `torch.save("
                f"torch.jit.load('{path.name}').state_dict(), 'weights.pt')`"
            ) from error
        raise WeightsError(f"{path} is damaged: {files.first_line(error)}") from error
    if not isinstance(found, Mapping):
        raise WeightsError(f"{path}: expected a dict of tensors, found {type(found).__name__}")
    settings = found.get("hyper_parameters")
    card = settings.get(_CARD, {}) if isinstance(settings, Mapping) else {}
    tensors = _flat(torch, found)
    _check_held(path, tensors)
    return tensors, card


def _check_unpacked_size(path: epath.Path, content: bytes) -> None:
    """Raises WeightsError if a file's parts are larger than it: PyTorch compresses nothing."""
    try:
        if not zipfile.is_zipfile(io.BytesIO(content)):
            return
        parts = zipfile.ZipFile(io.BytesIO(content)).infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise WeightsError(f"{path} is damaged: {error}") from error
    size = sum(part.file_size for part in parts)
    if size > len(content):
        raise WeightsError(
            f"{path} has {len(content):,} bytes and would unpack to {size:,}: PyTorch writes no "
            "such file; it was not unpacked"
        )


def _check_held(path: epath.Path, tensors: Mapping[str, Any]) -> None:
    """Raises WeightsError for a tensor that declares more values than the file holds for it."""
    for name, tensor in tensors.items():
        if str(tensor.layout) == "torch.strided":
            size, held = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
            if size > held:
                raise WeightsError(
                    f"{path}: {name} declares {size:,} bytes, and the file holds {held:,} for it"
                )


def _flat(torch, nested: Mapping) -> dict[str, Any]:
    """The tensors of nested dicts, by their keys joined by dots.

    Those in lists or under numbers are an optimizer's.
    """
    flat, seen, waiting = {}, set(), [("", nested)]
    while waiting:
        prefix, mapping = waiting.pop()
        seen.add(id(mapping))  # a damaged file may hold a dict that contains itself
        for key, value in mapping.items():
            if isinstance(key, str) and isinstance(value, torch.Tensor):
                flat[f"{prefix}{key}"] = value
            elif isinstance(key, str) and isinstance(value, Mapping) and id(value) not in seen:
                waiting.append((f"{prefix}{key}.", value))
    return flat


def _arrays(tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """NumPy arrays of NumPy's or PyTorch's tensors; floats shorter than float32 become that.

    Raises:
      WeightsError: if some are no plain arrays of numbers.
    """
    arrays, other = {}, []
    for key, value in tensors.items():
        if not isinstance(value, np.ndarray):
            dtype = str(value.dtype).removeprefix("torch.")
            is_plain = dtype in _PLAIN and str(value.layout) == "torch.strided"
            if not is_plain or value.is_meta:
                other.append(key)
                continue
            value = (value.float() if dtype == "bfloat16" else value).detach().numpy()
        arrays[key] = _at_least_float32(value)
    if other:
        raise WeightsError(f"expected plain tensors, which these are not: {', '.join(other[:5])}")
    return arrays


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
