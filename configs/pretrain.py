"""CromSS pretraining on SSL4EO-S12 with noisy Dynamic World labels: the paper's recipe.

    python -m cromss_jax.main --config=configs/pretrain.py --workdir=runs/pretrain

Variants follow a colon and are separated by commas. Single fields are set by their own flags:

    --config=configs/pretrain.py:fusion=late,bands=9    two complete U-Nets, 9 bands
    --config=configs/pretrain.py:modality=s1            one network, no consistency
    --config=configs/pretrain.py:selection=off          full weight for every label
    --config=configs/pretrain.py:sample                 minutes on a laptop, on the sample data
    --config.batch_size=256                             any field
"""

import ml_collections

from cromss_jax import sensors

_VARIANTS = {
    "fusion": ("mid", "late"),
    "bands": tuple(str(count) for count in sensors.S2_BAND_CHOICES),
    "modality": sensors.MODALITIES,
    "selection": ("on", "off"),
}


def _parse(argument: str) -> dict[str, str]:
    chosen = {}
    for item in filter(None, argument.split(",")):
        name, _, value = item.partition("=")
        if item != "sample" and value not in _VARIANTS.get(name, ()):
            known = [f"{n}={'|'.join(v)}" for n, v in _VARIANTS.items()]
            raise ValueError(
                f"configs/pretrain.py has no variant {item!r}: choose from sample, "
                + ", ".join(known)
            )
        chosen[name] = value
    if "modality" in chosen and "fusion" in chosen:
        raise ValueError(
            "configs/pretrain.py has modality=... and fusion=...: a single modality has no fusion, "
            "remove one of them"
        )
    return chosen


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """The configuration, changed by the variants in `argument`."""
    chosen = _parse(argument)
    config = ml_collections.ConfigDict()

    config.mode = "pretrain"
    config.seed = 42
    config.num_epochs = 200
    config.batch_size = 128  # of all devices; the learning rate is not scaled with it
    config.num_devices = 0  # 0: all devices of all processes
    # Less memory for more time: the batch in parts; activations computed again for the gradient.
    config.microbatches = 1
    config.rematerialise = False
    config.deterministic = False  # on GPUs: the same bits in every run, at some cost

    config.init_from = ""  # initial weights: a run's folder or a file of PyTorch weights
    # Bands of that file in the order of its channels, such as ("B2", "B3"). Empty: those it tells.
    config.init_from_bands = ()

    config.data = ml_collections.ConfigDict()
    config.data.dir = "data"
    config.data.name = "ssl4eo_s12_nol"
    config.data.crop_size = 256
    config.data.validation_fraction = 0.01  # of the locations; all their seasons are scored
    config.data.max_bad_records = 0  # damaged ones that the run goes on without
    config.data.num_threads = 2

    config.augmentation = ml_collections.ConfigDict()
    config.augmentation.flip_probability = 0.5
    config.augmentation.rotation_probability = 0.2
    config.augmentation.max_angle = 90.0  # degrees

    config.modalities = (chosen["modality"],) if "modality" in chosen else sensors.MODALITIES
    config.s2_bands = sensors.S2_BAND_CHOICES[int(chosen.get("bands", 13))]

    config.network = ml_collections.ConfigDict()
    config.network.fusion = "none" if "modality" in chosen else chosen.get("fusion", "mid")
    config.network.depth = 50  # ResNet
    config.network.decoder = "unet"  # or pspnet, deeplabv3plus, fpn
    config.network.dtype = "float32"  # or bfloat16; for activations, parameters stay float32

    config.loss = ml_collections.ConfigDict()
    config.loss.segmentation = ("cross_entropy", "dice")
    config.loss.consistency = "none" if "modality" in chosen else "ce"
    config.loss.consistency_weight = 1.0
    # Label smoothing. Priors: "t" temporal, "s" spatial, "ts" their mean.
    config.loss.prior = "ts"
    config.loss.prior_weight = 0.15
    config.loss.uniform_weight = 0.05

    config.selection = ml_collections.ConfigDict()
    config.selection.enabled = chosen.get("selection", "on") == "on"
    config.selection.confidence = "entropy"  # or gini; for the prediction confidence
    config.selection.final_keep_fraction = 0.5
    config.selection.ramp = "exp"
    config.selection.ramp_epochs = 80
    # Thresholds over the global batch; "per_device" reproduces the published code under DDP.
    config.selection.scope = "global"

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.name = "adam"  # or sgd
    config.optimizer.learning_rate = 0.005
    config.optimizer.l2 = 1e-8  # added to the gradient
    config.optimizer.momentum = 0.9  # for sgd

    config.schedule = ml_collections.ConfigDict()
    config.schedule.name = "plateau"  # or exponential, constant
    config.schedule.factor = 0.5
    config.schedule.patience = 30  # validations without a relative improvement of 1e-4
    config.schedule.decay = 0.98  # per epoch, for the exponential schedule

    config.log_every_steps = 50
    config.eval_every_epochs = 1
    config.checkpoint_every_epochs = 5
    config.checkpoints_to_keep = 3
    config.num_pictures = 4

    if "sample" in chosen:
        _shrink(config)
    return config


def _shrink(config: ml_collections.ConfigDict) -> None:
    """The recipe of `make pretrain`: all parts of the method, small enough for two cores."""
    config.data.dir = "data/sample"
    config.num_epochs = 14
    config.batch_size = 8
    config.data.crop_size = 96
    config.data.validation_fraction = 0.125
    config.network.depth = 18
    config.optimizer.learning_rate = 0.003
    config.schedule.name = "exponential"
    config.schedule.decay = 0.8
    config.selection.ramp_epochs = 10
    config.log_every_steps = 10
    config.eval_every_epochs = 7
    config.checkpoint_every_epochs = 7
