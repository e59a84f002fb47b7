"""`make bench`: time and memory against PyTorch and Avalanche, interleaved in one run.

Read `measure` for how it is measured, `goals` for what, `workers` for the contestants. Every contestant is
a process of its own; those of `workers` that begin with `torch_` or `avalanche_` run in the environment that
`peers` sets up and import nothing of cl_jax.
"""
