"""The same step by PyTorch on the same card: `python -m tests.bench.gpu.pytorch --batch_size=64`.

smp's networks in mid fusion, channels_last, autocast to bfloat16, fused Adam, the losses of
`tests.torch_oracle`. First everything as it is called, with a topk a class for the thresholds, as
in the published code. Then networks and losses by `torch.compile`, with all thresholds from one
sort, for which the host need not wait. Priors, crops, flips and rotations are on the device, too, a
batch at a time; only the samples that are to be rotated are.

Left out here: upsampling (the bands of 20 and 60 m are at 10 m from the start, as the published
LMDB holds them), accuracies and norms for the log, the plateau schedule, the test for finite
losses.
"""

import functools
import itertools
import sys
import time
from collections.abc import Callable, Mapping

import jax
import numpy as np
import torch
import torch.nn.functional as F
from absl import app, flags

from cromss_jax import sensors
from cromss_jax.data import preprocess
from tests import torch_oracle, torch_parity
from tests.bench import records
from tests.bench import step as cpu_bench
from tests.bench.gpu import recipe

_STEPS = flags.DEFINE_integer("steps", 40, "Timed steps", lower_bound=3)
_COMPILE = flags.DEFINE_bool("compile", True, "Whether torch.compile is measured, too")
_WARM_UP = 5


def tiles_at_10m(made: Mapping[str, np.ndarray]) -> np.ndarray:
    """All bands of records at 10 m, [B, T, T, 15] uint8, by our upsampling on the CPU."""
    with jax.default_device(jax.devices("cpu")[0]):
        s2 = jax.jit(lambda r: preprocess.stack_bands(r, "s2", sensors.S2_BANDS))(made)
    return np.concatenate([made["s1"], np.asarray(s2).astype(np.uint8)], -1)


def draw(rng: np.random.Generator, batch_size: int, margin: int, augmentation) -> dict:
    """Crops, flips and rotations as `preprocess.random_geometry` draws them, on the host."""
    flipped = rng.random(batch_size) < augmentation.flip_probability
    which = rng.integers(0, 3, batch_size)
    rotated = rng.random(batch_size) < augmentation.rotation_probability
    limit = np.deg2rad(augmentation.max_angle)
    angle = np.where(rotated, rng.uniform(-limit, limit, batch_size), 0)
    return {
        "top": rng.integers(0, margin + 1, batch_size),
        "left": rng.integers(0, margin + 1, batch_size),
        "flip_rows": flipped & (which != 1),
        "flip_columns": flipped & (which != 0),
        "angle": angle.astype(np.float32),
    }


class Examples:
    """Makes examples of records that are on the device.

    Args:
      tiles: [B, T, T, 15] uint8.
      labels: [B, S, T, T] uint8 of all seasons.
      season: [B] the drawn ones.
      crop: H = W, pixels.
      device: where.
    """

    def __init__(self, tiles, labels, season, crop: int, device: torch.device):
        self._tiles = torch.from_numpy(tiles).to(device)
        self._all_labels = torch.from_numpy(labels).long().to(device)
        self._season = torch.from_numpy(season).long().to(device)
        self._crop, self._device = crop, device

    def __call__(self, geometry: Mapping[str, np.ndarray]):
        """Images by modality, labels [B, H, W] int64, priors [B, C, H, W]."""
        samples = torch.arange(len(self._season), device=self._device)
        steps = np.arange(self._crop)[None]

        def positions(offset, flip):
            flipped = np.where(flip[:, None], self._crop - 1 - steps, steps)
            return torch.from_numpy(offset[:, None] + flipped).to(self._device)

        rows = positions(geometry["top"], geometry["flip_rows"])[:, :, None]
        columns = positions(geometry["left"], geometry["flip_columns"])[:, None, :]
        at = (samples[:, None, None], rows, columns)
        priors = cpu_bench.torch_priors(self._all_labels, self._season)
        labels = self._all_labels[samples, self._season][at].float()[..., None]
        # NHWC in memory, which is PyTorch's channels_last.
        maps = torch.cat([self._tiles[at].float() / 255, priors.permute(0, 2, 3, 1)[at]], -1)
        maps, labels = maps.permute(0, 3, 1, 2), labels.permute(0, 3, 1, 2)

        rotated = np.flatnonzero(geometry["angle"])
        if len(rotated):
            angles = torch.from_numpy(geometry["angle"][rotated]).to(self._device)
            index = torch.from_numpy(rotated).to(self._device)
            maps[index] = rotate(maps[index], angles, "bilinear")
            labels[index] = rotate(labels[index], angles, "nearest")
        parts = maps.split([*records.NUM_CHANNELS.values(), torch_oracle.NUM_CLASSES], 1)
        s1, s2, priors = (x.contiguous(memory_format=torch.channels_last) for x in parts)
        return {"s1": s1, "s2": s2}, labels[:, 0].long(), priors


