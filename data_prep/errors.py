"""Errors for the user: a data set that cannot be built, a file that cannot be used."""

from cromss_jax.errors import UserError


class BuildError(UserError):
    """The data set cannot be built. The message is for the user."""


class BadFileError(UserError):
    """A file that cannot be used, because of which its location is skipped.

    Attributes:
      file: its path from the component on.
      reason: what is wrong with it.
    """

    def __init__(self, file: str, reason: str):
        super().__init__(file, reason)
        self.file = file
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}"
