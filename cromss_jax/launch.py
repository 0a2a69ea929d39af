"""What the commands that submit a run have in common."""

import pathlib
import shlex
import shutil
import signal
from collections.abc import Mapping, Sequence

from absl import flags
from ml_collections import config_flags

from cromss_jax import command_line
from cromss_jax.errors import UserError

# The exit status of main after an interruption. Schedulers start the run again after this one.
INTERRUPTED_STATUS = 128 + signal.SIGTERM


class LaunchError(UserError):
    """The run cannot be submitted with these flags."""


def config_file() -> tuple[pathlib.Path, str]:
    """The file that --config names, and its variants, such as ":sample"."""
    path, colon, variants = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    return command_line.find_config(path), colon + variants


def config_overrides() -> dict[str, object]:
    """The values of the flags --config.FIELD, by field."""
    return config_flags.get_override_values(flags.FLAGS["config"])


def main_flags(arguments: Mapping[str, object]) -> str:
    """The flags of `cromss_jax.main`, by name, quoted for a shell."""
    return shlex.join(f"--{name}={value}" for name, value in arguments.items())


def options(**values: object) -> list[str]:
    """Options of a tool, such as --num-slices=2; those whose value is None are left out."""
    return [
        f"--{name.replace('_', '-')}={value}" for name, value in values.items() if value is not None
    ]


def check_further_options(further: Sequence[str], tools: str, example: str) -> None:
    """Raises LaunchError if what follows the flags is not options, of which one is the example."""
    if further and not further[0].startswith("-"):
        raise LaunchError(
            f"{further[0]} is not a flag: put options of {tools} after ` -- `, such as -- {example}"
        )


def check_tool(tool: str, remedy: str) -> None:
    """Raises LaunchError, with the remedy, if the tool is not installed."""
    if not shutil.which(tool):
        raise LaunchError(f"{tool}, which submits the run, was not found: {remedy}")
