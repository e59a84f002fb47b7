"""What is edited and what is asked about it, of one seed."""

from __future__ import annotations

import dataclasses
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
    refused: (case, reason) of edits that are not made.
    unknown: how many facts were left out before enough were found that the model says, of `config.known`.
    not_asked: (case, reason) of questions that are not asked about edits that are made.
  """

  edits: list[Edit]
  requests: rows.Requests
  asked: evaluate.Questions
  seen: list[int]
  known: list[Edit]
  refused: list[tuple[str, str]]
  unknown: int
  not_asked: list[tuple[str, str]]


def prepare(chosen, subject: Subject, data: Path, seed: int, tell) -> Exam:
  """The edits of a seed and the questions about them."""
  every, refused = edit_streams.load(data / 'edit', chosen['data'], seed)
  picked, unknown = choose(chosen, subject, every, seed, tell)
  picked, again = distinct(picked)
  prefixes = begin_texts(chosen, subject, seed)
  requests, kept, odd = rows.requests(subject.tokenizer, picked, prefixes, chosen['length'])
  impossible = [*again, *((e.case, why) for e, why in odd)]
  for case, why in impossible:
    tell(f'refused: {case}: {why}')
  picked = [picked[i] for i in kept]
  about = chosen['evaluate']
  seen = at_most(len(picked), about['edits'])
  some, edited = left_alone([picked[i] for i in seen], picked)
  asked, too_long = evaluate.questions(
    subject.tokenizer, some, about['neighbours'], chosen['length']
  )
  not_asked = [(case, f'edited itself: {prompt}') for case, prompt in edited]
  not_asked += [(case, f'too long to be asked: {prompt}') for case, prompt in too_long]
  return Exam(picked, requests, asked, seen, every, [*impossible, *refused], unknown, not_asked)


def distinct(picked: Sequence[Edit]) -> tuple[list[Edit], list[tuple[str, str]]]:
  """The first request of every prompt, and (case, reason) of the others: a model can give one answer."""
  first: dict[str, Edit] = {}
  again = []
  for e in picked:
    before = first.setdefault(e.text, e)
    if before is not e:
      again.append((e.case, f'{e.text!r} is requested already, by {before.case}'))
  return list(first.values()), again


def left_alone(
  asked: Sequence[Edit], picked: Sequence[Edit]
) -> tuple[list[Edit], list[tuple[str, str]]]:
  """The edits with those neighbours that none of `picked` rewrites, and (case, prompt) of the others."""
  rewritten, found, left = {e.text for e in picked}, [], []
  for e in asked:
    alone = [i for i, prompt in enumerate(e.neighbours) if prompt not in rewritten]
    left += [(e.case, prompt) for prompt in e.neighbours if prompt in rewritten]
    found.append(
      dataclasses.replace(
        e,
        neighbours=tuple(e.neighbours[i] for i in alone),
        answers=tuple(e.answers[i] for i in alone if e.answers),
      )
    )
  return found, left


def choose(chosen, subject: Subject, every: list[Edit], seed: int, tell):
  """(the edits of a seed, how many facts were left out before enough were found that the model says)."""
  order = np.random.default_rng(seed).permutation(len(every))
  n, picked, unknown = chosen['edits'], [], 0
  if not chosen['known']:
    picked = [every[i] for i in order[:n]]
  else:
    if not any(e.truth for e in every):
      raise UserError(
        f'config.known: {chosen["data"]} has no truths, of which the model could say some'
      )
    ask = evaluate.asker(subject.config)
    for lo in range(0, len(order), 64):
      some = [every[i] for i in order[lo : lo + 64] if every[i].truth]
      bare = [Edit(e.prompt, e.subject, e.truth, case=e.case) for e in some]
      asked, _ = evaluate.questions(subject.tokenizer, bare, 0, chosen['length'])
      half = len(asked.kind)
      _, share = ask(subject.backbone, (), asked.rows)
      for i, right in zip(asked.edit, share[:half], strict=True):
        if len(picked) == n:
          break
        if right == 1:
          picked.append(some[i])
        else:
          unknown += 1
      if len(picked) == n:
        break
    tell(f'{len(picked)} of {len(picked) + unknown} facts are what the model says anyway')
  if len(picked) < n:
    raise UserError(f'config.edits={n}, and there are {len(picked)} in {chosen["data"]}')
  return picked, unknown


def at_most(edits: int, n: int) -> list[int]:
  """Indices of at most n of so many edits, spread evenly: what is asked about."""
  return sorted({int(i) for i in np.linspace(0, edits - 1, min(n, edits)).round()})
