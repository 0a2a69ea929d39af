"""The method of the paper: losses, sample selection, label smoothing, schedules, metrics.

Functions of arrays and scalars; no configuration, no networks, no devices by name. Imports
nothing of the other rooms. Begin with `selection`, then `losses` and `smoothing`.
"""
