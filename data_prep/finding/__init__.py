"""Finding the files of a data set, in folders and in archives that are not unpacked.

May import the modules at the top level of `data_prep`. Begin with `sources`.
"""
