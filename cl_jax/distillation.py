"""The network of the last boundary as a teacher: what several methods keep of it, and learn from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cl_jax.errors import UserError
from cl_jax.masks import nest, paths
from cl_jax.methods.heads.task_head import MINUS_INF
from cl_jax.types import Array, Batch, Forward, Out, Tree, overlay

OUTPUTS = ('all', 'seen', 'heads', 'old')
RAW = ('heads', 'old')  # which read the logits before a head's mask


class Former(NamedTuple):
  """What is kept of the finished tasks."""

  teacher: Tree  # parameters (and norm statistics) at the last boundary
  seen: Array  # bool[C], classes trained on before that boundary
  now: Array  # bool[C], including the current task's
  tasks: Array  # i32[], finished tasks


def begin(params: Tree, batch: Batch, fwd: Forward) -> Former:
  """Before the first task; the teacher is the initial network, from which nothing is learnt."""
  none = jnp.zeros(jax.eval_shape(fwd, params, batch).logits.shape[-1], bool)
  return Former(overlay(fwd.stats, params), none, none, jnp.int32(0))


def meet(former: Former, batch: Batch) -> Former:
  """The labels of a batch count as the current task's."""
  return former._replace(now=former.now.at[batch.y].max(batch.w > 0))


def settle(former: Former, params: Tree, fwd: Forward) -> Former:
  """A boundary: the network as it is becomes the teacher, without what methods behind this one have added."""
  now = paths(overlay(fwd.stats, params))
  teacher = nest({path: now[path] for path in paths(former.teacher)})
  return Former(teacher, former.now, former.now, former.tasks + 1)


class Distiller(NamedTuple):
  """What `distiller` returns.

  Attributes:
    wrap: the method's hook of that name.
    loss: (former, old Out, new Out) -> f32[B], T^2 times a cross-entropy at temperature T.
  """

  wrap: Callable
  loss: Callable[[Former, Out, Out], Array]


def distiller(
  name: str,
  outputs: str,
  task_classes: tuple[tuple[int, ...], ...] = (),
  temperature: float | Array = 2.0,
  mean: bool = False,
) -> Distiller:
  """Distils the teacher's outputs, Li & Hoiem 2018, eq. 2-3.

  Args:
    name: of the method.
    outputs: 'all': one softmax over all. 'seen': targets over the classes seen before the boundary, zero
      for the others, against all outputs that compete now (class-incremental). 'heads': the sum over
      finished tasks of one softmax per head. 'old': one softmax over the classes seen before the boundary,
      of both networks. For the last two a head that masks must come AFTER the method in the chain.
    task_classes: the labels of each task, for 'heads'.
    temperature: T.
    mean: average over the outputs that compete, and the heads, instead of summing.

  Raises:
    UserError (by `loss`): another choice than 'all' of a language model.
  """
  if outputs not in OUTPUTS:
    raise ValueError(f'{name} outputs {outputs!r}: one of {OUTPUTS}')
  if outputs == 'heads' and not task_classes:
    raise ValueError(f'{name} outputs "heads" needs task_classes, the labels of each task')

  def wrap(s, apply):
    def keep_raw(variables, batch, tap, train):
      out = apply(variables, batch, tap, train)
      return out._replace(aux={**out.aux, name: out.logits})

    return keep_raw if outputs in RAW else apply

  def distil(target, logits):
    p = jax.nn.softmax(target / temperature)
    logp = jax.nn.log_softmax(logits / temperature)
    ce = -(temperature**2) * jnp.sum(p * jnp.maximum(logp, MINUS_INF), axis=-1)
    # A language model: the mean over the tokens to learn, the others have logits of 0.
    if ce.ndim > 1:
      learnt = (logits != 0).any(-1)
      ce = jnp.where(learnt, ce, 0).sum(-1) / jnp.maximum(learnt.sum(-1), 1)
      return ce / logits.shape[-1] if mean else ce
    return ce / jnp.sum(logits > MINUS_INF / 2, axis=-1) if mean else ce

  def loss(former, old, new):
    if outputs != 'all' and new.logits.ndim > 2:
      raise UserError(
        f'config.{name}.outputs={outputs!r} goes by classes, and outputs of a language model are tokens: '
        "take 'all'"
      )
    if outputs == 'heads':
      per_head = [
        (former.tasks > t) * distil(old.aux[name][:, list(c)], new.aux[name][:, list(c)])
        for t, c in enumerate(task_classes)
      ]
      kd = sum(per_head, jnp.zeros(()))
      return kd / jnp.maximum(former.tasks, 1) if mean else kd
    if outputs == 'old':
      only = lambda out: jnp.where(former.seen, out.aux[name], MINUS_INF)  # noqa: E731
      return distil(only(old), only(new))
    if outputs == 'seen':
      return distil(jnp.where(former.seen, old.logits, MINUS_INF), new.logits)
    return distil(old.logits, new.logits)

  return Distiller(wrap, loss)
