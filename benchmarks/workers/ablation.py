"""A factorial ablation of W1, cold: 6 methods x seeds, in one program with switches or a program each."""

from __future__ import annotations

from benchmarks.workers.serve import options, serve

GIVEN = options()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

from benchmarks import workloads  # noqa: E402
from cl_jax import loop  # noqa: E402
from cl_jax.compose import chain, gated  # noqa: E402
from cl_jax.learner import learner  # noqa: E402
from cl_jax.methods.regularisation.ewc import ewc  # noqa: E402
from cl_jax.methods.regularisation.lwf import lwf  # noqa: E402
from cl_jax.methods.replay.er import er  # noqa: E402
from cl_jax.models.mlp import mlp  # noqa: E402
from cl_jax.streams.take import put  # noqa: E402
from cl_jax.sweep import MAPPED, SHARED, map_runs  # noqa: E402

METHODS = {
  'er': lambda: er(workloads.MEMORY, workloads.DRAW['w1']),
  'lwf': lambda: lwf(1.0),
  'ewc': lambda: ewc(10.0, 'empirical', online=True, decay=0.9),
}
CELLS = ((), ('er',), ('lwf',), ('ewc',), ('er', 'lwf'), ('er', 'ewc'))


def prepare(kind: str, units: int, size: tuple = (), seeds: int = 8):
  stream = put(workloads.w1(workloads.Size(*size) if size else workloads.W1)[0])
  network = mlp((units, units), stream.classes)

  def superset(on, key, stream):
    build = lambda on, _: learner(  # noqa: E731
      network,
      optax.sgd(workloads.RATE),
      chain(**{n: gated(on[i], m()) for i, (n, m) in enumerate(METHODS.items())}),
    )
    return loop.run(build, on, key, stream)[1].R[-1].mean()

  def alone(cell):
    def one(key, stream):
      build = lambda hp, _: learner(  # noqa: E731
        network, optax.sgd(workloads.RATE), chain(**{n: METHODS[n]() for n in cell})
      )
      return loop.run(build, None, key, stream)[1].R[-1].mean()

    return one

  def repeat(i):
    jax.clear_caches()
    keys = jax.random.split(jax.random.key(i), seeds)
    one_device = jax.devices()[:1]
    if kind == 'superset':
      switches = jnp.array([[float(n in cell) for n in METHODS] for cell in CELLS])
      n = len(CELLS) * seeds
      mapped = map_runs(superset, (MAPPED, MAPPED, SHARED), n, devices=one_device)
      accuracy = jax.jit(mapped)(
        jnp.repeat(switches, seeds, 0), jnp.concatenate([keys] * len(CELLS)), stream
      )
    else:
      parts = []
      for cell in CELLS:
        mapped = map_runs(alone(cell), (MAPPED, SHARED), seeds, devices=one_device)
        parts.append(jax.jit(mapped)(keys, stream))
      accuracy = jnp.concatenate(parts)
    table = np.asarray(accuracy).reshape(len(CELLS), seeds)
    return {'accuracy': float(table.mean()), 'table': table.tolist()}

  return repeat, {}


serve(lambda: prepare(**GIVEN))
