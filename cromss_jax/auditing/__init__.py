"""Which labels of a data set are probably wrong: evidence, the noise that it tells, reports.

May import `mapping`, `training.sharding` and the rooms below it. Begin with `evidence`.
"""
