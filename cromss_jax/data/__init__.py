"""From records on disk to examples on the device.

`input_pipeline` reads uint8 records and makes batches on the host; it imports no jax. `preprocess`
runs inside the compiled step. `description` states sizes and shapes without reading records. May
import `networks`, `method`, `sensors` and `files`. Begin with `input_pipeline`.
"""
