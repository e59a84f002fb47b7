"""Targets of edits in a network of SmolLM2's shape: in one program, one by one, or in the published way.

'published' is one request at a time with whole forward and backward passes over all tokens in every step,
as in github.com/kmeng01/memit, compiled as well.
"""

from __future__ import annotations

from benchmarks.workers.serve import options, serve

GIVEN = options()

from functools import partial  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

from cl_jax.editing import inside, rows, target  # noqa: E402
from cl_jax.models import causal  # noqa: E402

LAYER, CONTEXTS, STEPS = 8, 4, 10


def prepare(kind: str, edits: int, depth: int = 30):
  config = causal.Config(depth=depth)
  p = causal.draw(jax.random.key(0), config, 0.02)
  draw = np.random.default_rng(0)
  ids = lambda n: draw.integers(0, config.vocabulary, n).tolist()  # noqa: E731
  # 9 tokens whose subject ends with the fifth; behind a prefix of 6 tokens in all contexts but one.
  made = [
    (ids(9 + 6 * (c > 0)), 4 + 6 * (c > 0), ids(1)) for _ in range(edits) for c in range(CONTEXTS)
  ]
  flat = rows.layout(made)
  rewrite = rows.Rows(*(a.reshape(edits, CONTEXTS, -1) for a in flat))
  requests = rows.Requests(rewrite, rows.layout([(ids(6), 3, []) for _ in range(edits)]))
  recipe = target.Recipe(STEPS, stop=0.0)

  def ours(width: int):
    found = target.optimise(config, p, requests, LAYER, ('block',), recipe, width)
    return np.asarray(found.loss)

  tx = optax.adam(recipe.rate)

  def said(delta, one: rows.Rows):
    """log p of whole passes with delta at the subject's last token."""
    width = one.head.shape[-1]

    def tap(name, h, i=0):
      added = jnp.where((jnp.asarray(i) == LAYER) & (name == 'block'), delta, 0.0)
      return h.at[:, width].add(added) if name == 'block' else h

    return inside.forward(config, p, one, tap)

  @jax.jit
  def step(delta, opt, request, before):
    def loss(delta):
      log_p = inside.mean_log_p(said(delta, request.rewrite), request.rewrite.target).mean()
      after = said(delta, rows.Rows(*(a[None] for a in request.essence)))[0, 0]
      divergence = (jnp.exp(after) * (after - before)).sum()
      return -log_p + recipe.kl * divergence + recipe.decay * jnp.sqrt(jnp.sum(delta**2) + 1e-12)

    value, g = jax.value_and_grad(loss)(delta)
    update, opt = tx.update(g, opt)
    return value, delta + update, opt

  def published():
    found = []
    for n in range(edits):
      request, delta, value = rows.take(requests, n), jnp.zeros(config.d), jnp.zeros(())
      opt, before = tx.init(delta), jnp.zeros(config.vocabulary)
      for _ in range(STEPS):
        value, delta, opt = step(delta, opt, request, before)
      found.append(value)
    return np.asarray(found)

  work = {'grouped': partial(ours, edits), 'single': partial(ours, 1), 'published': published}[kind]

  def repeat(i):
    return {'loss': float(np.mean(work()))}

  return repeat, {}


serve(lambda: prepare(**GIVEN))
