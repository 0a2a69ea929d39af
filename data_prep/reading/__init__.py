"""Reading images and label maps: values, invalid pixels, grids, offsets, dates.

May import `finding` and the modules at the top level of `data_prep`. Begin with `bands`.
"""
