"""Where the program lies, installed or in a checkout, and which version it is."""

import importlib.metadata
import pathlib
import tomllib

_PACKAGE = pathlib.Path(__file__).parent
# A wheel has `configs` inside of the package, a checkout beside it (pyproject.toml).
IS_INSTALLED = (_PACKAGE / "configs").is_dir()
# The folder that `configs` lies in.
ROOT = _PACKAGE if IS_INSTALLED else _PACKAGE.parent


def version() -> str:
    """The program's version; a checkout's stands in its pyproject.toml, installed or not."""
    if IS_INSTALLED:
        return importlib.metadata.version("cromss_jax")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
