"""Edit requests as arrays: the last token of every subject stands in one column, and nothing before it moves.

A row of tokens is cut in two. `head` holds what comes before the last token of the subject, which no edit of
that token can change in a causal model; `tail` begins with that token and goes to the end of the target.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cl_jax.editing import encoding
from cl_jax.errors import UserError
from cl_jax.types import Array


class Rows(NamedTuple):
  """Rows of tokens around a column; the leading axes are common, -1 is padding.

  Attributes:
    head: i32[..., H], filled up on the left.
    tail: i32[..., T], from the last token of the subject on, filled up on the right.
    before: i32[..., M], the columns of `tail` whose logits predict `target`.
    target: i32[..., M], its tokens.
  """

  head: Array
  tail: Array
  before: Array
  target: Array


class Requests(NamedTuple):
  """N edits.

  Attributes:
    rewrite: rows [N, P, ...] of P contexts: the prompt as it is, then with each prefix before it.
    essence: rows [N, ...] of '{subject} is a', with the last column as the one that predicts.
  """

  rewrite: Rows
  essence: Rows


@dataclasses.dataclass(frozen=True)
class Edit:
  """One fact to write, and how to tell what it did.

  Attributes:
    prompt: with {} in the place of the subject.
    subject, target: what is to follow the prompt, without a leading space.
    truth: what the model is expected to say before; '' where it is not known.
    paraphrases: other ways to ask.
    neighbours: prompts of other subjects, whose answer is to stay.
    answers: what they are to stay at, one a neighbour; `truth` where there are none.
    portability: (prompt, answer) pairs that follow from the edit.
    case: name in reports.
  """

  prompt: str
  subject: str
  target: str
  truth: str = ''
  paraphrases: tuple[str, ...] = ()
  neighbours: tuple[str, ...] = ()
  answers: tuple[str, ...] = ()
  portability: tuple[tuple[str, str], ...] = ()
  case: str = ''

  @property
  def text(self) -> str:
    return self.prompt.replace('{}', self.subject)


# A prompt, where its subject ends (a character), and what follows it.
Piece = tuple[str, int, str]


def requests(
  tokenizer: Any, edits: Sequence[Edit], prefixes: Sequence[str] = (), length: int = 64
) -> tuple[Requests, list[int], list[tuple[Edit, str]]]:
  """The edits that can be made as arrays, which of them these are, and (edit, reason) of the others.

  Args:
    tokenizer: a `tokenizers.Tokenizer`.
    prefixes: texts that are put before the prompts, each with '. ' between.
    length: tokens that a row may have.

  Raises:
    UserError: there is no edit that can be made.
  """
  kept: list[int] = []
  refused: list[tuple[Edit, str]] = []
  rewrites: list[list[tuple[list[int], int, list[int]]]] = []
  essences: list[tuple[list[int], int, list[int]]] = []
  for i, edit in enumerate(edits):
    try:
      pieces = [piece(edit, prefix) for prefix in ('', *prefixes)]
      found = [tokens_of(tokenizer, p, length) for p in pieces]
      subject = edit.subject.strip()
      essence = tokens_of(tokenizer, (f'{subject} is a', len(subject), ''), length)
    except UserError as error:
      refused.append((edit, str(error)))
      continue
    rewrites.append(found)
    essences.append(essence)
    kept.append(i)
  if not kept:
    reasons = '; '.join(f'{e.case or e.text!r}: {why}' for e, why in refused[:3])
    raise UserError(f'none of {len(edits)} edits can be made ({reasons})')
  flat = layout([row for rows in rewrites for row in rows])
  shape = (len(kept), 1 + len(prefixes))
  rewrite = Rows(*(a.reshape(*shape, a.shape[-1]) for a in flat))
  return Requests(rewrite, layout(essences)), kept, refused


def piece(edit: Edit, prefix: str = '') -> Piece:
  """The prompt of an edit with a prefix before it.

  Raises:
    UserError: no place for the subject, or an empty subject or target.
  """
  if not edit.subject.strip():
    raise UserError('the subject is empty')
  if edit.prompt.count('{}') != 1:
    raise UserError(f'the prompt {edit.prompt!r} must have one {{}}, the place of the subject')
  if not edit.target.strip():
    raise UserError('the target is empty')
  before = f'{prefix}. ' if prefix else ''
  end = len(before) + edit.prompt.index('{}') + len(edit.subject.rstrip())
  return before + edit.text, end, edit.target


def tokens_of(tokenizer: Any, piece: Piece, length: int) -> tuple[list[int], int, list[int]]:
  """(tokens of the prompt, position of the last one that the subject touches, tokens of the target).

  Raises:
    UserError: more tokens than `length`, or none before the end of the subject.
  """
  prompt, end, target = piece
  ids, spans = encoding.prompt(tokenizer, prompt)
  touched = [i for i, (lo, hi) in enumerate(spans) if lo < end and hi > lo]
  if not touched:
    raise UserError(f'the tokenizer has no token for {prompt[:end]!r}')
  answer = encoding.after(tokenizer, prompt, target)
  if len(ids) + len(answer) > length:
    have = len(ids) + len(answer)
    raise UserError(f'{prompt!r} and its target are {have} tokens, at most {length} are allowed')
  return ids, touched[-1], answer


def layout(rows: Sequence[tuple[Sequence[int], int, Sequence[int]]]) -> Rows:
  """(prompt, position of the subject's last token, target) rows as arrays of one shape, as short as they go.

  A row without a target has its last column in `before`: what it predicts can be looked at.
  """
  heads = max(at for _, at, _ in rows)
  tails = max(len(p) + len(t) - at for p, at, t in rows)
  most = max(max(len(t), 1) for _, _, t in rows)
  n = len(rows)
  head, tail = np.full((n, heads), -1, np.int32), np.full((n, tails), -1, np.int32)
  before, target = np.full((n, most), -1, np.int32), np.full((n, most), -1, np.int32)
  for i, (prompt, at, answer) in enumerate(rows):
    head[i, heads - at :] = prompt[:at]
    rest = [*prompt[at:], *answer]
    tail[i, : len(rest)] = rest
    first = len(prompt) - at - 1
    before[i, : max(len(answer), 1)] = np.arange(first, first + max(len(answer), 1))
    target[i, : len(answer)] = answer
  return Rows(*map(jnp.asarray, (head, tail, before, target)))


def take(requests: Any, rows: Any) -> Any:
  """The requests, or rows, of some indices."""
  return jax.tree.map(lambda a: a[jnp.asarray(rows)], requests)


def groups(index: np.ndarray, width: int) -> list[tuple[np.ndarray, int]]:
  """(indices, how many of them count), `width` at a time: the last are filled up with some of their own."""
  width = min(width, len(index))
  parts = [index[lo : lo + width] for lo in range(0, len(index), width)]
  return [(np.resize(part, width), len(part)) for part in parts]


def trimmed(rows: Rows, step: int = 4) -> Rows:
  """Tails without the columns that are padding in all rows, up to a multiple of `step`: few shapes occur."""
  longest = int((np.asarray(rows.tail) >= 0).sum(-1).max())
  return rows._replace(tail=rows.tail[..., : -(-longest // step) * step])


def cut(rows: Rows, at: int) -> Rows:
  """Rows [N, ...] cut elsewhere: `at` tokens of each prompt, or all but -at, are its head.

  With 0 there are no heads, so that rows are as wide as the longest, not as the longest head and tail.
  """
  found = []
  for head, tail, _, target in zip(*map(np.asarray, rows), strict=True):
    tokens = [int(t) for t in (*head, *tail) if t >= 0]
    answer = [int(t) for t in target if t >= 0]
    prompt = tokens[: len(tokens) - len(answer)]
    found.append((prompt, at % len(prompt), answer))
  return layout(found)


def plain(rows: Rows) -> Rows:
  """Rows [N, ...] of the first context of rows [N, P, ...]."""
  return Rows(*(a[:, 0] for a in rows))


def flat(rows: Rows) -> Rows:
  """Rows [N * P, ...] of rows [N, P, ...]."""
  n, contexts = rows.target.shape[:2]  # of a head without columns -1 could not be told
  return Rows(*(a.reshape(n * contexts, a.shape[-1]) for a in rows))
