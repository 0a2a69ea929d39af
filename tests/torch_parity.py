"""The PyTorch networks that ours must equal, and the way between the two. Import after
`pytest.importorskip("segmentation_models_pytorch")`."""

import copy
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import segmentation_models_pytorch as smp
import torch
import torchvision
from flax import nnx

from configs import pretrain
from cromss_jax.training import objective, pretrain_step
from cromss_jax.weights import torch_keys
from tests import torch_oracle

NUM_CLASSES = torch_oracle.NUM_CLASSES
MODELS = {
    "unet": smp.Unet,
    "pspnet": smp.PSPNet,
    "deeplabv3plus": smp.DeepLabV3Plus,
    "fpn": smp.FPN,
}
# Logits and the loss: absolute, or relative to the largest where that is above 1, as float32
# rounds by 6e-8 in each of some 60 layers. Statistics: likewise. Gradients: a tensor's distance
# relative to its length.
TOLERANCES = {
    "eval_logits": 1e-4,
    "train_logits": 1e-4,
    "loss": 1e-5,
    "statistics": 1e-5,
    "gradients": 1e-4,
    "eval_logits_after_step": 1e-4,
}
EPOCH = 20  # the ramp has begun: about 3 % of each class are left out


class TorchMidFusion(torch.nn.Module):
    """Two encoders, one decoder and head under the published code's attribute names."""

    def __init__(self, depth: int, num_channels: Mapping[str, int], num_classes: int, decoder: str):
        super().__init__()
        model = torch_model(depth, num_channels["s2"], num_classes, decoder)
        self.encoder1 = torch_model(depth, num_channels["s1"], num_classes, decoder).encoder
        self.encoder = model.encoder
        self.decoder = model.decoder
        self.segmentation_head = model.segmentation_head

    def forward(self, images):
        return {
            "s1": self.segmentation_head(self.decoder(self.encoder1(images["s1"]))),
            "s2": self.segmentation_head(self.decoder(self.encoder(images["s2"]))),
        }


class TorchLateFusion(torch.nn.Module):
    """Two complete networks under the published code's attribute names."""

    def __init__(self, depth: int, num_channels: Mapping[str, int], num_classes: int, decoder: str):
        super().__init__()
        self.model1 = torch_model(depth, num_channels["s1"], num_classes, decoder)
        self.model2 = torch_model(depth, num_channels["s2"], num_classes, decoder)

    def forward(self, images):
        return {"s1": self.model1(images["s1"]), "s2": self.model2(images["s2"])}


class NarrowResNetEncoder(smp.encoders.resnet.ResNetEncoder):
    """smp's encoder with fewer channels, as our ResNet-10 has. Not initialised as smp does."""

    def __init__(self, width: int, block: type, layers: list[int], **more):
        super().__init__(block=block, layers=layers, **more)
        self.conv1 = torch.nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(width)
        self.inplanes = width
        for stage, count in enumerate(layers):
            made = self._make_layer(block, width * 2**stage, count, stride=1 if stage == 0 else 2)
            setattr(self, f"layer{stage + 1}", made)


smp.encoders.encoders["resnet10"] = {
    "encoder": NarrowResNetEncoder,
    "pretrained_settings": {},
    "params": {
        "width": 16,
        "block": torchvision.models.resnet.BasicBlock,
        "layers": [1, 1, 1, 1],
        "out_channels": [3, 16, 16, 32, 64, 128],
    },
}


def torch_model(
    depth: int, in_channels: int, num_classes: int, decoder: str = "unet"
) -> torch.nn.Module:
    narrow = {"decoder_channels": (64, 32, 16, 8, 4)} if (depth, decoder) == (10, "unet") else {}
    return MODELS[decoder](
        f"resnet{depth}",
        encoder_weights=None,
        in_channels=in_channels,
        classes=num_classes,
        **narrow,
    )


def torch_network(
    fusion: str,
    depth: int,
    num_channels: Mapping[str, int],
    num_classes: int,
    seed: int,
    decoder: str = "unet",
) -> torch.nn.Module:
    """smp's counterpart of `fusion.make_network`, initialised from `seed`.

    Without fusion it is smp's own model, which takes and returns an image, not a dict of them.
    """
    torch.manual_seed(seed)
    if fusion == "none":
        (in_channels,) = num_channels.values()
        return torch_model(depth, in_channels, num_classes, decoder)
    cls = {"mid": TorchMidFusion, "late": TorchLateFusion}[fusion]
    return cls(depth, num_channels, num_classes, decoder)


def without_dropout(network: torch.nn.Module) -> torch.nn.Module:
    """The network, keeping everything in training too."""
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout | torch.nn.Dropout2d):
            module.p = 0
    return network


