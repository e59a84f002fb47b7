"""Prefix tuning."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cl_jax import prompts
from cl_jax.types import Method


def prefix_tuning(length: int = 10, scale: float = 0.02) -> Method:
  """Trains keys and values [layers, length, d] that every query of every layer attends to besides its own.

  Li & Liang, ACL 2021, eq. 3; official code XiangLi1999/PrefixTuning. The prefixes come after the
  projections. Freeze the backbone; the head is trained too. Deviation: no network that computes the
  prefixes from smaller ones in training (section 4.3).

  Args:
    length: rows of each prefix.
    scale: the prefixes start at N(0, scale^2).

  Raises:
    UserError: the network is no transformer.

  State: none (parameters: 2 layers length d).
  """

  def init(key, params, batch, fwd):
    net = prompts.network('prefix_tuning', params, batch, fwd)
    draw = scale * jax.random.normal(key, (2, net.layers, length, net.key), jnp.float32)
    return {'prefix_tuning': {'keys': draw[0], 'values': draw[1]}}, ()

  def wrap(s, apply):
    def prefixed(variables, batch, tap, train):
      own = variables['prefix_tuning']
      return apply(variables, batch, prompts.before_keys(tap, own['keys'], own['values']), train)

    return prefixed

  return Method(init=init, wrap=wrap)
