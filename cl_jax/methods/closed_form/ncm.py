"""Nearest class mean."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cl_jax.errors import UserError
from cl_jax.methods.heads.task_head import MINUS_INF
from cl_jax.types import Array, Method


class NCMState(NamedTuple):
  total: Array  # f32[C, D]
  count: Array  # f32[C]


def ncm(classes: int, metric: str = 'cosine', when: str = 'step') -> Method:
  """Classifies by the nearest mean of the frozen features of each class.

  Mensink et al., TPAMI 2013; as the head of a pretrained model SimpleCIL (Zhou et al., IJCV 2024, eq. 4-5),
  which uses the cosine. Learns in one pass, any order gives the same result.

  Args:
    classes: size of the output layer.
    metric: 'cosine' or 'euclidean' (logits are minus half the squared distance).
    when: 'step' learns from every batch. 'boundary' learns from the examples of the finished task, each
      once whatever the number of epochs, with the features of the network as it is then; in training the
      model's own logits stay, so that its head learns. Adaptation in the first session only, merged with
      the network before it, is APER (same paper, section 4.2):
      `chain(lora=lora(), first_session=first_session(merge=True), ncm=ncm(classes, when='boundary'))`.
      Without `merge` the means are those of the adapted network alone.

  Needs the boundary where `when` says so. State: 4 C (D + 1) bytes. Freeze the model: a moving backbone
  would leave the means behind.
  """
  if metric not in ('cosine', 'euclidean'):
    raise ValueError(f'ncm metric {metric!r}: cosine or euclidean')
  if when not in ('step', 'boundary'):
    raise UserError(f'ncm when={when!r}: choose step or boundary')

  def init(key, params, batch, fwd):
    width = jax.eval_shape(fwd, params, batch).features.shape[-1]
    return {}, NCMState(jnp.zeros((classes, width)), jnp.zeros(classes))

  def wrap(s, apply):
    def nearest(variables, batch, tap, train):
      out = apply(variables, batch, tap, train)
      if train and when == 'boundary':
        return out
      f, mean = out.features, s.total / jnp.maximum(s.count, 1)[:, None]
      if metric == 'cosine':
        unit = lambda a: a / jnp.maximum(jnp.linalg.norm(a, axis=-1, keepdims=True), 1e-12)  # noqa: E731
        score = unit(f) @ unit(mean).T
      else:
        score = f @ mean.T - 0.5 * jnp.sum(mean**2, -1) - 0.5 * jnp.sum(f**2, -1, keepdims=True)
      return out._replace(logits=jnp.where(s.count > 0, score, MINUS_INF))

    return nearest

  def count(s, f, b):
    hot = b.w[:, None] * jax.nn.one_hot(b.y, classes)
    return NCMState(s.total + hot.T @ f, s.count + hot.sum(0))

  def after(s, params, step, key):
    return params, count(s, step.out.features, step.batch)

  def boundary(s, params, batches, fwd, key):
    one = lambda s, b: (count(s, fwd(params, b).features, b), None)  # noqa: E731
    return params, jax.lax.scan(one, s, batches)[0]

  if when == 'step':
    return Method(init=init, wrap=wrap, after=after)
  return Method(init=init, wrap=wrap, boundary=boundary, needs=('boundary',))
