"""The method of the paper: losses, sample selection, label smoothing, schedules, metrics.

Functions of arrays and scalars. They know no configuration, no networks and no device names, and
import nothing from the other rooms. Begin with `selection`, then read `losses` and `smoothing`.
"""
