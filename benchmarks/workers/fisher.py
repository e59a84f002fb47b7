"""The exact diagonal Fisher information of a perceptron on 1,000 images: closed form or a gradient each."""

from __future__ import annotations

from benchmarks.workers.serve import options, serve

GIVEN = options()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from benchmarks import workloads  # noqa: E402
from cl_jax import fisher  # noqa: E402
from cl_jax.models.mlp import mlp  # noqa: E402
from cl_jax.streams.take import put, take  # noqa: E402
from cl_jax.types import Forward  # noqa: E402


def prepare(kind: str, units: int, size: tuple = ()):
  stream = put(workloads.w1(workloads.Size(*size) if size else workloads.W1)[0])
  network = mlp((units, units), stream.classes)
  batches = jax.vmap(lambda rows: take(stream, rows, 0))(stream.ends[0])
  first = jax.tree.map(lambda a: a[0], batches)
  params, _ = network.init(jax.random.key(0), first)
  fwd = Forward(network.apply, {}, {})

  def gradients(params, batches, key):
    """The mean of squared gradients, vmapped over the examples of a batch."""

    def one(row):
      single = jax.tree.map(lambda a: a[None], row)
      loss = lambda p: jax.nn.log_softmax(fwd(p, single).logits)[0, row.y]  # noqa: E731
      return jax.tree.map(lambda g: row.w * jnp.square(g), jax.grad(loss)(params))

    def batch(total, rows):
      return jax.tree.map(lambda t, g: t + g.sum(0), total, jax.vmap(one)(rows)), None

    total, _ = jax.lax.scan(batch, jax.tree.map(jnp.zeros_like, params), batches)
    return jax.tree.map(lambda a: a / batches.w.sum(), total)

  def closed(params, batches, key):
    return fisher.diagonal(fwd, params, batches, key, 'empirical')

  program = jax.jit({'closed': closed, 'gradients': gradients}[kind])
  program = program.lower(params, batches, jax.random.key(0)).compile()
  times = 5 if kind == 'closed' else 1

  def repeat(i):
    for _ in range(times):
      found = jax.block_until_ready(program(params, batches, jax.random.key(i)))
    return {'trace': float(sum(a.sum() for a in jax.tree.leaves(found))), 'times': times}

  return repeat, {}


serve(lambda: prepare(**GIVEN))
