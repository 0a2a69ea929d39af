"""Builds data sets of ArrayRecord files from the GeoTIFFs of their publishers.

May import `cromss_jax.sensors`; nothing imports it. Begin with `build`, then `builder`, then one of
the data sets, `ssl4eo_s12_nol` or `downstream`.
"""
