"""Product quantisation (Jegou, Douze & Schmid, TPAMI 2011): vectors as a few bytes.

The D channels are cut into m parts of equal size, each with a codebook of its own; a vector is the
numbers of the nearest codewords, one byte a part.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cl_jax import memory
from cl_jax.types import Array


def starts(key: Array, w: Array, parts: int, words: int) -> Array:
  """i32[parts, words]: rows with w > 0, drawn without replacement for each part as long as there are some."""
  at = jnp.minimum(jnp.arange(words), jnp.maximum((w > 0).sum(), 1) - 1)
  keys = jax.random.split(key, parts)
  return jax.vmap(lambda key: memory.shuffled(key, w <= 0)[at])(keys)


def fit(key: Array, x: Array, w: Array, parts: int, words: int, rounds: int) -> Array:
  """Codebooks f32[parts, words, D / parts] by Lloyd's k-means, which starts at random rows.

  Args:
    x: f32[N, D], N >= words.
    w: f32[N]; rows with 0 do not count.
    rounds: of assigning all rows and moving all codewords. One without a row stays where it is.
  """
  split = in_parts(x, parts).swapaxes(0, 1)  # [parts, N, D / parts]
  first = jax.vmap(lambda rows, at: rows[at])(split, starts(key, w, parts, words))

  def round_of(rows, books):
    near = nearest(rows, books)
    total = jnp.zeros_like(books).at[near].add(rows * w[:, None])
    count = jnp.zeros(words, x.dtype).at[near].add(w)
    return jnp.where(count[:, None] > 0, total / jnp.maximum(count, 1e-12)[:, None], books)

  def body(i, books):
    return jax.lax.map(lambda at: round_of(*at), (split, books))

  return jax.lax.fori_loop(0, rounds, body, first)


def in_parts(x: Array, parts: int) -> Array:
  """[..., D] -> [..., parts, D / parts]."""
  if x.shape[-1] % parts:
    raise ValueError(f'{x.shape[-1]} channels cannot be cut into {parts} equal parts')
  return x.reshape(*x.shape[:-1], parts, -1)


def nearest(rows: Array, book: Array) -> Array:
  """i32[N]: the codeword [words, d] nearest to each row [N, d], the first of equals."""
  return jnp.argmin(jnp.sum(jnp.square(book), -1) - 2 * rows @ book.T, axis=-1)


def encode(books: Array, x: Array) -> Array:
  """Codes u8[..., parts] of vectors [..., D]."""
  parts = in_parts(x, books.shape[0])
  flat = parts.reshape(-1, *parts.shape[-2:]).swapaxes(0, 1)
  codes = jax.lax.map(lambda at: nearest(*at), (flat, books))
  return codes.T.reshape(parts.shape[:-1]).astype(jnp.uint8)


def decode(books: Array, codes: Array) -> Array:
  """The vectors [..., D] that the codes stand for."""
  found = books[jnp.arange(books.shape[0]), codes.astype(jnp.int32)]
  return found.reshape(*codes.shape[:-1], -1)
