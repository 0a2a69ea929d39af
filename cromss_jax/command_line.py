"""What the commands that take a configuration have in common."""

import sys

from absl import flags


def parse(arguments: list[str]) -> list[str]:
    """Parses the flags; a sentence instead of a traceback for what was mistyped."""
    try:
        return flags.FLAGS(arguments)
    except (flags.Error, AttributeError, KeyError, OSError) as error:  # unknown fields, no file
        sentence = str(error).replace("\\n", "; ").strip().splitlines()[-1].strip("\"' ")
        sys.exit(f"error: {sentence} (--helpshort lists the flags)")
