"""Do the tests notice a wrong line? `python -m tests.bench.mutants [--count=100] [--seed=0]`.

Draws places in the method, the data pipeline and the checkpoints where one operator or constant
can be another, changes one at a time in a copy of the tree, and runs the fast tests of that module
until one fails. What no test noticed is printed: either no test can tell, as the change is equal in
effect (`EQUAL` says why), or a test is missing.
"""

import ast
import collections
import dataclasses
import difflib
import importlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

from absl import app, flags

# Nothing of ours is imported here: the forked processes import it from the changed tree.
ROOT = pathlib.Path(__file__).parents[2]
_OURS = ("cromss_jax", "configs", "data_prep", "tests")
# What takes seconds to import, and no changed line can change.
_IMPORTED_ONCE = ("jax", "flax.nnx", "optax", "orbax.checkpoint", "grain", "tensorflow_datasets")
_IMPORTED_ONCE += ("scipy.ndimage", "rasterio", "pytest")

_COUNT = flags.DEFINE_integer("count", 100, "How many mutants are drawn of all", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the draw")
_FIRST = flags.DEFINE_integer("first", 0, "The first of the drawn ones to run, to continue")

# A mutant that lets tests run for longer has been noticed, too.
_SECONDS = 300

# The fast tests of each module, the quickest first.
MODULES = {
    "method/losses": ("method/test_method", "training/test_objective"),
    "method/selection": ("method/test_method", "training/test_objective", "test_platforms"),
    "method/smoothing": ("method/test_method", "data/test_preprocess", "test_platforms"),
    "method/schedules": ("method/test_method", "method/test_metrics"),
    "method/metrics": ("method/test_metrics",),
    "training/objective": ("training/test_objective",),
    "data/preprocess": ("data/test_preprocess", "test_platforms"),
    "data/validation_split": ("data/test_validation_split",),
    "data/input_pipeline": ("data/test_input_pipeline", "training/test_data_says"),
    "training/checkpoint": ("training/test_checkpoint",),
    "weights/manifest": ("training/test_checkpoint",),
}

# By module and changed line: why that is equal in effect.
EQUAL = {
    (
        "data/preprocess",
        "weights = np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))",
    ): "both pieces are 0 at distance 1",
    (
        "data/preprocess",
        "rotated = jnp.flatnonzero(angle, size=angle.size, fill_value=1)",
    ): "the loop ends before what is filled",
    (
        "data/preprocess",
        "maps = {name: x[..., 1].astype(jnp.uint8) for name, x in labels.items()}",
    ): "JAX clamps an index beyond the only channel",
    (
        "data/preprocess",
        "side = min(math.ceil((block - 1) * math.sqrt(2)) + 3, size)",
    ): "a larger square holds the same pixels",
    (
        "data/preprocess",
        "side = min(math.ceil((block - 1) * math.sqrt(3)) + 2, size)",
    ): "a larger square holds the same pixels",
    (
        "data/preprocess",
        "size, ends = maps[0].shape[1], np.cumsum([x.shape[-1] for x in maps])",
    ): "crops are square",
    (
        "data/preprocess",
        'return jnp.max(jnp.where(is_drawn, records["labels"], 0), axis=1, dtype=jnp.int32)',
    ): "of zeros and one number from 0, sum and maximum are the same",
    (
        "data/preprocess",
        "size, ends = maps[1].shape[0], np.cumsum([x.shape[-1] for x in maps])",
    ): "all maps of a sample have one size",
    (
        "data/preprocess",
        "jnp.minimum(jnp.floor(jnp.min(coordinate, axis=1)).astype(jnp.int32), size - side)",
    ): "of a matrix, axis 1 is the last",
    (
        "data/preprocess",
        "matrix = bicubic_matrix(size, factor) if factor >= 1 else np.eye(size, dtype=np.float32)",
    ): "the kernel of factor 1 is the identity",
    (
        "data/input_pipeline",
        'stored_size = decoded["labels"].shape[1]',
    ): "labels are square",
    (
        "training/objective",
        'known = valid * (batch["truth"] <= num_classes(config))',
    ): "no code is the number of classes: known ones are below, 255 is above",
    (
        "method/selection",
        "width = math.gcd(num_pixels, 129)",
    ): "another arrangement of the same pixels",
    (
        "method/selection",
        "ratio = jnp.where(threshold > 0, "
        "confidence / jnp.where(threshold >= 0, threshold, 1.0), 1.0)",
    ): "it keeps a division from 0 whose result is not taken",
    (
        "method/smoothing",
        "if maps.dtype == jnp.bfloat16:",
    ): "both forms give the same numbers; which is faster is a matter of GPUs",
    (
        "method/smoothing",
        "folded = (np.arange(size) - offset) % (2 * size)",
    ): "the filter is symmetric",
    (
        "method/smoothing",
        "return jnp.where(jnp.max(one_hot, axis=-1, keepdims=True) > 0, targets, 0.0)",
    ): "of zeros and one 1, sum and maximum are the same",
    (
        "method/smoothing",
        "return jnp.where(total > 0, maps / jnp.where(total > 0, total, 2.0), 1.0 / num_classes)",
    ): "it keeps a division from 0 whose result is not taken",
    (
        "method/selection",
        "return jnp.max(probs * one_hot, axis=-1)",
    ): "of zeros and one number from 0, sum and maximum are the same",
    (
        "weights/manifest",
        'names = list(name for name in _names(folder, "") if name != NAME)',
    ): "the text of the manifest is sorted, too",
}

_COMPARED = {
    ast.Gt: ">=",
    ast.GtE: ">",
    ast.Lt: "<=",
    ast.LtE: "<",
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.In: "not in",
    ast.NotIn: "in",
    ast.Is: "is not",
    ast.IsNot: "is",
}
_COMPUTED = {
    ast.Add: "-",
    ast.Sub: "+",
    ast.Mult: "/",
    ast.Div: "*",
    ast.FloorDiv: "*",
    ast.Mod: "//",
    ast.Pow: "*",
    ast.LShift: ">>",
    ast.RShift: "<<",
    ast.BitAnd: "|",
    ast.BitOr: "&",
}
_CALLED = {"min": "max", "minimum": "maximum", "floor": "ceil", "sum": "max", "mean": "sum"}
_CALLED |= {"max": "min", "maximum": "minimum"}


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A changed module.

    Attributes:
      module: such as "method/losses".
      start, end: of the changed text in the file, in characters.
      text: what stands there instead.
    """

    module: str
    start: int
    end: int
    text: str

    @property
    def path(self) -> str:
        """The file."""
        return f"cromss_jax/{self.module}.py"

    def source(self) -> tuple[str, str]:
        """The file as it is, and changed."""
        source = (ROOT / self.path).read_text()
        return source, source[: self.start] + self.text + source[self.end :]

    def line(self) -> tuple[int, str]:
        """Number and text of the line that is changed."""
        source, _ = self.source()
        number = source.count("\n", 0, self.start)
        return number + 1, source.splitlines()[number].strip()

    def __str__(self) -> str:
        before, after = (text.splitlines() for text in self.source())
        changed = [x for x in difflib.ndiff(before, after) if x.startswith(("- ", "+ "))]
        said = " -> ".join(x[2:].strip() for x in changed)
        return f"{self.path}:{self.line()[0]}: {said}"


class _Finder(ast.NodeVisitor):
    """Finds the mutants of a module, where they change what is computed."""

    def __init__(self, module: str, source: str):
        self.found: list[Mutant] = []
        self._module, self._source = module, source
        lengths = [len(line.encode()) for line in source.splitlines(keepends=True)]
        self._starts = [sum(lengths[:i]) for i in range(len(lengths))]

    def _offset(self, line: int, column: int) -> int:
        # ast counts bytes.
        return len(self._source.encode()[: self._starts[line - 1] + column].decode())

    def _begin(self, node: ast.AST) -> int:
        return self._offset(node.lineno, node.col_offset)

    def _end(self, node: ast.AST) -> int:
        return self._offset(node.end_lineno, node.end_col_offset)

    def _add(self, start: int, end: int, text: str) -> None:
        self.found.append(Mutant(self._module, start, end, text))

    def _replace_between(self, left: ast.AST, right: ast.AST, sign: str, text: str) -> None:
        """Changes the operator that stands between two operands, beside parentheses."""
        start, end = self._end(left), self._begin(right)
        between = self._source[start:end]
        if between.count(sign) == 1:
            start += between.index(sign)
            self._add(start, start + len(sign), text)

    def visit_Compare(self, node: ast.Compare) -> None:
        operands = [node.left, *node.comparators]
        for left, right, operator in zip(operands, operands[1:], node.ops, strict=False):
            sign, text = _SIGNS[type(operator)], _COMPARED[type(operator)]
            self._replace_between(left, right, sign, text)
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        kind = type(node.op)
        if kind in _COMPUTED:
            self._replace_between(node.left, node.right, _SIGNS[kind], _COMPUTED[kind])
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        sign, text = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        self._replace_between(node.values[0], node.values[1], sign, text)
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not | ast.Invert | ast.USub):
            self._add(self._begin(node), self._begin(node.operand), "")
        if not isinstance(node.op, ast.USub):  # -1 is one constant
            self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func
        called = getattr(name, "attr", getattr(name, "id", None))
        if called in _CALLED:
            self._add(self._end(name) - len(called), self._end(name), _CALLED[called])
        if called == "sorted":
            self._add(self._end(name) - len(called), self._end(name), "list")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        value = node.value
        if isinstance(value, bool):
            changed = str(not value)
        elif isinstance(value, int):
            changed = str(value + 1)
        elif isinstance(value, float):
            changed = repr(value * 2 if value else 1.0)
        else:
            return
        self._add(self._begin(node), self._end(node), changed)

    def _visit_body(self, node: ast.FunctionDef | ast.ClassDef) -> None:
        # Annotations and decorators change nothing that is computed.
        for part in [*getattr(getattr(node, "args", None), "defaults", []), *node.body]:
            self.visit(part)

    visit_FunctionDef = visit_ClassDef = _visit_body

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value:
            self.visit(node.value)

    def visit_Raise(self, node: ast.Raise) -> None:
        """Skips what an error says."""

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Skips texts."""


_SIGNS = {
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.In: "in",
    ast.NotIn: "not in",
    ast.Is: "is",
    ast.IsNot: "is not",
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.Div: "/",
    ast.FloorDiv: "//",
    ast.Mod: "%",
    ast.Pow: "**",
    ast.LShift: "<<",
    ast.RShift: ">>",
    ast.BitAnd: "&",
    ast.BitOr: "|",
}


def find(module: str) -> list[Mutant]:
    """All mutants of a module, in the order of its text."""
    source = (ROOT / f"cromss_jax/{module}.py").read_text()
    finder = _Finder(module, source)
    finder.visit(ast.parse(source))
    return sorted(finder.found, key=lambda mutant: (mutant.start, mutant.text))


def is_program(mutant: Mutant) -> bool:
    """Whether the changed text can be parsed; parentheses may be lost."""
    try:
        ast.parse(mutant.source()[1])
    except SyntaxError:
        return False
    return True


def why_equal(mutant: Mutant) -> str:
    """Why a mutant is equal in effect, "" if it is not known to be."""
    source, changed = mutant.source()
    number = mutant.line()[0] - 1
    if "strict=True" in source[mutant.start - 7 : mutant.end]:
        return "the lengths are the same by construction"
    return EQUAL.get((mutant.module, changed.splitlines()[number].strip()), "")


def copy_tree(folder: pathlib.Path) -> pathlib.Path:
    """Copies what git knows or would know, beside the reference data as here."""
    tree = folder / "tree"
    line = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(line, cwd=ROOT, check=True, capture_output=True, text=True)
    for name in listed.stdout.splitlines():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    (folder / "shared").symlink_to(ROOT.parent / "shared")
    return tree


def import_once() -> None:
    """Imports other libraries that tests need, with the settings of tests/environment.py."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = (
        "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
        "--xla_cpu_parallel_codegen_split_count=1 --xla_cpu_use_fusion_emitters=false"
    )
    for name in _IMPORTED_ONCE:
        importlib.import_module(name)


def run_tests(module: str, tree: pathlib.Path) -> str:
    """Runs the tests of a module in a process forked from this one.

    Returns:
      "passed", "failed" or "took too long".
    """
    child = os.fork()
    if not child:
        log = os.open(tree / "tests.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(tree)
        for name in [name for name in sys.modules if name.partition(".")[0] in _OURS]:
            del sys.modules[name]
        sys.path[:] = [str(tree), *(path for path in sys.path if path not in ("", str(ROOT)))]
        sys.dont_write_bytecode = True  # a file may change twice within a second
        import pytest

        if not importlib.import_module("cromss_jax").__file__.startswith(str(tree)):
            os._exit(99)
        paths = [f"tests/{name}.py" for name in MODULES[module]]
        os._exit(pytest.main(["-x", "-m", "not slow", "-p", "no:cacheprovider", *paths]))
    started = time.monotonic()
    while time.monotonic() - started < _SECONDS:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            # 1: a test failed; 2: an error while they were imported.
            code = os.waitstatus_to_exitcode(status)
            if code not in (0, 1, 2) and code >= 0:
                raise RuntimeError(f"pytest's status {code}: {(tree / 'tests.log').read_text()}")
            return "failed" if code else "passed"
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "took too long"


def outcomes(drawn: list[Mutant], tree: pathlib.Path) -> Iterator[tuple[Mutant, str]]:
    """Each mutant and what its tests did.

    Raises:
      RuntimeError: if tests fail without any change.
    """
    for module in sorted({mutant.module for mutant in drawn}):
        if run_tests(module, tree) != "passed":
            raise RuntimeError(f"tests fail as it is: {(tree / 'tests.log').read_text()}")
    for mutant in drawn:
        source, changed = mutant.source()
        (tree / mutant.path).write_text(changed)
        yield mutant, run_tests(mutant.module, tree)
        (tree / mutant.path).write_text(source)


def main(_) -> None:
    """Prints every mutant, the last line as JSON."""
    every = [mutant for module in MODULES for mutant in find(module) if is_program(mutant)]
    drawn = random.Random(_SEED.value).sample(every, min(_COUNT.value, len(every)))[_FIRST.value :]
    counts: collections.Counter = collections.Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        # As a worker of xdist, a process takes the settings that are made here.
        os.environ["PYTEST_XDIST_WORKER"] = "gw0"
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "compiled")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
        import_once()
        for mutant, outcome in outcomes(drawn, copy_tree(folder)):
            if outcome == "passed":
                reason = why_equal(mutant)
                outcome = f"equal, {reason}" if reason else "LIVED"
            counts[outcome.partition(",")[0]] += 1
            print(f"{counts.total()} {outcome}: {mutant}", flush=True)
    judged = counts.total() - counts["equal"]
    share = (judged - counts["LIVED"]) / judged
    print(json.dumps({**counts, "possible": len(every), "killed_share": round(share, 3)}))


if __name__ == "__main__":
    app.run(main)
