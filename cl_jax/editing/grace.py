"""GRACE (Hartvigsen et al., NeurIPS 2023): a codebook of states beside one layer, no weight is written."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cl_jax.editing import inside
from cl_jax.editing.rounds import Rounds, straight
from cl_jax.editing.rows import Requests, Rows, cut, groups, plain, take
from cl_jax.editing.write import Editor
from cl_jax.errors import UserError
from cl_jax.models.causal import Config
from cl_jax.types import Array, Tree

SAME = 1e-4  # keys that are nearer than this many `eps` are one and the same prompt


def grace(
  config: Config,
  layer: int,
  capacity: int = 1000,
  eps: float = 1.0,
  steps: int = 100,
  rate: float = 1.0,
  warm: bool = False,
  width: int = 16,
  rounds: Rounds = straight,
) -> Editor:
  """Replaces what a layer hands on at the prompt's last token when what it gets is near a stored key (eq. 1):

    h = v_i  if |q - k_i| <= eps_i  for the nearest key i,  else f(q)

  (github.com/Thartvigsen/GRACE). A request whose nearest key, at distance d, (alg. 1)
  - is further than eps + eps_i adds an entry with radius eps;
  - has the same target grows that radius to d, if it is less;
  - has another target adds an entry with radius d / 2, and sets the other's to d / 2 - 1e-5.
  Requests are taken one after the other, and the value of the entry that a request ends at is trained on it
  by Adam (for a grown entry once more, as in the repository). What a value is trained on does not depend on
  other entries, so those of a batch are trained together, requests that share an entry in turn.

  Args:
    layer: of the codebook; published for GPT2-XL: 35 of 48.
    capacity: entries. When all are used, a request that needs one is refused (report 'refused'), and nothing
      changes for the others.
    eps: first radius, in units of the states; published 1.
    steps, rate: of Adam; published 100, 1.
    warm: whether values start at what stands there, else uniform in [0, 1) by the key (published).
    width: requests whose values are trained at a time.
    rounds: runs the loop over these.

  State: keys and values f[capacity, d], radii f[capacity], labels i32[capacity] (the target's first token)
  and count; 8 d + 8 bytes an entry, used or not. Report: also 'refused' bool[N] and 'entry' i32[N] (-1 when
  refused); the loss is -'log_p', by what the codebook gives after the batch.
  Deviations: the layer that is wrapped is the MLP with its norm and its residual, q what is before them (tap
  'middle') and h what is after ('block'), where the repository wraps a matrix inside (c_fc); of its
  replacements this is 'replace_last', at one token, which EasyEdit takes too (the default there replaces the
  prompt before it); targets are the same if their first tokens are, not if the means of all are; and a
  key nearer than 1e-4 eps with another target is taken over, since a radius of 0 could not be met again.
  """
  (layer,) = inside.checked(config, (layer,))
  if capacity < 1:
    raise UserError(f'a codebook needs a capacity of 1 or more entries, not {capacity}')

  def init(backbone: Tree) -> Tree:
    dtype = backbone['embed']['tokens'].dtype
    wide = jnp.zeros((capacity, config.d), dtype)
    return {
      'keys': wide,
      'values': wide,
      'radii': jnp.zeros(capacity, dtype),
      'labels': jnp.full(capacity, -1, jnp.int32),
      'count': jnp.zeros((), jnp.int32),
    }

  def edit(backbone: Tree, state: Tree, requests: Requests, key: Array):
    # The tail is the prompt's last token and the target: nothing before it depends on the value.
    rows = cut(plain(requests.rewrite), -1)
    n = len(rows.tail)
    every = groups(np.arange(n), width)
    found = [_states(config, layer, backbone, take(rows, some)) for some, _ in every]
    query, here = (jnp.concatenate(a)[:n] for a in zip(*found, strict=True))
    draw = lambda key: jax.random.uniform(key, here.shape[1:], here.dtype)  # noqa: E731
    first = here if warm else jax.vmap(draw)(jax.random.split(key, n))
    state, entry, new = _inserted(state, query, rows.target[:, 0], first, eps)
    parts = [part for turn in turns(np.asarray(entry)) for part in groups(turn, width)]

    def step(i: int, values: Array) -> Array:
      some, real = parts[i]
      start = jnp.where(new[some, None], first[some], values[entry[some]])
      value = _train(config, layer, backbone, take(rows, some), start, steps, rate)
      return values.at[entry[some[:real]]].set(value[:real])

    state = state | {'values': rounds('values', len(parts), state['values'], step)}
    distance, i = jax.lax.map(partial(nearest, state), query)
    given = jnp.where((distance <= state['radii'][i])[:, None], state['values'][i], here)
    log_p = [_said(config, layer, backbone, take(rows, some), given[some]) for some, _ in every]
    log_p = jnp.concatenate(log_p)[:n]
    return [], state, {'loss': -log_p, 'log_p': log_p, 'refused': entry < 0, 'entry': entry}

  return Editor(init, edit, lambda state, columns: tap(layer, state, columns))


def tap(layer: int, state: Tree, columns: Array):
  """The tap that looks states up: i32[B] columns of the last tokens of the prompts."""
  rows, kept = jnp.arange(len(columns)), []

  def replace(h: Array) -> Array:
    distance, i = nearest(state, kept[-1])
    here = h[rows, columns]
    found = jnp.where((distance <= state['radii'][i])[:, None], state['values'][i], here)
    return h.at[rows, columns].set(found.astype(h.dtype))

  def tap(name, h, i=0):
    if name == 'middle':
      kept.append(h[rows, columns])
    if name == 'block':
      return jax.lax.cond(jnp.asarray(i) == layer, replace, lambda h: h, h)
    return h

  return tap


def nearest(state: Tree, query: Array) -> tuple[Array, Array]:
  """(distance f[...], index i32[...]) of the key nearest to f[..., d]; infinity while there is none."""
  distance = jnp.linalg.norm(query[..., None, :] - state['keys'], axis=-1)
  distance = jnp.where(jnp.arange(len(state['keys'])) < state['count'], distance, jnp.inf)
  return distance.min(-1), distance.argmin(-1)


def insert(state: Tree, query: Array, label: Array, value: Array, eps) -> tuple[Tree, Array, Array]:
  """(the state with room for a request, its entry or -1, whether `value` stands there), as `grace` says.

  Args:
    query, value: f[d], key and value of a new entry. label: i32[].
  """
  distance, i = nearest(state, query)
  radius = state['radii'][i]
  near = distance <= eps + radius
  same = near & (state['labels'][i] == label)
  over = near & ~same & (distance <= SAME * eps)
  add = ~same & ~over
  full = add & (state['count'] >= len(state['keys']))
  split = add & near & ~full
  entry = jnp.where(add, state['count'], i)
  # An index out of range is not written to.
  fresh = jnp.where(add & ~full, entry, len(state['keys']))
  other = jnp.where(
    split,
    jnp.maximum(distance / 2 - 1e-5, 0),
    jnp.where(same, jnp.maximum(radius, distance), radius),
  )
  radii = state['radii'].at[i].set(other)
  first = jnp.where(split, distance / 2, eps).astype(radii.dtype)
  renamed = jnp.where(over, i, fresh)
  state = state | {
    'keys': state['keys'].at[fresh].set(query, mode='drop'),
    'values': state['values'].at[renamed].set(value, mode='drop'),
    'radii': radii.at[fresh].set(first, mode='drop'),
    'labels': state['labels'].at[renamed].set(label, mode='drop'),
    'count': state['count'] + (add & ~full),
  }
  return state, jnp.where(full, -1, entry), (add & ~full) | over


@jax.jit
def _inserted(state: Tree, query, label, value, eps) -> tuple[Tree, Array, Array]:
  """`insert` of N requests, one after the other."""

  def one(state, inputs):
    query, label, value = inputs
    state, entry, new = insert(state, query, label, value, eps)
    return state, (entry, new)

  state, (entry, new) = jax.lax.scan(one, state, (query, label, value))
  return state, entry, new


def turns(entries: np.ndarray) -> list[np.ndarray]:
  """The requests that end at an entry first, those that end there second, ...; refused ones (-1) in none."""
  seen: dict[int, int] = {}
  found: list[list[int]] = []
  for n, entry in enumerate(entries.tolist()):
    if entry < 0:
      continue
    seen[entry] = seen.get(entry, -1) + 1
    if seen[entry] == len(found):
      found.append([])
    found[seen[entry]].append(n)
  return [np.array(some) for some in found]


@partial(jax.jit, static_argnums=(0, 1))
def _states(config, layer, p, rows: Rows) -> tuple[Array, Array]:
  """What the MLP of the layer gets and what the layer hands on, f[N, d] each, where tails begin."""
  column = rows.head.shape[-1]
  h, place = inside.begin(config, p, rows)
  h = inside.between(config, p, h, place, 0, layer)
  h, found = inside.captured(config, p, h, layer, place, ('middle',), column)
  return found['middle'], h[:, column]


@partial(jax.jit, static_argnums=(0, 1))
def _train(config, layer, p, rows: Rows, value: Array, steps, rate) -> Array:
  """The values f[N, d] after Adam, each on its own row."""
  tx = optax.scale_by_adam()
  m = inside.middle(config, p, rows, layer + 1)

  def step(_, carry):
    value, opt = carry
    g = jax.grad(lambda value: -_log_p(config, layer, p, rows, m, value).sum())(value)
    update, opt = tx.update(g, opt)
    return value - rate * update, opt

  return jax.lax.fori_loop(0, steps, step, (value, tx.init(value)))[0]


@partial(jax.jit, static_argnums=(0, 1))
def _said(config, layer, p, rows: Rows, value: Array) -> Array:
  """log p f[N] of the targets with the values f[N, d]."""
  return _log_p(config, layer, p, rows, inside.middle(config, p, rows, layer + 1), value)


def _log_p(config, layer, p, rows: Rows, m: inside.Middle, value: Array) -> Array:
  h = inside.go_on(config, p, m._replace(h=m.h.at[:, 0].set(value)), layer + 1)
  return inside.mean_log_p(inside.predictions(config, p, h, rows), rows.target)