def randomise_norms(network: torch.nn.Module, seed: int) -> None:
    """Gives every BatchNorm weights and statistics that a swapped or missing one would betray."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.2, generator=generator)
                module.running_mean.normal_(0, 0.2, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
                module.num_batches_tracked.fill_(7)


def torch_arrays(network: torch.nn.Module) -> dict[str, np.ndarray]:
    """The network's `state_dict` as copied arrays."""
    return {key: value.detach().numpy().copy() for key, value in network.state_dict().items()}


def to_torch_image(image: np.ndarray) -> torch.Tensor:
    """[B, H, W, K] to PyTorch's [B, K, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(0, 3, 1, 2)))


def from_torch_image(image: torch.Tensor) -> np.ndarray:
    """[B, K, H, W] to our [B, H, W, K]."""
    return image.detach().numpy().transpose(0, 2, 3, 1)


def gate_norms(network: torch.nn.Module, seed: int) -> None:
    """Sets every BatchNorm and GroupNorm so that no activation comes near the kink of a ReLU.

    Where one does, rounding decides whether a gradient passes, and two correct float32
    computations differ by 3e-3 (PyTorch's own float32 and float64 do). Here 70 % of the channels
    are far above zero, the rest far below.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.GroupNorm):
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.0, generator=generator)
                open_ = torch.rand(module.bias.shape, generator=generator) < 0.7
                # A channel may have summed up tens in the residual stream before it is closed.
                module.bias.copy_(torch.where(open_, 4.0, -100.0))
                module.bias.add_(torch.rand(module.bias.shape, generator=generator))


def network_config(fusion: str, depth: int, num_bands: int, decoder: str = "unet"):
    """The paper's recipe with another network."""
    config = pretrain.get_config(f"bands={num_bands},fusion={fusion}")
    config.network.depth = depth
    config.network.decoder = decoder
    return config


