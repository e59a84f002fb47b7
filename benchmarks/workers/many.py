"""Many runs of W1 in one program: on some devices, some at a time. Returns what a table needs, no states."""

from __future__ import annotations

from benchmarks.workers.serve import options, serve

GIVEN = options()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402

from benchmarks import workloads  # noqa: E402
from cl_jax import loop  # noqa: E402
from cl_jax.learner import learner  # noqa: E402
from cl_jax.methods.replay.er import er  # noqa: E402
from cl_jax.models.mlp import mlp  # noqa: E402
from cl_jax.streams.take import put  # noqa: E402
from cl_jax.sweep import MAPPED, SHARED, map_runs  # noqa: E402


def prepare(n: int, units: int = 256, size: tuple = (), width: int = 1, devices: int = 1):
  stream = put(workloads.w1(workloads.Size(*size) if size else workloads.W1)[0])

  def build(hp, weights):
    chosen = er(workloads.MEMORY, workloads.DRAW['w1'])
    return learner(mlp((units, units), stream.classes), optax.sgd(hp), chosen)

  def one(hp, key, stream):
    return loop.run(build, hp, key, stream)[1].R[-1].mean()

  available = jax.devices()
  if len(available) < devices:
    raise SystemExit(f'{devices} devices are asked for, jax sees {len(available)}')
  mapped = map_runs(one, (SHARED, MAPPED, SHARED), n, width, available[:devices])
  hp = jnp.float32(workloads.RATE)
  keys = lambda i: jax.random.split(jax.random.key(i), n)  # noqa: E731
  program = jax.jit(mapped).lower(hp, keys(0), stream).compile()

  def repeat(i):
    return {'accuracy': float(jax.block_until_ready(program(hp, keys(i), stream)).mean())}

  return repeat, {'platform': available[0].platform}


serve(lambda: prepare(**GIVEN))
