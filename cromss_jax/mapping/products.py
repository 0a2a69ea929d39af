"""The files of a finished map: layers with their legends, and a summary."""

import pathlib
from collections.abc import Iterable, Mapping, Sequence

from etils import epath

from cromss_jax import files
from cromss_jax.mapping import areas, cogs
from cromss_jax.mapping.cogs import Grid, Layer
from cromss_jax.mapping.styles import PERCENT, Entry
from cromss_jax.mapping.work import Work

SUMMARY, IDENTITY = "summary.md", "map.json"
_AGREEMENT = (Entry(0, "#d95f02", "S1 and S2 differ"), Entry(1, "#1b9e77", "S1 and S2 agree"))


def describe(names: Iterable[str], legend: Mapping[str, str]) -> tuple[Layer, ...]:
    """The layers of a map.

    Args:
      names: of `blending.LAYERS`.
      legend: names of the classes with their colours "#rrggbb".
    """
    entries = tuple(Entry(i, colour, name) for i, (name, colour) in enumerate(legend.items()))
    known = {
        "classes": Layer("classes", ("class",), entries, is_classes=True),
        "probabilities": Layer("probabilities", tuple(legend), PERCENT, False, "%"),
        "confidence": Layer("confidence", ("probability of the class",), PERCENT, False, "%"),
        "agreement": Layer("agreement", ("agreement of S1 and S2",), _AGREEMENT, is_classes=True),
    }
    return tuple(known[name] for name in names)


def write(
    work: Work,
    layers: Sequence[Layer],
    grid: Grid,
    legend: Mapping[str, str],
    folder: pathlib.Path,
    facts: Mapping[str, str],
) -> str:
    """Writes the files of a map whose rows are all there, and removes the unfinished ones.

    Args:
      work: the unfinished map.
      layers: to write.
      grid: of the map.
      legend: names of the classes with their colours.
      folder: to write to.
      facts: what the summary says about how the map was made.

    Returns:
      The text of the summary. Beside it lies `map.json`, which says what decides the map; it is
      written last.
    """
    for layer in layers:
        cogs.write(work.path(layer.name), layer, grid, folder)
    pixels, square_km = areas.count(
        lambda start, stop: work.read("classes", start, stop), grid, len(legend)
    )
    lines = ["# Map", "", areas.table(tuple(legend), pixels, square_km), ""]
    lines += ["| | |", "|---|---|"]
    lines += [f"| {name} | {text} |" for name, text in facts.items()]
    text = "\n".join(lines) + "\n"
    files.write_whole(epath.Path(folder / SUMMARY), text.encode())
    work.keep_identity(folder / IDENTITY)
    work.remove()
    return text
