"""Damages files for the readers of strangers' files: `python -m tests.bench.fuzz --minutes=10`.

Hypothesis draws a file of the corpus (tests/corpus) and changes it: bytes are replaced, taken out,
repeated, or something is put in that matters to the format. A reader must give what the file holds,
or one sentence by its own error, within bounds of time and memory. What does neither is made as
small as it can be, printed, and written to --found; put it into the corpus once it is mended.
"""

import collections
import json
import pathlib
import random
import tempfile
import time
import traceback

import hypothesis
import pytest
from absl import app, flags, logging
from hypothesis import strategies as st

from cromss_jax import command_line
from tests import hostile

_MINUTES = flags.DEFINE_float("minutes", 10, "Of processor time for each reader", lower_bound=0)
_SEED = flags.DEFINE_integer("seed", 0, "Of the draws")
_READERS = flags.DEFINE_list(
    "readers", list(hostile.READERS), f"Readers to try, of {', '.join(hostile.READERS)}"
)
_FOUND = flags.DEFINE_string("found", None, "Folder for files that a reader failed on")

# Hypothesis forgets what it has drawn between rounds, and shrinks at the end of one.
_ROUND = 500


@st.composite
def changed(draw: st.DrawFn, corpus: list[bytes], tokens: tuple[bytes, ...]) -> bytes:
    """A file of the corpus with some changes."""
    content = bytearray(draw(st.sampled_from(corpus)))
    for _ in range(draw(st.integers(0, 6))):
        start = draw(st.integers(0, len(content)))
        length = draw(st.sampled_from((0, 0, 1, 2, 4, 8, 32)))
        kind = draw(st.sampled_from(("put", "put", "token", "token", "take", "repeat", "cut")))
        if kind == "put":
            content[start : start + length] = draw(st.binary(max_size=8))
        elif kind == "token" and tokens:
            content[start : start + length] = draw(st.sampled_from(tokens))
        elif kind == "take":
            del content[start : start + length]
        elif kind == "repeat":
            part = bytes(content[start : start + length])
            content[start:start] = part * draw(st.integers(1, 200))
        elif kind == "cut":
            del content[start:]
    return bytes(content)


def fuzz(name: str, folder: pathlib.Path, minutes: float, rng: random.Random) -> dict[str, int]:
    """Tries one reader; returns how many files it read, refused and failed on."""
    reader = hostile.READERS[name]
    path = folder / f"file{reader.suffix}"
    corpus = [p.read_bytes() for p in sorted((hostile.CORPUS / name).iterdir())]
    counts: collections.Counter = collections.Counter(read=0, refused=0, failed=0)
    failures: dict[str, bytes] = {}
    end = time.process_time() + 60 * minutes

    def attempt(content: bytes) -> None:
        if time.process_time() > end:
            return
        path.write_bytes(content)
        try:
            said = hostile.check(reader, path)
        except BaseException as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            known = f"{type(error).__name__} in {where.filename}:{where.lineno}"
            if len(content) < len(failures.get(known, content + b"+")):
                failures[known] = content
            raise
        counts["refused" if said else "read"] += 1

    while time.process_time() < end:
        test = hypothesis.given(changed(corpus, reader.tokens))(attempt)
        test = hypothesis.seed(rng.randrange(1 << 32))(test)
        test = hypothesis.settings(
            max_examples=_ROUND,
            deadline=None,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
            report_multiple_bugs=True,
            verbosity=hypothesis.Verbosity.quiet,
        )(test)
        try:
            test()
        except (Exception, pytest.fail.Exception):
            counts["failed"] += 1
            if counts["failed"] > 20:
                break
    for known, content in failures.items():
        print(f"{name}: {known}: {content[:200]!r}", flush=True)
        if _FOUND.value:
            target = pathlib.Path(_FOUND.value) / name
            target.mkdir(parents=True, exist_ok=True)
            (target / f"{abs(hash(known)):x}{reader.suffix}").write_bytes(content)
    return {**counts, "faults": len(failures)}


def main(_) -> None:
    """Prints a table, the last line as JSON."""
    logging.set_verbosity(logging.ERROR)
    command_line.quieten_orbax()
    rng, figures = random.Random(_SEED.value), {}
    print("| reader | files | read | refused in a sentence | faults | processor minutes |")
    print("|---|---|---|---|---|---|", flush=True)
    for name in _READERS.value:
        started = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            found = fuzz(name, pathlib.Path(folder), _MINUTES.value, rng)
        files = found["read"] + found["refused"] + found["failed"]
        minutes = (time.process_time() - started) / 60
        print(
            f"| {name} | {files} | {found['read']} | {found['refused']} | {found['faults']} | "
            f"{minutes:.1f} |",
            flush=True,
        )
        figures[name] = found
    print(json.dumps(figures))


if __name__ == "__main__":
    app.run(main)
