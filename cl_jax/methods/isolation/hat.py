"""Hard attention to the task."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cl_jax.errors import UserError
from cl_jax.linalg import of_task
from cl_jax.masks import nest, paths
from cl_jax.types import Array, Method, Tree, Wire, overlay

EMBEDDINGS = {'normal': jax.random.normal, 'uniform': partial(jax.random.uniform, maxval=2.0)}


class HATState(NamedTuple):
  used: Tree  # {tap: f32[units] or, in a stack, f32[layers, units]}: cumulative attention of finished tasks
  settled: Array  # bool[C], classes of finished tasks
  now: Array  # bool[C], those of the current task
  smax: Array  # f32[tasks], with which finished tasks are read; 0 for the others
  step: Array  # i32[], steps since the last boundary
  tasks: Array  # i32[], finished


def hat(
  tasks: int,
  steps_per_epoch: int | tuple[int, ...],
  coef: float = 0.75,
  smax: float = 400.0,
  wires: tuple[Wire, ...] = (),
  embedding: str = 'normal',
) -> Method:
  """Learns, per task, a nearly binary gate on every hidden unit and protects the units in use.

  Serra et al., ICML 2018; official code joansj/hat. With e_l^t the embedding of task t at layer l:

  - gate a_l^t = sigmoid(s e_l^t) on the activations (eq. 1); s rises linearly from 1/smax to smax within
    each epoch and is smax at test (eq. 3); where an epoch is a single step it stays at 1/smax, in the
    official code too: such a task needs smaller batches
  - updates of weights are scaled by 1 - min(a<_{l,i}, a<_{l-1,j}), of biases by 1 - a<_{l,i} (eq. 2),
    where a< is the elementwise maximum over finished tasks
  - embedding gradients are multiplied by smax / s * (cosh(s e) + 1) / (cosh(e) + 1), s e clipped to +-50,
    and e is clipped to +-6 (eq. 4-5)
  - L = L_task + coef * sum a^t (1 - a<) / sum (1 - a<), pooled over all layers (eq. 6)

  Gates sit on the taps that the model's wires name: units of an MLP, channels of a convolution, and in a
  transformer the keys, the values and the hidden units of the feed-forward part. What is of use to every
  task (embeddings, layer norms, biases of the residual stream) is fixed after the first. Norm
  statistics move like biases. Give every task its own outputs by a `task_head`: the columns of a finished
  task's classes are fixed unless the current task has them too.

  Deviation: eq. 2 scales the update instead of the gradient, and embeddings of tasks that have no row in the
  batch stay. That is the same for plain SGD, and holds for momentum, Adam and weight decay too, which would
  move what is protected by what they remember. Where smax changes from task to task, a finished one is read
  and protected with its own; De Lange et al.'s code (Mattdl/CLsurvey) reads all with the latest.

  Args:
    tasks: number of tasks.
    steps_per_epoch: length of one annealing cycle; a tuple has one a task, for tasks of unequal length.
    coef: c, the weight of the sparsity term.
    smax: the steepest gate; 25 to 800 in the paper. Below 1 gates have one steepness throughout.
    wires: `Model.wires` of the network.
    embedding: what embeddings are drawn from. 'normal', N(0, 1), as the official code: half of the units
      begin closed. 'uniform', U(0, 2), as there for the paper's compression and in De Lange et al.'s code:
      all begin open, which takes fewer steps.

  Needs the task in training and at test, and the boundary. State: 4 bytes per unit and per task, 2 per class,
  8 bytes (and parameters: 4 bytes per unit and task).
  """
  if embedding not in EMBEDDINGS:
    raise ValueError(f'hat embedding {embedding!r}: one of {(*EMBEDDINGS,)}')
  # The gates are leaves of the parameters, whose paths have slashes already.
  named = {
    w.layer: w._replace(source=w.source.replace('/', '.'), target=w.target.replace('/', '.'))
    for w in wires
    if w.layer != 'head'
  }
  gated_taps = {w.source for w in named.values()} | {w.target for w in named.values()}

  def units(params, batch, fwd):
    """{tap: shape of its units} of every gated activation; those of a stack have its length in front."""
    depth = {
      named[path.rsplit('/', 1)[0]].target: a.shape[:1]
      for path, a in paths(overlay(fwd.frozen, params)).items()
      if path.endswith('/w') and path.rsplit('/', 1)[0] in named and a.ndim == 3
    }
    found: dict[str, tuple[int, ...]] = {}

    def tap(name, h, layer=0):
      name = name.replace('/', '.')
      if name in gated_taps:
        found[name] = (*depth.get(name, ()), h.shape[-1])
      return h

    jax.eval_shape(lambda p, b: fwd(p, b, tap), params, batch)
    return found

  def init(key, params, batch, fwd):
    shapes = units(params, batch, fwd)
    if not shapes:
      raise UserError(
        'hat needs hidden units to gate: give it wires=model.wires of a network that has some'
      )
    keys = jax.random.split(key, len(shapes))
    draw = EMBEDDINGS[embedding]
    e = {n: draw(k, (tasks, *u)) for k, (n, u) in zip(keys, shapes.items(), strict=True)}
    used = {n: jnp.zeros(u) for n, u in shapes.items()}
    none = jnp.zeros(jax.eval_shape(fwd, params, batch).logits.shape[-1], bool)
    return {'hat': e}, HATState(used, none, none, jnp.zeros(tasks), jnp.int32(0), jnp.int32(0))

  def steepness(s):
    n = of_task(steps_per_epoch, s.tasks)
    position = (s.step % n) / jnp.maximum(n - 1, 1)
    gentle = jnp.minimum(1 / smax, smax)
    return gentle + (smax - gentle) * position

  def taken(s, path, a):
    """How much of each entry of a parameter the finished tasks use: 0 to 1, of a shape like that of `a`."""
    everyone = (s.tasks > 0).astype(a.dtype)
    layer, _, name = path.rpartition('/')
    wire = named.get(layer)
    if wire is None:
      return everyone
    of = lambda tap: s.used.get(tap, everyone[None])  # noqa: E731
    if name != 'w':
      return of(wire.target)
    source = of(wire.source)
    repeat = a.shape[-2] // source.shape[-1] if source.shape[-1] > 1 else 1
    source = jnp.tile(source, repeat)  # the pixels of a flattened image share a channel
    return jnp.minimum(source[..., :, None], of(wire.target)[..., None, :])

  def wrap(s, apply):
    def gated(variables, batch, tap, train):
      e, task = variables['hat'], jnp.maximum(batch.task, 0)
      scale = steepness(s) if train else jnp.where(s.smax > 0, s.smax, smax)[task][:, None]

      def gate(name, h, layer=0):
        own = e.get(name.replace('/', '.'))
        if own is not None:
          a = jax.nn.sigmoid(scale * (own[task] if own.ndim == 2 else own[task, layer]))
          h = h * a.reshape(a.shape[0], *[1] * (h.ndim - 2), a.shape[1]).astype(h.dtype)
        return tap(name, h, layer)

      rest = {k: v for k, v in variables.items() if k != 'hat'}
      out = apply(rest, batch, gate, train)
      old = paths(rest)
      slow = {p: old[p] + (1 - taken(s, p, a)) * (a - old[p]) for p, a in paths(out.stats).items()}
      return out._replace(stats=nest(slow))

    return gated

  def loss(s, params, batch, out, fwd):
    scale, t = steepness(s), jnp.maximum(batch.task[0], 0)
    free = jax.tree.map(lambda u: 1 - u, s.used)
    a = {n: jax.nn.sigmoid(scale * e[t]) for n, e in params['hat'].items()}
    busy = sum(jnp.sum(a[n] * free[n]) for n in free)
    # Gates that are exactly 1 can leave no unit free: then nothing is busy either.
    return coef * busy / jnp.maximum(sum(jnp.sum(f) for f in free.values()), 1e-12)

  def grads(s, g, params, batch, grad_fn):
    scale = steepness(s)

    def compensate(grad, e):
      up = jnp.cosh(jnp.clip(scale * e, -50, 50)) + 1
      return grad * smax / scale * up / (jnp.cosh(e) + 1)

    return {**g, 'hat': jax.tree.map(compensate, g['hat'], params['hat'])}, s

  def after(s, params, step, key):
    now = s.now.at[step.batch.y].max(step.batch.w > 0)
    old, moved = paths(step.params), paths(params)
    for path, new in moved.items():
      top = path.split('/')[0]
      if top == 'head':
        moved[path] = jnp.where(s.settled & ~now, old[path], new)
      elif top != 'hat':
        moved[path] = old[path] + (1 - taken(s, path, new)) * (new - old[path])
    own = jnp.zeros(tasks, bool).at[jnp.maximum(step.batch.task, 0)].max(step.batch.w > 0)

    def kept(
      old, new
    ):  # rows of other tasks have no gradient, but momentum and weight decay move them
      return jnp.where(jnp.expand_dims(own, range(1, new.ndim)), jnp.clip(new, -6, 6), old)

    e = jax.tree.map(kept, step.params['hat'], params['hat'])
    return {**nest(moved), 'hat': e}, s._replace(step=s.step + 1, now=now)

  def boundary(s, params, batches, fwd, key):
    t = jnp.maximum(batches.task.reshape(-1)[0], 0)
    now = {n: jax.nn.sigmoid(smax * e[t]) for n, e in params['hat'].items()}
    used, none = jax.tree.map(jnp.maximum, s.used, now), jnp.zeros_like(s.now)
    read = s.smax.at[t].set(smax)
    return params, HATState(used, s.settled | s.now, none, read, jnp.int32(0), s.tasks + 1)

  needs = ('boundary', 'task_test', 'task_train')
  return Method(init, wrap, Method().mix, loss, grads, after, boundary, needs)
