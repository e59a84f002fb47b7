"""Low-rank adaptation."""

from __future__ import annotations

import jax.numpy as jnp

from cl_jax.lowrank import bounds, drawn, put, select
from cl_jax.models.layers import LowRank
from cl_jax.types import Method, Tree


def lora(rank: int = 8, alpha: float = 16.0, targets: str = '.*/(q|v)/w') -> Method:
  """Adds a trainable product of two thin matrices to chosen weights: h = x W + (alpha / r) (x A) B.

  Hu et al., ICLR 2022, eq. 3; official code microsoft/LoRA. A is Kaiming-uniform with a = sqrt(5), that is
  U(+-1/sqrt(d_in)), and B is zero, so that training starts from the model as it is. Freeze the rest by
  `learner(frozen=...)`; the product is never formed in training (see `LowRank`), but afterwards by
  `cl_jax.lowrank.merged`. Stacked weights [L, d_in, d_out] get an adapter per layer. Deviation: no dropout on
  A's input.

  Args:
    rank: r.
    alpha: scale; the update is multiplied by alpha / r.
    targets: regular expression, matched against the whole path of a weight, trained or frozen.

  State: none (parameters: r (d_in + d_out) per adapted matrix).
  """

  def init(key, params, batch, fwd):
    def factors(key, stack, d_in, d_out):
      return {'a': bounds(key, (*stack, d_in, rank)), 'b': jnp.zeros((*stack, rank, d_out))}

    return {'lora': drawn(key, select('lora', targets, params, fwd), factors)}, ()

  def wrap(s, apply):
    def adapted(variables, batch, tap, train):
      return apply(adapt(variables, alpha), batch, tap, train)

    return adapted

  return Method(init=init, wrap=wrap)


def adapt(variables: Tree, alpha: float) -> Tree:
  """The model's variables with every adapted weight as a `LowRank` operator, without the 'lora' branch."""

  def adapted(w, own):
    a, b = own['a'], own['b']
    return LowRank(
      w, a, b, jnp.full(a.shape[:-2], alpha / a.shape[-1])
    )  # one per layer, for the scan

  return put(variables, 'lora', adapted)
