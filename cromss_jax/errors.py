"""The errors that commands print as a sentence, without a traceback."""


class UserError(ValueError):
    """Something that the user can mend: the text says what was found and what to do.

    Beside OSError, which files and disks raise, it is all that commands print.
    """
