"""Checkpoints: the device state and the data iterator, together or not at all."""

from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from cromss_jax import files


class CheckpointError(ValueError):
    """A checkpoint folder is not what it should be."""


class Checkpoints:
    """Numbered checkpoints under one folder, written in the background.

    A checkpoint appears under its final name when it is complete; what a killed run left behind is
    removed on opening. As a context, it waits at the end for what is being written. Of several
    processes all must do the same; process 0 tells the others which checkpoints there are.
    """

    def __init__(self, directory: str, keep: int):
        """Opens the folder, making it if needed.

        Args:
          directory: absolute path or bucket address.
          keep: how many of the newest checkpoints stay.

        Raises:
          CheckpointError: if the newest folder with a step's name holds no finished checkpoint.
            Older ones are what a kill left of a checkpoint that was being removed.
        """
        steps = [path for path in epath.Path(directory).glob("*") if path.name.isdigit()]
        newest = max(steps, key=lambda path: int(path.name), default=None)
        # In a bucket, where nothing is renamed, it is what a kill left, and is removed on opening.
        bad = newest is not None and not (newest / "_CHECKPOINT_METADATA").exists()
        if bad and not files.in_bucket(directory):
            raise CheckpointError(
                f"{newest} has a checkpoint's name but is none (no _CHECKPOINT_METADATA); "
                "move it away, and the run continues from the newest real checkpoint"
            )
        self._manager = ocp.CheckpointManager(
            directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                cleanup_tmp_directories=True,
                # A disk that the hosts share may show them its folders at different times.
                single_host_load_and_broadcast=True,
            ),
        )

    @property
    def latest_step(self) -> int | None:
        """Step of the newest checkpoint, None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, host_state: dict) -> None:
        """Saves in the background; a step that is there already is left as it is."""
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
          The state, and the host's: the data iterator's and what identifies its data.
        """
        restored = self._manager.restore(
            self.latest_step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract_state), host=ocp.args.JsonRestore()
            ),
        )
        # A copy of XLA's own making: restored buffers on CPU may be borrowed, and are donated.
        shardings = jax.tree.map(lambda x: x.sharding, abstract_state)
        copy = jax.jit(lambda state: jax.tree.map(jnp.copy, state), out_shardings=shardings)
        return copy(restored.state), restored.host

    def __enter__(self) -> "Checkpoints":
        """Starts nothing."""
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        """Waits for what is being written."""
        # Nothing is finished without the other processes, and where the devices fail they are lost.
        lost = isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1
        if not lost:
            self._manager.close()
