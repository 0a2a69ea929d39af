"""Maps of whole scenes: windows, their predictions, blending, and the files that are written.

Knows arrays, files and a network; scenes come as objects with a grid and a function that reads.
May import `training.sharding`, `results` and the rooms below it. Begin with `scene_map`.
"""
