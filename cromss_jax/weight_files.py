"""Where weights are kept: checkpoints of runs, and PyTorch's files, from which nothing is run.

The only module that imports torch, and only for `.pt` and `.ckpt`: `.safetensors` needs none.
"""

import argparse
import dataclasses
import json
import pathlib
import pickle
import zipfile
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath
from flax import nnx

from cromss_jax import checkpoint, torch_keys, weights
from cromss_jax.weights import WeightsError

SUFFIXES = (".safetensors", ".pt", ".ckpt")
# What a folder of converted weights has instead of a run's configuration.
_NETWORK = "network.json"


def load(path: str, bands: Mapping[str, tuple[str, ...]] | None = None) -> weights.Weights:
    """Loads weights from whatever holds them.

    Args:
      path: the folder of a run, of one of its checkpoints or of converted weights; or a file.
      bands: of a file, by modality, where it doesn't tell them itself.

    Raises:
      WeightsError: if there are none, if they are damaged, or no network of ours.
    """
    if epath.Path(path).is_dir():
        return load_run(find_checkpoint(path))
    arrays, card = read(pathlib.Path(path))
    try:
        bands = bands or {m: tuple(names) for m, names in card.get("bands", {}).items()} or None
        return weights.from_layout(arrays, bands)[1]
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error


def find_checkpoint(path: str) -> epath.Path:
    """The folder of the checkpoint that `path` means: itself, or a run's newest.

    Raises:
      WeightsError: if there is none.
    """
    folder = epath.Path(path)
    if (folder / "state").is_dir():
        return folder
    steps = [step for step in (folder / "checkpoints").glob("*") if step.name.isdigit()]
    steps = [step for step in steps if (step / "_CHECKPOINT_METADATA").exists()]
    if not steps:
        raise WeightsError(
            f"{path}: neither a run (no finished checkpoint in {folder / 'checkpoints'}) nor a "
            "checkpoint (no folder `state` in it)"
        )
    return max(steps, key=lambda step: int(step.name))


def load_run(step: epath.Path) -> weights.Weights:
    """Loads the weights of a checkpoint's folder.

    Raises:
      WeightsError: if the checkpoint or its description is missing or damaged.
    """
    own, run = step / _NETWORK, step.parent.parent / "config.json"
    if own.exists():
        content = json.loads(own.read_text())
        bands = {modality: tuple(names) for modality, names in content["bands"].items()}
        network = weights.Network(**{**content, "bands": bands})
    elif run.exists():
        network = weights.Network.of_config(json.loads(run.read_text()))
    else:
        raise WeightsError(f"{step}: what network it is stands in {run}, which is missing")
    try:
        tree = checkpoint.read_arrays(step, ("params", "batch_stats"))
    except (ValueError, KeyError, OSError) as error:
        raise WeightsError(f"{step}: damaged: {_first_line(error)}") from error
    arrays = {}
    for part in tree.values():
        arrays |= torch_keys.from_tree(part)
    return weights.Weights(network, arrays)


def _check_suffix(path: pathlib.Path) -> None:
    if path.suffix not in SUFFIXES:
        raise WeightsError(f"{path}: a file of weights ends in {', '.join(SUFFIXES)}")


def _torch(path: pathlib.Path):
    try:
        import torch
    except ImportError as error:
        raise WeightsError(
            f"{path.suffix} files need PyTorch: `pip install cromss_jax[torch]`, or use "
            ".safetensors, which needs none"
        ) from error
    return torch


def read(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict]:
    """Reads a file of weights.

    Args:
      path: ends in `.safetensors`, `.pt` or `.ckpt`; a Lightning file's `state_dict` is taken.

    Returns:
      The arrays under the file's keys, float16 and bfloat16 as float32; and our card, as far as
      there is one inside the file or beside it (`.json`), else an empty dict.

    Raises:
      WeightsError: if there is no such file, if it is damaged, or if it is a pickle that asks for
        anything but tensors and plain values.
    """
    _check_suffix(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    arrays = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    card = path.with_suffix(".json")
    if not card.is_file():
        return arrays, {}
    try:
        return arrays, json.loads(card.read_text())
    except ValueError as error:
        raise WeightsError(f"{card}: the card beside {path.name} is damaged: {error}") from error


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        arrays = safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise WeightsError(f"{path}: damaged or no safetensors file: {error}") from error
    return {key: _widened(array) for key, array in arrays.items()}


def _read_pickle(path: pathlib.Path) -> dict[str, np.ndarray]:
    torch = _torch(path)
    try:
        # weights_only: tensors and plain values, nothing else is built. Lightning keeps its
        # settings in a Namespace, a bag of attributes.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        told = next((line.strip() for line in str(error).splitlines() if "GLOBAL" in line), "")
        raise WeightsError(
            f"{path}: damaged, or holds more than weights, none of which was run: "
            + (told or _first_line(error))
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile, OSError) as error:
        raise WeightsError(f"{path}: damaged: {_first_line(error)}") from error
    if isinstance(content, Mapping):
        content = content.get("state_dict", content)
    if not isinstance(content, Mapping) or not content:
        raise WeightsError(f"{path}: expected a dict of tensors, found {type(content).__name__}")
    other = [key for key, value in content.items() if not isinstance(value, torch.Tensor)]
    if other:
        raise WeightsError(
            f"{path}: expected tensors; no tensor is " + ", ".join(map(str, other[:5]))
        )
    return {
        str(key): _widened(
            (value.float() if value.dtype == torch.bfloat16 else value).detach().numpy()
        )
        for key, value in content.items()
    }


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _widened(array: np.ndarray) -> np.ndarray:
    """float32 for shorter floats; everything else as it is."""
    is_short = array.dtype.kind in "fV" and array.dtype.itemsize < 4
    return array.astype(np.float32) if is_short else array


def write(
    path: pathlib.Path, arrays: Mapping[str, np.ndarray], lightning: Mapping | None = None
) -> None:
    """Writes a file of weights, whole or not at all.

    Args:
      path: ends in `.safetensors`, `.pt` or `.ckpt`.
      arrays: by key.
      lightning: `hyper_parameters` of a Lightning file, which then has the arrays in its
        `state_dict`; None for the bare dict. A `.safetensors` file holds arrays alone.

    Raises:
      WeightsError: for another suffix.
    """
    _check_suffix(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    if path.suffix == ".safetensors":
        # Not save_file, whose files only their owner may read.
        temporary.write_bytes(safetensors.numpy.save(dict(arrays), metadata={"format": "pt"}))
    else:
        torch = _torch(path)
        tensors = {key: _tensor(torch, array) for key, array in arrays.items()}
        content = tensors
        if lightning is not None:
            content = {"state_dict": tensors, "hyper_parameters": dict(lightning)}
        torch.save(content, temporary)
    temporary.replace(path)


def _tensor(torch, array: np.ndarray):
    if array.dtype == jnp.bfloat16:  # which torch doesn't know from NumPy
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def write_folder(folder: epath.Path, found: weights.Weights) -> None:
    """Writes weights like a checkpoint's folder, which `load` reads; whole or not at all."""
    state = found.state()
    params, batch_stats = nnx.split_state(state, nnx.Param, nnx.BatchStat)
    temporary = folder.parent / f"{folder.name}.tmp"
    if temporary.exists():
        temporary.rmtree()
    temporary.mkdir(parents=True)
    checkpoint.write_arrays(temporary.absolute(), {"params": params, "batch_stats": batch_stats})
    (temporary / _NETWORK).write_text(json.dumps(dataclasses.asdict(found.network), indent=2))
    temporary.rename(folder)
