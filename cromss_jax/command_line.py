"""What the commands have in common: --config, the log, and what is said of mistyped flags."""

import argparse
import logging
import os
import pathlib
import sys
import threading
import traceback

import ml_collections
from absl import flags
from ml_collections import config_flags

from cromss_jax import package

# The flags defined here are those of the command that asks for them: --helpshort lists them there.
flags.disclaim_key_flags()


def find_config(path: str) -> pathlib.Path:
    """The file that --config means: as it is named, or else the package's `configs/NAME.py`.

    Raises:
      ValueError: if there is neither; says what was looked for and what there is.
    """
    own = pathlib.Path(os.path.expanduser(path))
    packaged = package.ROOT / path
    candidates = [own] + [packaged] * (packaged.parent == package.ROOT / "configs")
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    looked_for = " and ".join(dict.fromkeys(os.path.abspath(c) for c in candidates))
    known = ", ".join(sorted(f"configs/{c.name}" for c in (package.ROOT / "configs").glob("*.py")))
    raise ValueError(
        f"no such file, looked for {looked_for}; name a file of your own or one of the package's: "
        f"{known}"
    )


class _ConfigParser(flags.ArgumentParser):
    """Reads the file that `find_config` finds, and says so where it is the package's."""

    def __init__(self, of_file: flags.ArgumentParser):
        self._of_file = of_file

    def parse(self, argument: str) -> ml_collections.ConfigDict:
        path, colon, variants = argument.partition(":")
        parts = argument.split(":")
        for whole in (":".join(parts[:count]) for count in range(2, len(parts) + 1)):
            if os.path.isfile(os.path.expanduser(whole)):
                raise ValueError(
                    f"{whole} holds a colon, which separates the file from its variants: rename "
                    "the file or folder, or start from within the folder"
                )
        found = find_config(path)
        if found != pathlib.Path(os.path.expanduser(path)):
            print(f"--config={path}: taken from the package, {found}", file=sys.stderr)
        return self._of_file.parse(f"{found}{colon}{variants}")

    def flag_type(self) -> str:
        return self._of_file.flag_type()


def define_config() -> flags.FlagHolder[ml_collections.ConfigDict]:
    """Defines --config and with it --config.FIELD."""
    holder = config_flags.DEFINE_config_file(
        "config",
        None,
        "Configuration file and, after a colon, variants of it, such as configs/pretrain.py:sample;"
        " the package's where the current folder has no such file",
        lock_config=True,
    )
    flag = flags.FLAGS["config"]
    flag.parser = _ConfigParser(flag.parser)
    return holder


def define_preemption_status() -> flags.FlagHolder[int]:
    """Defines --preemption_status; see `find_preemption_status`."""
    return flags.DEFINE_integer(
        "preemption_status",
        0,
        "Exit status after SIGTERM, SIGUSR1, SIGUSR2, SIGHUP or Ctrl-C, in every phase of the run; "
        "schedulers that start again what failed want another than 0. A second Ctrl-C ends at "
        "once, with 130",
    )


def find_preemption_status() -> int:
    """The value of --preemption_status, also before the flags are parsed."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    default = flags.FLAGS["preemption_status"].default
    parser.add_argument("--preemption_status", "-preemption_status", type=int, default=default)
    return parser.parse_known_args()[0].preemption_status


def log_progress() -> None:
    """Logs our own progress, and what libraries warn of, with the time of day."""
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True
    )
    logging.getLogger("absl").setLevel(logging.WARNING)
    logging.getLogger("cromss_jax").setLevel(logging.INFO)


def quieten_orbax() -> None:
    """Keeps Orbax from printing in pages what it then raises, which is printed as a sentence."""

    def print_others(raised: threading.ExceptHookArgs) -> None:
        frames = traceback.extract_tb(raised.exc_traceback)
        if not any("orbax" in frame.filename for frame in frames):
            threading.__excepthook__(raised)

    logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
    threading.excepthook = print_others


def parse(arguments: list[str]) -> list[str]:
    """Parses the flags; a sentence instead of a traceback for what was mistyped."""
    try:
        return flags.FLAGS(arguments)
    except (flags.Error, AttributeError, KeyError, OSError) as error:  # unknown fields, no file
        sentence = str(error).replace("\\n", "; ").strip().splitlines()[-1].strip("\"' ")
        sys.exit(f"error: {sentence} (--helpshort lists the flags)")
