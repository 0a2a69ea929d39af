"""Which labels are probably wrong: evidence, noise, maps, polygons, reports.

May import `mapping`, `training.sharding` and the rooms below it. Begin with `evidence`.
"""
