"""What causal language models share: where logits belong, their loss, and what evaluation reports."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cl_jax.types import Array, Batch, Out


def shifted(logits: Array, learn: Array) -> Array:
  """Logits f32[B, L, V] moved so that those at position i predict token i; 0 where nothing is learnt.

  Zeros are constants: distillation and sensitivity, which compare whole arrays of logits, are left with the
  positions that count.
  """
  before = jnp.pad(logits[:, :-1], ((0, 0), (1, 0), (0, 0)))
  return jnp.where(targets(learn)[..., None], before, 0.0)


def targets(learn: Array) -> Array:
  """bool[B, L]: the positions to learn that have one before them."""
  return (learn > 0) & (jnp.arange(learn.shape[1]) > 0)


def token_loss(out: Out, batch: Batch) -> tuple[Array, Array]:
  """(-log p f32[B, L] of every token, which of them count bool[B, L])."""
  x = batch.x
  logp = jnp.take_along_axis(out.logits, x['tokens'][..., None], -1)[..., 0]
  return jax.nn.logsumexp(out.logits, -1) - logp, targets(x['learn'])


def loss(out: Out, batch: Batch) -> Array:
  """f32[B], the mean -log p of a row's tokens to learn, in nats."""
  nats, learn = token_loss(out, batch)
  return jnp.where(learn, nats, 0).sum(-1) / jnp.maximum(learn.sum(-1), 1)


def likelihood(out: Out, batch: Batch) -> Array:
  """f32[B, 2]: log-likelihood of a row's tokens to learn, and their number; e^-ratio is the perplexity."""
  nats, learn = token_loss(out, batch)
  keep = learn & (batch.w > 0)[:, None]
  return jnp.stack([-jnp.where(keep, nats, 0).sum(-1), keep.sum(-1, dtype=jnp.float32)], -1)


def exact(out: Out, batch: Batch) -> Array:
  """f32[B, 2]: whether each token to learn is the most probable one, given those before it; w.

  Greedy decoding writes exactly the tokens to learn where this holds, and something else where it does not:
  one pass over the right answer decides, and nothing has to be generated.
  """
  learn = targets(batch.x['learn'])
  right = (out.logits.argmax(-1) == batch.x['tokens']) | ~learn
  return jnp.stack([batch.w * right.all(-1), batch.w], -1)


MEASURES = {'likelihood': likelihood, 'exact': exact}