def example_batch(num_channels: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Images, labels in parcels, and any prior; height and width differ, so that a swap shows."""
    rng = np.random.default_rng(6)
    batch = {m: rng.random((2, 64, 96, k), np.float32) for m, k in num_channels.items()}
    parcels = rng.integers(0, NUM_CLASSES, (2, 8, 12))
    batch["labels"] = np.kron(parcels, np.ones((1, 8, 8), np.int64)).astype(np.uint8)
    prior = rng.random((2, 64, 96, NUM_CLASSES), np.float32)
    return batch | {"prior": prior / prior.sum(-1, keepdims=True)}


def scaled_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, absolute or relative to the largest expected value if above 1."""
    return float(np.abs(found - expected).max() / max(1, np.abs(expected).max()))


def logit_error(logits: Mapping, expected: Mapping[str, torch.Tensor]) -> float:
    """Of the worse modality."""
    assert logits.keys() == expected.keys()
    assert all(x.dtype == jnp.float32 for x in logits.values())
    return max(scaled_error(logits[m], from_torch_image(x)) for m, x in expected.items())


def gradient_floor(norms: Mapping[str, float]) -> float:
    """What is rounding among a U-Net's gradients, of these lengths.

    A bottleneck's bn2.bias has no effect where no ReLU closes, as 1x1 convolution and BatchNorm
    follow: its gradient is rounding. All others are over ten times this floor.
    """
    floor = 1e-10 * max(norms.values())
    assert all(key.endswith("bn2.bias") for key, norm in norms.items() if norm < 10 * floor)
    return floor


def exact_gradients(
    network: torch.nn.Module, images: Mapping[str, torch.Tensor], batch: Mapping
) -> dict[str, np.ndarray]:
    """Gradients of the total loss in training, by PyTorch in float64; changes the network."""
    logits = network.double().train()({m: x.double() for m, x in images.items()})
    labels, prior = torch.from_numpy(batch["labels"]).long(), to_torch_image(batch["prior"])
    torch_oracle.total_loss(logits, labels, prior.double(), EPOCH).backward()
    return {k: v.grad.numpy() for k, v in network.named_parameters() if v.grad is not None}


def compiled_functions(
    config, images: Mapping, batch: Mapping, compiler_options: Mapping
) -> tuple[Callable, Callable]:
    """Our network of a configuration as two functions of (params, batch_stats).

    Returns:
      Logits in evaluation; and in training (loss, (logits, batch_stats)), gradients.
    """
    definition = pretrain_step.network_definition(config)

    def evaluate(params, batch_stats):
        return nnx.merge(definition, params, batch_stats)(images, train=False)

    def loss_of(params, batch_stats):
        network = nnx.merge(definition, params, batch_stats, copy=True)
        logits = network(images, train=True)
        loss, _ = objective.training_loss(config, logits, batch, EPOCH)
        return loss, (logits, nnx.state(network, nnx.BatchStat))

    differentiate = jax.value_and_grad(loss_of, has_aux=True)
    return (
        jax.jit(evaluate, compiler_options=compiler_options),
        jax.jit(differentiate, compiler_options=compiler_options),
    )


def gradient_error(
    grads: Mapping[str, np.ndarray], theirs: torch.nn.Module, exact: Mapping | None
) -> float:
    """Largest distance of a gradient from PyTorch's, relative to its length, beyond rounding.

    Args:
      grads: our gradients, by PyTorch's keys.
      theirs: the network with PyTorch's gradients in float32.
      exact: PyTorch's gradients in float64; None for a U-Net, whose float32 gradients are precise.
    """
    expected = {
        key: value.grad.numpy()
        for key, value in theirs.named_parameters()
        if value.grad is not None
    }
    # A PSPNet's encoder has stages that it does not use.
    assert not any(np.any(grads[key]) for key in grads.keys() - expected.keys())
    if exact is None:
        norms = {key: np.linalg.norm(value) for key, value in expected.items()}
        slack = dict.fromkeys(norms, gradient_floor(norms))
    else:
        # Pooling before a BatchNorm loses digits: BatchNorm normalises over the few averages, in
        # ASPP two, so float32 subtracts nearly equal numbers. PyTorch's own float32 gradients then
        # differ by 2 % from its float64 ones, and biases with a gradient of zero have only
        # rounding. So the reference is float64, and four times PyTorch's own rounding is allowed;
        # ours was no more than three times.
        slack = {key: 4 * np.linalg.norm(expected[key] - exact[key]) for key in exact}
        expected = exact
        norms = {key: np.linalg.norm(value) for key, value in expected.items()}
    return max(
        max(np.linalg.norm(grads[key] - expected[key]) - slack[key], 0) / max(norm, slack[key])
        for key, norm in norms.items()
    )


def errors(
    fusion: str,
    depth: int,
    num_channels: Mapping[str, int],
    compiler_options: Mapping,
    decoder: str = "unet",
) -> dict[str, float]:
    """Differences between our results and PyTorch's with the same weights, without dropout.

    First evaluation, then a forward and backward pass of the total loss in training, with random
    weights. Then evaluation again, with the weights after our pass moved to PyTorch.
    """
    config = network_config(fusion, depth, num_channels["s2"], decoder)
    theirs = torch_network(fusion, depth, num_channels, NUM_CLASSES, seed=4, decoder=decoder)
    without_dropout(theirs)
    randomise_norms(theirs, seed=5)
    abstract = nnx.state(nnx.eval_shape(lambda: pretrain_step.make_network(config, nnx.Rngs(0))))
    batch = example_batch(num_channels)
    images = {m: batch[m] for m in num_channels}
    torch_images = {m: to_torch_image(x) for m, x in images.items()}
    evaluate, differentiate = compiled_functions(config, images, batch, compiler_options)

    def state_of(network):
        state = torch_keys.from_torch_state(torch_arrays(network), abstract)
        return nnx.split_state(state, nnx.Param, nnx.BatchStat)

    found = {}
    with torch.no_grad():
        expected = theirs.eval()(torch_images)
    found["eval_logits"] = logit_error(evaluate(*state_of(theirs)), expected)

    gate_norms(theirs, seed=7)
    before = copy.deepcopy(theirs)
    params, batch_stats = state_of(theirs)
    (loss, (logits, batch_stats)), grads = differentiate(params, batch_stats)
    expected = theirs.train()(torch_images)
    expected_loss = torch_oracle.total_loss(
        expected, torch.from_numpy(batch["labels"]).long(), to_torch_image(batch["prior"]), EPOCH
    )
    expected_loss.backward()
    found["loss"] = abs(float(loss) - expected_loss.item()) / expected_loss.item()
    found["train_logits"] = logit_error(logits, expected)
    arrays = torch_arrays(theirs)
    found["statistics"] = max(
        scaled_error(array, arrays[key])
        for key, array in torch_keys.to_torch_state(batch_stats).items()
    )
    exact = None if decoder == "unet" else exact_gradients(before, torch_images, batch)
    found["gradients"] = gradient_error(torch_keys.to_torch_state(grads), theirs, exact)

    moved = torch_keys.to_torch_state(params) | torch_keys.to_torch_state(batch_stats)
    theirs.load_state_dict({k: torch.from_numpy(v) for k, v in moved.items()}, strict=True)
    with torch.no_grad():
        expected = theirs.eval()(torch_images)
    found["eval_logits_after_step"] = logit_error(evaluate(params, batch_stats), expected)
    return found
