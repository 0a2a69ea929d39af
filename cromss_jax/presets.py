"""Legends of published land-cover maps: source values, names and colours."""

from collections.abc import Mapping

from cromss_jax.legend import Legend

# The labels of SSL4EO-S12 + NoL. Colours: Dynamic World's.
DYNAMIC_WORLD = Legend.of(
    {
        "water": "#419bdf",
        "trees": "#397d49",
        "grass": "#88b053",
        "flooded vegetation": "#7a87c6",
        "crops": "#e49635",
        "shrub & scrub": "#dfc35a",
        "built area": "#c4281b",
        "bare ground": "#a59b8f",
        "snow & ice": "#b39fe1",
    }
)

# ESA WorldCover 2020 and 2021; names and colours as in the files' legend and colour table.
WORLDCOVER = Legend.of(
    {
        "Tree cover": "#006400",
        "Shrubland": "#ffbb22",
        "Grassland": "#ffff4c",
        "Cropland": "#f096ff",
        "Built-up": "#fa0000",
        "Bare/sparse vegetation": "#b4b4b4",
        "Snow and ice": "#f0f0f0",
        "Permanent water bodies": "#0064c8",
        "Herbaceous wetland": "#0096a0",
        "Mangroves": "#00cf75",
        "Moss and lichen": "#fae6a0",
    },
    values=(10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 100),
    ignored=(0,),
)

# ESRI 10 m land cover since 2021, its colours. 0 is nodata, 10 is cloud.
ESRI = Legend.of(
    {
        "water": "#1a5bab",
        "trees": "#358221",
        "flooded vegetation": "#87d19e",
        "crops": "#ffdb5c",
        "built area": "#ed022a",
        "bare ground": "#ede9e4",
        "snow/ice": "#f2faff",
        "rangeland": "#c6ad8d",
    },
    values=(1, 2, 4, 5, 7, 8, 9, 11),
    ignored=(0, 10),
)

# The scene classification of Sentinel-2 L2A. What is no cover of the ground is ignored: 0 nodata,
# 1 saturated, 2 dark, 3 shadow, 7 unclassified, 8 and 9 cloud, 10 cirrus. Colours: Sen2Cor's.
SCL = Legend.of(
    {
        "vegetation": "#00a000",
        "not vegetated": "#ffe65a",
        "water": "#0000ff",
        "snow or ice": "#ff64ff",
    },
    values=(4, 5, 6, 11),
    ignored=(0, 1, 2, 3, 7, 8, 9, 10),
)

# The eight classes of DFC2020 that the paper scores, in the order of Dynamic World. Names and
# colours are the data set's (simplified IGBP). 3 (savanna) and 8 (snow) have no class.
DFC2020 = Legend.of(
    {
        "water": "#1c0dff",
        "forest": "#009900",
        "grassland": "#b6ff05",
        "wetlands": "#27ff87",
        "croplands": "#c24f44",
        "shrubland": "#c6b044",
        "urban/built-up": "#a5a5a5",
        "barren": "#f9ffa4",
    },
    values=(10, 1, 4, 5, 6, 2, 7, 9),
    ignored=None,
)

# The same classes from MODIS land cover (IGBP, 1 to 17), by way of DFC2020's simplified IGBP. Its
# savannas (8, 9) and snow (15) have no class.
DFC2020_OF_IGBP = DFC2020.with_values(
    {
        17: 0,
        **dict.fromkeys((1, 2, 3, 4, 5), 1),
        10: 2,
        11: 3,
        **dict.fromkeys((12, 14), 4),
        **dict.fromkeys((6, 7), 5),
        13: 6,
        16: 7,
    },
    ignored=None,
)

# SSL4EO-S12@OSM. Each class has the colour of the most similar CORINE class. 0 is unmarked.
OSM = Legend.of(
    {
        "urban": "#e6004d",
        "arable land": "#ffffa8",
        "forest": "#80ff00",
        "industrial": "#cc4df2",
        "artificial vegetation": "#ffa6ff",
        "dump site": "#a64d00",
        "pasture": "#e6e64d",
        "permanent crops": "#f2a64d",
        "water": "#00ccf2",
        "open space": "#e6e6e6",
        "shrub": "#a6ff80",
        "wetland": "#a6a6ff",
        "coastal": "#4d4dff",
    },
    values=tuple(range(1, 14)),
    ignored=(0,),
)

LEGENDS: Mapping[str, Legend] = {
    "dynamic_world": DYNAMIC_WORLD,
    "worldcover": WORLDCOVER,
    "esri": ESRI,
    "scl": SCL,
    "dfc2020": DFC2020,
    "osm": OSM,
}
