"""Finetuning on clean labels: the paper's three tasks.

    python -m cromss_jax.main --config=configs/finetune.py:task=dfc2020,input=s2,encoder=frozen \
        --config.init_from=runs/pretrain --workdir=runs/dfc2020_s2_frozen

Variants follow a colon and are separated by commas. Single fields are set by their own flags.
Defaults are in parentheses:

    task=dfc2020|dw|osm             data set, decoder and crop size (dfc2020)
    input=s1|s2                     modality (s2)
    encoder=frozen|trained|late     trained: fine-tuned; late: frozen until config.unfreeze_epoch
                                    (frozen)
    bands=13|12|10|9|3              number of Sentinel-2 bands (13)
    mode=evaluate                   scores the weights in config.init_from without training
    sample                          minutes on a laptop, on `data_prep.sample --format=...`
    --config.seeds="(0, 1, 2)"      several runs; reports mean and standard deviation
"""

import ml_collections

from cromss_jax import sensors

# Data set, decoder and crop by task (paper, Section IV).
_TASKS = {
    "dfc2020": ("dfc2020", "pspnet", 256),
    "dw": ("ssl4eo_s12_dw", "deeplabv3plus", 496),
    "osm": ("ssl4eo_s12_osm", "fpn", 480),
}
_VARIANTS = {
    "task": tuple(_TASKS),
    "input": sensors.MODALITIES,
    "encoder": ("frozen", "trained", "late"),
    "bands": tuple(str(count) for count in sensors.S2_BAND_CHOICES),
    "mode": ("finetune", "evaluate"),
}


def _parse(argument: str) -> dict[str, str]:
    chosen = {}
    for item in filter(None, argument.split(",")):
        name, _, value = item.partition("=")
        if item != "sample" and value not in _VARIANTS.get(name, ()):
            known = [f"{n}={'|'.join(v)}" for n, v in _VARIANTS.items()]
            raise ValueError(
                f"configs/finetune.py has no variant {item!r}: choose from sample, "
                + ", ".join(known)
            )
        chosen[name] = value
    return chosen


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """The configuration, changed by the variants in `argument`."""
    chosen = _parse(argument)
    name, decoder, crop_size = _TASKS[chosen.get("task", "dfc2020")]
    config = ml_collections.ConfigDict()

    config.mode = chosen.get("mode", "finetune")
    # One run per seed. The seed determines the initial weights of the decoder, the order of tiles,
    # their augmentation, and the choice of tiles if config.data.num_train_tiles is set.
    config.seeds = (42,)
    config.num_epochs = 50
    config.batch_size = 32
    # 0: all devices of all processes.
    config.num_devices = 0
    config.deterministic = False  # on GPUs: the same bits in every run, at some cost

    # Initial weights of the encoder: a run's folder, a released checkpoint, or a PyTorch ResNet,
    # also as saved by MoCo, DINO or DeCUR. "{seed}" in the path is replaced by each seed. Empty:
    # randomly initialised. With mode=evaluate, the weights to score.
    config.init_from = ""
    # Bands of the file in config.init_from, in the order of its channels, such as ("B2", "B3");
    # needed if the file does not tell them. Empty: those that it tells.
    config.init_from_bands = ()
    # Name of these weights in the tables; empty: config.init_from.
    config.weights_name = ""
    config.encoder = chosen.get("encoder", "frozen")
    config.unfreeze_epoch = 10  # for encoder=late

    config.data = ml_collections.ConfigDict()
    config.data.dir = "data"
    config.data.name = name
    config.data.train_split = "train"
    config.data.test_split = "test"
    config.data.crop_size = crop_size
    config.data.num_train_tiles = 0  # 0: all; otherwise this number, drawn by the seed
    config.data.num_threads = 2
    config.data.max_bad_records = 0  # damaged ones that the run goes on without

    config.augmentation = ml_collections.ConfigDict()
    config.augmentation.flip_probability = 0.5
    config.augmentation.rotation_probability = 0.0
    config.augmentation.max_angle = 90.0  # degrees

    config.modalities = (chosen.get("input", "s2"),)
    config.s2_bands = sensors.S2_BAND_CHOICES[int(chosen.get("bands", 13))]

    config.network = ml_collections.ConfigDict()
    config.network.fusion = "none"
    config.network.depth = 50  # ResNet
    config.network.decoder = decoder  # pspnet, deeplabv3plus, fpn or unet
    config.network.dtype = "float32"  # or bfloat16; for activations, parameters stay float32

    config.loss = ml_collections.ConfigDict()
    config.loss.segmentation = ("cross_entropy", "dice")

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.name = "adam"  # or sgd
    config.optimizer.learning_rate = 5e-4
    config.optimizer.l2 = 0.0  # added to the gradient
    config.optimizer.momentum = 0.9  # for sgd
    # Factor of the learning rate from each stage of the encoder to the stage before it.
    config.optimizer.layer_decay = 1.0

    # Half a cosine from the learning rate to the final one, then constant.
    config.schedule = ml_collections.ConfigDict()
    config.schedule.final_learning_rate = 1e-5
    config.schedule.epochs = 40

    config.log_every_steps = 50
    config.checkpoint_every_epochs = 10
    config.checkpoints_to_keep = 2
    # Whether to write the predicted maps of the test tiles as GeoTIFFs.
    config.save_predictions = False

    if "sample" in chosen:
        _shrink(config)
    return config


def _shrink(config: ml_collections.ConfigDict) -> None:
    """The recipe for the sample's small tiles, on two cores."""
    config.data.dir = "data/sample"
    config.data.crop_size = 96
    config.batch_size = 8
    config.num_epochs = 40
    config.network.depth = 18
    config.schedule.epochs = 30
    config.optimizer.learning_rate = 2e-3
    config.log_every_steps = 20
    config.checkpoint_every_epochs = 20
