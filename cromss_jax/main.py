"""Command line: `python -m cromss_jax.main --config=configs/pretrain.py --workdir=DIR`."""

import logging
import sys

from absl import app, flags
from ml_collections import config_flags

from cromss_jax import checkpoint, data, train

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration file, such as configs/pretrain.py", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of checkpoints, logs and results")


def main(arguments: list[str]) -> None:
    """Runs the configuration; a sentence and exit code 1 for what the user can mend."""
    if len(arguments) > 1:
        raise app.UsageError(f"unknown arguments {arguments[1:]}; flags start with --")
    # Our own progress only: the libraries tell the user nothing at this level.
    logging.getLogger("cromss_jax").setLevel(logging.INFO)
    try:
        train.train(_CONFIG.value, _WORKDIR.value)
    except (
        checkpoint.CheckpointError,
        data.DataError,
        train.ConfigError,
        train.NonFiniteLossError,
    ) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)
