"""Prompts and what follows them as tokens, in the way of the tokenizer that a model brings."""

from __future__ import annotations

from typing import Any

from cl_jax.errors import UserError

Spans = list[tuple[int, int]]


def prompt(tokenizer: Any, text: str) -> tuple[list[int], Spans]:
  """Tokens of a text at its beginning, and the characters [begin, end) that each stands for.

  What the tokenizer puts before a text (Llama's <|begin_of_text|>; GPT-2 and SmolLM2 have nothing) stands
  before it, and for no characters. Spaces at the end are left out: what is to follow brings its own.

  Args:
    tokenizer: a `tokenizers.Tokenizer`.
  """
  whole = tokenizer.encode('a', add_special_tokens=True)
  marks = [*whole.special_tokens_mask, 0]
  first = whole.ids[: marks.index(0)]
  found = tokenizer.encode(text.rstrip(), add_special_tokens=False)
  return [*first, *found.ids], [*([(0, 0)] * len(first)), *found.offsets]


def after(tokenizer: Any, text: str, answer: str) -> list[int]:
  """Tokens of an answer behind a prompt, with a space between; [] for no answer.

  By what they add to the prompt's tokens: a tokenizer that marks the beginning of a text (SentencePiece's)
  would read an answer alone in another way.

  Raises:
    UserError: the two together begin with other tokens than the prompt has alone.
  """
  if not answer.strip():
    return []
  begun, _ = prompt(tokenizer, text)
  both, _ = prompt(tokenizer, f'{text.rstrip()} {answer.strip()}')
  if both[: len(begun)] != begun:
    raise UserError(f'{answer!r} behind {text!r} changes the last token of the prompt itself')
  return both[len(begun) :]
