"""Cross-modal pretraining of segmentation networks on noisy labels.

From Python, the weights of a run or of a file are one object:

    import cromss_jax

    model = cromss_jax.load("runs/dfc2020_s2_frozen/seed_42")
    image = model.preprocess(tile, bands=("B1", "B2", ...))  # raw values [H, W, K]
    probabilities = model.predict({"s2": image[None]})["s2"]  # [1, H, W, C]
    features = model.features({"s2": image[None]})["s2"]  # strides 2, 4, 8, ...

Importing the package alone is cheap: JAX is imported with the first of these names.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cromss_jax.pretrained import Pretrained, WeightsError, load

__all__ = ["Pretrained", "WeightsError", "load"]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from cromss_jax import pretrained

    return getattr(pretrained, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
