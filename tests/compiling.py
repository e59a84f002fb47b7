"""Compiler options for tests."""

from __future__ import annotations

import os
from functools import partial

import jax

from cl_jax.types import Learner

# What takes XLA's compiler for a CPU less time. The emitters of fusions that are not the default have less
# to set up: a third. LLVM optimises nothing as well: half, of large programs four fifths; sums then round in
# another way. For comparisons of a program with itself, within a tolerance, and in f64; what is said to be
# bitwise of two programs, or is counted, timed or measured in bytes, is compiled as a user's programs are,
# or by `bitwise`, where a few are.
OLD_EMITTERS: dict[str, bool | int] = {}
if jax.__version_info__ < (0, 11):  # an option that a compiler does not know is an error
  OLD_EMITTERS['xla_cpu_use_fusion_emitters'] = False
QUICK = {'xla_backend_optimization_level': 0} | OLD_EMITTERS

# The same in the environment of a process that a test starts. Where several processes compile the same
# programs, the small ones are kept as well.
QUICKLY = {
  'XLA_FLAGS': ' '.join(
    [os.environ.get('XLA_FLAGS', ''), *(f'--{k}={str(v).lower()}' for k, v in QUICK.items())]
  ),
  'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
}

quick = partial(jax.jit, compiler_options=QUICK)
# LLVM optimises, so that two programs with the same operations still round alike.
bitwise = partial(jax.jit, compiler_options=OLD_EMITTERS)


def compiled(learn: Learner) -> Learner:
  """The learner with functions that are compiled, each on its own, instead of run operation by operation."""
  parts = {name: quick(getattr(learn, name)) for name in ('init', 'step', 'boundary', 'predict')}
  return learn._replace(**parts)
