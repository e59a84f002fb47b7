"""Rows of a memory as a few codes each: product quantisation (`cl_jax.quantise`) as a codec, 'pqMxK'.

A row of D numbers is cut into M equal parts in the order in which it is stored; each is the number of the
nearest of K codewords of its own codebook. Codebooks are state: 4 D K bytes of codewords, and 4 M K of counts
where they are learnt on the way. With `latent` they are fitted to the activations of the first task, as in
`remind`. Examples of the stream are stored from the first step on, so there codebooks are learnt as the
examples come (`learn`), from nothing: no row waits in more bytes than it is meant to have.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cl_jax import codecs, quantise
from cl_jax.codecs import Rows
from cl_jax.errors import UserError
from cl_jax.types import Array, Tree


class Form(NamedTuple):
  """parts: M, that a row is cut into; words: K, codewords of each; name: as it is written."""

  parts: int
  words: int
  name: str


class Books(NamedTuple):
  """Codebooks that are being learnt.

  Attributes:
    words: f32[M, K, D / M], zeros where count is 0.
    count: i32[M, K], the examples whose part was given to the codeword.
  """

  words: Array
  count: Array


class Quantised(NamedTuple):
  """The state of a method whose memory is in codes; `books` has one for each leaf of an example."""

  books: tuple[Books | None, ...]
  method: Tree


def form(codec: str) -> Form | None:
  """What 'pqMxK' says; None where `codec` is no such name.

  Raises:
    UserError: K is not 2 to 256 or M not at least 1.
  """
  found = re.fullmatch(r'pq(\d+)x(\d+)', codec)
  if not found:
    return None
  parts, words = int(found[1]), int(found[2])
  if parts < 1 or not 2 <= words <= 256:
    raise UserError(
      f'codec {codec!r}: pqMxK has M >= 1 parts of a row and K = 2 to 256 codewords of each'
    )
  return Form(parts, words, codec)


def code_bytes(f: Form) -> int:
  """Of a row: two codes to a byte where K <= 16, else one."""
  return -(-f.parts // 2) if f.words <= 16 else f.parts


def blank(f: Form, shape: Sequence[int]) -> Array:
  """Codewords f32[M, K, D / M], all 0, for rows of `shape` with D numbers.

  Raises:
    UserError: M does not divide D.
  """
  n = math.prod(shape)
  if n % f.parts:
    raise UserError(f'{f.name}: rows of {n} numbers cannot be cut into {f.parts} equal parts')
  return jnp.zeros((f.parts, f.words, n // f.parts), jnp.float32)


def begun(f: Form, x: Array) -> Books:
  """Empty codebooks for rows like x [B, ...]."""
  return Books(blank(f, x.shape[1:]), jnp.zeros((f.parts, f.words), jnp.int32))


def learn(books: Books, x: Array, w: Array) -> Books:
  """MacQueen's k-means (Berkeley Symposium 1967), the one that learns from examples as they come.

  Part by part and row by row: while there are unused codewords, a part that equals none becomes one (there:
  the first K points, equal or not); every other one moves its nearest codeword, which stays the mean of
  all that it was given. A code that was stored earlier means that mean as well, so the codewords are means of
  what the memory holds a sample of.

  Args:
    x: [B, ...], floats or uint8.
    w: f32[B]; rows with 0 do not count.
  """
  rows = quantise.in_parts(x.reshape(x.shape[0], -1).astype(jnp.float32), books.count.shape[0])
  part = jnp.arange(books.count.shape[0])

  def one(books, at):
    row, counts = at
    far = jnp.square(books.words - row[:, None]).sum(-1)
    far = jnp.where(books.count > 0, far, jnp.inf)
    used = (books.count > 0).sum(1)
    new = (used < books.count.shape[1]) & (far.min(1) > 0)
    word = jnp.where(new, used, far.argmin(1))
    counts = (counts > 0).astype(jnp.int32)
    count = books.count.at[part, word].add(counts)
    old = books.words[part, word]
    n = jnp.maximum(count[part, word], 1).astype(jnp.float32)[:, None]
    return Books(books.words.at[part, word].add(counts * (row - old) / n), count), None

  return jax.lax.scan(one, books, (rows, w))[0]


def used(books: Books) -> Array:
  """The codewords, the first one in the place of those that are not used yet: of equals it is taken."""
  return jnp.where(books.count[..., None] > 0, books.words, books.words[:, :1])


def encode(f: Form, words: Array, x: Array) -> Rows:
  """Rows [B, ...] of floats or uint8 as codes; of codewords that are as near the first."""
  codes = quantise.encode(words, x.reshape(x.shape[0], -1).astype(jnp.float32))
  codes = codecs.nibbles(codes.astype(jnp.int32)) if f.words <= 16 else codes
  return Rows(codes, None, None, f.name, tuple(x.shape[1:]), str(x.dtype))


def decode(words: Array, rows: Rows) -> Array:
  """The rows [B, *shape] that are meant, in their own dtype; of uint8 rounded to the nearest."""
  codes = rows.codes
  if words.shape[1] <= 16:
    codes = codecs.numbers(codes, words.shape[0])
  x = quantise.decode(words, codes).reshape(codes.shape[0], *rows.shape)
  if rows.dtype != 'uint8':
    return x.astype(rows.dtype)
  # Means of few pixels are halves often; whichever way they were summed, they go up.
  return jnp.clip(jnp.floor(x + 0.5007), 0, 255).astype(jnp.uint8)


# --- examples, with several leaves ---------------------------------------------------------------------


def begin_tree(f: Form, x: Tree) -> tuple[Books | None, ...]:
  """Empty codebooks for every leaf that `codecs.takes`."""
  return tuple(begun(f, a) if codecs.takes(a) else None for a in jax.tree.leaves(x))


def learn_tree(books: tuple[Books | None, ...], x: Tree, w: Array) -> tuple[Books | None, ...]:
  leaves = jax.tree.leaves(x)
  return tuple(b and learn(b, a, w) for b, a in zip(books, leaves, strict=True))


def encode_tree(f: Form, books: tuple[Books | None, ...], x: Tree) -> Tree:
  leaves, tree = jax.tree.flatten(x)
  made = (a if b is None else encode(f, used(b), a) for b, a in zip(books, leaves, strict=True))
  return jax.tree.unflatten(tree, list(made))


def decode_tree(books: tuple[Books | None, ...], x: Tree) -> Tree:
  """The inverse; leaves that are not encoded stay as they are, also in what was never encoded."""
  is_rows = lambda a: isinstance(a, Rows)  # noqa: E731
  leaves, tree = jax.tree.flatten(x, is_leaf=is_rows)
  made = (
    decode(used(b), a) if b is not None and is_rows(a) else a
    for b, a in zip(books, leaves, strict=True)
  )
  return jax.tree.unflatten(tree, list(made))
