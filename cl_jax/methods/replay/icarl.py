"""iCaRL: incremental classifier and representation learning."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from cl_jax.linalg import cross_entropy, weighted_mean
from cl_jax.memory import distinct
from cl_jax.methods.heads.task_head import MINUS_INF
from cl_jax.types import Array, Batch, Forward, Method, Tree, overlay


class ICaRLState(NamedTuple):
  rows: Batch  # [K + 1, ...]: exemplars, those of a class one after the other, best first
  count: Array  # i32[C], exemplars of each class
  order: Array  # i32[C], the rank at which a class came, -1 before
  now: Array  # bool[C], classes met so far
  draw: Batch  # the exemplars of the next step
  means: Array  # f32[C, D], normalised class means of the exemplars' features
  teacher: Tree  # parameters (and norm statistics) at the last boundary


def icarl(
  classes: int = 10,
  capacity: int = 2000,
  draw: int = 32,
  coef: float = 1.0,
  temperature: float = 1.0,
) -> Method:
  """Distils with sigmoid outputs on new data and exemplars, predicts by the nearest mean of exemplars.

  L = mean over rows of sum_c BCE(sigmoid(z_c), q_c), in place of the cross-entropy, with q_c the label, or
  for the classes of finished tasks sigmoid(z_c / temperature) of the last boundary's network.

  At a boundary each class keeps capacity // (classes seen) exemplars. A new one gets them by herding, without
  repeats: p_k = argmin_x ||mu - (phi(x) + sum_{j<k} phi(p_j)) / k||; an old one keeps its first. phi are
  L2-normalised features, and a row's class is the one with the nearest normalised mean of exemplars.

  Rebuffi et al., CVPR 2017, algorithms 1-5; official code srebuffi/iCaRL. Memory-honest: the means are those
  of the stored exemplars ("iCaRL"), not of all training data ("theoretical best"). Deviations: exemplars join
  every batch as `draw` rows instead of being mixed into the task's epochs; the loss sums over outputs as in
  GMvandeVen/continual-learning (the official code averages); images are not mirrored for the means; outputs
  that a head leaves out have no loss, so that under a `task_head` old outputs learn from exemplars alone, as
  in De Lange et al.'s code (Mattdl/CLsurvey, which takes softmaxes).
  Until the first boundary predictions are the network's own. The loss of the run must be the
  cross-entropy, which is taken out.

  Args:
    classes: size of the output layer.
    capacity: K, exemplars in all; at least one a class.
    draw: exemplars per step, drawn without replacement.
    coef: weight of the outputs of old classes; 1 in the paper.
    temperature: softens their targets; 1 in the paper. GMvandeVen/continual-learning has 2, which is worth
      three points on Split MNIST.

  Needs the boundary. State: capacity + 1 + draw rows as stored, 4 C (D + 2) + C bytes, 1 x parameters and
  norm statistics. One more forward pass per step.
  """
  if capacity < classes:
    raise ValueError(f'icarl: {capacity} exemplars for {classes} classes: give at least as many')

  def init(key, params, batch, fwd):
    d = jax.eval_shape(fwd, params, batch).features.shape[-1]
    blank = lambda n: jax.tree.map(lambda a: jnp.zeros((n, *a.shape[1:]), a.dtype), batch)  # noqa: E731
    zeros = jnp.zeros(classes, jnp.int32)
    return {}, ICaRLState(
      blank(capacity + 1), zeros, zeros - 1, zeros > 0, blank(draw), jnp.zeros((classes, d)),
      overlay(fwd.stats, params),
    )  # fmt: skip

  def wrap(s, apply):
    def nearest(variables, batch, tap, train):
      out = apply(variables, batch, tap, train)
      if train:
        return out
      distance = jnp.sum(jnp.square(unit(out.features)[:, None] - s.means), axis=-1)
      by_mean = jnp.where(s.order >= 0, -distance, MINUS_INF)
      logits = jnp.where(jnp.any(s.order >= 0), by_mean, out.logits)
      return out._replace(logits=logits, aux={**out.aux, 'icarl': out.logits})

    return nearest

  def mix(s, batch):
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), batch, s.draw)

  def loss(s, params, batch, out, fwd):
    old = jax.lax.stop_gradient(fwd(s.teacher, batch).aux['icarl'])
    known = s.order >= 0
    label = jax.nn.one_hot(batch.y, classes, dtype=out.logits.dtype)
    target = jnp.where(known, jax.nn.sigmoid(old / temperature), label)
    bce = optax.sigmoid_binary_cross_entropy(jnp.maximum(out.logits, -1e4), target)
    bce = jnp.sum(
      jnp.where(out.logits > MINUS_INF / 2, jnp.where(known, coef, 1.0) * bce, 0), axis=-1
    )
    return weighted_mean(bce - cross_entropy(out.logits, batch.y), batch.w)

  def after(s, params, step, key):
    now = s.now.at[step.batch.y].max(step.batch.w > 0)
    return params, s._replace(now=now, draw=drawn(s, key))

  def drawn(s, key):
    """Rows of distinct filled slots."""
    at, w = distinct(key, draw, s.count.sum(dtype=jnp.int32))
    slots = jnp.argsort(~filled(s), stable=True)  # the filled ones first
    return jax.tree.map(lambda a: a[slots[at]], s.rows)._replace(w=w)

  def layout(total):
    """(rank of the class, rank of the exemplar) of every slot, for `total` classes."""
    m = jnp.maximum(capacity // jnp.maximum(total, 1), 1)
    at = jnp.arange(capacity)
    return at // m, at % m

  def filled(s):
    """bool[capacity]: the slots that hold an exemplar."""
    rank, nth = layout((s.order >= 0).sum())
    held = (
      jnp.zeros(capacity + 1, jnp.int32).at[jnp.where(s.order >= 0, s.order, capacity)].set(s.count)
    )
    return nth < held[rank]

  def boundary(s, params, batches, fwd, key):
    new = s.now & (s.order < 0)
    before = (s.order >= 0).sum()
    order = jnp.where(new, before + jnp.cumsum(new) - 1, s.order).astype(jnp.int32)
    total = before + new.sum()
    data = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), batches)
    phi = jax.lax.map(lambda b: unit(fwd(params, b).features), batches)
    picked, count = herd(phi.reshape(-1, phi.shape[-1]), data, new, order, total)
    rank, nth = layout(total)
    m_old = jnp.maximum(capacity // jnp.maximum(before, 1), 1)
    m = jnp.maximum(capacity // jnp.maximum(total, 1), 1)
    kept = jnp.where(new, count, jnp.minimum(s.count, m))
    source = jnp.minimum(rank * m_old + nth, capacity)
    take = lambda old, fresh: jnp.where(  # noqa: E731
      (rank < before).reshape(-1, *[1] * (old.ndim - 1)), old[source], fresh[picked]
    )
    rows = jax.tree.map(take, s.rows, data)
    s = s._replace(count=kept.astype(jnp.int32), order=order)
    rows = rows._replace(w=jnp.where(filled(s), 1.0, 0.0).astype(rows.w.dtype))
    rows = jax.tree.map(lambda a: jnp.concatenate([a, jnp.zeros_like(a[:1])]), rows)
    s = s._replace(
      rows=rows, means=means_of(rows, params, fwd, batches), teacher=overlay(fwd.stats, params)
    )
    return params, s._replace(draw=drawn(s, key))

  def herd(phi, data, new, order, total):
    """(i32[capacity] positions in the task's data for the slots of new classes, i32[C] how many each got)."""
    m = jnp.maximum(capacity // jnp.maximum(total, 1), 1)
    length = jnp.sum(jnp.square(phi), axis=-1)

    def one_class(c, carry):
      picked, count = carry
      mine = (data.y == c) & (data.w > 0)
      mu = jnp.sum(phi * mine[:, None], axis=0) / jnp.maximum(mine.sum(), 1)
      most = jnp.where(new[c], jnp.minimum(m, mine.sum()), 0)

      def pick(k, carry):
        picked, total, free = carry
        # ||mu - (phi + total) / (k + 1)||^2 up to a constant and a factor, by one product
        apart = length - 2 * phi @ ((k + 1) * mu - total)
        best = jnp.argmin(jnp.where(free, apart, jnp.inf)).astype(jnp.int32)
        slot = order[c] * m + k
        return picked.at[slot].set(best), total + phi[best], free.at[best].set(False)

      picked, *_ = jax.lax.fori_loop(0, most, pick, (picked, jnp.zeros_like(mu), mine))
      return picked, count.at[c].set(most.astype(jnp.int32))

    start = (jnp.zeros(capacity, jnp.int32), jnp.zeros(classes, jnp.int32))
    return jax.lax.fori_loop(0, classes, one_class, start)

  def means_of(rows: Batch, params: Tree, fwd: Forward, batches: Batch) -> Array:
    """f32[C, D]: the normalised mean of the normalised features of each class's exemplars."""
    size = batches.y.shape[1]
    n = -(-(capacity + 1) // size) * size
    padded = jax.tree.map(
      lambda a: jnp.pad(a, [(0, n - capacity - 1)] + [(0, 0)] * (a.ndim - 1)).reshape(
        -1, size, *a.shape[1:]
      ),
      rows,
    )

    def add(total, b):
      phi = unit(fwd(params, b).features) * (b.w > 0)[:, None]
      return total.at[b.y].add(phi), None

    d = jax.eval_shape(fwd, params, jax.tree.map(lambda a: a[0], padded)).features.shape[-1]
    total, _ = jax.lax.scan(add, jnp.zeros((classes, d)), padded)
    return unit(total)

  return Method(
    init=init, wrap=wrap, mix=mix, loss=loss, after=after, boundary=boundary, needs=('boundary',)
  )


def unit(a: Array) -> Array:
  """Rows of length 1 (0 stays 0)."""
  norm = jnp.sqrt(jnp.sum(jnp.square(a), axis=-1, keepdims=True))
  return a / jnp.where(norm > 0, norm, 1)
