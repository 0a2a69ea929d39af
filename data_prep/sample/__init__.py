"""A procedural world, written as GeoTIFFs in the tree of a real data set.

The command is `python -m data_prep.sample`. This package may import the writers of `data_prep`; no
builder imports it. Begin with `world`.
"""
