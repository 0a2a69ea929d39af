"""Legends of layers as QGIS styles, which QGIS applies when they lie beside the file."""

import dataclasses
from collections.abc import Sequence
from xml.sax.saxutils import quoteattr


@dataclasses.dataclass(frozen=True)
class Entry:
    """An entry of a legend.

    Attributes:
      value: of the pixels.
      colour: "#rrggbb".
      label: what it means.
    """

    value: int
    colour: str
    label: str


# Percent from low to high, readable by the colour-blind (stops of matplotlib's viridis).
_RAMP = ("#440154", "#3b528b", "#21918c", "#5ec962", "#fde725")
PERCENT = tuple(Entry(25 * i, colour, f"{25 * i} %") for i, colour in enumerate(_RAMP))


def qml(entries: Sequence[Entry], *, is_classes: bool) -> str:
    """A QGIS style of the first band of a file.

    Args:
      entries: of the legend, by ascending value.
      is_classes: whether each is a class; otherwise they are stops of a colour ramp.
    """
    if is_classes:
        rows = [
            f'<paletteEntry value="{e.value}" color="{e.colour}" alpha="255" '
            f"label={quoteattr(e.label)}/>"
            for e in entries
        ]
        renderer = [
            '<rasterrenderer type="paletted" band="1" opacity="1" alphaBand="-1">',
            "<colorPalette>",
            *rows,
            "</colorPalette>",
            "</rasterrenderer>",
        ]
    else:
        low, high = entries[0].value, entries[-1].value
        rows = [
            f'<item value="{e.value}" color="{e.colour}" alpha="255" label={quoteattr(e.label)}/>'
            for e in entries
        ]
        renderer = [
            '<rasterrenderer type="singlebandpseudocolor" band="1" opacity="1" alphaBand="-1" '
            f'classificationMin="{low}" classificationMax="{high}">',
            "<rastershader>",
            '<colorrampshader colorRampType="INTERPOLATED" classificationMode="1" clip="0" '
            f'minimumValue="{low}" maximumValue="{high}">',
            *rows,
            "</colorrampshader>",
            "</rastershader>",
            "</rasterrenderer>",
        ]
    return "\n".join(
        [
            "<!DOCTYPE qgis PUBLIC 'http://mrcc.com/qgis.dtd' 'SYSTEM'>",
            '<qgis version="3.28" styleCategories="Symbology">',
            "<pipe>",
            *renderer,
            "</pipe>",
            "</qgis>\n",
        ]
    )
