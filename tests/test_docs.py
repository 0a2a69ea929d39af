"""The README files: their blocks run or their flags are parsed, what they name exists.

A shell or Python block runs, each document's in order and in a folder of its own that looks like a
clone. Commands stay as users type them; flags behind them make the work small. Networks are
ResNet-10, and so are those that a block asks smp for; README.md runs with its ResNet-18, which is
slow, and is else parsed. A block with `<!-- parsed only: reason -->` above it has its flags parsed
by the command's own parser, one with `<!-- not run: reason -->` is only counted.
"""

import collections
import contextlib
import functools
import importlib.util
import json
import pathlib
import pkgutil
import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable
from unittest import mock

import pytest
from packaging.requirements import Requirement
from sybil import Document, Example
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer

from configs import finetune, pretrain
from tests import commands, environment, runs

ROOT = runs.ROOT
PACKAGES = ("configs", "cromss_jax", "data_prep", "tests")
DOCUMENTS = sorted(ROOT.glob("*.md")) + sorted(
    path for name in PACKAGES for path in (ROOT / name).rglob("README.md")
)
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in DOCUMENTS}
# Languages of blocks: what becomes of them. Drawings and trees are text.
LANGUAGES = ("bash", "python", "dockerfile", "text")
MARK = re.compile(r"<!-- (parsed only|not run): (\S.*) -->\n\Z")
MODULES = ("main", "predict", "audit", "plan", "convert", "launch_slurm", "launch_tpu")
MODULES = tuple(f"cromss_jax.{name}" for name in MODULES)
MODULES += ("data_prep.build", "data_prep.sample")
# What a command takes beside flags.
POSITIONAL = {"cromss_jax.convert": r"(to|from)_torch", "cromss_jax.compare": r"\S+"}
# Options of xpk, gcloud and sbatch that the text names.
FOREIGN_FLAGS = {"spot", "dry-run", "gpu-bind", "gpus-per-task"}
# No field of a configuration: a file's name, and any field.
OTHER = ("config.json", "--config.x=y")


def smaller(module: str, arguments: list[str], depth: int) -> list[str]:
    """Flags that make a command's work small; the last of equal flags counts."""
    if module == "data_prep.sample":
        is_tiles = any(argument.startswith("--format=") for argument in arguments)
        return ["--locations=16", "--tile_size=48"] + ([] if is_tiles else ["--seasons=2"])
    if module == "cromss_jax.main":
        fields = {k: v for k, v in runs.tiny_flags("").items() if k != "data.dir"}
        fields["num_epochs"] = 1
        fields["network.depth"] = depth
        return [f"--config.{name}={value}" for name, value in fields.items()]
    return []


def parse_flags(
    module: str, arguments: list[str], folder: pathlib.Path = ROOT
) -> tuple[str, list[str]]:
    """Parses a command's flags as the command does.

    Returns:
      What is wrong, "" if nothing is; the names of all flags that there are.
    """
    done = commands.run("tests.parsed_flags", module, *arguments, cwd=folder)
    assert done.returncode == 0, done.stderr
    wrong, rest, names = json.loads(done.stdout.splitlines()[-1])
    foreign = arguments[arguments.index("--") + 1 :] if "--" in arguments else []
    own = rest[: len(rest) - len(foreign)]
    unknown = [word for word in own if not re.fullmatch(POSITIONAL.get(module, ""), word)]
    if unknown and not wrong:
        wrong = f"unknown arguments {unknown}"
    return wrong, names


