"""Checkpoints of the device state and the data iterator; both are saved together.

Checksums say whether a checkpoint is whole. Those of the arrays are taken before they are written
and stand in the host state; those of the files are in the manifest, which is written before the
checkpoint gets its final name.
"""

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from cromss_jax import files
from cromss_jax.errors import UserError
from cromss_jax.training import distributed
from cromss_jax.weights import manifest

_log = logging.getLogger(__name__)

_Result = TypeVar("_Result")


class CheckpointError(UserError):
    """A checkpoint cannot be saved or restored; the message is for the user."""


class Checkpoints:
    """Numbered checkpoints in one folder, written in the background.

    A checkpoint gets its final name when it is complete. Opening removes what a killed run left
    behind, and checks the newest checkpoint. If it is damaged, the newest one that is whole takes
    its place, and the damaged ones are renamed `damaged_STEP`. Used as a context manager, it waits
    at the end for checkpoints that are being written.
    With several processes, all must make the same calls; process 0 writes, checks the files, and
    tells the others which checkpoints exist. Each checks the arrays that it restores.
    """

    def __init__(self, directory: epath.PathLike, keep: int):
        """Opens the folder and creates it if needed.

        Args:
          directory: the folder, local or a gs:// address.
          keep: number of newest checkpoints to keep.

        Raises:
          CheckpointError: if there are checkpoints, but none of them is whole.
        """
        self._directory = files.absolute(directory)
        self._saving: int | None = None
        # Whether the checkpoints that were checked have a manifest.
        self._has_manifest: dict[int, bool] = {}
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                cleanup_tmp_directories=True,
                # On a shared disk, hosts may see new folders at different times.
                single_host_load_and_broadcast=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._write_manifest),
            ),
        )
        self._newest_whole(self._check_files)

    @property
    def latest_step(self) -> int | None:
        """Step of the newest checkpoint; None if there is none."""
        return max(self._steps(), default=None)

    def _steps(self) -> list[int]:
        """Steps of the checkpoints. Of several processes Orbax gives NumPy's integers."""
        return sorted(map(int, self._manager.all_steps()))

    def check_space(self, state: Any) -> None:
        """Checks that the disk can hold two checkpoints: one is removed when the next is complete.

        Args:
          state: shapes and dtypes of what will be saved.

        Raises:
          CheckpointError: if it cannot. Not every quota is seen before it is reached.
        """
        if files.in_bucket(self._directory):
            return
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
        needed = size * (2 if self.latest_step is None else 1)
        free = shutil.disk_usage(self._directory).free
        if any(distributed.of_process_0(free < needed)):
            raise CheckpointError(
                f"{self._directory} has {free / 1e6:.1f} MB left, but needs {needed / 1e6:.1f} MB: "
                f"two checkpoints of {size / 1e6:.1f} MB must fit; make room there, or use another "
                "--workdir"
            )

    def save(self, step: int, state: Any, host_state: Mapping) -> None:
        """Saves in the background; does nothing if `step` is the newest checkpoint already.

        Args:
          step: number of completed steps.
          state: arrays that every process has completely.
          host_state: JSON.

        Raises:
          CheckpointError: if it cannot be written, or the one before could not.
        """
        if step == self.latest_step:
            return
        if not files.in_bucket(self._directory) and not self._directory.is_dir():
            raise CheckpointError(f"step {step} could not be saved: {self._directory} has vanished")
        with self._saving_errors():
            self._finish()
            self._saving = step
            sums = manifest.array_sums(state) if jax.process_index() == 0 else {}
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    host=ocp.args.JsonSave({**host_state, manifest.ARRAY_SUMS: sums}),
                ),
            )

    def wait(self) -> None:
        """Waits until the checkpoint that is being written is complete.

        Raises:
          CheckpointError: if it cannot be written.
        """
        with self._saving_errors():
            self._finish()

    def restore(self, abstract_state: Any) -> tuple[int, Any, dict]:
        """Restores the newest checkpoint that is whole.

        Args:
          abstract_state: the state's shapes, dtypes and shardings.

        Returns:
          The step, the device state, and the host state: that of the data iterator, and the data's
          identity.

        Raises:
          CheckpointError: if none is whole, or if a whole one does not fit `abstract_state`.
        """
        found = self._newest_whole(lambda step: (step, *self._read(step, abstract_state)))
        if found is None:
            raise CheckpointError(f"{self._directory} holds no checkpoint")
        return found

    def _newest_whole(self, read: Callable[[int], _Result]) -> _Result | None:
        """What `read` gives for the newest step that it raises no DamagedError for.

        Only then, newer ones are renamed: if none can be read, it may be the program that is wrong.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self._steps()):
            try:
                result = read(step)
            except manifest.DamagedError as error:
                damaged[step] = str(error)
                continue
            if damaged:
                self._set_aside(damaged, step)
            return result
        if damaged:
            raise CheckpointError(
                f"no checkpoint in {self._directory} is whole: {'; '.join(damaged.values())}. "
                "Restore the folder from a copy, or move it away to start from the beginning"
            )
        return None

    def _set_aside(self, damaged: Mapping[int, str], whole: int) -> None:
        """Renames damaged checkpoints, and says what is lost."""
        for step, reason in damaged.items() if jax.process_index() == 0 else ():
            # Another one of that step may have been damaged before.
            names = [f"damaged_{step}", *(f"damaged_{step}_{n}" for n in range(2, 100))]
            free = next(name for name in names if not (self._directory / name).exists())
            (self._directory / str(step)).rename(self._directory / free)
            _log.warning("checkpoint %d is damaged, renamed to %s: %s", step, free, reason)
        _log.warning(
            "continuing from the newest whole checkpoint, step %d: the steps up to %d are lost and "
            "will be taken again",
            whole,
            max(damaged),
        )
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints are renamed")
        self._manager.reload()

    def _check_files(self, step: int) -> None:
        """Raises DamagedError if a file is not as it was saved. All processes do the same."""
        problem, has_manifest = "", False
        if jax.process_index() == 0:
            folder = self._directory / str(step)
            try:
                if not (folder / "_CHECKPOINT_METADATA").exists():
                    raise manifest.DamagedError(
                        f"{folder} holds no complete checkpoint (no _CHECKPOINT_METADATA)"
                    )
                has_manifest = manifest.check(folder)
            except (manifest.DamagedError, OSError) as error:
                problem = str(error)
        is_bad, has_manifest = distributed.of_process_0(bool(problem), has_manifest)
        if is_bad:
            raise manifest.DamagedError(problem or "see the log of process 0")
        self._has_manifest[step] = has_manifest

    def _read(self, step: int, abstract_state: Any) -> tuple[Any, dict]:
        """The states of a step; raises DamagedError on all processes if one of them does."""
        if step not in self._has_manifest:
            self._check_files(step)
        problem, state, host = "", None, {}
        try:
            state, host = self._restore(step, abstract_state)
        except jax.errors.JaxRuntimeError:
            raise
        except manifest.DamagedError as error:
            problem = str(error)
        except Exception as error:  # Orbax passes on what its parts make of a damaged file.
            folder = self._directory / str(step)
            if self._has_manifest[step]:
                raise CheckpointError(
                    f"{folder} is whole, but is of another network, optimizer or version "
                    f"({files.first_line(error)}): use the configuration and version that wrote it"
                ) from error
            problem = f"{folder} cannot be read ({files.first_line(error)})"
        if _any_process(bool(problem)):
            raise manifest.DamagedError(problem or "another process could not read it, see its log")
        return state, host

    def _restore(self, step: int, abstract_state: Any) -> tuple[Any, dict]:
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract_state), host=ocp.args.JsonRestore()
            ),
        )
        # XLA must own buffers that will be donated; restored buffers on CPU may be borrowed.
        shardings = jax.tree.map(lambda x: x.sharding, abstract_state)
        copy = jax.jit(lambda state: jax.tree.map(jnp.copy, state), out_shardings=shardings)
        state, host, folder = copy(restored.state), restored.host, self._directory / str(step)
        sums = host.pop(manifest.ARRAY_SUMS, None)
        if sums is None:
            _log.warning("unverified: %s was saved by a version that kept no checksums", folder)
            return state, host
        if not self._has_manifest[step]:
            raise manifest.DamagedError(f"{folder / manifest.NAME} is missing")
        manifest.check_arrays(state, sums, folder)
        return state, host

    def _write_manifest(self) -> None:
        """Called by Orbax in a thread of process 0, before it renames the folder."""
        # In a bucket it already has its final name.
        named = [p for p in self._directory.glob("*") if p.name.startswith(f"{self._saving}.")]
        (folder,) = named or [self._directory / str(self._saving)]
        manifest.write(folder)

    def _finish(self) -> None:
        """Waits for the checkpoint that is being written."""
        self._manager.wait_until_finished()
        if self._saving is not None and jax.process_index() == 0:
            manifest.add_commit(self._directory / str(self._saving))
        self._saving = None

    @contextlib.contextmanager
    def _saving_errors(self) -> Iterator[None]:
        """Turns errors of a save, such as a full disk, into a sentence."""
        try:
            yield
        except jax.errors.JaxRuntimeError:
            raise
        except Exception as error:  # of the libraries below Orbax, from its thread
            step, self._saving = self._saving, None
            raise CheckpointError(
                f"step {step} could not be saved in {self._directory} "
                f"({files.first_line(error)}); the checkpoints before it are whole: make room "
                "there or restore the folder, then the same command continues"
            ) from error

    def __enter__(self) -> "Checkpoints":
        """Returns itself."""
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        """Waits for checkpoints that are being written."""
        # A device failure means that other processes are lost, and a save needs all of them.
        lost = isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1
        if lost or isinstance(error, CheckpointError):
            return
        with self._saving_errors():
            self._finish()
            self._manager.close()


def _any_process(found: bool) -> bool:
    """Whether one of the processes found it."""
    if jax.process_count() == 1:
        return found
    return bool(np.any(multihost_utils.process_allgather(np.array(found))))
