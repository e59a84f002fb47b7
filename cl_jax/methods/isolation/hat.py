"""Hard attention to the task."""

from __future__ import annotations

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cl_jax.errors import UserError
from cl_jax.masks import nest, paths
from cl_jax.types import Array, Method, Tree


class HATState(NamedTuple):
  used: Tree  # {tap: f32[units]}, the cumulative attention of finished tasks
  step: Array  # i32[], steps since the last boundary


def hat(
  tasks: int,
  steps_per_epoch: int,
  coef: float = 0.75,
  smax: float = 400.0,
  head: str = 'head',
) -> Method:
  """Learns, per task, a nearly binary gate on every hidden unit and protects the units in use.

  Serra et al., ICML 2018; official code joansj/hat. With e_l^t the embedding of task t at layer l:

  - gate a_l^t = sigmoid(s e_l^t) on the activations (eq. 1); s rises linearly from 1/smax to smax within
    each epoch and is smax at test (eq. 3)
  - weight gradients are scaled by 1 - min(a<_{l,i}, a<_{l-1,j}), biases by 1 - a<_{l,i} (eq. 2), where a< is
    the elementwise maximum over finished tasks
  - embedding gradients are multiplied by smax / s * (cosh(s e) + 1) / (cosh(e) + 1), s e clipped to +-50,
    and e is clipped to +-6 (eq. 4-5)
  - L = L_task + coef * sum a^t (1 - a<) / sum (1 - a<), pooled over all layers (eq. 6)

  A hidden layer is a tap whose name is also the parent of a weight `w` (and bias `b`), and layers follow each
  other in the order of their numbers (l0, l1, ...). The output layer is not masked: give every task its
  own outputs by a `task_head`. Train with plain SGD: momentum, Adam and weight decay move
  protected weights although their gradient is zero.

  Args:
    tasks: number of tasks.
    steps_per_epoch: length of one annealing cycle.
    coef: c, the weight of the sparsity term.
    smax: the steepest gate.
    head: top-level name of the output layer.

  Needs the task in training and at test, and the boundary. State: 4 bytes per unit (and parameters: 4 bytes
  per unit and task).
  """

  def record(params, batch, fwd):
    """{tap: units} of every hidden activation."""
    units: dict[str, int] = {}

    def tap(name, h, layer=0):
      units[name] = h.shape[-1]
      return h

    jax.eval_shape(lambda p, b: fwd(p, b, tap), params, batch)
    return units

  def init(key, params, batch, fwd):
    units = record(params, batch, fwd)
    layers = {p.rsplit('/', 1)[0] for p in paths(params)} - {head}
    if unknown := sorted(layers ^ set(units)):
      raise UserError(
        f'hat needs one gated activation per hidden layer; layers {sorted(layers)} and activations '
        f'{sorted(units)} of this model differ in {unknown}'
      )
    keys = jax.random.split(key, len(units))
    e = {n: jax.random.normal(k, (tasks, u)) for k, (n, u) in zip(keys, units.items(), strict=True)}
    used = {n: jnp.zeros(u) for n, u in units.items()}
    return {'hat': e}, HATState(used, jnp.int32(0))

  def steepness(s):
    position = (s.step % steps_per_epoch) / max(steps_per_epoch - 1, 1)
    return 1 / smax + (smax - 1 / smax) * position

  def wrap(s, apply):
    def gated(variables, batch, tap, train):
      e, scale = variables['hat'], steepness(s) if train else smax
      task = jnp.maximum(batch.task, 0)

      def gate(name, h, layer=0):
        a = jax.nn.sigmoid(scale * e[name][task])
        return tap(name, h * a.reshape(a.shape[0], *[1] * (h.ndim - 2), a.shape[1]), layer)

      rest = {k: v for k, v in variables.items() if k != 'hat'}
      return apply(rest, batch, gate, train)

    return gated

  def loss(s, params, batch, out, fwd):
    scale, t = steepness(s), jnp.maximum(batch.task[0], 0)
    free = jax.tree.map(lambda u: 1 - u, s.used)
    a = {n: jax.nn.sigmoid(scale * e[t]) for n, e in params['hat'].items()}
    busy = sum(jnp.sum(a[n] * free[n]) for n in free)
    return coef * busy / sum(jnp.sum(f) for f in free.values())

  def grads(s, g, params, batch, grad_fn):
    scale = steepness(s)

    def compensate(grad, e):
      up = jnp.cosh(jnp.clip(scale * e, -50, 50)) + 1
      return grad * smax / scale * up / (jnp.cosh(e) + 1)

    order = sorted(s.used, key=number)
    before = dict(zip(order[1:], order, strict=False))
    masked = {}
    for path, grad in paths({k: v for k, v in g.items() if k != 'hat'}).items():
      layer, name = path.rsplit('/', 1)
      if layer != head:
        taken = s.used[layer]
        if name == 'w' and layer in before:
          taken = jnp.minimum(taken, s.used[before[layer]][:, None])
        grad = grad * (1 - taken)
      masked[path] = grad
    hat_grad = jax.tree.map(compensate, g['hat'], params['hat'])
    return {**nest(masked), 'hat': hat_grad}, s

  def after(s, params, step, key):
    e = jax.tree.map(lambda a: jnp.clip(a, -6, 6), params['hat'])
    return {**params, 'hat': e}, s._replace(step=s.step + 1)

  def boundary(s, params, batches, fwd, key):
    t = jnp.maximum(batches.task.reshape(-1)[0], 0)
    now = {n: jax.nn.sigmoid(smax * e[t]) for n, e in params['hat'].items()}
    return params, HATState(jax.tree.map(jnp.maximum, s.used, now), jnp.int32(0))

  needs = ('boundary', 'task_test', 'task_train')
  return Method(init, wrap, Method().mix, loss, grads, after, boundary, needs)


def number(layer: str) -> tuple:
  """Sorts 'l2' before 'l10'; the order of a dict does not survive a pytree."""
  return tuple(int(part) if part.isdigit() else part for part in re.split(r'(\d+)', layer))
