"""Frozen weights in 16, 8 or 4 bits, in the place of arrays: adapters train above them in full precision."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cl_jax import codecs
from cl_jax.errors import UserError
from cl_jax.masks import matches, nest, paths
from cl_jax.types import Array, Tree

BITS = (16, 8, 4)
GROUP = 64  # rows that share a scale in 4 bits


class Quantised(NamedTuple):
  """What `operator` makes of a stored weight: x @ it, in the dtype of x."""

  stored: dict[str, Array]

  def __rmatmul__(self, x: Array) -> Array:
    s = self.stored
    if 'int8' in s:  # one scale a column: it may follow the product
      return (x @ s['int8'].astype(x.dtype)) * s['scale'].astype(x.dtype)
    return x @ dequantise(s).astype(x.dtype)


def is_stored(w: Any) -> bool:
  """Whether `w` is a quantised weight, a dict of arrays, and not an array."""
  return isinstance(w, dict) and bool({'bfloat16', 'int8', 'int4'} & set(w))


def matrix(w: Any) -> jax.ShapeDtypeStruct:
  """The shape and dtype of a weight, of the matrix that it stands for where it is stored in few bits."""
  return jax.eval_shape(dequantise, w) if is_stored(w) else jax.ShapeDtypeStruct(w.shape, w.dtype)


def operator(w: Any) -> Any:
  """`w`, or what multiplies like the weight that it stores."""
  return Quantised(w) if is_stored(w) else w


def quantise(w: Array, bits: int) -> dict[str, Array]:
  """Rounds a weight f32[..., in, out]; 8 and 4 bits to the nearest of 2^bits - 1 levels, symmetric about 0.

  16 bits: {'bfloat16': u16[..., in, out]}, the bits of bfloat16; see `codecs.half`.
  8 bits: {'int8': int8[..., in, out], 'scale': f32[..., 1, out]}, a scale per column.
  4 bits: {'int4': u8[..., in / 2, out], two rows to a byte, 'scale': f32[..., in / 64, out]}, a scale per
  column and 64 rows, as QLoRA's blocks are (Dettmers et al. 2023; deviation: levels are evenly spaced, not
  those of a normal distribution).
  """
  *lead, rows, columns = w.shape
  if bits == 16:
    return {'bfloat16': codecs.half(w.astype(jnp.float32))}
  if bits == 8:
    scale = jnp.maximum(jnp.abs(w).max(-2, keepdims=True), 1e-12) / 127
    return {'int8': jnp.round(w / scale).astype(jnp.int8), 'scale': scale}
  if bits != 4:
    raise UserError(f'weights are quantised to 16, 8 or 4 bits, not {bits}')
  if rows % GROUP:
    raise UserError(f'4 bits need a multiple of {GROUP} rows, a weight has {rows}: use 8 bits')
  grouped = w.reshape(*lead, rows // GROUP, GROUP, columns)
  scale = jnp.maximum(jnp.abs(grouped).max(-2), 1e-12) / 7
  levels = jnp.round(grouped / scale[..., None, :]).astype(jnp.int8).reshape(w.shape) + 8
  low, high = levels[..., ::2, :].astype(jnp.uint8), levels[..., 1::2, :].astype(jnp.uint8)
  return {'int4': low | (high << 4), 'scale': scale}


def dequantise(stored: dict[str, Array]) -> Array:
  """The weight f32[..., in, out] that is stored."""
  if 'bfloat16' in stored:
    return codecs.whole(stored['bfloat16'])
  scale = stored['scale']
  if 'int8' in stored:
    return stored['int8'].astype(jnp.float32) * scale
  packed = stored['int4']
  *lead, half, columns = packed.shape
  pair = jnp.stack([packed & 15, packed >> 4], -2).reshape(*lead, 2 * half, columns)
  levels = pair.astype(jnp.float32) - 8
  return (levels.reshape(*lead, -1, GROUP, columns) * scale[..., None, :]).reshape(levels.shape)


def dequantise_tree(tree: Tree) -> Tree:
  """The tree with arrays in the place of weights in few bits."""
  return jax.tree.map(lambda a: dequantise(a) if is_stored(a) else a, tree, is_leaf=is_stored)


def quantise_tree(tree: Tree, bits: int, targets: str = '.*layers/.*/w') -> Tree:
  """The tree with the weights whose whole path matches `targets` in `bits` bits."""
  leaves = paths(tree)
  chosen = [p for p in leaves if matches(targets, p)]
  if not chosen:
    raise UserError(f'{targets!r} matches none of the frozen weights')
  made = jax.jit(lambda w: quantise(w, bits))
  return nest({p: made(a) if p in chosen else a for p, a in leaves.items()})
