"""The directory that a sample is written to."""

import os
import pathlib


def new_directory(output_dir: str | os.PathLike) -> pathlib.Path:
    """Makes the directory, or raises FileExistsError if it holds anything."""
    output_dir = pathlib.Path(output_dir).expanduser().absolute()
    if output_dir.exists() and any(output_dir.iterdir()):
        raise FileExistsError(
            f"{output_dir} is not empty: delete it, or choose another --output_dir"
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    return output_dir
