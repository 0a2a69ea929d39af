"""The training step against PyTorch's, and its parts: `python -m tests.bench.step [--only=NAMES]`.

A ratio is our time over PyTorch's, of medians over interleaved rounds (ours, PyTorch's contiguous,
PyTorch's channels_last, ours, ...); PyTorch counts with its faster memory format. Float32, the same
weights, the same batch, all cores for both. Before it is timed, each case checks that both sides
compute the same, and the bench stops where they don't.

* `resnet50_mid_8x128` and the like: from a preprocessed batch to new parameters: networks,
  selection, losses, gradients, Adam with L2. On PyTorch's side smp's networks, `torch_oracle`
  (thresholds by a topk a class, as the published code, whose repeated softmaxes it shares) and
  torch.optim.Adam by its defaults. Ours also computes what it logs: accuracies, norms.
* `encoder_*`: ResNet-50 of 13 bands, forward and gradients of its parameters.
* `decoder_*`: its U-Net decoder and head, forward and gradients of parameters and features.
* `selection_losses_priors_*`: from logits and the labels of four seasons to the loss and the
  gradients of the logits; priors of whole tiles, as the published code makes them. On PyTorch's
  side they are SciPy's filters, a thread a core, or separable convolutions, whatever is faster.
* `preprocessing_*`: from records to images and labels, without priors. Ours upsamples the bands
  of 20 and 60 m; PyTorch's gets them upsampled, as the published LMDB holds them. It crops, flips,
  and rotates only the samples that are to be rotated.
"""

import concurrent.futures
import copy
import dataclasses
import functools
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import torch
import torch.nn.functional as F
from absl import app, flags
from flax import nnx

from cromss_jax import presets
from cromss_jax.data import preprocess
from cromss_jax.method import smoothing
from cromss_jax.networks import fusion as networks
from cromss_jax.training import memory, objective, pretrain_step, sharding
from cromss_jax.weights import torch_keys
from tests import torch_oracle, torch_parity
from tests.bench.records import NUM_CHANNELS, make_records

_ROUNDS = flags.DEFINE_integer("rounds", 7, "Timed rounds of each case", lower_bound=1)
_ONLY = flags.DEFINE_list("only", [], "Names of the cases to run; all by default")

SIZES = {"8x128": (8, 128), "4x256": (4, 256)}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
EPOCH = torch_parity.EPOCH
# Of float32 losses and gradients that are summed in another order.
TOLERANCE = 1e-4

# What runs a case once, to the end, and returns a number or array that both sides must agree on.
Runner = Callable[[], np.ndarray | float]


def jit(function: Callable, donate_argnums: Sequence[int] = ()) -> Callable:
    """Compiles for one device, as `main` compiles its steps."""
    options = sharding.compiler_options(sharding.make_mesh(1))
    return jax.jit(function, donate_argnums=donate_argnums, compiler_options=options)


def make_config(fusion: str, depth: int, size: str) -> ml_collections.ConfigDict:
    """The paper's recipe at another size, one location a batch: a step is an epoch."""
    config = torch_parity.network_config(fusion, depth, NUM_CHANNELS["s2"])
    batch_size, crop = SIZES[size]
    changes = {
        "batch_size": batch_size,
        "data.crop_size": crop,
        "schedule.name": "constant",
        # So small that both sides still agree after some steps.
        "optimizer.learning_rate": 1e-6,
    }
    config.update_from_flattened_dict(changes)
    return config


def make_batch(config: ml_collections.ConfigDict) -> dict[str, np.ndarray]:
    """Examples of a batch, from the middle of the tiles."""
    records = make_records(config.batch_size, config.data.crop_size)
    margin = records["labels"].shape[-1] - config.data.crop_size
    geometry = preprocess.centre_geometry(config.batch_size, margin)
    make = jax.jit(
        lambda r: pretrain_step.make_examples(config, r, geometry, objective.prior_kind(config))
    )
    # Copied: torch warns of arrays that cannot be written.
    return {name: np.array(value) for name, value in make(records).items()}


def to_torch(image: np.ndarray, memory_format: torch.memory_format) -> torch.Tensor:
    """[B, H, W, K] to [B, K, H, W], laid out so."""
    tensor = torch_parity.to_torch_image(np.asarray(image))
    return tensor.contiguous(memory_format=memory_format)


