"""The Triton backend, for NVIDIA and AMD GPUs: a module an operation.

A module has the kernels, and `run(table, *arguments)`, which launches them. `table` is what the
check of the arguments has read; it is None where the arguments are single tensors. The modules
without `run` are shared: `device` and `rounding` on the device, `launch`, `tables` and `blocks` on
the host, `rows` on both. Only `blocks` can be imported where triton is not installed.

TRITON_INTERPRET=1, set before triton is imported, runs the kernels on CPU tensors.
"""
