"""Checkpoints of the device state and the data iterator; both are saved together."""

from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from cromss_jax import files


class CheckpointError(ValueError):
    """A checkpoint folder is incomplete or was not written by this program."""


class Checkpoints:
    """Numbered checkpoints in one folder, written in the background.

    A checkpoint gets its final name when it is complete. Opening removes what a killed run left
    behind. Used as a context manager, it waits at the end for checkpoints that are being written.
    With several processes, all must make the same calls; process 0 tells the others which
    checkpoints exist.
    """

    def __init__(self, directory: epath.PathLike, keep: int):
        """Opens the folder and creates it if needed.

        Args:
          directory: the folder, local or a gs:// address.
          keep: number of newest checkpoints to keep.

        Raises:
          CheckpointError: if the newest folder named like a step holds no complete checkpoint.
            Older folders of this kind are checkpoints whose removal was interrupted.
        """
        directory = files.absolute(directory)
        steps = [path for path in directory.glob("*") if path.name.isdigit()]
        newest = max(steps, key=lambda path: int(path.name), default=None)
        # A bucket has no renaming, so there it is an interrupted write, which opening removes.
        bad = newest is not None and not (newest / "_CHECKPOINT_METADATA").exists()
        if bad and not files.in_bucket(directory):
            raise CheckpointError(
                f"{newest} is named like a checkpoint but does not contain one (no "
                "_CHECKPOINT_METADATA): move it away to continue from the newest complete "
                "checkpoint"
            )
        self._manager = ocp.CheckpointManager(
            directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                cleanup_tmp_directories=True,
                # On a shared disk, hosts may see new folders at different times.
                single_host_load_and_broadcast=True,
            ),
        )

    @property
    def latest_step(self) -> int | None:
        """Step of the newest checkpoint; None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, host_state: dict) -> None:
        """Saves in the background; does nothing if `step` is the newest checkpoint already."""
        if step == self.latest_step:
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), host=ocp.args.JsonSave(host_state)
            ),
        )

    def restore(self, abstract_state: Any) -> tuple[Any, dict]:
        """Restores the newest checkpoint.

        Args:
          abstract_state: the state's shapes, dtypes and shardings.

        Returns:
          The device state, and the host state: that of the data iterator, and the data's identity.
        """
        restored = self._manager.restore(
            self.latest_step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract_state), host=ocp.args.JsonRestore()
            ),
        )
        # XLA must own buffers that will be donated; restored buffers on CPU may be borrowed.
        shardings = jax.tree.map(lambda x: x.sharding, abstract_state)
        copy = jax.jit(lambda state: jax.tree.map(jnp.copy, state), out_shardings=shardings)
        return copy(restored.state), restored.host

    def __enter__(self) -> "Checkpoints":
        """Returns itself."""
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        """Waits for checkpoints that are being written."""
        # A device failure means that other processes are lost, and a save needs all of them.
        lost = isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1
        if not lost:
            self._manager.close()
