"""From records on disk to examples on the device.

`input_pipeline` reads and batches uint8 on the host and imports no jax; `preprocess` runs inside
the compiled step. May import `networks`, `method`, `sensors` and `files`. Begin with
`input_pipeline`.
"""
