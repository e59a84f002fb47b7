"""Interference-free low-rank adaptation."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cl_jax.errors import UserError
from cl_jax.linalg import of_task
from cl_jax.lowrank import drawn, here, keep, operator, put, select, train_only
from cl_jax.masks import nest, paths
from cl_jax.types import Array, Method, Tree

PROBES = 'inflora_probes'  # a branch of parameters that exists only while inputs are measured


class InfLoRAState(NamedTuple):
  moment: Tree  # by path f32[..., d_in, d_in], sum of x^T x over the first steps of the task
  rows: Array  # f32[], examples in it
  old: Tree  # by path f32[..., d_in, d_in], the projector onto the inputs of finished tasks
  step: Array  # i32[], steps since the last boundary
  task: Array  # i32[]


def inflora(
  tasks: int,
  warm: int | None = None,
  steps_per_epoch: int | tuple[int, ...] = 1,
  rank: int = 10,
  energy: float = 0.95,
  squared: bool = False,
  targets: str = '.*/(k|v)/w',
) -> Method:
  """Trains updates that read only directions which inputs of finished tasks do not have.

  W_t = W + sum_{i<=t} A_i B_i; B_t is trained from 0, A_t is fixed: the first r left singular vectors of
  (I - P) H, where H = X^T X / rows is the second moment of the weight's inputs in task t, and P projects onto
  the inputs of finished tasks.

  Liang & Li, CVPR 2024, alg. 1; official code liangyanshuo/InfLoRA. P grows at a boundary (DualGPM): by the
  leading left singular vectors of (I - P) H, H now of the finished task's examples under the trained network,
  until the share of sum S that is kept (S the singular values of H) reaches e_t = e + (1 - e) t / T. H is a
  second moment already, so sum S is the energy of the inputs (from the second task on an upper bound of
  what is missing, since (I - P) H is not symmetric: a few directions more are kept); the official code takes
  sum S^2, which squares it once more and keeps fewer directions (squared=True).

  Deviations: hooks see no data before a task, so its first `warm` steps only gather H (the head and all else
  that is not frozen train meanwhile), then A_t is set; P itself is stored in place of a basis of it or of its
  complement; A is not divided by sqrt(3); the first task's directions reach e_0 (the official code takes one
  fewer). A step that gathers takes one more forward and backward pass.
  Positions of a sequence count as rows, those of padding tokens too.

  Freeze the rest by `learner(frozen=...)`. A task of no more than `warm` steps gets no update; after more
  than `tasks` boundaries no slot is trained. While H is gathered the training loss is taken once more with a
  branch of parameters beside the others, which penalties that go over all parameters (`ewc`) do not accept.

  Args:
    tasks: T, number of slots.
    warm: steps that gather H; None is `steps_per_epoch`.
    steps_per_epoch: one epoch, from the stream; a tuple has one a task.
    rank: r, at most d_in.
    energy: e.
    squared: measure energy by S^2, as the official code does.
    targets: regular expression, matched against the whole path of a weight, trained or frozen; stacked
      weights [layers, d_in, d_out] get factors per layer.

  Needs the boundary. State: 8 d_in^2 bytes per adapted matrix, 12 bytes (and parameters:
  T r (d_in + d_out) per adapted matrix).
  """
  given = steps_per_epoch if warm is None else warm

  def gather(s):
    return of_task(given, s.task)

  def init(key, params, batch, fwd):
    weights = select('inflora', targets, params, fwd)
    thin = [p for p, w in weights.items() if w.shape[-2] < rank]
    if thin:
      raise UserError(f'inflora rank={rank} is more than the inputs of {thin[0]}: lower it')

    def factors(key, stack, d_in, d_out):
      a, b = (tasks, *stack, d_in, rank), (tasks, *stack, rank, d_out)
      return {'a': jnp.zeros(a), 'b': jnp.zeros(b)}

    square = {p: jnp.zeros((*w.shape[:-1], w.shape[-2])) for p, w in weights.items()}
    zero = jnp.int32(0)
    state = InfLoRAState(square, jnp.float32(0), square, zero, zero)
    return {'inflora': drawn(key, weights, factors)}, state

  def wrap(s, apply):
    def adapted(w, own):
      return operator(w, jax.lax.stop_gradient(own['a']), train_only(s.task, own['b']))

    def summed(variables, batch, tap, train):
      probes = variables.get(PROBES)
      variables = put({k: v for k, v in variables.items() if k != PROBES}, 'inflora', adapted)
      if probes is not None:

        def probed(w, own):
          valid = (batch.w > 0).astype(jnp.float32)
          return Probed(w, own['p'], jnp.broadcast_to(valid, (*own['p'].shape[:-2], *valid.shape)))

        variables = put({**variables, PROBES: probes}, PROBES, probed)
      return apply(variables, batch, tap, train)

    return summed

  def blank(s):
    return nest({f'{p}/p': jnp.zeros_like(a) for p, a in s.moment.items()})

  def moments(gradient):
    return {p.rpartition('/')[0]: a for p, a in paths(gradient).items()}

  def grads(s, g, params, batch, grad_fn):
    def measured():
      return moments(grad_fn({**params, PROBES: blank(s)}, batch)[1][PROBES])

    on = s.step < gather(s)
    added = jax.lax.cond(on, measured, lambda: jax.tree.map(jnp.zeros_like, s.moment))
    rows = s.rows + jnp.where(on, jnp.sum(batch.w > 0), 0)
    return g, s._replace(moment=jax.tree.map(jnp.add, s.moment, added), rows=rows)

  def after(s, params, step, key):
    s = s._replace(step=s.step + 1)
    free = lambda name, a: here(s.task, a) & (name == 'b') & (s.step > gather(s))  # noqa: E731
    own = paths(keep(step.params['inflora'], params['inflora'], free))

    def chosen():
      new = {}
      for path, moment in s.moment.items():
        h = moment / jnp.maximum(s.rows, 1)
        u, _, _ = jnp.linalg.svd(h - s.old[path] @ h, full_matrices=False)
        a = own[f'{path}/a']
        new[f'{path}/a'] = jnp.where(here(s.task, a), u[..., :rank], a)
      return new

    same = {p: a for p, a in own.items() if p.endswith('/a')}
    own |= jax.lax.cond(s.step == gather(s), chosen, lambda: same)
    return {**params, 'inflora': nest(own)}, s

  def boundary(s, params, batches, fwd, key):
    def add(total, batch):
      # The cotangent of a probe is x^T x, whatever is differentiated.
      loss = lambda probes: jnp.sum(fwd({**params, PROBES: probes}, batch).logits)  # noqa: E731
      return jax.tree.map(jnp.add, total, moments(jax.grad(loss)(blank(s)))), None

    total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, s.moment), batches)
    rows = jnp.maximum(jnp.sum(batches.w > 0), 1)
    target = energy + (1 - energy) * s.task / tasks
    old = {p: extended(s.old[p], total[p] / rows, target, squared) for p in total}
    zero = jax.tree.map(jnp.zeros_like, s.moment)
    return params, InfLoRAState(zero, jnp.zeros_like(s.rows), old, jnp.int32(0), s.task + 1)

  return Method(
    init=init, wrap=wrap, grads=grads, after=after, boundary=boundary, needs=('boundary',)
  )


def extended(old: Array, h: Array, target: Array, squared: bool) -> Array:
  """The projector `old` [..., d, d] with the leading directions of (I - old) h, until `target` is kept."""
  size = (lambda s: jnp.square(s)) if squared else (lambda s: s)
  all_values = jnp.linalg.svd(h, compute_uv=False)
  whole = size(all_values).sum(-1, keepdims=True)
  u, values, _ = jnp.linalg.svd(h - old @ h, full_matrices=False)
  own = size(values)
  # What is kept before each direction; where that is below the target it is added.
  before = whole - own.sum(-1, keepdims=True) + jnp.cumsum(own, -1) - own
  take = (before < target * whole) & (
    values > 1e-6 * all_values[..., :1]
  )  # a direction, not rounding
  u = jnp.where(take[..., None, :], u, 0)
  return old + u @ jnp.swapaxes(u, -1, -2)


class Probed(NamedTuple):
  """A weight that measures its inputs: the cotangent of `probe` is x^T x over the valid examples."""

  w: Any  # an array or another operator [..., d_in, d_out]
  probe: Array  # [..., d_in, d_in]
  valid: Array  # f32[..., B]

  def __rmatmul__(self, x: Array) -> Array:
    return measured(x, self.probe, self.valid) @ self.w


@jax.custom_vjp
def measured(x: Array, probe: Array, valid: Array) -> Array:
  """x [B, ..., d_in], as it is."""
  return x


def _forward(x, probe, valid):
  return x, (x, probe, valid)


def _backward(saved, d):
  x, probe, valid = saved
  x = jnp.where(valid.reshape(-1, *[1] * (x.ndim - 1)) > 0, x, 0).reshape(-1, x.shape[-1])
  return d, (x.T @ x).astype(probe.dtype), jnp.zeros_like(valid)


measured.defvjp(_forward, _backward)
