"""The recipe that all parts measure: the paper's in bfloat16, or a tiny one to try the bench."""

import json
import statistics
from collections.abc import Sequence

import ml_collections
from absl import flags, logging

from configs import pretrain

TINY = flags.DEFINE_bool("tiny", False, "Sizes that a CPU runs in seconds: tries the bench out")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Images a step", lower_bound=1)

# Figures only.
logging.set_verbosity(logging.WARNING)
# Of the data set of the parts that read: one number for all parts, so that they share a program.
NUM_LOCATIONS = 128
TINY_FIELDS = {"network.depth": 10, "data.crop_size": 32}


def fields() -> dict[str, object]:
    """What differs from the defaults of configs/pretrain.py."""
    found = {
        "batch_size": BATCH_SIZE.value,
        "num_devices": 1,
        "network.dtype": "bfloat16",
        "data.name": "made_up",
        "data.validation_fraction": 0.0,
        "schedule.name": "constant",
        "optimizer.learning_rate": 1e-4,
    }
    return {**found, **TINY_FIELDS} if TINY.value else found


def make_config() -> ml_collections.FrozenConfigDict:
    """The recipe as a configuration."""
    config = pretrain.get_config()
    config.update_from_flattened_dict(fields())
    return ml_collections.FrozenConfigDict(config)


def speed(seconds: Sequence[float]) -> dict[str, float]:
    """Figures of steps that took so long."""
    median = statistics.median(seconds)
    return {
        "images_per_second": round(BATCH_SIZE.value / median, 1),
        "step_milliseconds": round(1e3 * median, 3),
        "mean_step_milliseconds": round(1e3 * statistics.mean(seconds), 3),
        "slowest_step_milliseconds": round(1e3 * max(seconds), 3),
        "steps": len(seconds),
    }


def show(figures: dict) -> None:
    """Prints figures, those of before included: the last line counts if the part is stopped."""
    print(json.dumps(figures), flush=True)
