"""What is edited and what is asked about it, of one seed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cl_jax.editing import evaluate, rows
from cl_jax.editing.rows import Edit
from cl_jax.errors import UserError
from cl_jax.streams import edits as edit_streams
from experiments.edit_subject import Subject, begin_texts


class Exam(NamedTuple):
  """What is edited and what is asked, of one seed.

  Attributes:
    edits: in the order in which they are written.
    requests: the same as arrays.
    asked: the questions; `seen` maps their edits to indices of `edits`.
    seen: indices of the edits that are asked about.
    known: all facts of the data, for references.
    refused: (case, reason).
  """

  edits: list[Edit]
  requests: rows.Requests
  asked: evaluate.Questions
  seen: list[int]
  known: list[Edit]
  refused: list[tuple[str, str]]


def prepare(chosen, subject: Subject, data: Path, seed: int, tell) -> Exam:
  """The edits of a seed and the questions about them."""
  every, refused = edit_streams.load(data / 'edit', chosen['data'], seed)
  picked, left = choose(chosen, subject, every, seed, tell)
  prefixes = begin_texts(chosen, subject, seed)
  requests, kept, odd = rows.requests(subject.tokenizer, picked, prefixes, chosen['length'])
  for e, why in odd:
    tell(f'refused: {e.case}: {why}')
  picked = [picked[i] for i in kept]
  about = chosen['evaluate']
  seen = at_most(picked, about['edits'])
  asked, too_long = evaluate.questions(
    subject.tokenizer, [picked[i] for i in seen], about['neighbours'], chosen['length']
  )
  refused = [*((e.case, why) for e, why in odd), *refused, *left]
  refused += [(case, f'too long to be asked: {prompt}') for case, prompt in too_long]
  return Exam(picked, requests, asked, seen, every, refused)


def choose(chosen, subject: Subject, every: list[Edit], seed: int, tell):
  """(the edits of a seed, (case, reason) of those that were left out before enough were found)."""
  order = np.random.default_rng(seed).permutation(len(every))
  n, picked, left = chosen['edits'], [], []
  if not chosen['known']:
    picked = [every[i] for i in order[:n]]
  else:
    ask = evaluate.asker(subject.config)
    for lo in range(0, len(order), 64):
      some = [every[i] for i in order[lo : lo + 64] if every[i].truth]
      bare = [Edit(e.prompt, e.subject, e.truth, case=e.case) for e in some]
      asked, _ = evaluate.questions(subject.tokenizer, bare, 0, chosen['length'])
      half = len(asked.kind)
      _, share = ask(subject.backbone, (), asked.rows)
      for i, right in zip(asked.edit, share[:half], strict=True):
        (picked if right == 1 else left).append(some[i])
      if len(picked) >= n:
        break
    tell(f'{len(picked)} of {len(picked) + len(left)} facts are what the model says anyway')
    picked = picked[:n]
  if len(picked) < n:
    raise UserError(f'config.edits={n}, and there are {len(picked)} in {chosen["data"]}')
  return picked, [(e.case, 'the model does not say the truth') for e in left]


def at_most(picked: Sequence[Edit], n: int) -> list[int]:
  """Indices of at most n edits, spread evenly: what is asked about."""
  return sorted({int(i) for i in np.linspace(0, len(picked) - 1, min(n, len(picked))).round()})
