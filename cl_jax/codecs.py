"""Arrays in fewer bytes: pure pairs of `encode` and `decode`, deterministic, with every byte in plain sight.

Rows (`encode`) are the examples of a memory: each carries its own scale, so it can be written and read alone.
Tensors (`pack`) are what a method or an optimiser keeps beside the parameters: a scale for each block.
Rounding is to the nearest level, of two as near to the even one (in the dynamic codecs to the lower); nothing
is drawn.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from cl_jax.errors import UserError
from cl_jax.types import Array, Tree

ROWS = ('float32', 'bfloat16', 'uint8', 'int8', 'int4')
TENSORS = ('bfloat16', 'dynamic8', 'udynamic8')
BLOCK = 256  # numbers of a tensor that share a scale


@partial(
  jax.tree_util.register_dataclass,
  data_fields=['codes', 'scale', 'low'],
  meta_fields=['codec', 'shape', 'dtype'],
)
@dataclasses.dataclass(frozen=True)
class Rows:
  """Encoded rows [B, ...]; a pytree whose leaves all have the leading axis B.

  Attributes:
    codes: [B, *shape], for 'int4' u8[B, ceil(numbers / 2)], the first of two in the low bits.
    scale: f32[B], the distance of two levels; None where the codes need none.
    low: f32[B], what code 0 stands for ('uint8' of floats); None elsewhere.
    codec: one of `ROWS`.
    shape, dtype: of a decoded row.
  """

  codes: Array
  scale: Array | None
  low: Array | None
  codec: str
  shape: tuple[int, ...]
  dtype: str


def encode(codec: str, x: Array) -> Rows:
  """Rows [B, ...] in the bytes of `codec`.

  Of n floats a row, with |x| <= m and low <= x <= high the row's own bounds:
    'float32': 4 n bytes, as it is. 'bfloat16': 2 n bytes, error <= |x| / 256.
    'uint8': n + 8 bytes, 256 levels from low to high, error <= (high - low) / 510.
    'int8': n + 4 bytes, 255 levels symmetric about 0, error <= m / 254.
    'int4': ceil(n / 2) + 4 bytes, 15 levels symmetric about 0, error <= m / 14.
  Of n uint8, whose bounds are known: 'float32' and 'bfloat16' as numbers, exact; 'uint8' and 'int8' as they
  are, n bytes, exact; 'int4' the nearest of 16 levels 0, 17, ..., 255 without a scale, error <= 8.

  Args:
    codec: one of `ROWS`.
    x: floats or uint8.

  Raises:
    UserError: no such codec.
    TypeError: of another dtype; see `takes`.
  """
  if codec not in ROWS:
    raise UserError(f'no codec {codec!r} for a memory: one of {", ".join(ROWS)}')
  if not takes(x):
    raise TypeError(f'rows of {x.dtype} cannot be encoded: floats and uint8 can')
  x = jnp.asarray(x)
  made = partial(Rows, codec=codec, shape=tuple(x.shape[1:]), dtype=str(x.dtype))
  if codec == 'float32':
    return made(x.astype(jnp.float32), None, None)
  if codec == 'bfloat16':
    return made(half(x.astype(jnp.float32)), None, None)
  if x.dtype == jnp.uint8:
    return made(nibbles((x.astype(jnp.int32) + 8) // 17) if codec == 'int4' else x, None, None)
  x = x.astype(jnp.float32)
  if codec == 'uint8':
    low = _over_rows(jnp.min, x)
    scale = (_over_rows(jnp.max, x) - low) * np.float32(1 / 255)
    levels = jnp.clip(_levels(x - _wide(low, x), scale), 0, 255)
    return made(levels.astype(jnp.uint8), scale, low)
  top = 127 if codec == 'int8' else 7
  scale = _over_rows(jnp.max, jnp.abs(x)) * np.float32(1 / top)
  levels = jnp.clip(_levels(x, scale), -top, top)
  if codec == 'int8':
    return made(levels.astype(jnp.int8), scale, None)
  return made(nibbles(levels.astype(jnp.int32) + 8), scale, None)


def decode(rows: Rows) -> Array:
  """The rows [B, *shape] that are meant, in their own dtype."""
  codes, dtype = rows.codes, rows.dtype
  if rows.codec == 'int4':
    codes = numbers(codes, math.prod(rows.shape)).reshape(codes.shape[0], *rows.shape)
    if dtype == 'uint8':
      return (codes * 17).astype(jnp.uint8)
    codes = codes - 8
  if rows.codec == 'bfloat16':
    codes = whole(codes)
  if rows.scale is None:
    return codes.astype(dtype)
  x = codes.astype(jnp.float32) * _wide(rows.scale, codes)
  return (x if rows.low is None else x + _wide(rows.low, codes)).astype(dtype)


def takes(a: Array) -> bool:
  """Whether rows of that dtype can be encoded."""
  return jnp.issubdtype(a.dtype, jnp.floating) or a.dtype == jnp.uint8


def encode_tree(codec: str, x: Tree) -> Tree:
  """Every leaf that can be encoded; token numbers, masks and the like stay as they are."""
  return jax.tree.map(lambda a: encode(codec, a) if takes(a) else a, x)


def decode_tree(x: Tree) -> Tree:
  """The inverse of `encode_tree`, or nearly so; leaves that are not encoded stay as they are."""
  return jax.tree.map(lambda a: decode(a) if isinstance(a, Rows) else a, x, is_leaf=_is(Rows))


def half(x: Array) -> Array:
  """bfloat16 bits u16 of f32, to the nearest even. As integers they travel through every export."""
  short = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
  return (jax.lax.bitcast_convert_type(short, jnp.uint32) >> 16).astype(jnp.uint16)


def whole(bits: Array) -> Array:
  """The f32 that bfloat16 bits stand for."""
  return jax.lax.bitcast_convert_type(bits.astype(jnp.uint32) << 16, jnp.float32)


def nibbles(levels: Array) -> Array:
  """Numbers 0 to 15, i32[B, ...], two to a byte: u8[B, ceil(n / 2)]."""
  flat = levels.reshape(levels.shape[0], -1)
  flat = jnp.pad(flat, ((0, 0), (0, flat.shape[1] % 2)))
  return (flat[:, ::2] | (flat[:, 1::2] << 4)).astype(jnp.uint8)


def numbers(packed: Array, n: int) -> Array:
  """i32[B, n]: the inverse of `nibbles`."""
  wide = packed.astype(jnp.int32)
  return jnp.stack([wide & 15, wide >> 4], -1).reshape(packed.shape[0], -1)[:, :n]


def _over_rows(reduce, x: Array) -> Array:
  return reduce(x, axis=tuple(range(1, x.ndim))) if x.ndim > 1 else x


def _wide(per_row: Array, x: Array) -> Array:
  return per_row.reshape(-1, *[1] * (x.ndim - 1))


def _levels(x: Array, scale: Array) -> Array:
  scale = _wide(scale, x)
  return jnp.round(x / jnp.where(scale > 0, scale, 1))


# --- tensors ----------------------------------------------------------------------------------------


@partial(
  jax.tree_util.register_dataclass,
  data_fields=['codes', 'scale'],
  meta_fields=['codec', 'shape'],
)
@dataclasses.dataclass(frozen=True)
class Packed:
  """An encoded tensor.

  Attributes:
    codes: u16[*shape] of 'bfloat16', u8[numbers] of the others.
    scale: f32[ceil(numbers / BLOCK)], of each block the number farthest from 0; None for 'bfloat16'.
    codec: one of `TENSORS`.
    shape: of the f32 tensor.
  """

  codes: Array
  scale: Array | None
  codec: str
  shape: tuple[int, ...]


def pack(codec: str, x: Array) -> Packed:
  """A tensor f32[...] of n numbers in the bytes of `codec`.

  'bfloat16': 2 n bytes, error <= |x| / 256. 'dynamic8': n + 4 ceil(n / 256) bytes: x over m, the number
  farthest from 0 in its block of 256, as the nearest of the levels of `dynamic_map`. The error is at most
  0.0071 |m|, less the nearer x is to 0; what is not 0 never becomes 0. Packing what was unpacked changes
  nothing. 'udynamic8': the same for numbers >= 0 (second moments, importances), which have all levels to
  themselves: 0.0036 |m|; a negative number becomes 0.

  Dettmers, Lewis, Shleifer & Zettlemoyer, "8-bit Optimizers via Block-wise Quantization", ICLR 2022, sections
  2.1-2.2; official code bitsandbytes-foundation/bitsandbytes. Deviations: blocks of 256 numbers, not
  2048, since the networks here are small; m has its sign, so that it is exact (the map has 1 and no -1); a
  number too small for the lowest level takes that level instead of 0, so that no second moment vanishes under
  a first one.

  Args:
    codec: one of `TENSORS`.
    x: f32.
  """
  if codec not in TENSORS:
    raise UserError(f'no codec {codec!r} for a state: one of {", ".join(TENSORS)}')
  shape = tuple(x.shape)
  if codec == 'bfloat16':
    return Packed(half(x.astype(jnp.float32)), None, codec, shape)
  levels = dynamic_map(codec)
  blocks = _blocks(x.astype(jnp.float32))
  if codec == 'udynamic8':
    blocks = jnp.maximum(blocks, 0)
  high, low = blocks.max(1), blocks.min(1)
  scale = jnp.where(high >= -low, high, low)
  of_scale = blocks / jnp.where(scale != 0, scale, 1)[:, None]
  codes = jnp.searchsorted(jnp.asarray((levels[1:] + levels[:-1]) / 2), of_scale)
  zero = int(np.searchsorted(levels, 0))
  codes = codes + jnp.where(codes == zero, jnp.sign(of_scale).astype(jnp.int32), 0)
  codes = jnp.clip(codes, 0, 255).astype(jnp.uint8).reshape(-1)[: x.size]
  return Packed(codes, scale, codec, shape)


def unpack(packed: Packed) -> Array:
  """The tensor f32[*shape] that is meant."""
  if packed.scale is None:
    return whole(packed.codes)
  levels = jnp.asarray(dynamic_map(packed.codec))
  x = levels[_blocks(packed.codes).astype(jnp.int32)] * packed.scale[:, None]
  return x.reshape(-1)[: math.prod(packed.shape)].reshape(packed.shape)


@functools.cache
def dynamic_map(codec: str) -> np.ndarray:
  """f32[256], ascending: levels that are dense near 0, as of an 8-bit float whose exponent grows by need.

  The decade (10^-k, 10^(1-k)] for k = 1, ..., 7 has 2^(7-k) evenly spaced levels (centres of equal parts), on
  either side of 0, or of 'udynamic8' twice as many on one side; 0 and 1 complete them. The least size is
  5.5e-7, or 3.25e-7.
  """
  found, positive = [0.0, 1.0], codec == 'udynamic8'
  for decade in range(7):
    parts = 2 ** (decade + positive)
    edges = np.linspace(0.1, 1, parts + 1)
    sizes = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - 6)
    found += [*sizes] if positive else [*sizes, *-sizes]
  return np.sort(np.asarray(found)).astype(np.float32)


def packs(codec: str, a: Array) -> bool:
  """Whether an array is packed: f32 that is no scalar and, for the dynamic codecs, fills a block."""
  return a.dtype == jnp.float32 and a.ndim > 0 and (codec == 'bfloat16' or a.size >= BLOCK)


def unpack_tree(tree: Tree) -> Tree:
  """The tree with f32 tensors in the place of packed ones."""
  return jax.tree.map(
    lambda a: unpack(a) if isinstance(a, Packed) else a, tree, is_leaf=_is(Packed)
  )


def _blocks(x: Array) -> Array:
  """[..., ] -> [blocks, BLOCK], with zeros at the end."""
  flat = x.reshape(-1)
  return jnp.pad(flat, (0, -flat.size % BLOCK)).reshape(-1, BLOCK)


def _is(kind: type):
  return lambda a: isinstance(a, kind)
