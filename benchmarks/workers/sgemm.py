"""The limit: the workload's multiply-adds done as products of 2048 x 2048 matrices by the same library."""

from __future__ import annotations

from benchmarks.workers.serve import options, serve

GIVEN = options()

import time  # noqa: E402

import jax  # noqa: E402

SIDE = 2048


def prepare(flops: int):
  a = jax.random.normal(jax.random.key(0), (SIDE, SIDE))
  product = jax.jit(lambda a: a @ a).lower(a).compile()
  times = 5

  def repeat(i):
    begin = time.process_time()
    for _ in range(times):
      b = jax.block_until_ready(product(a))
    spent = time.process_time() - begin
    return {'cpu': spent / times * flops / (2 * SIDE**3), 'checksum': float(b[0, 0])}

  return repeat, {}


serve(lambda: prepare(**GIVEN))