@pytest.fixture
def clone(tmp_path, monkeypatch) -> pathlib.Path:
    """A folder that looks like a clone, nothing built or trained in it; the current one."""
    for path in ROOT.iterdir():
        if path.name not in ("data", "runs", "build", "dist") and path.name[0] != ".":
            (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines_of(source: str) -> list[list[str]]:
    """The commands of a shell block, in words."""
    lines = source.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def check(words: list[str], folder: pathlib.Path) -> None:
    """Checks a command without running it."""
    match words:
        case ["python", "-m", module, *arguments]:
            wrong, _ = parse_flags(module, arguments, folder)
            assert not wrong, f"{shlex.join(words)}: {wrong}"
        case ["make", *targets]:
            done = subprocess.run(["make", "-n", *targets], cwd=folder, capture_output=True)
            assert done.returncode == 0, done.stderr.decode()
        case ["pip", "install", *requirements]:
            ours = [text for text in requirements if text.startswith(".")]
            extras = {
                extra for text in ours for extra in Requirement(f"cromss_jax{text[1:]}").extras
            }
            project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            assert extras <= project["optional-dependencies"].keys(), requirements
        case _:
            pytest.fail(f"{words[0]} can be neither run nor parsed: mark it as not run")


def run(words: list[str], folder: pathlib.Path, depth: int) -> None:
    """Runs a command, with less to do."""
    assert words[:2] == ["python", "-m"], f"{words[0]} is not run here: mark the block"
    _, _, module, *arguments = words
    done = commands.run(module, *arguments, *smaller(module, arguments, depth), cwd=folder)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"


def patched_smp(depth: int) -> contextlib.AbstractContextManager:
    """Makes U-Nets of smp that of this depth which `torch_parity` has."""
    if depth != 10 or not importlib.util.find_spec("segmentation_models_pytorch"):
        return contextlib.nullcontext()
    from tests import torch_parity

    def small_unet(name: str, *, encoder_weights: None, in_channels: int, classes: int):
        assert name == "resnet18"  # of the configuration `sample`
        return torch_parity.torch_model(depth, in_channels, classes)

    return mock.patch.object(torch_parity.smp, "Unet", small_unet)


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        *((name, 10) for name in TEXTS if name != "README.md"),
        ("README.md", 0),
        pytest.param("README.md", 18, marks=pytest.mark.slow),
    ],
)
def test_blocks(name, depth, clone, record_property, monkeypatch):
    """With networks of this depth; 0: its blocks are parsed only."""
    # `make test-slow` compiles as users do, which takes minutes here; no numbers are compared.
    monkeypatch.setenv("XLA_FLAGS", environment.quick_flags())
    counts = collections.Counter()

    def by_its_mark(example: Example, evaluate: Callable[[Example, str], None]) -> None:
        mark = MARK.search(example.document.text[: example.region.start])
        kind = mark[1] if mark else "run"
        if kind != "not run":
            evaluate(example, kind)
        counts["parsed only" if kind == "run" and not depth else kind] += 1

    def shell(example: Example, kind: str) -> None:
        for words in lines_of(example.parsed):
            run(words, clone, depth) if kind == "run" and depth else check(words, clone)

    def python(example: Example, kind: str) -> None:
        if kind == "run" and depth:
            with patched_smp(depth if "smp." in example.parsed else 0):
                PythonEvaluator()(example)
        else:
            compile(example.parsed, name, "exec")

    document = Document.parse(
        str(ROOT / name),
        CodeBlockParser("bash", functools.partial(by_its_mark, evaluate=shell)),
        CodeBlockParser("python", functools.partial(by_its_mark, evaluate=python)),
    )
    for example in document:
        example.evaluate()
    record_property("blocks", dict(counts))


def test_every_block_says_its_language():
    """And there are no indented blocks, which would be overlooked."""
    for name, text in TEXTS.items():
        document, start = Document(text, name), 0
        lexer = RawFencedCodeBlockLexer(re.compile(r"(?P<language>[^\n]*)\n"))
        outside = ""
        for region in lexer(document):
            assert region.lexemes["language"] in LANGUAGES, document.region_details(region)
            outside += text[start : region.start]
            start = region.end
        outside += text[start:]
        assert not re.search(r"^ {4,}\S", outside, re.MULTILINE), name


def without_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def spans(text: str) -> list[str]:
    """What stands in single backticks."""
    return re.findall(r"`([^`\n]+)`", without_blocks(text))


@pytest.mark.parametrize("name", TEXTS)
def test_commands_within_the_text(name, clone):
    for span in spans(TEXTS[name]):
        if module := re.fullmatch(r"python -m ((cromss_jax|data_prep|tests)[a-z_.]+)", span):
            assert importlib.util.find_spec(module[1]), span
        elif re.match(r"python -m (cromss_jax|data_prep|tests)\.\S+ |make |pip install ", span):
            check(shlex.split(span), clone)


def test_flags_within_the_text():
    """In backticks: those of the commands, and fields of the configurations."""
    known = set(FOREIGN_FLAGS)
    for module in MODULES:
        known |= set(parse_flags(module, [])[1])
    fields = [config.get_config() for config in (pretrain, finetune)]
    for text in TEXTS.values():
        for span in spans(text):
            for flag in re.findall(r"(?:^|(?<= ))--([a-z][\w-]*)", span):
                assert flag in known or not re.match(r"--|python -m (cromss|data)", span), span
            if field := re.match(r"(?:--)?config\.(\w[\w.]*)", span):
                assert any(has_field(config, field[1]) for config in fields) or span in OTHER, span


def has_field(config, path: str) -> bool:
    for key in path.split("."):
        if key not in config:
            return False
        config = config[key]
    return True


def test_named_functions_exist():
    """As in `method.selection.entangle`, from cromss_jax on."""
    rooms = [path.parent.name for path in (ROOT / "cromss_jax").glob("*/__init__.py")]
    named = re.compile(rf"({'|'.join(rooms)})(\.\w+)+")
    found = {s for s in spans(TEXTS["cromss_jax/README.md"]) if named.fullmatch(s)}
    found = {name for name in found if not name.endswith(".py")}
    assert len(found) > 40
    for name in found:
        pkgutil.resolve_name(f"cromss_jax.{name}")


@pytest.mark.parametrize("name", TEXTS)
def test_links_and_files_exist(name):
    """Links, with the headings that they lead to; Python files in backticks."""
    folders = (ROOT, ROOT / "cromss_jax", (ROOT / name).parent)
    for span in spans(TEXTS[name]):
        if re.fullmatch(r"[\w/]+\.py", span):
            assert any((folder / span).is_file() for folder in folders), span
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[name]):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text()), target


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", without_blocks(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def test_the_readme_is_short():
    lines = TEXTS["README.md"].splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 120
    assert "make test" in TEXTS["README.md"]
