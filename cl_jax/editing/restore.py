"""Runs of a prompt with its subject blurred, and clean states put back into them."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cl_jax.editing import inside
from cl_jax.editing.rows import Rows
from cl_jax.models import causal
from cl_jax.models.causal import Config
from cl_jax.types import Array, Tree

KINDS = ('block', 'feedforward', 'attention')  # taps of a layer, and the first axis of the maps


class Trace(NamedTuple):
  """What one prompt showed; probabilities of the answer after its last token.

  Attributes:
    answer: i32[].
    clean: f32[]. corrupted: f32[], the mean over the noise samples.
    maps: f32[3, layers, L], the same where a state of `KINDS` was put back at one layer (a window around it
      for 'feedforward' and 'attention') and token. Minus `corrupted` it is the indirect effect.
  """

  answer: Array
  clean: Array
  corrupted: Array
  maps: Array


class Runs(NamedTuple):
  """The clean and the corrupted runs of a prompt.

  Attributes:
    place: of one row.
    clean: {kind: f[layers, L, d]}.
    start: f[layers, S, L, d], corrupted, before each layer.
    end: f[1 + S, L, d], clean and corrupted, after the last layer.
  """

  place: inside.Place
  clean: dict[str, Array]
  start: Array
  end: Array


def runs(config: Config, p: Tree, tokens: Array, subject: Array, added: Array) -> Runs:
  """Runs tokens i32[L] as they are, and with each of `added` f[S, L, d] on the subject's embeddings."""
  inside_subject = (jnp.arange(len(tokens)) >= subject[0]) & (jnp.arange(len(tokens)) < subject[1])
  row = tokens[None]
  h, place = inside.begin(config, p, Rows(row[:, :0], row, row[:, :0], row[:, :0]))
  noisy = h + jnp.where(inside_subject[:, None], added, 0).astype(h.dtype)
  h = jnp.concatenate([h, noisy])

  def step(h, i):
    kept = {}

    def tap(name, value, _):
      if name in KINDS:
        kept[name] = value[0]
      return value

    return inside.layer(config, p, h, i, place, tap), (h[1:], kept)

  end, (start, clean) = jax.lax.scan(step, h, jnp.arange(config.depth))
  return Runs(place, clean, start, end)


def restored(config: Config, p: Tree, found: Runs, first: Array, where: dict[str, Array]) -> Array:
  """The last states f[S, L, d] of the corrupted runs with clean states put back.

  Args:
    where: {kind: bool[layers, L]}, what is put back; nothing below layer `first`, which may be traced.
  """

  def tap(name, value, i):
    if name not in where:
      return value
    return jnp.where(where[name][i][:, None], found.clean[name][i], value)

  return inside.between(config, p, found.start[first], found.place, first, config.depth, tap)


def probability(config: Config, p: Tree, h: Array, end: Array) -> Array:
  """Of every token, f32[..., vocabulary], after column `end` of last states h f[..., L, d]."""
  logits = causal.unembed(config, p, causal.norm(config, p['norm'], h[..., end, :]))
  return jax.nn.softmax(logits.astype(jnp.float32), -1)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def maps(config, samples, window, width, p, tokens, subject, answer, key, sigma) -> Trace:
  """See `tracing.trace`; `subject` is i32[2], and `answer` -1 where it is to be the most probable token."""
  shape = (samples, len(tokens), config.d)
  found = runs(config, p, tokens, subject, sigma * jax.random.normal(key, shape))
  end = found.place.seen.sum() - 1
  both = probability(config, p, found.end, end)
  answer = jnp.where(answer < 0, both[0].argmax(), answer).astype(jnp.int32)
  layers, tokens_at = jnp.arange(config.depth), jnp.arange(len(tokens))

  def at(kind: Array, layer: Array) -> Array:
    around = jnp.where(kind == 0, 1, window)
    lo, hi = layer - around // 2, layer + (around + 1) // 2
    there = (layers >= lo) & (layers < hi)

    def one(token: Array) -> Array:
      states = there[:, None] & (tokens_at == token)
      where = {name: states & (kind == i) for i, name in enumerate(KINDS)}
      h = restored(config, p, found, jnp.maximum(lo, 0), where)
      return probability(config, p, h, end)[:, answer].mean()

    return jax.lax.map(one, tokens_at, batch_size=width)

  pairs = jnp.divmod(jnp.arange(len(KINDS) * config.depth), config.depth)
  found_there = jax.lax.map(lambda pair: at(*pair), pairs)
  found_there = found_there.reshape(len(KINDS), config.depth, len(tokens))
  return Trace(answer, both[0, answer], both[1:, answer].mean(), found_there)
