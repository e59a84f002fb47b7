"""S-Prompts."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cl_jax import prompts
from cl_jax.errors import UserError
from cl_jax.types import Array, Method, overlay


class SPromptsState(NamedTuple):
  tasks: prompts.Tasks
  finished: Array  # i32[], tasks with centroids
  centroids: Array  # f32[T, k, D]


def sprompts(
  tasks: int, length: int = 10, centroids: int = 5, iterations: int = 20, unit: bool = True
) -> Method:
  """A prompt and a head per task, trained in it only; each input goes to the task of the nearest centroid.

  Wang et al., NeurIPS 2022, "S-Prompts learning with pre-trained transformers", section 3 (the image
  prompts, S-iPrompts); official code iamwangyabin/S-Prompts. At a boundary k-means of the features of the
  frozen network, over the task's examples, gives `centroids` points; at test an input takes prompt and head
  of the task with the nearest point (Euclidean). Until there are any the current task is taken. What
  belongs to other tasks keeps its value bit for bit, whatever the optimiser remembers.

  The heads are {'w': [T, D, C], 'b': [T, C]}; each starts as the network's own, which is not used. They have
  all outputs: let these all compete (no `current_head`), so that a head learns which do not occur in its
  task.

  Deviations: queries have length 1 like the features that centroids are of (`unit`; the official code leaves
  queries as they are); Euclidean where it takes the sum of absolute differences; heads learn the labels of
  all tasks, where its own have the task's alone; k-means starts from the task's first example and, in turn,
  the one that is farthest from those chosen, and has a fixed number of iterations. Prompts start at
  U(-0.5, 0.5), as in `prompt_tuning`.

  Args:
    tasks: T, slots; later tasks go on with the last one, whose centroids become theirs.
    length: rows of a prompt.
    centroids: k.
    iterations: of k-means.
    unit: features are scaled to length 1, for centroids and queries.

  Raises:
    UserError: the network is no transformer, or has no head of 'w' and 'b'.

  Needs the boundary. State: 4 T k D + 12 bytes (parameters: T (length d + (D + 1) C)). One more forward pass
  at test.
  """

  def init(key, params, batch, fwd):
    net = prompts.network('sprompts', params, batch, fwd)
    head = overlay(fwd.frozen, params).get('head', {})
    if set(head) != {'w', 'b'}:
      raise UserError('sprompts needs an output layer "head" of a weight w and a bias b')
    draw = jax.random.uniform(key, (tasks, length, net.width), jnp.float32, -0.5, 0.5)
    heads = {n: jnp.broadcast_to(a, (tasks, *a.shape)) + 0.0 for n, a in head.items()}
    points = jnp.zeros((tasks, centroids, net.features))
    return (
      {'sprompts': {'prompts': draw, **heads}},
      SPromptsState(prompts.first_task(), jnp.int32(0), points),
    )

  def route(s, q):
    """i32[B], the task whose centroid is nearest."""
    far = distances(q, s.centroids.reshape(-1, q.shape[-1])).reshape(-1, tasks, centroids).min(-1)
    near = jnp.argmin(jnp.where(jnp.arange(tasks) < s.finished, far, jnp.inf), -1)
    return jnp.where(s.finished > 0, near, s.tasks.now)

  def wrap(s, apply):
    def prompted(variables, batch, tap, train):
      own, now = variables['sprompts'], s.tasks.now
      if train:
        out = apply(variables, batch, prompts.before_sequence(tap, own['prompts'][now]), train)
        return out._replace(logits=out.features @ own['w'][now] + own['b'][now])
      q = prompts.query(apply, variables, batch)
      q = prompts.unit(q) if unit else q
      task = route(s, q)
      out = apply(variables, batch, prompts.before_sequence(tap, own['prompts'][task]), train)
      every = jnp.einsum('bd,tdc->btc', out.features, own['w']) + own['b']
      logits = jnp.take_along_axis(every, task[:, None, None], 1)[:, 0]
      return out._replace(logits=logits, aux={**out.aux, 'sprompts': q})

    return prompted

  def after(s, params, step, key):
    mine, old, new = jnp.arange(tasks) == s.tasks.now, step.params['sprompts'], params['sprompts']
    kept = {n: prompts.keep_others(old[n], new[n], mine) for n in new}
    return {**params, 'sprompts': kept}, s._replace(tasks=prompts.step_taken(s.tasks))

  def boundary(s, params, batches, fwd, key):
    q = jax.lax.map(lambda b: fwd(params, b).aux['sprompts'], batches)
    points = kmeans(q.reshape(-1, q.shape[-1]), batches.w.reshape(-1) > 0, centroids, iterations)
    return params, SPromptsState(
      prompts.next_task(s.tasks, tasks),
      jnp.maximum(s.finished, s.tasks.now + 1),
      s.centroids.at[s.tasks.now].set(points),
    )

  return Method(init=init, wrap=wrap, after=after, boundary=boundary, needs=('boundary',))


def distances(x: Array, points: Array) -> Array:
  """Squared Euclidean distances f32[N, k] of rows x [N, D] to points [k, D]."""
  return jnp.square(x).sum(1)[:, None] - 2 * x @ points.T + jnp.square(points).sum(1)


def kmeans(x: Array, valid: Array, k: int, iterations: int) -> Array:
  """k points [k, D] for the `valid` rows of x [N, D]; a point without rows stays where it is."""
  x = jnp.where(valid[:, None], x, 0)
  start = jnp.broadcast_to(x[jnp.argmax(valid)], (k, x.shape[1]))

  def farthest(i, points):  # the points past i are copies of the first one
    return points.at[i].set(x[jnp.argmax(jnp.where(valid, distances(x, points).min(1), -1.0))])

  def lloyd(_, points):
    own = jax.nn.one_hot(distances(x, points).argmin(1), k, dtype=x.dtype) * valid[:, None]
    count = own.sum(0)[:, None]
    return jnp.where(count > 0, own.T @ x / jnp.maximum(count, 1), points)

  points = jax.lax.fori_loop(1, k, farthest, start)
  return jax.lax.fori_loop(0, iterations, lloyd, points)
