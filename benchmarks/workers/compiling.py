"""The compilation of a whole run of W1, from nothing or out of the persistent cache."""

from __future__ import annotations

from benchmarks.workers.serve import options, serve

GIVEN = options()

import time  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402

from benchmarks import workloads  # noqa: E402
from cl_jax import loop  # noqa: E402
from cl_jax.learner import learner  # noqa: E402
from cl_jax.methods.replay.er import er  # noqa: E402
from cl_jax.models.mlp import mlp  # noqa: E402


def prepare(tasks: int, cache: str | None = None):
  if cache:
    jax.config.update('jax_compilation_cache_dir', cache)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
    jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
  stream, _ = workloads.w1(workloads.Size(tasks, 100, 100))
  shapes = jax.eval_shape(lambda s: s, stream)

  def build(hp, weights):
    return learner(mlp((256, 256), stream.classes), optax.sgd(hp), er(100, 10))

  def repeat(i):
    jax.clear_caches()
    begin = time.process_time()
    program = jax.jit(lambda hp, key, stream: loop.run(build, hp, key, stream))
    lowered = program.lower(jnp.float32(0.1), jax.random.key(0), shapes)
    middle = time.process_time()
    compiled = lowered.compile()
    return {
      'cpu': time.process_time() - middle,
      'trace': middle - begin,
      'temporary': compiled.memory_analysis().temp_size_in_bytes,
    }

  return repeat, {}


serve(lambda: prepare(**GIVEN))
