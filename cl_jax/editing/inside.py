"""What goes on inside a causal transformer: some of its layers, keys, passes that start in the middle.

Positions are columns of `Rows`: head, then tail. The column of the subject's last token is the head's width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cl_jax.editing.rows import Rows
from cl_jax.errors import UserError
from cl_jax.models import causal
from cl_jax.models.causal import Config
from cl_jax.types import Array, Tree, no_tap

KEY = 'layers/down/w'  # the matrix that facts are written to, and whose inputs are the keys


class Place(NamedTuple):
  """Where the tokens of B rows stand.

  Attributes:
    seen: bool[B, L], what is no padding.
    places: i32[B, L], the position of each token in its row.
  """

  seen: Array
  places: Array


def begin(config: Config, p: Tree, rows: Rows, tap=no_tap) -> tuple[Array, Place]:
  """The embedded rows f32[B, L, d], and their place."""
  tokens = jnp.concatenate([rows.head, rows.tail], -1)
  seen = tokens >= 0
  place = Place(seen, causal.places_of(seen, config))
  h = p['embed']['tokens'][jnp.maximum(tokens, 0)]
  if not config.rope:
    h = h + p['embed']['positions'][place.places]
  return tap('embed', h, 0), place


def checked(config: Config, layers: Collection[int]) -> tuple[int, ...]:
  """The layers, ascending.

  Raises:
    UserError: none, one twice, or not of this model.
  """
  found = tuple(sorted(set(layers)))
  if not found or len(found) != len(layers):
    raise UserError(f'layers to edit must be different ones and at least one, not {tuple(layers)}')
  if found[0] < 0 or found[-1] >= config.depth:
    raise UserError(f'layers {found}: this model has layers 0 to {config.depth - 1}')
  return found


def weights(p: Tree, first: int) -> Tree:
  """Of the layers from `first` on, as inputs of a scan: a gradient keeps what is indexed inside again."""
  return jax.tree.map(lambda a: a[first:], p['layers'])


Change = Callable[[Tree, Array], Tree]  # (weights of layer i, i) -> the weights to use


def layer(config: Config, p: Tree, h: Array, i: Array | int, place: Place, tap=no_tap) -> Array:
  """Layer i of the backbone p applied to h f32[B, L, d]."""
  return apply(config, jax.tree.map(lambda a: a[i], p['layers']), h, i, place, tap)


def apply(config: Config, own: Tree, h: Array, i: Array | int, place: Place, tap=no_tap) -> Array:
  """Layer i, whose weights are `own`, applied to h f32[B, L, d]."""
  n = h.shape[1]
  visible = jnp.tril(jnp.ones((n, n), bool)) & place.seen[:, None, :]

  def attend(q, k, v):
    return causal.attention(config, q, tap('k', k, i), tap('v', v, i), visible, tap, i)

  return causal.block(config, own, h, jnp.asarray(i), place.places, attend, tap)


def between(
  config: Config, p: Tree, h: Array, place: Place, lo: Array | int, hi: Array | int, tap=no_tap
) -> Array:
  """Layers lo to hi - 1, which may be traced, applied to h; no gradient goes through a traced bound."""
  return jax.lax.fori_loop(lo, hi, lambda i, h: layer(config, p, h, i, place, tap), h)


class Reading(NamedTuple):
  """What stands at the subject's last token of B rows.

  Attributes:
    key: f[B, ffn], the input of 'down' at one layer.
    value: f[B, d], the output of 'down' there, its bias included.
    state: f[B, d], the residual stream after another layer.
    feedforward: f[B, d], the output of 'down' at that other layer.
  """

  key: Array
  value: Array
  state: Array
  feedforward: Array


def read(config: Config, p: Tree, rows: Rows, at: Array | int, last: Array | int) -> Reading:
  """The key and value of layer `at` and the state after layer `last` >= at."""
  column = rows.head.shape[-1]
  h, place = begin(config, p, rows)
  h = between(config, p, h, place, 0, at)
  _, one = captured(config, p, h, at, place, ('mlp', 'feedforward'), column)
  h = between(config, p, h, place, at, last)
  h, two = captured(config, p, h, last, place, ('feedforward',), column)
  return Reading(one['mlp'], one['feedforward'], h[:, column], two['feedforward'])


def captured(
  config: Config, p: Tree, h: Array, i: Array | int, place: Place, names: tuple[str, ...], column
) -> tuple[Array, dict[str, Array]]:
  """Layer i applied to h, and the activations of some of its taps at one column, [B, .] each."""
  found: dict[str, Array] = {}

  def tap(name, value, _):
    if name in names:
      found[name] = value[:, column]
    return value

  return layer(config, p, h, i, place, tap), found


class Middle(NamedTuple):
  """The forward pass of B rows as far as layer `first`, and what the later layers need of the head.

  Attributes:
    h: f[B, T, d], the residual stream of the tail before layer `first`.
    k, v: f[layers, B, H, kv], keys and values of the head in the layers from `first` on.
    place: of the whole rows.
  """

  h: Array
  k: Array
  v: Array
  place: Place


def middle(config: Config, p: Tree, rows: Rows, first: int) -> Middle:
  """Runs the rows once; only tails have to be run again for whatever changes at the subject's last token."""
  width = rows.head.shape[-1]
  h, place = begin(config, p, rows)
  h = between(config, p, h, place, 0, first)

  def step(h, i):
    kept: dict[str, Array] = {}

    def tap(name, value, _):
      if name in ('k', 'v'):
        kept[name] = value[:, :width]
      return value

    new = layer(config, p, h, i, place, tap)
    return new, (kept['k'], kept['v'])

  _, (k, v) = jax.lax.scan(step, h, jnp.arange(first, config.depth))
  return Middle(h[:, width:], k, v, place)


