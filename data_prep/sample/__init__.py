"""A procedural world, written as GeoTIFFs in the tree of a real data set.

`python -m data_prep.sample`. May import the writers of `data_prep`; no builder imports this.
Begin with `world`.
"""