def whole_step(fusion: str, depth: int, size: str) -> dict[str, Runner]:
    """A training step on a batch in memory, by side."""
    config = make_config(fusion, depth, size)
    batch = make_batch(config)
    network = torch_parity.torch_network(
        fusion, depth, NUM_CHANNELS, len(presets.DYNAMIC_WORLD), seed=0
    ).train()
    start = torch_parity.torch_arrays(network)

    state = jax.jit(lambda key: pretrain_step.init_state(config, key))(jax.random.key(0))
    parts = {
        name: torch_keys.from_torch_state({k: start[k] for k in torch_keys.keys(part)}, part)
        for name, part in (("params", state.params), ("batch_stats", state.batch_stats))
    }
    # Copied: the step gives its state's memory away.
    state = jax.tree.map(jnp.array, dataclasses.replace(state, step=jnp.int32(EPOCH), **parts))
    update = pretrain_step.make_update(
        config, pretrain_step.network_definition(config), config.batch_size
    )
    update = jit(update, donate_argnums=(0,))
    ours = {"state": state, "batch": jax.device_put(batch)}

    def our_step() -> float:
        # The ramp must not move on, so that all rounds do the same.
        state = dataclasses.replace(ours["state"], step=jnp.int32(EPOCH))
        ours["state"], report = update(state, ours["batch"])
        jax.block_until_ready(ours["state"])
        return float(report["loss"])

    labels = torch.from_numpy(batch["labels"]).long()

    def torch_step(network, optimizer, images, priors) -> float:
        optimizer.zero_grad()
        loss = torch_oracle.total_loss(network(images), labels, priors, EPOCH)
        loss.backward()
        optimizer.step()
        return loss.item()

    runners = {"ours": our_step}
    for name, memory_format in FORMATS.items():
        twin = copy.deepcopy(network).to(memory_format=memory_format)
        optimizer = torch.optim.Adam(
            twin.parameters(), config.optimizer.learning_rate, weight_decay=config.optimizer.l2
        )
        images = {m: to_torch(batch[m], memory_format) for m in NUM_CHANNELS}
        priors = to_torch(batch["prior"], memory_format)
        runners[name] = functools.partial(torch_step, twin, optimizer, images, priors)
    return runners


def network_part(part: str, size: str) -> dict[str, Runner]:
    """Encoder or decoder of a ResNet-50 U-Net: the loss is a random combination of its outputs."""
    batch_size, crop = SIZES[size]
    rng = np.random.default_rng(1)
    theirs = torch_parity.torch_model(50, NUM_CHANNELS["s2"], len(presets.DYNAMIC_WORLD)).train()
    definition, params, stats = nnx.split(
        networks.make_network(
            "none",
            50,
            {"s2": NUM_CHANNELS["s2"]},
            len(presets.DYNAMIC_WORLD),
            "float32",
            nnx.Rngs(0),
        ),
        nnx.Param,
        nnx.BatchStat,
    )
    start = torch_parity.torch_arrays(theirs)
    params, stats = (
        torch_keys.from_torch_state({k: start[k] for k in torch_keys.keys(group)}, group)
        for group in (params, stats)
    )
    image = rng.random((batch_size, crop, crop, NUM_CHANNELS["s2"]), np.float32)
    with torch.no_grad():
        features = copy.deepcopy(theirs).encoder(torch_parity.to_torch_image(image))
    # smp's features begin with the image itself, of which the decoder wants the size.
    whole = torch.empty(batch_size, NUM_CHANNELS["s2"], crop, crop)
    features = [torch_parity.from_torch_image(x) for x in features[1:]]
    inputs = [image] if part == "encoder" else features
    classes = (batch_size, crop, crop, len(presets.DYNAMIC_WORLD))
    shapes = [x.shape for x in features] if part == "encoder" else [classes]
    slopes = [rng.random(shape, np.float32) for shape in shapes]

    def loss_of(params, inputs):
        network = nnx.merge(definition, params, stats, copy=True)
        if part == "encoder":
            outputs = network.encode([network.encoder], inputs, True)[0]
        else:
            outputs = [network.decode(inputs, True)]
        return sum(jnp.vdot(x, slope) for x, slope in zip(outputs, slopes, strict=True))

    wanted = 0 if part == "encoder" else (0, 1)
    differentiate = jit(jax.value_and_grad(loss_of, argnums=wanted))
    params, inputs = jax.device_put(params), jax.device_put(inputs)

    def our_part() -> float:
        loss, grads = jax.block_until_ready(differentiate(params, inputs))
        del grads
        return float(loss)

    def torch_part(network, inputs, slopes) -> float:
        network.zero_grad()
        for x in inputs:
            x.grad = None
        if part == "encoder":
            outputs = network.encoder(inputs[0])[1:]
        else:
            outputs = [network.segmentation_head(network.decoder([whole, *inputs]))]
        loss = sum((x * slope).sum() for x, slope in zip(outputs, slopes, strict=True))
        loss.backward()
        return loss.item()

    runners = {"ours": our_part}
    for name, memory_format in FORMATS.items():
        twin = copy.deepcopy(theirs).to(memory_format=memory_format)
        laid_out = [to_torch(x, memory_format) for x in inputs]
        if part == "decoder":
            laid_out = [x.requires_grad_() for x in laid_out]
        their_slopes = [to_torch(x, memory_format) for x in slopes]
        runners[name] = functools.partial(torch_part, twin, laid_out, their_slopes)
    return runners


