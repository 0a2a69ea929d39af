"""Legend: the classes of a data set, their names and colours, and the source values they come from.

A legend is written into the metadata of a data set; networks, losses, metrics, pictures, tables,
cards and maps take the classes from there. `presets` holds the legends of published maps.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cromss_jax.errors import UserError
from cromss_jax.sensors import IGNORE_LABEL

MIN_CLASSES, MAX_CLASSES = 2, 250

_COLOUR = re.compile(r"#[0-9a-f]{6}")


class LegendError(UserError):
    """A legend that cannot be used. The message is for the user."""


@dataclasses.dataclass(frozen=True)
class Legend:
    """The classes of a data set, in the order of their labels 0, 1, ..., C - 1.

    Attributes:
      names: [C] of the classes, all different.
      colours: [C] "#rrggbb".
      values: [C] the source values that become each class; at least one each.
      ignored: source values that have no class; None means all that no class has. 255 is always
        ignored.
    """

    names: tuple[str, ...]
    colours: tuple[str, ...]
    values: tuple[tuple[int, ...], ...]
    ignored: tuple[int, ...] | None = ()

    def __post_init__(self):
        """Refuses a legend that is wrong.

        Raises:
          LegendError: naming the class or the value.
        """
        if not len(self.names) == len(self.colours) == len(self.values):
            raise LegendError(
                f"the legend has {len(self.names)} names, {len(self.colours)} colours and "
                f"{len(self.values)} sets of values: each class needs one of each"
            )
        if not MIN_CLASSES <= len(self.names) <= MAX_CLASSES:
            raise LegendError(
                f"the legend has {len(self.names)} classes: {MIN_CLASSES} to {MAX_CLASSES} are "
                "possible"
            )
        for name, colour, values in zip(self.names, self.colours, self.values, strict=True):
            _check_class(name, colour, values)
        for name in self.names:
            if self.names.count(name) > 1:
                raise LegendError(
                    f"{self.names.count(name)} classes are called {name!r}: give each its own "
                    "name, or make them one class (in a CSV file by the same entry in the column "
                    "class)"
                )
        self._check_values()

    def _check_values(self) -> None:
        """Refuses a value that would have two classes, or a class although it is ignored."""
        owner: dict[int, str] = {}
        for name, values in zip(self.names, self.values, strict=True):
            for value in values:
                if value in owner:
                    raise LegendError(
                        f"value {value} is in the legend twice, as {owner[value]!r} and as "
                        f"{name!r}: keep one"
                    )
                owner[value] = name
        for value in self.ignored or ():
            if isinstance(value, bool) or not isinstance(value, int):
                raise LegendError(f"the ignored value {value!r} is not a whole number")
            if value in owner:
                raise LegendError(
                    f"value {value} is both ignored and of the class {owner[value]!r}: keep one"
                )

    def __len__(self) -> int:
        """Number of classes C."""
        return len(self.names)

    @classmethod
    def of(
        cls,
        classes: Mapping[str, str],
        values: Sequence[int | tuple[int, ...]] | None = None,
        ignored: tuple[int, ...] | None = (),
    ) -> "Legend":
        """A legend from names with their colours.

        Args:
          classes: from name to colour, in the order of the labels.
          values: the source value, or values, of each class; None means 0, 1, ..., C - 1.
          ignored: see the class.
        """
        given = range(len(classes)) if values is None else values
        return cls(
            names=tuple(classes),
            colours=tuple(classes.values()),
            values=tuple(v if isinstance(v, tuple) else (v,) for v in given),
            ignored=ignored,
        )

    def with_values(
        self, class_of: Mapping[int, int], ignored: tuple[int, ...] | None = ()
    ) -> "Legend":
        """The same classes from other source values.

        Args:
          class_of: from source value to label.
          ignored: see the class.
        """
        values = tuple(
            tuple(value for value, label in class_of.items() if label == i)
            for i in range(len(self))
        )
        return dataclasses.replace(self, values=values, ignored=ignored)

    def classes_of(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Maps source values to labels.

        Args:
          values: any shape and dtype.

        Returns:
          The labels, uint8, of the same shape: 0..C-1, and 255 where a value is ignored or not
          known; and the different values that are not known (none if `ignored` is None), sorted.
        """
        values = np.asarray(values)
        is_whole = np.issubdtype(values.dtype, np.integer) and values.size
        # In Python's integers, as a difference may be too large for the values' own.
        least, most = (int(values.min()), int(values.max())) if is_whole else (0, 0)
        if is_whole and most - least < 1 << 16 and most < 1 << 63:
            # A table is ten times as fast as sorting the pixels.
            codes = values.astype(np.int64) - least
            present = np.flatnonzero(np.bincount(codes.ravel()))
            inverse = np.searchsorted(present, np.arange(present[-1] + 1))[codes]
            present += least
        else:
            present, inverse = np.unique(values, return_inverse=True)
        label_of = {v: label for label, group in enumerate(self.values) for v in group}
        skipped = {*(self.ignored or ()), IGNORE_LABEL}
        labels = np.full(present.shape, IGNORE_LABEL, np.uint8)
        known = np.full(present.shape, self.ignored is None)
        for i, value in enumerate(present.tolist()):
            labels[i] = label_of.get(value, IGNORE_LABEL)
            known[i] |= value in label_of or value in skipped
        return labels[inverse].reshape(values.shape), present[~known]

    def values_text(self) -> str:
        """The values that have a class or are ignored, as text: 0..8, 255."""
        known = {value for group in self.values for value in group}
        values = sorted(known | {*(self.ignored or ()), IGNORE_LABEL})
        starts = [i for i, value in enumerate(values) if i == 0 or value != values[i - 1] + 1]
        ends = [*(start - 1 for start in starts[1:]), len(values) - 1]
        return ", ".join(
            str(values[start]) if start == end else f"{values[start]}..{values[end]}"
            for start, end in zip(starts, ends, strict=True)
        )

    def colours_rgb(self) -> np.ndarray:
        """The colours, uint8 [C,3]."""
        return np.array([list(bytes.fromhex(colour[1:])) for colour in self.colours], np.uint8)

    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Name and colour of each class, for configurations; `from_dict` reads them."""
        return tuple(zip(self.names, self.colours, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """The legend as JSON, for the metadata of a data set or the recipe of weights."""
        return {
            "classes": [
                {"name": name, "colour": colour, "values": list(values)}
                for name, colour, values in zip(self.names, self.colours, self.values, strict=True)
            ],
            "ignored": None if self.ignored is None else list(self.ignored),
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any] | Sequence[Sequence[str]]) -> "Legend":
        """The legend that `to_dict` made, or one of pairs (name, colour).

        Data sets and weights of earlier versions have such pairs; their values are the labels.

        Raises:
          LegendError: if it is neither.
        """
        try:
            if not isinstance(saved, Mapping):
                names, colours = zip(*saved, strict=True)
                return cls(names, colours, values=tuple((i,) for i in range(len(names))))
            return cls(
                names=tuple(c["name"] for c in saved["classes"]),
                colours=tuple(c["colour"] for c in saved["classes"]),
                values=tuple(tuple(c["values"]) for c in saved["classes"]),
                ignored=None if saved["ignored"] is None else tuple(saved["ignored"]),
            )
        except LegendError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise LegendError(
                f"the saved legend {str(saved)[:60]!r} has no classes with name, colour and values"
            ) from error


def _check_class(name: str, colour: str, values: Sequence[int]) -> None:
    """Refuses a class without a usable name, colour or value.

    Raises:
      LegendError: saying which.
    """
    if not isinstance(name, str) or not name.strip() or not name.isprintable():
        raise LegendError(
            f"a class of value {', '.join(map(str, values))} is called {name!r}: it needs a name "
            "of printable characters"
        )
    if not isinstance(colour, str) or not _COLOUR.fullmatch(colour):
        raise LegendError(
            f"the colour of {name!r} is {colour!r}: it is written #rrggbb, such as #419bdf"
        )
    if not values:
        raise LegendError(f"the class {name!r} has no value: give it one, or leave it out")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int):
            raise LegendError(f"the value {value!r} of {name!r} is not a whole number")
        if value == IGNORE_LABEL:
            raise LegendError(
                f"the value {IGNORE_LABEL} of {name!r} means ignored everywhere: leave it out of "
                "the legend"
            )
