"""Greedy sampler and dumb learner."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from cl_jax import memory, writers
from cl_jax.linalg import cross_entropy, weighted_mean
from cl_jax.masks import nest, paths
from cl_jax.types import Method, Tree, overlay


class GDumbState(NamedTuple):
  memory: memory.Memory
  start: Tree  # the initial parameters and norm statistics
  stats: Tree  # norm statistics of the network that predicts


def gdumb(
  classes: int = 10,
  capacity: int = 500,
  epochs: int = 30,
  rows: int = 16,
  lr: float = 0.05,
  lr_end: float = 5e-4,
  decay: float = 1e-6,
) -> Method:
  """Only fills a class-balanced memory; at a boundary it trains from scratch on what is stored.

  Prabhu, Torr & Dokania, ECCV 2020, algorithms 1-2; official code drimpossible/GDumb: a check on what
  learning from the stream itself is worth. The optimiser of the run is not used. SGD with momentum 0.9,
  gradients cut at norm 10; the first pass at a tenth of `lr`, as there, then the rate falls from `lr` to
  `lr_end` along one cosine. Deviations: no warm restarts, no cutmix, no early stopping; the initial weights
  are the same each time.

  Args:
    classes: number of classes.
    capacity: slots.
    epochs: passes over the examples stored, at each boundary.
    rows: size of a batch of them; what is left of a pass is dropped.
    lr, lr_end, decay: of the training at a boundary, as in the official code.

  Needs the boundary, which is when it can predict. State: capacity + 2 rows as stored, 4 bytes per slot, 1
  per class, 1 x parameters, 2 x norm statistics.
  """
  write = writers.greedy_balanced(capacity, classes)
  size = min(rows, capacity)

  def init(key, params, batch, fwd):
    start = overlay(fwd.stats, params)
    return {}, GDumbState(memory.create(write, batch, 1), start, fwd.stats)

  def wrap(s, apply):
    def predict(variables, batch, tap, train):
      return apply(variables if train else overlay(variables, s.stats), batch, tap, train)

    return predict if jax.tree.leaves(s.stats) else apply

  def grads(s, g, params, batch, grad_fn):
    return jax.tree.map(jnp.zeros_like, g), s

  def after(s, params, step, key):
    new = memory.write_then_draw(write, s.memory, step.batch, key)
    return step.params, s._replace(memory=new)

  def boundary(s, params, batches, fwd, key):
    stored = s.memory.rows._replace(w=s.memory.rows.w * (jnp.arange(capacity + 1) < capacity))
    empty = stored.w[:capacity] <= 0
    steps = jnp.maximum(jnp.sum(~empty) // size, 1)

    def rate(count):
      done = jnp.minimum((count - steps) / (max(epochs - 1, 1) * steps), 1.0)
      falling = lr_end + (lr - lr_end) * 0.5 * (1 + jnp.cos(jnp.pi * done))
      return jnp.where(count < steps, 0.1 * lr, falling)

    tx = optax.chain(
      optax.clip_by_global_norm(10.0),
      optax.add_decayed_weights(decay),
      optax.sgd(rate, momentum=0.9),
    )

    def loss(p, stats, batch):
      out = fwd(overlay(stats, p), batch, train=True)
      return weighted_mean(cross_entropy(out.logits, batch.y), batch.w), out.stats

    def epoch(carry, key):
      order = jax.random.permutation(key, capacity)
      order = order[jnp.argsort(empty[order], stable=True)]  # empty slots last, beyond the steps

      def train(carry, chosen):
        p, stats, opt = carry
        g, stats = jax.grad(loss, has_aux=True)(p, stats, jax.tree.map(lambda a: a[chosen], stored))
        updates, opt = tx.update(g, opt, p)
        return optax.apply_updates(p, updates), stats, opt

      def step(carry, at):  # of a fixed number, so that a program can be counted
        i, chosen = at
        return jax.lax.cond(i < steps, train, lambda carry, _: carry, carry, chosen), None

      most = capacity // size
      places = order[: most * size].reshape(most, size)
      return jax.lax.scan(step, carry, (jnp.arange(most), places))[0], None

    first, of_norms = paths(s.start), paths(s.stats)
    begin = nest({p: a for p, a in first.items() if p not in of_norms})
    carry = (begin, nest({p: first[p] for p in of_norms}), tx.init(begin))
    (params, stats, _), _ = jax.lax.scan(epoch, carry, jax.random.split(key, epochs))
    return params, s._replace(stats=stats)

  return Method(
    init=init, wrap=wrap, grads=grads, after=after, boundary=boundary, needs=('boundary',)
  )
