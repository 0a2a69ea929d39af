"""Measures anew and rewrites the tables of the documents: `python -m tests.bench [--only=PARTS]`.

Runs the parts one after the other, each in a process of its own. Figures, with command, commit,
date, processor and versions, go to tests/bench/results.json after each part, and from there into
the generated tables of tests/bench/README.md and README.md. Parts that are not run keep their
figures. Timings need an idle machine.
"""

import json
import os
import subprocess
import sys

from absl import app, flags

from tests import runs
from tests.bench import parts, tables

DEFAULT = [name for name, part in parts.PARTS.items() if part.by_default]
_ONLY = flags.DEFINE_list(
    "only",
    DEFAULT,
    "Parts to run. Not by default: claims (hours), tpu (needs libtpu), and scaling, processes, "
    "faults, mutants and fuzz, whose outcomes change only with the code that they are about.\n"
    + "\n".join(f"{name}: {p.measures} ({p.takes})" for name, p in parts.PARTS.items()),
)
flags.register_validator(
    "only",
    lambda names: set(names) <= parts.PARTS.keys(),
    message=f"There is no such part. Choose from: {', '.join(parts.PARTS)}.",
)


def main(_) -> None:
    """Measures the chosen parts."""
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"warning: the machine is busy (load {load:.1f}), timings will be too long")
    results_file = runs.ROOT / parts.RESULTS
    for name in _ONLY.value:
        print(f"{name} ({parts.PARTS[name].takes})", flush=True)
        try:
            entry = parts.measure(parts.PARTS[name])
        except subprocess.CalledProcessError as error:
            sys.exit(f"{name} failed with status {error.returncode}; its former figures are kept")
        results = json.loads(results_file.read_text()) | {name: entry}
        results_file.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        blocks = tables.blocks(results)
        for document in parts.DOCUMENTS:
            path = runs.ROOT / document
            path.write_text(tables.rewrite(path.read_text(), blocks))
        print(f"\n{blocks[name]}\n", flush=True)


if __name__ == "__main__":
    app.run(main)
