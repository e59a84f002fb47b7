"""WISE (Wang et al., NeurIPS 2024): a side copy of one matrix holds the edits, and a router uses it."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cl_jax.editing import inside
from cl_jax.editing.rounds import Rounds, straight
from cl_jax.editing.rows import Requests, Rows, cut, flat, take, trimmed
from cl_jax.editing.write import Editor
from cl_jax.errors import UserError
from cl_jax.models.causal import Config
from cl_jax.types import Array, Tree

OLD = 0.6  # weight of the earlier side memory in a merge, of the new shards together 1 - OLD


class Training(NamedTuple):
  """How a shard is trained; the defaults are the repository's for Llama-2-7B.

  Attributes:
    steps: of gradient descent, a request.
    rate: of them.
    margins: alpha, beta, gamma of the routing loss, in units of the distance.
    bound: entries of the side memory stay this close to the main one.
    ratio: rho, the share of entries that a shard may train.
    density: the share of entries of a shard that a merge keeps.
    reach: the side memory is used where the distance is above this many epsilon.
  """

  steps: int = 70
  rate: float = 1.0
  margins: tuple[float, float, float] = (5.0, 20.0, 10.0)
  bound: float = 1.0
  ratio: float = 0.2
  density: float = 0.53
  reach: float = 0.88


def wise(
  config: Config,
  layer: int,
  unrelated: Rows,
  shards: int = 2,
  training: Training = Training(),  # noqa: B008 (a NamedTuple)
  rounds: Rounds = straight,
) -> Editor:
  """WISE-Merge: W' = W + side, used instead of W = 'down' of one layer where its activation a says so (eq. 3
  to 9; github.com/zjunlp/EasyEdit, models/wise):

    distance(x) = |a(x) side|_2,  route to W' if distance(x) > reach * epsilon
    loss = -log p(target | x_e; W') + max(0, distance(x_i) - alpha) + max(0, beta - distance(x_e))
           + max(0, gamma - (distance(x_e) - distance(x_i)))
    side <- clip(side - rate * mask * gradient)
    epsilon = min over all edits of distance(x_e)

  with x_e the contexts of a request and x_i an unrelated prompt, drawn by the key. The requests of a batch
  are dealt to `shards` in their order; each shard starts from side = 0, has its own random mask with a share
  of `ratio`, and takes its requests one after the other. In the end all of them and the earlier side memory
  are merged by `ties` (Yadav et al., NeurIPS 2023).

  Args:
    layer: published 27 of 32 (Llama-2-7B).
    unrelated: rows [U, ...] of prompts that no edit should touch; targets are not looked at.
    shards: published 2.
    rounds: runs the loop over the requests of every shard.

  The distance of a row is the mean over the tokens of its prompt, as in the repository (which takes the
  maximum for prompts of more than 100 tokens); one decision is made for the whole row.

  State: side f[ffn, d], epsilon f[] (infinity before the first edit), edits i32[]; 4 ffn d + 8 bytes. Shards
  are there only during `edit`, and masks are drawn by the key. Report: before the merge; 'log_p' is the mean
  over contexts, 'distance' the least over contexts.
  Deviations: distances of outputs as in the paper, where the repository puts the activation function on them
  first; over the prompt alone, not with its target, because routing is decided by the prompt; epsilon is the
  minimum over contexts too; means of the margins are over all contexts, not over those that break them; no
  decay of weights (1e-5) and no early end; a batch is one group of shards.
  """
  (layer,) = inside.checked(config, (layer,))
  if shards < 1:
    raise UserError(f'the side memory needs 1 or more shards, not {shards}')
  if not 0 < training.ratio <= 1 or not 0 < training.density <= 1:
    raise UserError(f'ratio and density must be in (0, 1]: {training.ratio}, {training.density}')
  unrelated = jax.tree.map(jnp.asarray, unrelated)

  def init(backbone: Tree) -> Tree:
    w = backbone['layers']['down']['w']
    return {
      'side': jnp.zeros(w.shape[1:], w.dtype),
      'epsilon': jnp.asarray(jnp.inf, w.dtype),
      'edits': jnp.zeros((), jnp.int32),
    }

  def edit(backbone: Tree, state: Tree, requests: Requests, key: Array):
    parts = min(shards, len(requests.rewrite.head))
    rewrite = requests.rewrite
    side, report = train(config, layer, parts, training, backbone, rewrite, unrelated, key, rounds)
    weights = jnp.asarray([(1 - OLD) / parts] * parts + [OLD], side.dtype)
    merged = ties(jnp.concatenate([side, state['side'][None]]), weights, training.density)
    state = {
      'side': merged,
      'epsilon': jnp.minimum(state['epsilon'], report['distance'].min()),
      'edits': state['edits'] + len(requests.rewrite.head),
    }
    return [], state, report

  def tap_of(state: Tree, columns: Array):
    return tap(layer, state['side'], training.reach * state['epsilon'], columns)

  return Editor(init, edit, tap_of)


def tap(layer: int, side: Array, threshold: Array, columns: Array):
  """The tap that routes: i32[B] columns of the last tokens of the prompts."""
  kept: dict[str, Array] = {}

  def route(h: Array) -> Array:
    extra = kept['mlp'] @ side
    routed = distance(extra, kept['seen']) > threshold
    return jnp.where(routed[:, None, None], h + extra, h)

  def tap(name, h, i=0):
    if name == 'scores':
      # What the prompt's last token attends to is the prompt, without padding: all that a tap can see of it.
      row = h[jnp.arange(len(columns)), 0, columns]
      kept['seen'] = row > jnp.finfo(h.dtype).min
    if name == 'mlp':
      kept['mlp'] = h
    if name == 'feedforward':
      return jax.lax.cond(jnp.asarray(i) == layer, route, lambda h: h, h)
    return h

  return tap


def distance(extra: Array, seen: Array) -> Array:
  """f[B], the mean norm of f[B, L, d] over the tokens bool[B, L], with a gradient of 0 where it is 0."""
  square = jnp.sum(extra**2, -1)
  norm = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
  return jnp.where(seen, norm, 0).sum(-1) / jnp.maximum(seen.sum(-1), 1)


@partial(jax.jit, static_argnames='density')
def ties(terms: Array, weights: Array, density: float) -> Array:
  """Terms f[K, ...] merged to f[...]: each keeps its `density` of largest entries, then each entry gets the
  weighted mean of those terms that have the sign of their weighted sum there (0 counts as positive)."""
  flat = terms.reshape(len(terms), -1)
  kept = max(int(density * flat.shape[1]), 1)
  least = jax.lax.top_k(jnp.abs(flat), kept)[0][:, -1:]
  flat = jnp.where(jnp.abs(flat) >= least, flat, 0)
  weighted = flat * weights[:, None]
  sign = jnp.where(weighted.sum(0) >= 0, 1, -1)
  agrees = jnp.sign(flat) == sign
  total = (agrees * weights[:, None]).sum(0)
  merged = (weighted * agrees).sum(0) / jnp.where(total > 0, total, 1)
  return merged.reshape(terms.shape[1:])


def train(
  config: Config,
  layer: int,
  parts: int,
  training: Training,
  p: Tree,
  rewrite: Rows,
  unrelated: Rows,
  key: Array,
  rounds: Rounds,
) -> tuple[Array, Tree]:
  """(the shards f[parts, ffn, d], the report of rows [N, P, ...]); the shards are trained side by side."""
  n, contexts = rewrite.head.shape[:2]
  size = -(-n // parts)
  index = np.arange(parts * size).reshape(parts, size)
  shape, dtype = p['layers']['down']['w'].shape[1:], p['layers']['down']['w'].dtype
  masks, others = draw(key, (parts, size), training.ratio, shape, len(unrelated.head))
  wide = cut(flat(rewrite), 0)
  wide = Rows(*(a.reshape(n, contexts, a.shape[-1]) for a in wide))

  def step(now: int, carry):
    sides, report = carry
    # Where a shard has no request left it is given the last one, which changes nothing.
    some = trimmed(take(wide, np.minimum(index[:, now], n - 1)))
    away = take(unrelated, others[:, now, None])
    counts = jnp.asarray(index[:, now] < n)
    sides, one = _one(config, layer, training, p, sides, masks, some, away, counts)
    return sides, jax.tree.map(lambda a, b: a.at[:, now].set(b), report, one)

  blank = dict.fromkeys(('distance', 'log_p', 'loss'), jnp.zeros((parts, size), dtype))
  begin = (jnp.zeros((parts, *shape), dtype), blank)
  sides, report = rounds('requests of each shard', size, begin, step)
  return sides, jax.tree.map(lambda a: a.reshape(-1)[:n], report)


def draw(
  key: Array, requests: tuple[int, int], ratio: float, shape: tuple[int, ...], rows: int
) -> tuple[Array, Array]:
  """(masks bool[parts, *shape] of the shards, i32[parts, size] which of `rows` unrelated ones goes with a
  request)."""
  of_mask, of_other = jax.random.split(key)
  others = jax.random.randint(of_other, requests, 0, rows)
  mask = lambda key: jax.random.bernoulli(key, ratio, shape)  # noqa: E731
  return jax.vmap(mask)(jax.random.split(of_mask, requests[0])), others


@partial(jax.jit, static_argnums=(0, 1, 2))
def _one(config, layer: int, training: Training, p: Tree, sides, masks, rewrite, away, counts):
  """(the shards after a request of each, the report [parts]); rows [parts, P, ...] and [parts, 1, ...]."""
  alpha, beta, gamma = training.margins

  def shard(side, mask, rows: Rows, away: Rows, counts):
    h, place, hidden, seen = _before(config, p, rows, layer)
    far_from, unseen = _before(config, p, away, layer)[2:]

    def loss(side):
      extra = hidden @ side
      log_p = inside.finish(config, p, h + extra, place, rows, layer + 1)
      log_p = inside.mean_log_p(log_p, rows.target).mean()
      near, far = distance(extra, seen), distance(far_from @ side, unseen)[0]
      broken = jax.nn.relu(far - alpha) + jax.nn.relu(beta - near) + jax.nn.relu(gamma + far - near)
      return broken.mean() - log_p, {'log_p': log_p, 'distance': near.min()}

    def step(_, side):
      g = jax.grad(loss, has_aux=True)(side)[0]
      return jnp.clip(side - training.rate * mask * g, -training.bound, training.bound)

    new = jnp.where(counts, jax.lax.fori_loop(0, training.steps, step, side), side)
    lost, report = loss(new)
    return new, report | {'loss': lost}

  return jax.vmap(shard)(sides, masks, rewrite, away, counts)


def _before(config, p, rows: Rows, layer: int) -> tuple[Array, inside.Place, Array, Array]:
  """(the states after the layer, their place, its activations f[B, L, ffn], the tokens of the prompts)."""
  h, place = inside.begin(config, p, rows)
  h = inside.between(config, p, h, place, 0, layer)
  h, found = inside.captured(config, p, h, layer, place, ('mlp',), slice(None))
  columns = rows.head.shape[-1] + rows.before[:, :1]
  seen = place.seen & (jnp.arange(place.seen.shape[1]) <= columns)
  return h, place, found['mlp'], seen
