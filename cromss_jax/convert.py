"""Weights to PyTorch and back, from the command line.

    python -m cromss_jax.convert to_torch --checkpoint=WORKDIR --output=s2.safetensors \
        --layout=encoder --modality=s2
    python -m cromss_jax.convert from_torch --input=released.ckpt --output=DIR

Layouts: `lightning`, the published code's file; `unet`, the smp model of one modality (`smp.Unet`,
or `smp.PSPNet`, `smp.DeepLabV3Plus`, `smp.FPN` by the network's decoder); `encoder`, smp's encoder;
`torchvision`, a plain ResNet without `fc` (the same keys as smp's encoder).
"""

import dataclasses
import sys

import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from cromss_jax import files, sensors
from cromss_jax.weights import cards, folders
from cromss_jax.weights import files as weight_files
from cromss_jax.weights.layouts import LAYOUTS, check_bands, to_layout
from cromss_jax.weights.network import WeightsError

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "to_torch: folder of a run (its newest checkpoint), or of one checkpoint"
)
_INPUT = flags.DEFINE_string("input", None, "from_torch: file of PyTorch weights, any layout")
_OUTPUT = flags.DEFINE_string(
    "output", None, "File (to_torch; .safetensors, .pt, .ckpt) or folder (from_torch) to write"
)
_LAYOUT = flags.DEFINE_enum("layout", None, LAYOUTS, "to_torch: keys of which network")
_MODALITY = flags.DEFINE_enum(
    "modality", None, sensors.MODALITIES, "to_torch: which one, where the layout holds one"
)
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "float16", "bfloat16"], "to_torch: of the file"
)
_BANDS = flags.DEFINE_list(
    "bands", None, "from_torch: the bands in order, where their number doesn't tell them"
)
# By command: flags that it needs, and flags that it may have.
_COMMANDS = {
    "to_torch": ((_CHECKPOINT, _OUTPUT, _LAYOUT), (_MODALITY, _DTYPE)),
    "from_torch": ((_INPUT, _OUTPUT), (_BANDS,)),
}


def to_torch(
    checkpoint: str, output: str, layout: str, modality: str | None, dtype: str = "float32"
) -> str:
    """Writes a checkpoint's weights as a file for PyTorch, with its card; returns a summary.

    Args:
      checkpoint: folder of a run, of one of its checkpoints, or of converted weights.
      output: file to write; beside it come its card, `FILE.json` and `FILE.md`.
      layout: see `weights.to_layout`.
      modality: likewise.
      dtype: of parameters and statistics in the file.

    Raises:
      weights.WeightsError: a sentence for the user.
    """
    step = folders.find_checkpoint(checkpoint)
    found = folders.load_run(step)
    network, arrays = to_layout(found, layout, modality)
    converted = {
        key: array if array.dtype.kind in "iu" else array.astype(jnp.dtype(dtype))
        for key, array in arrays.items()
    }
    for what, held in ((f"{step} holds", arrays), (f"{dtype} would make", converted)):
        bad = [key for key, array in held.items() if not np.isfinite(array).all()]
        if bad:
            raise WeightsError(f"{what} NaN or infinite values in {', '.join(bad)}")
    path = files.absolute(output)
    weight_files.write(path, converted, cards.make(found, network, layout))
    return f"{path}: {network}, {len(arrays)} tensors, {dtype}, from {step}"


def from_torch(path: str, output: str, bands: tuple[str, ...] | None = None) -> str:
    """Writes the weights of a PyTorch file as a checkpoint's folder; returns a summary.

    Args:
      path: file of any layout.
      output: folder to write, which must not be there; `to_torch` and `init_from` take it.
      bands: of a single modality, in order, where their number doesn't tell them.

    Raises:
      weights.WeightsError: a sentence for the user.
    """
    folder = files.absolute(output)
    if folder.exists():
        raise WeightsError(f"{output} is there already; choose another --output")
    known = None
    if bands:
        modality = "s1" if set(bands) <= set(sensors.S1_BANDS) else "s2"
        known = check_bands({modality: bands})
    found = weight_files.load(path, known)
    if not found.card:
        found = dataclasses.replace(found, card={"source": path})
    folders.write_folder(folder, found)
    return "\n".join(
        [f"{output}: {found.network}, {len(found.arrays)} tensors, from {path}", *found.notes]
    )


def main(arguments: list[str]) -> None:
    """Runs the command; what the user can mend is told in one sentence."""
    command = arguments[1] if len(arguments) == 2 else None
    if command not in _COMMANDS:
        sys.exit(f"error: say what to do, {' or '.join(_COMMANDS)}; found {arguments[1:]}")
    needed, optional = _COMMANDS[command]
    missing = [f"--{flag.name}" for flag in needed if flag.value is None]
    if missing:
        sys.exit(f"error: {command} needs {', '.join(missing)} (--helpshort lists the flags)")
    ours = flags.FLAGS.get_key_flags_for_module(sys.argv[0])
    names = {flag.name for flag in (*needed, *optional)}
    foreign = [f"--{flag.name}" for flag in ours if flag.present and flag.name not in names]
    if foreign:
        sys.exit(f"error: {command} has no use for {', '.join(foreign)}")
    logging.set_verbosity(logging.WARNING)
    try:
        if command == "to_torch":
            summary = to_torch(
                _CHECKPOINT.value, _OUTPUT.value, _LAYOUT.value, _MODALITY.value, _DTYPE.value
            )
        else:
            summary = from_torch(
                _INPUT.value, _OUTPUT.value, tuple(_BANDS.value) if _BANDS.value else None
            )
        print(summary)
    except (WeightsError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main)
