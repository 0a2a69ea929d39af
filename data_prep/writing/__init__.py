"""Writing data sets: the TFDS builder, ArrayRecord files, Beam.

May import `finding` and the modules at the top level of `data_prep`. Begin with `builder`.
"""
