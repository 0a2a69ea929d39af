"""Converts network states to `state_dict`s of segmentation_models_pytorch (smp) and back.

One rule holds for every tensor: its key is its attribute path joined by dots, and the four axes of
a convolution kernel go from HWIO to PyTorch's OIHW. PyTorch is not needed.
"""

from collections.abc import Mapping

import jax
import numpy as np
from flax import nnx

_TO_OIHW = (3, 2, 0, 1)
_TO_HWIO = (2, 3, 1, 0)


def keys(state: nnx.State) -> list[str]:
    """The sorted keys of smp's `state_dict` for a network's state."""
    return sorted(_named(state))


def from_tree(tree: Mapping) -> dict[str, np.ndarray]:
    """Like `to_torch_state`, for a state in the form of a checkpoint: nested dicts of arrays."""
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        ".".join(str(key.key) for key in path[:-1]): _to_torch(np.asarray(array))
        for path, array in paths
    }


def to_torch_state(state: nnx.State) -> dict[str, np.ndarray]:
    """Flattens a network's state to arrays under the keys of smp's `state_dict`.

    Args:
      state: `nnx.state(network, (nnx.Param, nnx.BatchStat))`, or a part of it.

    Returns:
      Copies in PyTorch's layout; integers (`num_batches_tracked`) as int64. Sorted by key.
    """
    return {
        key: _to_torch(np.asarray(variable[...])) for key, variable in sorted(_named(state).items())
    }


def _to_torch(array: np.ndarray) -> np.ndarray:
    """A copy with PyTorch's axes; integers become int64."""
    if array.ndim == 4:
        array = array.transpose(_TO_OIHW)
    dtype = np.int64 if np.issubdtype(array.dtype, np.integer) else array.dtype
    return np.array(array, dtype, order="C")


def from_torch_state(arrays: Mapping[str, np.ndarray], state: nnx.State) -> nnx.State:
    """Converts smp's arrays to a network's state; both must have exactly the same tensors.

    Args:
      arrays: arrays by the keys of smp's `state_dict`, with PyTorch's axes.
      state: a network's state, or the result of `nnx.eval_shape` for it. It gives the structure,
        shapes and dtypes; its values are not read.

    Returns:
      A state like `state` with copies of the arrays, as NumPy arrays.

    Raises:
      ValueError: as `check_torch_state`.
    """
    check_torch_state(arrays, state)

    def converted(key: str, dtype: np.dtype) -> np.ndarray:
        array = np.asarray(arrays[key])
        if array.ndim == 4:
            array = array.transpose(_TO_HWIO)
        with np.errstate(over="ignore"):  # overflow gives infinity, which `from_layout` rejects
            return np.array(array, dtype, order="C")

    return nnx.from_flat_state(
        [
            (path, variable.replace(converted(_key(path), variable.dtype)))
            for path, variable in nnx.to_flat_state(state)
        ]
    )


def check_torch_state(arrays: Mapping[str, np.ndarray], state: nnx.State) -> None:
    """Checks that smp's arrays are a network's state; nothing is copied.

    Args:
      arrays: as for `from_torch_state`.
      state: as for `from_torch_state`.

    Raises:
      ValueError: if keys are missing or unexpected, or have the wrong shape or kind; the message
        lists all of them.
    """
    wanted = _named(state)
    problems = [f"missing {key}" for key in sorted(wanted.keys() - arrays.keys())]
    problems += [f"unexpected {key}" for key in sorted(arrays.keys() - wanted.keys())]
    for key in sorted(wanted.keys() & arrays.keys()):
        array, shape, dtype = np.asarray(arrays[key]), wanted[key].shape, wanted[key].dtype
        torch_shape = tuple(shape[axis] for axis in _TO_OIHW) if len(shape) == 4 else shape
        is_integer = np.issubdtype(dtype, np.integer)
        if array.shape != torch_shape:
            problems.append(f"{key} has shape {array.shape}, needs {torch_shape}")
        elif not np.issubdtype(array.dtype, np.integer if is_integer else np.floating):
            problems.append(f"{key} holds {array.dtype}, needs {dtype}")
        elif is_integer and not np.array_equal(array.astype(dtype), array):
            problems.append(f"{key} holds {array}, too large for {dtype}")
    if problems:
        raise ValueError(
            f"the checkpoint does not fit the network in {len(problems)} tensors: check fusion, "
            "depth, number of bands and number of classes:\n  " + "\n  ".join(problems)
        )


def _key(path: tuple) -> str:
    return ".".join(map(str, path))


def _named(state: nnx.State) -> dict[str, nnx.Variable]:
    return {_key(path): variable for path, variable in nnx.to_flat_state(state)}
