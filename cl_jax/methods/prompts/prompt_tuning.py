"""Prompt tuning."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cl_jax import prompts
from cl_jax.errors import UserError
from cl_jax.types import Method, overlay

STARTS = ('random', 'vocabulary', 'labels')
FREQUENT = 5000


def prompt_tuning(length: int = 20, start: str = 'random', tokens: tuple[int, ...] = ()) -> Method:
  """Trains a prompt P [length, d] that is put before the embedded sequence of every input.

  Lester et al., EMNLP 2021, section 2; official code google-research/prompt-tuning. Freeze the backbone; the
  head is trained too. Positions are not added to the prompt. Deviation: the head is a linear layer, where
  the paper's model generates the label as text; so 'labels' takes token ids, not strings.

  Args:
    length: rows of the prompt; the paper has 1 to 150.
    start: 'random' U(-0.5, 0.5), 'vocabulary' the embeddings of tokens drawn from the first 5,000 (the most
      frequent ones in a vocabulary that is sorted), or 'labels' those of `tokens`.
    tokens: ids for 'labels', repeated to `length`.

  Raises:
    UserError: the network is no transformer, or has no token embeddings and `start` wants some.

  State: none (parameters: length d).
  """
  if start not in STARTS:
    raise UserError(f'start={start!r} is not known: use one of {", ".join(STARTS)}')
  if start == 'labels' and not tokens:
    raise UserError("start='labels' wants token ids: give tokens=(...)")

  def init(key, params, batch, fwd):
    net = prompts.network('prompt_tuning', params, batch, fwd)
    if start == 'random':
      prompt = jax.random.uniform(key, (length, net.width), jnp.float32, -0.5, 0.5)
      return {'prompt_tuning': {'prompt': prompt}}, ()
    embed = overlay(fwd.frozen, params)['backbone'].get('embed', {})
    if 'tokens' not in embed:
      raise UserError(f"start={start!r} wants token embeddings, the network has none: use 'random'")
    table = embed['tokens']
    if start == 'vocabulary':
      rows = jax.random.randint(key, (length,), 0, min(FREQUENT, table.shape[0]))
    else:
      if not all(0 <= t < table.shape[0] for t in tokens):
        raise UserError(f'tokens={tokens!r} exceed the vocabulary of {table.shape[0]}')
      rows = jnp.asarray([tokens[i % len(tokens)] for i in range(length)])
    return {'prompt_tuning': {'prompt': jnp.asarray(table)[rows]}}, ()

  def wrap(s, apply):
    def prompted(variables, batch, tap, train):
      prompt = variables['prompt_tuning']['prompt']
      return apply(variables, batch, prompts.before_sequence(tap, prompt), train)

    return prompted

  return Method(init=init, wrap=wrap)
