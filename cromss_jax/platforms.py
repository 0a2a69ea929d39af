"""Which form of an operation runs on which kind of device.

All forms of an operation give the same numbers up to rounding; tests compare them.

| operation | CPU | GPU | TPU |
|---|---|---|---|
| convolution of many channels, its gradients | matrix products | convolution | convolution |
| convolution of 13, 2 or 9 channels | as it is | padded to 16, 8, 16 | packed |
| convolution after upsampling | matrix products | transposed convolution | convolution |
| 3x3 maximum | by axes | by axes | by cells |
| BatchNorm in training | as derived | fused | as derived |
| filters along an axis in bfloat16 | float32 | three bfloat16 parts | float32 |
| crop, flips, rotation | matrices, blocks | gather | matrices, blocks |
| search for thresholds | by modality | of all modalities | by modality |
| its labels | compared once | in every round | compared once |
| U-Net | plain | plain | packed |
| optimizer | vectors joined | rows; vectors' gradients joined | vectors joined |

Layers choose by `choose`: when they are compiled or, inside `known`, when they are traced. A step
chooses when it is built, by `Forms`.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax

_known: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


@contextlib.contextmanager
def known(platform: str) -> Iterator[None]:
    """Inside, what is traced is compiled for this platform alone, and only its forms are traced.

    Tracing all forms takes a quarter of a step's tracing time. JAX remembers what it traced: jit a
    function for each platform, as `sharding.jit_step` does.

    Args:
      platform: "cpu", "gpu" or "tpu", as of `jax.Device.platform`.
    """
    token = _known.set(platform)
    try:
        yield
    finally:
        _known.reset(token)


def choose(
    *operands: Any,
    default: Callable[..., Any],
    cpu: Callable[..., Any] | None = None,
    gpu: Callable[..., Any] | None = None,
) -> Any:
    """Calls the function for the platform that the program is compiled for, else `default`."""
    if platform := _known.get():
        return ({"cpu": cpu, "gpu": gpu}.get(platform) or default)(*operands)
    # JAX names a GPU by its maker.
    functions = {"cpu": cpu, "cuda": gpu, "rocm": gpu}
    chosen = {name: function for name, function in functions.items() if function}
    return jax.lax.platform_dependent(*operands, default=default, **chosen)


@dataclasses.dataclass(frozen=True)
class Forms:
    """The forms of a training step.

    Attributes:
      packs: whether a U-Net computes on packed images (`networks.packing`).
      gathers: whether samples are cropped, flipped and rotated by gathering single pixels.
      joins_vectors: whether the optimizer works on all vectors joined into one.
      fuses_norms: whether BatchNorms are computed by `networks.fused`.
      searches_together: whether the modalities' class thresholds are found in one search.
    """

    packs: bool = False
    gathers: bool = False
    joins_vectors: bool = True
    fuses_norms: bool = False
    searches_together: bool = False


CPU = Forms()
GPU = Forms(gathers=True, joins_vectors=False, fuses_norms=True, searches_together=True)


def forms_for(mesh: jax.sharding.Mesh, *, can_pack: bool) -> Forms:
    """The forms of a training step on the devices of a mesh.

    Args:
      mesh: the devices, all of one kind.
      can_pack: whether the step's networks can compute on packed images.
    """
    return {"cpu": CPU, "gpu": GPU, "tpu": Forms(packs=can_pack)}[mesh.devices.flat[0].platform]
