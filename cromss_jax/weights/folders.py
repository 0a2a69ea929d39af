"""Folders of weights: a run's checkpoints, and converted weights in the same format."""

import dataclasses
import json
import logging
import uuid
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx

from cromss_jax import files
from cromss_jax.weights import cards, manifest, torch_keys
from cromss_jax.weights.layouts import check_bands
from cromss_jax.weights.network import Network, Weights, WeightsError

_log = logging.getLogger(__name__)

# A folder of converted weights has this file instead of a run's configuration.
_NETWORK = "network.json"


def find_checkpoint(path: str) -> epath.Path:
    """The checkpoint folder for a path: the path itself, or a run's newest checkpoint.

    Raises:
      WeightsError: if there is no checkpoint.
    """
    folder = files.absolute(path)
    if (folder / "state").is_dir():
        return folder
    steps = [step for step in (folder / "checkpoints").glob("*") if step.name.isdigit()]
    steps = [step for step in steps if (step / "_CHECKPOINT_METADATA").exists()]
    if not steps:
        seeds = sorted(seed.name for seed in folder.glob("seed_*"))
        raise WeightsError(
            f"{path} is neither a run (no finished checkpoint in {folder / 'checkpoints'}) nor a "
            "checkpoint (it has no folder `state`): use the folder of a run or of a checkpoint"
            + (f", such as one of the runs in it: {', '.join(seeds)}" if seeds else "")
        )
    return max(steps, key=lambda step: int(step.name))


def load_run(step: epath.Path) -> Weights:
    """Loads the weights in a checkpoint folder.

    Raises:
      WeightsError: if the checkpoint or its description is missing or damaged.
    """
    own, run = step / _NETWORK, step.parent.parent / "config.json"
    description = own if own.exists() else run
    if not description.exists():
        raise WeightsError(f"{run} is missing: it describes the network of {step}; restore it")
    try:
        content = files.parse_json(description.read_bytes())
        if own.exists():
            bands = check_bands(content["network"]["bands"])
            network = Network(**{**content["network"], "bands": bands})
            card = dict(content["card"])
            cards.check(card, description)
        else:
            network = Network.of_config(content)
            card = cards.of_run(step, network)
        network.abstract_state()  # of what it describes, there is a network
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"{description} is damaged or was written by another program: {error!r}"
        ) from error
    try:
        has_manifest = manifest.check(step)
        sums = manifest.saved_array_sums(step)
        if sums and not has_manifest:
            raise manifest.DamagedError(f"{step / manifest.NAME} is missing")
        tree = read_arrays(step, ("params", "batch_stats"))
        if sums:
            manifest.check_arrays(tree, sums, step)
    except manifest.DamagedError as error:
        raise WeightsError(f"{error}: choose another checkpoint") from error
    except (ValueError, KeyError, AttributeError, OSError) as error:
        raise WeightsError(f"{step} is damaged: {files.first_line(error)}") from error
    if not has_manifest:
        _log.warning("unverified: %s has no %s to compare its files with", step, manifest.NAME)
    arrays = {}
    for part in tree.values():
        arrays |= torch_keys.from_tree(part)
    return Weights(network, arrays, card=card)


def write_folder(folder: epath.Path, found: Weights) -> None:
    """Writes weights in the format of a checkpoint folder, which `files.load` reads.

    A killed process leaves no partial folder under the final name.
    """
    params, batch_stats = nnx.split_state(found.state(), nnx.Param, nnx.BatchStat)
    folder = files.absolute(folder)
    temporary = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.tmp")
    temporary.mkdir(parents=True)
    try:
        write_arrays(temporary, {"params": params, "batch_stats": batch_stats})
        content = {"network": dataclasses.asdict(found.network), "card": dict(found.card)}
        (temporary / _NETWORK).write_text(json.dumps(content, indent=2))
        manifest.write(temporary)
        temporary.rename(folder)
    except ValueError as error:  # of TensorStore, such as for a full disk
        raise WeightsError(f"{folder} cannot be written ({files.first_line(error)})") from error
    finally:
        if temporary.exists():
            temporary.rmtree()


def read_arrays(step_folder: epath.Path, names: Sequence[str]) -> dict[str, Any]:
    """Reads fields of a saved state, independent of the devices that it was saved on.

    Args:
      step_folder: the checkpoint folder.
      names: fields of the state.

    Returns:
      Nested dicts of NumPy arrays, by field.

    Raises:
      ValueError, KeyError or OSError: if they are missing or damaged.
    """
    reader, folder = ocp.PyTreeCheckpointHandler(), step_folder / "state"
    shapes = reader.metadata(folder).tree
    wanted = {name: shapes[name] for name in names}
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    args = ocp.args.PyTreeRestore(item=wanted, restore_args=as_numpy, partial_restore=True)
    return reader.restore(folder, args=args)


def write_arrays(step_folder: epath.Path, state: Any) -> None:
    """Writes a state that `read_arrays` reads; raises an error if one exists already."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
        writer.save(step_folder / "state", args=ocp.args.PyTreeSave(state))