def torch_priors(season_labels: torch.Tensor, season: torch.Tensor) -> torch.Tensor:
    """`torch_oracle.prior` of a batch [B, S, T, T] by separable convolutions, [B, C, T, T]."""
    one_hot = F.one_hot(season_labels, len(presets.DYNAMIC_WORLD)).permute(0, 1, 4, 2, 3).float()
    drawn = one_hot[torch.arange(len(season), device=season.device), season]
    maps = torch.stack([one_hot.mean(1), drawn])
    radius = smoothing.RADIUS
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
    taps = torch.exp(-0.5 * (offsets / smoothing.SIGMA) ** 2)
    taps = (taps / taps.sum()).float().to(season.device)
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    for dim, kernel in ((2, taps.view(1, 1, -1, 1)), (3, taps.view(1, 1, 1, -1))):
        size = flat.shape[dim]
        before = flat.narrow(dim, 0, radius).flip(dim)
        after = flat.narrow(dim, size - radius, radius).flip(dim)
        flat = F.conv2d(torch.cat([before, flat, after], dim), kernel)
    filtered = flat.reshape(maps.shape)
    return (filtered / filtered.sum(2, keepdim=True)).mean(0)


def selection_losses_priors(size: str) -> dict[str, Runner]:
    """Priors, selection, losses and their gradients."""
    config = make_config("mid", 50, size)
    records = make_records(config.batch_size, config.data.crop_size)
    crop = config.data.crop_size
    top = (records["labels"].shape[-1] - crop) // 2
    inside = (slice(top, top + crop),) * 2
    rng = np.random.default_rng(2)
    labels = records["labels"][np.arange(config.batch_size), records["season"]]
    shape = (config.batch_size, crop, crop, len(presets.DYNAMIC_WORLD))
    logits = {m: rng.normal(0, 2, shape).astype(np.float32) for m in NUM_CHANNELS}

    @jax.jit
    def differentiate(logits, season_labels, labels):
        prior = smoothing.smoothing_prior(season_labels, labels, len(presets.DYNAMIC_WORLD), "ts")
        batch = {"labels": labels[:, *inside], "prior": prior[:, *inside]}
        loss_of = lambda x: objective.training_loss(config, x, batch, EPOCH)[0]
        return jax.value_and_grad(loss_of)(logits)

    arguments = jax.device_put((logits, records["labels"], labels))

    def our_part() -> float:
        loss, _ = jax.block_until_ready(differentiate(*arguments))
        return float(loss)

    pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
    seasons = records["season"]
    torch_labels = torch.from_numpy(labels).long()[:, *inside]
    torch_season_labels = torch.from_numpy(records["labels"]).long()

    def by_scipy() -> torch.Tensor:
        priors = pool.map(torch_oracle.prior, records["labels"], seasons)
        return torch.from_numpy(np.stack([p[:, *inside] for p in priors])).float()

    def by_torch() -> torch.Tensor:
        priors = torch_priors(torch_season_labels, torch.from_numpy(seasons).long())
        return priors[:, :, *inside]

    def torch_part(make_priors, logits) -> float:
        for x in logits.values():
            x.grad = None
        loss = torch_oracle.total_loss(logits, torch_labels, make_priors(), EPOCH)
        loss.backward()
        return loss.item()

    runners = {"ours": our_part}
    for name, memory_format in FORMATS.items():
        laid_out = {m: to_torch(x, memory_format).requires_grad_() for m, x in logits.items()}
        for filters, make_priors in (("scipy", by_scipy), ("torch", by_torch)):
            runners[f"{name}, {filters}"] = functools.partial(torch_part, make_priors, laid_out)
    return runners


