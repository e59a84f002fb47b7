"""A random projection whose matrix is never stored: Hadamard transforms and signs that a seed gives."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from cl_jax.types import Array

ROUNDS = 3  # of signs and a transform; "HD1 HD2 HD3"


def structured(x: Array, seed: Array, width: int) -> Array:
  """x W for a random W of [D, width] that is made of `seed` whenever it is needed, f32[..., width].

  W has blocks of n columns, n the least power of 2 that is at least D (x is padded with zeros):
  sqrt(n) (H D_1) (H D_2) (H D_3) with H the orthonormal Hadamard matrix and D_r diagonal matrices of random
  signs, so the columns of a block are orthogonal and of length sqrt(n), the scale of a Gaussian W of n rows,
  whose columns are that long on average. Of these n rows x meets the first D, and where D is less than n its
  columns are about sqrt(D) long and orthogonal on average alone. Yu, Suresh, Choromanski, Holtmann-Rice &
  Kumar, "Orthogonal Random Features", NeurIPS 2016, section 4 (SORF), after Le, Sarlos & Smola, "Fastfood",
  ICML 2013, from which the zeros and the blocks side by side are; no official repository. Deviation: the last
  block is cut to `width`.

  A block takes 3 n log2(n) additions a row, no multiplications but by signs and one scale, and 3 n signs,
  where a stored W has D n multiply-adds and 4 D n bytes.

  Args:
    x: f32[..., D].
    seed: u32[].
    width: M, columns of W.
  """
  d = x.shape[-1]
  n = 2 ** math.ceil(math.log2(max(d, 2)))
  blocks = -(-width // n)
  sign = signs(seed, ROUNDS * blocks * n).reshape(ROUNDS, blocks, n).astype(x.dtype)
  x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, n - d)])[..., None, :]
  for r in reversed(range(ROUNDS)):  # D_3 meets x first
    x = hadamard(x * sign[r])
  scale = math.sqrt(n) / math.sqrt(n) ** ROUNDS
  return (scale * x).reshape(*x.shape[:-2], blocks * n)[..., :width]


def hadamard(x: Array) -> Array:
  """H x along the last axis, n a power of 2; H[i, j] = (-1)^popcount(i & j), not divided by sqrt(n).

  Every stage is the same, sums of neighbours and then their differences (Pease, 1968), so that a loop does:
  less code on a device than log2(n) stages of their own.
  """
  n = x.shape[-1]

  def stage(_, x):
    pairs = x.reshape(*x.shape[:-1], n // 2, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    return jnp.concatenate([a + b, a - b], -1)

  return jax.lax.fori_loop(0, n.bit_length() - 1, stage, x)


def signs(seed: Array, n: int) -> Array:
  """i32[n] of -1 and 1: the highest bits of a counter that a hash scrambles.

  The counter goes in steps of 2^32 / golden ratio from `seed`, and the hash is the finaliser of MurmurHash3
  (Appleby, 2011), as in SplitMix (Steele, Lea & Flood, OOPSLA 2014). In integers of 32 bits alone, so that
  all devices and compilers agree, and each sign by itself, so that none has to be kept.
  """
  i = seed.astype(jnp.uint32) + jnp.uint32(0x9E3779B9) * jnp.arange(1, n + 1, dtype=jnp.uint32)
  i = (i ^ (i >> 16)) * jnp.uint32(0x85EBCA6B)
  i = (i ^ (i >> 13)) * jnp.uint32(0xC2B2AE35)
  return 1 - 2 * ((i ^ (i >> 16)) >> 31).astype(jnp.int32)
