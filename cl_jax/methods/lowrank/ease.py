"""An adapter per task and prototypes in all of their feature spaces."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cl_jax import adapters
from cl_jax.errors import UserError
from cl_jax.lowrank import here, keep
from cl_jax.methods.heads.task_head import MINUS_INF
from cl_jax.types import Array, Method


class EaseState(NamedTuple):
  mean: Array  # f32[T, C, D], prototype of class c under adapter b, synthesised where count is 0
  count: Array  # f32[T, C], examples that it is the mean of
  own: Array  # i32[C], the first task in which the class came up, -1 before
  now: Array  # bool[C], classes trained on since the last boundary
  task: Array  # i32[]


def ease(
  classes: int, tasks: int, rank: int = 16, scale: float = 0.1, reweigh: float = 0.1
) -> Method:
  """Trains an adapter per task and classifies by class means in the feature spaces of all of them.

  logit_c = sum_b v_bc cos(f_b, p_bc), v_bc = 1 for b the adapter of c's own task, else `reweigh`

  Zhou et al., CVPR 2024, eq. 4-10; official code sun-hailong/CVPR24-Ease. Parallel adapters (see `adapter`);
  in a task its own is trained through the network's head, on which only the task's classes compete. At a
  boundary p_bc becomes the mean of f_b over the finished task's examples of c, under its adapter and all
  earlier ones. For an old class c under the new adapter b it is synthesised by likeness to the task's classes
  j, seen with the adapter o of c's own task: sum_j softmax_j(cos(p_oc, p_oj)) p_bj.

  Other tasks' adapters are restored after the update, so they keep their exact bits under any optimiser. A
  task's classes are those of its examples so far, the batch at hand included. Where a class comes up again,
  its means go on over all examples. Until the first boundary the head predicts, and after it classes without
  a prototype are ruled out. Deviations: all slots are allocated from the start; the head of the training is
  linear, not a scaled cosine; `reweigh` is not divided by the number of finished tasks, as it is in the
  official code.

  Args:
    classes: size of the output layer.
    tasks: T, number of adapters.
    rank: units of the bottleneck, r.
    scale: of the adapters' outputs.
    reweigh: alpha of eq. 10.

  Raises:
    UserError: the network is no transformer, or no classifier, as a language model.

  Needs a transformer (vit, bert, decoder, clip), T forward passes per prediction, and the boundary. State:
  4 T C (D + 1) + 5 C + 4 bytes (and parameters: T layers (2 d r + d + r)).
  """

  def init(key, params, batch, fwd):
    layers, d = adapters.sites('ease', ('middle', 'feedforward'), params, batch, fwd)
    out = jax.eval_shape(fwd, params, batch)
    if out.logits.shape[1:] != (classes,):
      raise UserError(
        f'ease compares each input with {classes} classes; the logits of this network are '
        f'{out.logits.shape}: take a classifier'
      )
    features = out.features.shape[-1]
    return {'ease': adapters.draw(key, (tasks, layers), d, rank)}, EaseState(
      jnp.zeros((tasks, classes, features)),
      jnp.zeros((tasks, classes)),
      jnp.full(classes, -1, jnp.int32),
      jnp.zeros(classes, bool),
      jnp.int32(0),
    )

  def mark(now, batch):
    return now.at[batch.y].max(batch.w > 0)

  def wrap(s, apply):
    slot = jnp.minimum(s.task, tasks - 1)

    def adapted(variables, batch, tap, train):
      def through(own):
        return apply(variables, batch, adapters.in_parallel(own, scale, tap), train)

      if train:
        out = through(jax.tree.map(lambda a: a[slot], variables['ease']))
        return out._replace(logits=jnp.where(mark(s.now, batch), out.logits, MINUS_INF))

      every = jax.lax.map(through, variables['ease'])  # every leaf [T, ...]
      out = jax.tree.map(lambda a: a[slot], every)
      likeness = jnp.einsum('tbd,tcd->tbc', unit(every.features), unit(s.mean))
      weight = jnp.where(s.own == jnp.arange(tasks)[:, None], 1.0, reweigh)
      weight = jnp.where(jnp.arange(tasks)[:, None] < s.task, weight, 0)
      score = jnp.where(s.own >= 0, jnp.einsum('tbc,tc->bc', likeness, weight), MINUS_INF)
      logits = jnp.where(s.task > 0, score, out.logits)
      return out._replace(logits=logits, aux={**out.aux, 'ease': every.features.swapaxes(0, 1)})

    return adapted

  def after(s, params, step, key):
    own = keep(step.params['ease'], params['ease'], lambda name, a: here(s.task, a))
    return {**params, 'ease': own}, s._replace(now=mark(s.now, step.batch))

  def boundary(s, params, batches, fwd, key):
    def add(total, batch):
      f = fwd(params, batch).aux['ease']  # f32[B, T, D]
      f = jnp.where(batch.w[:, None, None] > 0, f, 0)
      hot = (batch.w > 0)[:, None] * jax.nn.one_hot(batch.y, classes)
      return (total[0] + jnp.einsum('bc,btd->tcd', hot, f), total[1] + hot.sum(0)), None

    zero = (jnp.zeros_like(s.mean), jnp.zeros(classes))
    (sums, seen), _ = jax.lax.scan(add, zero, batches)
    begun = (jnp.arange(tasks) <= s.task)[:, None]
    count = s.count + jnp.where(begun, seen, 0)
    grown = (s.count[..., None] * s.mean + sums) / jnp.maximum(count, 1)[..., None]
    mean = jnp.where((begun & (seen > 0))[..., None], grown, s.mean)

    present, known = seen > 0, s.own >= 0
    slot = jnp.minimum(s.task, tasks - 1)
    of_own = unit(mean[jnp.maximum(s.own, 0)])  # f32[C, C, D]: class j under the adapter of class c
    mine = of_own[jnp.arange(classes), jnp.arange(classes)]
    alike = jnp.einsum('cd,cjd->cj', mine, of_own)
    share = jax.nn.softmax(jnp.where(present, alike, MINUS_INF), axis=-1)
    made = (known & (count[slot] == 0) & (s.task < tasks))[:, None]
    mean = mean.at[slot].set(jnp.where(made, share @ mean[slot], mean[slot]))
    own = jnp.where(present & ~known, slot, s.own)
    return params, EaseState(mean, count, own, jnp.zeros_like(s.now), s.task + 1)

  return Method(init=init, wrap=wrap, after=after, boundary=boundary, needs=('boundary',))


def unit(a: Array) -> Array:
  """Rows of length 1; 0 stays 0."""
  return a * jax.lax.rsqrt(jnp.maximum(jnp.square(a).sum(-1, keepdims=True), 1e-24))
