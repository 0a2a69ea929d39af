"""Imports go one way between rooms, and heavy or foreign libraries stay where they belong."""

import ast
import functools
import importlib
import importlib.util
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]

# Rooms of cromss_jax: each imports only what stands further down. `costs` stands beside them, for
# the commands alone. A module at the top level that is not in GROUND is a command, or `pretrained`,
# the Python API.
ROOMS = (
    "commands",
    "auditing",
    "mapping",
    "training",
    "weights",
    "results",
    "data",
    "networks",
    "method",
    "ground",
)
GROUND = {
    *("blocks", "errors", "files", "legend", "lock", "package", "platforms", "presets", "sensors")
}
BESIDE = "costs"
# Commands, and modules beside them, that read scenes as data sets of scenes do, and with what.
READERS_OF_SCENES = tuple(
    f"cromss_jax.{name}"
    for name in ("predict", "predict_beam", "scenes", "audit", "audit_scene", "folds")
)
# What of cromss_jax data_prep imports.
PREPARED_WITH = ("blocks", "errors", "sensors", "legend", "presets", "files", "lock")
OURS = ("cromss_jax", "data_prep", "configs", "tests")
READING = re.compile(r"data_prep\.(errors|options|reading\..+|datasets\.scene_\w+)$")


@functools.cache
def imports_of(path: pathlib.Path) -> frozenset[str]:
    """Full names of everything a file imports, `from a import b` as a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names)


def modules(package: str) -> dict[str, pathlib.Path]:
    """Files of a package by their full name, as in "cromss_jax.method.losses"."""
    found = {}
    for path in (ROOT / package).rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def inner(path: pathlib.Path, package: str) -> set[str]:
    """The modules of a package that a file imports, by full name."""
    known = modules(package)
    found = set()
    for name in imports_of(path):
        while name and name not in known:
            name = name.rpartition(".")[0]
        found |= {name} - {"", package}
    return found


def room(module: str) -> str:
    """The room of a module of cromss_jax, by full name."""
    parts = module.split(".")[1:] or ["__init__"]
    if (ROOT / "cromss_jax" / parts[0]).is_dir():
        return parts[0]
    return "ground" if parts[0] in GROUND else "commands"


def edges() -> set[tuple[str, str]]:
    """Imports between modules of different rooms."""
    return {
        (name, other)
        for name, path in modules("cromss_jax").items()
        if name != "cromss_jax"
        for other in inner(path, "cromss_jax")
        if room(name) != room(other)
    }


def test_rooms_import_downwards():
    for name, other in edges():
        if BESIDE in (room(name), room(other)):
            assert room(name) == "commands" or room(other) == "ground", f"{name} imports {other}"
        else:
            rank = ROOMS.index
            assert rank(room(other)) > rank(room(name)), f"{name} imports {other}"


def test_modules_import_in_no_circle():
    graph = {name: inner(path, "cromss_jax") for name, path in modules("cromss_jax").items()}
    while graph:
        free = {name for name, others in graph.items() if not others & graph.keys() - {name}}
        assert free, f"a circle among {sorted(graph)}"
        graph = {name: others for name, others in graph.items() if name not in free}


def test_every_room_says_what_it_is():
    for name, path in modules("cromss_jax").items():
        if path.name == "__init__.py" and name != "cromss_jax":
            tree = ast.parse(path.read_text())
            assert len(tree.body) == 1, f"{path} is more than a docstring"
            assert "Begin with" in ast.get_docstring(tree), path


def test_the_method_knows_no_config_and_no_networks():
    for name, path in modules("cromss_jax").items():
        if room(name) == "method":
            names = imports_of(path)
            assert not {n for n in names if n.startswith(("flax", "ml_collections", "absl"))}, name


def test_the_host_side_imports_no_jax():
    host = (
        "data.input_pipeline",
        "data.validation_split",
        "blocks",
        "sensors",
        "legend",
        "presets",
        "files",
        "lock",
        "package",
    )
    for name in host:
        names = imports_of(modules("cromss_jax")[f"cromss_jax.{name}"])
        foreign = {n for n in names if n.split(".")[0] in ("jax", "flax", "orbax")}
        assert not foreign, f"{name} imports {foreign}"


def test_torch_and_tensorflow_stay_outside():
    for name, path in modules("cromss_jax").items():
        names = imports_of(path)
        foreign = {n for n in names if n.split(".")[0] in ("torch", "tensorflow", "smp")}
        assert not foreign or name == "cromss_jax.weights.files", f"{name} imports {foreign}"


# Errors of one file that is read: what reads it says which file, and what becomes of it.
OF_ONE_FILE = {"ArchiveError", "DamagedError", "GeotiffError", "ZarrError"}


def test_what_we_raise_is_printed_as_a_sentence():
    """Commands print UserError and OSError, and show all else with a traceback."""
    bases = {}
    for package in ("cromss_jax", "data_prep"):
        for path in modules(package).values():
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef) and node.name.endswith("Error"):
                    bases[node.name] = {ast.unparse(base).split(".")[-1] for base in node.bases}
    assert bases.keys() >= OF_ONE_FILE
    printed = {"UserError", "OSError", "FileNotFoundError"}
    for name in bases.keys() - OF_ONE_FILE - printed:
        while name not in printed:
            assert name in bases, f"{name} is neither"
            (name,) = bases[name]


def test_scenes_alone_are_read_with_data_prep_and_it_knows_constants_files_and_the_lock_only():
    for name, path in [*modules("cromss_jax").items(), *modules("configs").items()]:
        used = inner(path, "data_prep")
        if name in READERS_OF_SCENES:
            used = {module for module in used if not READING.match(module)}
        assert not used, path
    for path in modules("data_prep").values():
        shared = {f"cromss_jax.{name}" for name in PREPARED_WITH}
        assert inner(path, "cromss_jax") <= shared, path


# Rooms of data_prep, as those of cromss_jax, below the command `build`.
PREPARATION = ("commands", "sample", "datasets", "writing", "reading", "finding", "ground")


def preparation_room(module: str) -> str:
    """The room of a module of data_prep, by full name."""
    parts = module.split(".")[1:] or ["build"]
    if (ROOT / "data_prep" / parts[0]).is_dir():
        return parts[0]
    return "commands" if parts[0] == "build" else "ground"


def test_preparation_imports_downwards():
    rank = PREPARATION.index
    for name, path in modules("data_prep").items():
        for other in inner(path, "data_prep"):
            above, below = preparation_room(name), preparation_room(other)
            assert rank(below) >= rank(above), f"{name} imports {other}"
            assert (above, below) != ("commands", "sample"), f"{name} imports {other}"


def test_what_benches_name_is_there():
    """They run for minutes or hours, and nobody runs all of them after a change."""
    missing = []
    for path in (ROOT / "tests" / "bench").rglob("*.py"):
        tree = ast.parse(path.read_text())
        named = {}  # modules of ours by the name that they have here
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or node.module.split(".")[0] not in OURS:
                continue
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if importlib.util.find_spec(node.module).submodule_search_locations and (
                    importlib.util.find_spec(full)
                ):
                    named[alias.asname or alias.name] = importlib.import_module(full)
                elif not hasattr(importlib.import_module(node.module), alias.name):
                    missing.append(f"{path.name}: {full}")
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                module = named.get(node.value.id)
                if module and not hasattr(module, node.attr):
                    missing.append(f"{path.name}: {node.value.id}.{node.attr}")
    assert not missing
