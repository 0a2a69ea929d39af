"""Builds data sets of ArrayRecord files from the GeoTIFFs of their publishers.

May import `cromss_jax.sensors`; nothing imports it. Imports go from `build` to `datasets`,
`writing`, `reading`, `finding` and the other modules here. Begin with `build`, then
`writing.builder`, then `datasets.ssl4eo_s12_nol`.
"""
