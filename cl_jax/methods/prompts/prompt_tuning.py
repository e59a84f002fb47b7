"""Prompt tuning."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cl_jax import prompts
from cl_jax.errors import UserError
from cl_jax.types import Array, Batch, Forward, Method, Tree, overlay

STARTS = ('random', 'vocabulary', 'labels')
FREQUENT = 5000


def prompt_tuning(length: int = 20, start: str = 'random', tokens: tuple[int, ...] = ()) -> Method:
  """Trains a prompt P [length, d] that is put before the embedded sequence of every input.

  Lester et al., EMNLP 2021, section 2; official code google-research/prompt-tuning. Freeze the backbone; the
  head is trained too. Deviations: the head is a linear layer, where the paper's model generates the label as
  text; so 'labels' takes token ids, not strings. The prompt comes after all that a network does to embed a
  text, where other code lets it through: BERT and GPT-2 add no positions to it, BERT neither its segment nor
  its norm, and the text keeps its positions.

  Args:
    length: rows of the prompt; the paper has 1 to 150.
    start: 'random' U(-0.5, 0.5), 'vocabulary' the embeddings of tokens drawn from the first 5,000 (the most
      frequent ones in a vocabulary that is sorted), or 'labels' those of `tokens`: each as the network embeds
      it in a text of these tokens alone, with positions, segment and norm where it has them.
    tokens: ids for 'labels', repeated to `length`.

  Raises:
    UserError: the network is no transformer; `start` wants tokens and it has none, or fewer positions.

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
    vocabulary = embed['tokens'].shape[0]
    if start == 'vocabulary':
      ids = jax.random.randint(key, (length,), 0, min(FREQUENT, vocabulary))
    else:
      if not all(0 <= t < vocabulary for t in tokens):
        raise UserError(f'tokens={tokens!r} exceed the vocabulary of {vocabulary}')
      ids = jnp.asarray([tokens[i % len(tokens)] for i in range(length)])
    return {'prompt_tuning': {'prompt': embedded(ids, params, batch, fwd)}}, ()

  def wrap(s, apply):
    def prompted(variables, batch, tap, train):
      prompt = variables['prompt_tuning']['prompt']
      return apply(variables, batch, prompts.before_sequence(tap, prompt), train)

    return prompted

  return Method(init=init, wrap=wrap)


def embedded(ids: Array, params: Tree, batch: Batch, fwd: Forward) -> Array:
  """[length, d], what the tap 'embed' sees of a text of the tokens `ids`, i32[length].

  The table's rows are not in that space where the network goes on to a norm: those of MiniLM have length 1,
  what its first layer reads 9.
  """
  seen = []

  def look(name, h, layer=0):
    if name == 'embed':
      seen.append(h[0])
    return h

  whole = jax.tree.map(lambda a: jnp.ones((1, len(ids)), a.dtype), batch.x)
  one = jax.tree.map(lambda a: a[:1], batch)._replace(x={**whole, 'tokens': ids[None]})
  fwd(params, one, look)
  return seen[0]
