"""Converts weights to PyTorch and back.

    python -m cromss_jax.convert to_torch --checkpoint=WORKDIR --output=s2.safetensors \
        --layout=encoder --modality=s2
    python -m cromss_jax.convert from_torch --input=released.ckpt --output=DIR

Layouts: `lightning` is the file format of the published code. `unet` is the smp model of one
modality: `smp.Unet`, `smp.PSPNet`, `smp.DeepLabV3Plus` or `smp.FPN`, depending on the network's
decoder. `encoder` is smp's encoder. `torchvision` is a plain ResNet without `fc`; it has the same
keys as smp's encoder.
"""

import dataclasses
import sys

import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from cromss_jax import command_line, files, sensors
from cromss_jax.errors import UserError
from cromss_jax.weights import cards, folders
from cromss_jax.weights import files as weight_files
from cromss_jax.weights.layouts import LAYOUTS, name_bands, to_layout
from cromss_jax.weights.network import WeightsError

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    None,
    "to_torch: folder of a run (its newest checkpoint is used) or of one checkpoint",
)
_INPUT = flags.DEFINE_string("input", None, "from_torch: file of PyTorch weights in any layout")
_OUTPUT = flags.DEFINE_string(
    "output",
    None,
    "to_torch: file to write (.safetensors, .pt or .ckpt); from_torch: folder to write",
)
_LAYOUT = flags.DEFINE_enum("layout", None, LAYOUTS, "to_torch: layout of the tensors' keys")
_MODALITY = flags.DEFINE_enum(
    "modality",
    None,
    sensors.MODALITIES,
    "to_torch: modality to write, for layouts that hold only one",
)
_DTYPE = flags.DEFINE_enum(
    "dtype",
    "float32",
    ["float32", "float16", "bfloat16"],
    "to_torch: dtype of the tensors in the file",
)
_BANDS = flags.DEFINE_list(
    "bands",
    None,
    "from_torch: band names in order, needed if the file does not determine them",
)
_TAKE = flags.DEFINE_string(
    "take",
    None,
    "from_torch: which network of a file to use if it holds several, such as state_dict_ema, "
    "student or encoder_k; by default the one that was trained, not a moving average of it",
)
# By command: required flags and optional flags.
_COMMANDS = {
    "to_torch": ((_CHECKPOINT, _OUTPUT, _LAYOUT), (_MODALITY, _DTYPE)),
    "from_torch": ((_INPUT, _OUTPUT), (_BANDS, _TAKE)),
}


def to_torch(
    checkpoint: str, output: str, layout: str, modality: str | None, dtype: str = "float32"
) -> str:
    """Writes a checkpoint's weights as a file for PyTorch, with its card; returns a summary.

    Args:
      checkpoint: folder of a run, of one of its checkpoints, or of converted weights.
      output: file to write; its card is written next to it as `FILE.json` and `FILE.md`.
      layout: see `layouts.to_layout`.
      modality: see `layouts.to_layout`.
      dtype: dtype of parameters and statistics in the file.

    Raises:
      WeightsError: if the weights cannot be read or written so; the message is for the user.
    """
    step = folders.find_checkpoint(checkpoint)
    found = folders.load_run(step)
    network, arrays = to_layout(found, layout, modality)
    converted = {
        key: array if array.dtype.kind in "iu" else array.astype(jnp.dtype(dtype))
        for key, array in arrays.items()
    }
    for place, tensors, remedy in (
        (step, arrays, "choose another checkpoint"),
        (f"the conversion to {dtype}", converted, "use --dtype=float32"),
    ):
        bad = [key for key, array in tensors.items() if not np.isfinite(array).all()]
        if bad:
            raise WeightsError(f"{place} has NaN or infinite values in {', '.join(bad)}: {remedy}")
    path = files.absolute(output)
    weight_files.write(path, converted, cards.make(found, network, layout))
    return f"{path}: {network}, {len(arrays)} tensors, {dtype}, from {step}"


def from_torch(
    path: str,
    output: str,
    bands: tuple[str, ...] | None = None,
    take: str | None = None,
) -> str:
    """Writes the weights of a PyTorch file as a checkpoint folder; returns a summary.

    Args:
      path: file of PyTorch weights in any layout.
      output: folder to write, which must not exist; `to_torch` and `config.init_from` accept it.
      bands: names of the bands of a single modality in order, needed if the file does not
        determine them.
      take: which network to use if the file holds several (`layouts.find_network`).

    Raises:
      WeightsError: if the file cannot be read or `output` exists; the message is for the user.
    """
    folder = files.absolute(output)
    if folder.exists():
        raise WeightsError(f"{output} already exists: choose another --output")
    found = weight_files.load(path, name_bands(bands) if bands else None, take)
    if not found.card:
        found = dataclasses.replace(found, card={"source": path})
    folders.write_folder(folder, found)
    return "\n".join(
        [f"{output}: {found.network}, {len(found.arrays)} tensors, from {path}", *found.notes]
    )


def main(arguments: list[str]) -> None:
    """Runs the command. Errors that the user can fix are printed as one sentence, exit code 1."""
    command = arguments[1] if len(arguments) == 2 else None
    if command not in _COMMANDS:
        sys.exit(f"error: the arguments are {arguments[1:]}; use {' or '.join(_COMMANDS)}")
    needed, optional = _COMMANDS[command]
    missing = [f"--{flag.name}" for flag in needed if flag.value is None]
    if missing:
        sys.exit(f"error: {command} needs {', '.join(missing)} (--helpshort lists the flags)")
    ours = flags.FLAGS.get_key_flags_for_module(sys.argv[0])
    names = {flag.name for flag in (*needed, *optional)}
    foreign = [f"--{flag.name}" for flag in ours if flag.present and flag.name not in names]
    if foreign:
        sys.exit(f"error: {command} does not use {', '.join(foreign)}: remove it")
    logging.set_verbosity(logging.WARNING)
    command_line.quieten_orbax()
    try:
        if command == "to_torch":
            summary = to_torch(
                _CHECKPOINT.value, _OUTPUT.value, _LAYOUT.value, _MODALITY.value, _DTYPE.value
            )
        else:
            bands = tuple(_BANDS.value) if _BANDS.value else None
            summary = from_torch(_INPUT.value, _OUTPUT.value, bands, _TAKE.value)
        print(summary)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main)