def preprocessing(size: str) -> dict[str, Runner]:
    """Imagery and labels, cropped, flipped and, two of ten, rotated."""
    config = make_config("mid", 50, size)
    crop, batch_size = config.data.crop_size, config.batch_size
    records = make_records(batch_size, crop)
    margin = records["labels"].shape[-1] - crop
    draw = functools.partial(
        preprocess.random_geometry, batch_size=batch_size, margin=margin, **config.augmentation
    )
    # The first seed of one or two rotations in ten samples.
    for seed in range(100):
        geometry = jax.device_get(dataclasses.asdict(draw(jax.random.key(seed))))
        if round(0.2 * batch_size) == np.count_nonzero(geometry["angle"]):
            break

    @jax.jit
    def ours(key, records):
        return pretrain_step.make_examples(config, records, draw(key), None)

    key, placed = jax.random.key(seed), jax.device_put(records)

    def our_part() -> np.ndarray:
        found = jax.block_until_ready(ours(key, placed))
        return np.asarray(found["s2"]).mean((1, 2))

    stack = jax.jit(lambda r: preprocess.stack_bands(r, "s2", config.s2_bands))
    tiles = np.concatenate([records["s1"], np.asarray(stack(records))], -1)
    # As the LMDB holds them: a sample's bands in planes.
    tiles = torch.from_numpy(tiles.astype(np.uint8).transpose(0, 3, 1, 2).copy())
    labels = records["labels"][np.arange(batch_size), records["season"]]
    labels = torch.from_numpy(labels).float()[:, None]

    def one_sample(index: int) -> tuple[torch.Tensor, torch.Tensor]:
        top, left = geometry["top"][index], geometry["left"][index]
        found = [tiles[index].float() / 255, labels[index]]
        found = [x[:, top : top + crop, left : left + crop] for x in found]
        flips = [d for d, name in ((1, "flip_rows"), (2, "flip_columns")) if geometry[name][index]]
        if flips:
            found = [x.flip(flips) for x in found]
        angle = float(geometry["angle"][index])
        if angle:
            cos, sin = np.cos(angle), np.sin(angle)
            turn = torch.tensor([[cos, -sin, 0], [sin, cos, 0]], dtype=torch.float32)[None]
            found = [
                F.grid_sample(
                    x[None],
                    F.affine_grid(turn, [1, len(x), crop, crop], align_corners=True),
                    mode=mode,
                    padding_mode="reflection",
                    align_corners=True,
                )[0]
                for x, mode in zip(found, ("bilinear", "nearest"), strict=True)
            ]
        return tuple(found)

    def torch_part() -> np.ndarray:
        images, targets = zip(*map(one_sample, range(batch_size)), strict=True)
        images = torch.stack(images)
        torch.stack(targets).long()
        return images[:, NUM_CHANNELS["s1"] :].mean((2, 3)).numpy()

    return {"ours": our_part, "contiguous": torch_part}


def cases() -> dict[str, Callable[[], dict[str, Runner]]]:
    """What makes the runners of each case, by name."""
    found = {}
    for size in SIZES:
        for depth in (18, 50):
            for fusion in ("mid", "late"):
                make = functools.partial(whole_step, fusion, depth, size)
                found[f"resnet{depth}_{fusion}_{size}"] = make
        for part in ("encoder", "decoder"):
            found[f"{part}_{size}"] = functools.partial(network_part, part, size)
        found[f"selection_losses_priors_{size}"] = functools.partial(selection_losses_priors, size)
        found[f"preprocessing_{size}"] = functools.partial(preprocessing, size)
    return found


def check(name: str, runners: Mapping[str, Runner]) -> None:
    """Runs each side once; stops the bench unless they compute the same."""
    results = {side: np.asarray(once()) for side, once in runners.items()}
    ours = results.pop("ours")
    for side, theirs in results.items():
        error = np.abs(ours - theirs).max() / np.abs(theirs).max()
        if not error < TOLERANCE:
            sys.exit(f"{name}: ours is {error:.1e} from PyTorch's ({side}); no time means anything")


def times(runners: Mapping[str, Runner], rounds: int) -> dict[str, float]:
    """Median seconds of each side over interleaved rounds, the first one not counted."""
    seconds = {side: [] for side in runners}
    for number in range(rounds + 1):
        for side, once in runners.items():
            started = time.perf_counter()
            once()
            if number:
                seconds[side].append(time.perf_counter() - started)
    return {side: statistics.median(values) for side, values in seconds.items()}


def main(_) -> None:
    """Prints a row for each case, the last line as JSON: ratios, and seconds behind them."""
    torch.set_num_threads(os.cpu_count())
    memory.keep_freed_memory()  # as `main` does; PyTorch's memory is kept by it, too
    known = cases()
    unknown = [name for name in _ONLY.value if name not in known]
    if unknown:
        sys.exit(f"no case {', '.join(unknown)}; there are {', '.join(known)}")
    ratios, seconds = {}, {}
    for name in _ONLY.value or known:
        runners = known[name]()
        check(name, runners)
        found = times(runners, _ROUNDS.value)
        ours = found.pop("ours")
        best = min(found, key=found.get)
        ratios[name] = round(ours / found[best], 3)
        seconds[name] = {"ours": round(ours, 4), "pytorch": round(found[best], 4)}
        others = ", ".join(f"{side} {value:.3f}" for side, value in found.items())
        print(f"{name:32}{ratios[name]:6.2f}   ours {ours:.3f} s; PyTorch {others} s", flush=True)
        del runners
        gc.collect()
        jax.clear_caches()
    print(json.dumps({**ratios, "seconds": seconds, "rounds": _ROUNDS.value}))


if __name__ == "__main__":
    app.run(main)
