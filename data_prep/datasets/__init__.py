"""The data sets: which files belong together, and what a record holds.

May import `writing`, `reading`, `finding` and the modules at the top level of `data_prep`. Begin
with `ssl4eo_s12_nol`.
"""
