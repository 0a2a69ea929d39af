"""Imports go one way, and heavy or foreign libraries stay where they belong."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parents[1]

# Who may import whom inside cromss_jax: only what stands further down.
LAYERS = (
    ("launch_tpu", "main", "plan", "convert", "compare"),
    ("train", "finetune"),
    ("run",),
    ("weight_files",),
    ("cards",),
    ("weights", "finetune_step"),
    (
        "step",
        "data",
        "checkpoint",
        "report",
        "pictures",
        "maps",
        "distributed",
        "costs",
        "command_line",
    ),
    ("models", "sharding", "preprocess", "torch_keys", "files", "traffic"),
    ("decoders", "resnet"),
    ("layers",),
    ("convolution",),
    ("packing",),
    ("losses", "selection", "smoothing", "metrics", "schedules", "optimizers"),
    ("sensors",),
)
# The method sees arrays and scalars only.
PURE = {"losses", "selection", "smoothing", "metrics"}
# The host side of the data pipeline knows no device.
HOST = {"data", "sensors"}


def imports_of(path: pathlib.Path) -> set[str]:
    """Full names of everything a file imports, `from a import b` as a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def inner(names: set[str]) -> set[str]:
    """Modules of cromss_jax among imports."""
    return {n.split(".")[1] for n in names if n.startswith("cromss_jax.")}


def modules() -> dict[str, set[str]]:
    found = {p.stem: imports_of(p) for p in (ROOT / "cromss_jax").glob("*.py")}
    del found["__init__"]
    return found


def test_every_module_has_a_layer_and_imports_downwards():
    rank = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    for name, names in modules().items():
        assert name in rank, f"{name} has no layer"
        for other in inner(names):
            assert rank[other] > rank[name], f"{name} imports {other}"


def test_the_method_knows_no_config_and_no_networks():
    for name in PURE:
        names = modules()[name]
        assert inner(names) <= {"sensors"}, name
        assert not {n for n in names if n.startswith(("flax", "ml_collections", "absl"))}, name


def test_the_host_side_imports_no_jax():
    for name in HOST:
        names = {n for n in modules()[name] if n.split(".")[0] in ("jax", "flax", "orbax")}
        assert not names, f"{name} imports {names}"


def test_torch_and_tensorflow_stay_outside():
    for name, names in modules().items():
        foreign = {n for n in names if n.split(".")[0] in ("torch", "tensorflow", "smp")}
        assert not foreign or name == "weight_files", f"{name} imports {foreign}"


def test_nothing_imports_data_prep_and_it_knows_the_constants_only():
    for path in [*(ROOT / "cromss_jax").glob("*.py"), *(ROOT / "configs").glob("*.py")]:
        assert not {n for n in imports_of(path) if n.startswith("data_prep")}, path
    for path in (ROOT / "data_prep").glob("*.py"):
        assert inner(imports_of(path)) <= {"sensors"}, path