def go_on(config: Config, p: Tree, m: Middle, first: int, tap=no_tap) -> Array:
  """The last hidden states f[B, T, d] of the tails, from layer `first` on; differentiable."""
  width, n = m.k.shape[2], m.h.shape[1]
  places = m.place.places[:, width:]
  causal_part = jnp.tril(jnp.ones((n, n), bool)) & m.place.seen[:, None, width:]
  head_part = jnp.broadcast_to(m.place.seen[:, None, :width], (len(m.h), n, width))
  visible = jnp.concatenate([head_part, causal_part], 2)

  def step(h, inputs):
    i, k_head, v_head, own = inputs

    def attend(q, k, v):
      k, v = jnp.concatenate([k_head, k], 1), jnp.concatenate([v_head, v], 1)
      return causal.attention(config, q, k, v, visible, tap, i)

    return causal.block(config, own, h, i, places, attend, tap), None

  layers = jnp.arange(first, config.depth)
  h, _ = jax.lax.scan(step, m.h, (layers, m.k, m.v, weights(p, first)))
  return causal.norm(config, p['norm'], h)


def predictions(config: Config, p: Tree, h: Array, rows: Rows) -> Array:
  """log p f[B, M, vocabulary] at the columns `rows.before` of the tails' last hidden states h f[B, T, d]."""
  picked = jnp.take_along_axis(h, jnp.maximum(rows.before, 0)[..., None], 1)
  return jax.nn.log_softmax(causal.unembed(config, p, picked), -1)


def forward(config: Config, p: Tree, rows: Rows, tap=no_tap) -> Array:
  """log p f[B, M, vocabulary] of what follows the columns `before` of B rows: a whole forward pass."""
  h, place = begin(config, p, rows, tap)
  return finish(config, p, h, place, rows, 0, tap)


def finish(
  config: Config,
  p: Tree,
  h: Array,
  place: Place,
  rows: Rows,
  first: int,
  tap=no_tap,
  change: Change | None = None,
) -> Array:
  """`forward` from the residual stream h f[B, L, d] before layer `first` on; `change` sets other weights."""

  def step(h, inputs):
    i, own = inputs
    own = own if change is None else change(own, i)
    return apply(config, own, h, i, place, tap), None

  h, _ = jax.lax.scan(step, h, (jnp.arange(first, config.depth), weights(p, first)))
  h = causal.norm(config, p['norm'], h[:, rows.head.shape[-1] :])
  return predictions(config, p, h, rows)


def target_log_p(log_p: Array, target: Array) -> Array:
  """f[..., M] log p of each token of the target, 0 at padding."""
  picked = jnp.take_along_axis(log_p, jnp.maximum(target, 0)[..., None], -1)[..., 0]
  return jnp.where(target >= 0, picked, 0.0)


def mean_log_p(log_p: Array, target: Array) -> Array:
  """f[...] the mean log p of a target's tokens."""
  return target_log_p(log_p, target).sum(-1) / jnp.maximum((target >= 0).sum(-1), 1)
