"""The PyTorch networks that ours must equal, and the way between the two. Import after
`pytest.importorskip("segmentation_models_pytorch")`."""

from collections.abc import Mapping

import numpy as np
import segmentation_models_pytorch as smp
import torch


class TorchMidFusion(torch.nn.Module):
    """Two encoders, one decoder and head under the published code's attribute names."""

    def __init__(self, depth: int, num_channels: Mapping[str, int], num_classes: int):
        super().__init__()
        unet = torch_unet(depth, num_channels["s2"], num_classes)
        name = f"resnet{depth}"
        self.encoder1 = smp.encoders.get_encoder(name, in_channels=num_channels["s1"], weights=None)
        self.encoder = unet.encoder
        self.decoder = unet.decoder
        self.segmentation_head = unet.segmentation_head

    def forward(self, images):
        return {
            "s1": self.segmentation_head(self.decoder(self.encoder1(images["s1"]))),
            "s2": self.segmentation_head(self.decoder(self.encoder(images["s2"]))),
        }


class TorchLateFusion(torch.nn.Module):
    """Two complete U-Nets under the published code's attribute names."""

    def __init__(self, depth: int, num_channels: Mapping[str, int], num_classes: int):
        super().__init__()
        self.model1 = torch_unet(depth, num_channels["s1"], num_classes)
        self.model2 = torch_unet(depth, num_channels["s2"], num_classes)

    def forward(self, images):
        return {"s1": self.model1(images["s1"]), "s2": self.model2(images["s2"])}


class TorchSingleModality(smp.Unet):
    """`smp.Unet` on a dict of one modality."""

    def forward(self, images):
        ((modality, image),) = images.items()
        return {modality: super().forward(image)}


def torch_unet(depth: int, in_channels: int, num_classes: int, cls=smp.Unet) -> smp.Unet:
    return cls(f"resnet{depth}", encoder_weights=None, in_channels=in_channels, classes=num_classes)


def torch_network(
    fusion: str, depth: int, num_channels: Mapping[str, int], num_classes: int, seed: int
) -> torch.nn.Module:
    """smp's counterpart of `models.make_network`, initialised from `seed`."""
    torch.manual_seed(seed)
    if fusion == "none":
        (in_channels,) = num_channels.values()
        return torch_unet(depth, in_channels, num_classes, TorchSingleModality)
    cls = {"mid": TorchMidFusion, "late": TorchLateFusion}[fusion]
    return cls(depth, num_channels, num_classes)


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
    """Sets every BatchNorm so that no activation comes near the kink of a ReLU.

    Where one does, rounding decides whether a gradient passes, and two correct float32
    computations differ by 3e-3 (PyTorch's own float32 and float64 do). Here 70 % of the channels
    are far above zero, the rest far below.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.0, generator=generator)
                open_ = torch.rand(module.bias.shape, generator=generator) < 0.7
                # A channel may have summed up tens in the residual stream before it is closed.
                module.bias.copy_(torch.where(open_, 4.0, -100.0))
                module.bias.add_(torch.rand(module.bias.shape, generator=generator))