def rotate(maps: torch.Tensor, angles: torch.Tensor, mode: str) -> torch.Tensor:
    """Rotates maps [N, K, H, H] about their centre, counter-clockwise; the border is reflected."""
    cos, sin, zero = angles.cos(), angles.sin(), torch.zeros_like(angles)
    turn = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)
    grid = F.affine_grid(turn, list(maps.shape), align_corners=True)
    return F.grid_sample(maps, grid, mode=mode, padding_mode="reflection", align_corners=True)


def weights_by_sort(confidence: torch.Tensor, labels: torch.Tensor, keep: float) -> torch.Tensor:
    """`torch_oracle.selection_weights` without shapes or branches that depend on the data."""
    classes, values = labels.flatten(), confidence.flatten()
    # float64, so that the sum keeps the bits of the confidence, which is from 0 to 1.
    order = torch.argsort(2.0 * classes.double() - values.double())
    counts = F.one_hot(classes, torch_oracle.NUM_CLASSES).sum(0)
    kept = torch.floor(keep * counts.double()).long()
    last = (counts.cumsum(0) - counts + kept - 1).clamp(min=0)
    thresholds = values[order[last]]
    weights = (confidence / thresholds[labels]).clamp(0, 1)
    return torch.where(kept[labels] > 0, weights, 0.0)


def make_step(config, device: torch.device, compiled: bool) -> Callable[[], torch.Tensor]:
    """A step of a new network on one batch of records; it returns the loss."""
    network = torch_parity.torch_network(
        config.network.fusion,
        config.network.depth,
        records.NUM_CHANNELS,
        torch_oracle.NUM_CLASSES,
        seed=0,
    )
    network = network.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.Adam(
        network.parameters(),
        config.optimizer.learning_rate,
        weight_decay=config.optimizer.l2,
        fused=device.type == "cuda",
    )
    forward, loss_of = network, torch_oracle.total_loss
    if compiled:
        forward = torch.compile(network, fullgraph=True)
        loss_of = functools.partial(loss_of, weigh=weights_by_sort)
        loss_of = torch.compile(loss_of, fullgraph=True)
    made = records.make_records(config.batch_size, config.data.crop_size)
    size = made["labels"].shape[-1]
    examples = Examples(
        tiles_at_10m(made), made["labels"], made["season"], config.data.crop_size, device
    )
    rng = np.random.default_rng(0)

    def step() -> torch.Tensor:
        margin = size - config.data.crop_size
        geometry = draw(rng, config.batch_size, margin, config.augmentation)
        images, labels, priors = examples(geometry)
        with torch.autocast(device.type, torch.bfloat16):
            logits = forward(images)
        logits = {m: x.float() for m, x in logits.items()}
        loss = loss_of(logits, labels, priors, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def time_steps(step: Callable[[], torch.Tensor], count: int, device: torch.device) -> list[float]:
    """Seconds between the ends of steps, as the device sees them."""
    if device.type != "cuda":
        ends = []
        for _ in range(count):
            step()
            ends.append(time.perf_counter())
        return np.diff(ends).tolist()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count)]
    for event in events:
        step()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]


def main(_) -> None:
    """Prints the figures, the last line as JSON."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not recipe.TINY.value:
        sys.exit("PyTorch finds no GPU; --tiny tries this bench on a CPU")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    config = recipe.make_config()
    print(f"{name}, torch {torch.__version__}, batch {config.batch_size}", flush=True)
    figures = {"device": name, "torch": torch.__version__}
    torch.backends.cudnn.benchmark = True
    for kind, compiled in {"eager": False, "compiled": True}.items():
        if compiled and not _COMPILE.value:
            continue
        step = make_step(config, device, compiled)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        loss = float(step())
        first = time.perf_counter() - started
        time_steps(step, _WARM_UP, device)
        found = recipe.speed(time_steps(step, _STEPS.value, device))
        found |= {"first_step_seconds": round(first, 1), "loss": [round(loss, 4)]}
        found["loss"].append(round(float(step()), 4))
        if device.type == "cuda":
            found["peak_gigabytes"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        figures[kind] = found
        recipe.show(figures)
        del step
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    app.run(main)
