"""What the methods with prompts share: the place where prompts enter, queries, and slots for tasks.

Prompts are taps. At 'embed' they come before the embedded sequence; at 'k' and 'v' they are prefixes of the
keys and values. A stack of layers is one scan, so that a prefix is there in every layer; in layers that must
not have it the tap 'scores' keeps every query from attending to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cl_jax import sparse
from cl_jax.errors import UserError
from cl_jax.types import Array, Batch, Forward, Tree, no_tap, overlay


class Network(NamedTuple):
  """The sizes of a transformer that prompts depend on.

  Attributes:
    width: of the embedded sequence.
    key: channels of the keys and values, which some networks share among heads.
    features: width of the features, and so of queries.
    layers: how many.
  """

  width: int
  key: int
  features: int
  layers: int


def network(method: str, params: Tree, batch: Batch, fwd: Forward) -> Network:
  """The sizes of the network behind `fwd`, without computing anything.

  Args:
    method: the name for the message of the error.
    params, batch, fwd: as `Method.init` gets them.

  Raises:
    UserError: the network has no taps 'embed', 'k', 'v', 'scores', or no stack of layers.
  """
  seen: dict[str, int] = {}

  def look(name, h, layer=0):
    seen[name] = h.shape[-1]
    return h

  out = jax.eval_shape(lambda p, b: fwd(p, b, look), params, batch)
  layers = sparse.layers(overlay(fwd.frozen, params))
  if not {'embed', 'k', 'v', 'scores'} <= set(seen) or not layers:
    raise UserError(
      f"{method} puts prompts at the taps 'embed', 'k' and 'v' of a transformer; this network has "
      f'{", ".join(sorted(seen)) or "no taps"}: take a vit, bert, decoder or clip, without cached features'
    )
  return Network(seen['embed'], seen['k'], out.features.shape[-1], layers)


def check_layers(where: str, layers: tuple[int, ...], net: Network) -> None:
  """Raises UserError for layers that the network does not have, or that are named twice."""
  if not layers or len(set(layers)) != len(layers) or not set(layers) <= set(range(net.layers)):
    raise UserError(
      f'{where}={tuple(layers)!r}: the network has the layers 0 to {net.layers - 1}; name each at most '
      'once, and one at least'
    )


def uniform(key: Array, shape: tuple[int, ...]) -> Array:
  """U(0, 0.01), from which the official code of L2P and DualPrompt starts."""
  return jax.random.uniform(key, shape, jnp.float32, 0.0, 0.01)


# --- where they enter -------------------------------------------------------------------------------


def before_sequence(tap: Callable, prompt: Array) -> Callable:
  """`tap`, then the prompt, [length, d] or one per row [B, length, d], before the embedded sequence."""

  def put(name, h, layer=0):
    h = tap(name, h, layer)
    return _before(prompt, h) if name == 'embed' else h

  return put


def before_keys(
  tap: Callable, keys: Array, values: Array, layers: tuple[int, ...] | None = None
) -> Callable:
  """`tap`, then prefixes before the keys and values of some layers.

  Args:
    tap: of whoever calls the network; it acts on the sequence alone.
    keys, values: [S, length, d], or one per row [S, B, length, d].
    layers: the S layers they belong to; None is all of them, in order.
  """
  length, behind = keys.shape[-2], {}

  def put(name, h, layer: Any = 0):
    h = tap(name, h, layer)
    if name in ('k', 'v'):
      own = keys if name == 'k' else values
      behind[name] = h.shape[
        1
      ]  # what others put before comes in front of this, so count from behind
      return _before(own[_slot(layers, layer)], h)
    if name == 'scores' and layers is not None:
      end = h.shape[-1] - behind['k']
      at = np.arange(h.shape[-1])
      mine = jnp.asarray((end - length <= at) & (at < end))
      there = jnp.any(jnp.asarray(layers) == layer)
      return jnp.where(mine & ~there, jnp.finfo(h.dtype).min, h)
    return h

  return put


def _slot(layers: tuple[int, ...] | None, layer: Array) -> Array:
  """Position of a layer among `layers`; 0, of no effect, where it is not among them."""
  return layer if layers is None else jnp.argmax(jnp.asarray(layers) == layer)


def _before(rows: Array, h: Array) -> Array:
  rows = rows.astype(h.dtype)
  rows = rows if rows.ndim == 3 else jnp.broadcast_to(rows, (h.shape[0], *rows.shape))
  return jnp.concatenate([rows, h], 1)


# --- queries ----------------------------------------------------------------------------------------


def query(apply: Callable, variables: Tree, batch: Batch) -> Array:
  """f32[B, D]: the features without a prompt, by a pass of its own without a gradient.

  Raises:
    UserError: a language model, whose features have read the tokens that are to be predicted: a prompt chosen
      by them would tell what they are.
  """
  # At the input, so that the pass is not differentiated at all.
  out = apply(jax.lax.stop_gradient(variables), batch, no_tap, False)
  if out.logits.ndim != 2:
    raise UserError(
      'prompts that are chosen by a whole row would tell a language model the tokens it has to predict: '
      'take prompt_tuning or prefix_tuning, or a classifier'
    )
  return jax.lax.stop_gradient(out.features)


def unit(x: Array) -> Array:
  """x of length 1 along the last axis."""
  return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-12))


# --- slots for tasks --------------------------------------------------------------------------------


class Tasks(NamedTuple):
  """Where a learner with a slot per task stands.

  Attributes:
    now: i32[], the slot in training: boundaries so far, at most the last slot.
    begun: i32[], slots of tasks in which a step has been taken. Right after a boundary this is the number of
      finished tasks: a slot that was never trained takes no part in predictions.
  """

  now: Array
  begun: Array


def first_task() -> Tasks:
  return Tasks(jnp.int32(0), jnp.int32(0))


def step_taken(s: Tasks) -> Tasks:
  return s._replace(begun=jnp.maximum(s.begun, s.now + 1))


def next_task(s: Tasks, tasks: int) -> Tasks:
  return s._replace(now=jnp.minimum(s.now + 1, tasks - 1))


def keep_others(old: Array, new: Array, mine: Array, axis: int = 0) -> Array:
  """`new` in the slots that are `mine`, bool[slots] along `axis`, and `old`, bit for bit, in the others.

  A gradient of zero is not enough: momentum, Adam and weight decay move what has none.
  """
  shape = [1] * new.ndim
  shape[axis] = -1
  return jnp.where(mine.reshape(shape), new, old)
