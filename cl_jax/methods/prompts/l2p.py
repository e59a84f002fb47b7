"""Learning to prompt."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cl_jax import prompts
from cl_jax.errors import UserError
from cl_jax.linalg import weighted_mean
from cl_jax.types import Method


def l2p(
  pool: int = 10, top: int = 5, length: int = 5, coef: float = 0.5, vote: bool = False
) -> Method:
  """Chooses prompts from a pool by the likeness of their keys to the input's features.

  Wang et al., CVPR 2022, "Learning to prompt for continual learning", eq. 2-5; official code
  google-research/l2p. With q the features of the frozen network without prompts, the `top` of the `pool`
  prompts with the largest cos(q, K_m) are put before the embedded sequence, in that order (of equals the
  lower index first), and

  L = L_task - coef * mean_x sum_{m chosen} cos(q(x), K_m)

  Prompts and keys start at U(0, 0.01). Freeze the backbone and let the current task's classes compete
  (`current_head`). Deviations: the head reads what the model's head reads (the class token of a ViT, the
  mean of the tokens of BERT), not the mean of the prompts, as in the official code's choice 'token';
  no penalty for prompts that are used often. The official code makes a new optimiser a task, which is
  `config.optimizer.reset` here.

  Args:
    pool: M.
    top: N, prompts per input.
    length: rows of a prompt.
    coef: lambda.
    vote: choose for all rows of a batch the prompts that most of its rows would choose, as the published
      figures do. That looks across the batch at test time, and a batch of one task tells the task.

  Raises:
    UserError: the network is no transformer, or `top` exceeds `pool`.

  Needs, with `vote`, batches at test ('batch_test'). State: none (parameters: M (length d + D)). One more
  forward pass.
  """
  if top > pool:
    raise UserError(f'l2p: top={top} prompts of a pool of {pool}: make the pool larger')

  def init(key, params, batch, fwd):
    net = prompts.network('l2p', params, batch, fwd)
    k_prompts, k_keys = jax.random.split(key)
    rows = prompts.uniform(k_prompts, (pool, length, net.width))
    return {'l2p': {'prompts': rows, 'keys': prompts.uniform(k_keys, (pool, net.features))}}, ()

  def choose(cosine, w):
    """i32[B, top], the prompts of each row."""
    index = jax.lax.top_k(cosine, top)[1]
    if not vote:
      return index
    votes = jax.nn.one_hot(index, pool, dtype=jnp.int32).sum(1)
    most = jax.lax.top_k(jnp.where((w > 0)[:, None], votes, 0).sum(0), top)[1]
    return jnp.broadcast_to(most, index.shape)

  def wrap(s, apply):
    def prompted(variables, batch, tap, train):
      own = variables['l2p']
      q = prompts.query(apply, variables, batch)
      cosine = prompts.unit(q) @ prompts.unit(own['keys']).T  # f32[B, M]
      index = choose(jax.lax.stop_gradient(cosine), batch.w)
      chosen = own['prompts'][index]  # [B, top, length, d]
      chosen = chosen.reshape(chosen.shape[0], -1, chosen.shape[-1])
      out = apply(variables, batch, prompts.before_sequence(tap, chosen), train)
      near = jnp.take_along_axis(cosine, index, 1).sum(1)
      return out._replace(aux={**out.aux, 'l2p': near})

    return prompted

  def loss(s, params, batch, out, fwd):
    return -coef * weighted_mean(out.aux['l2p'], batch.w)

  return Method(init=init, wrap=wrap, loss=loss, needs=('batch_test',) if vote else ())
