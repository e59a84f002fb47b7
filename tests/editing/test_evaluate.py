"""What is asked after edits and how it is counted, with answers that are given."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace

import numpy as np
import pytest

from cl_jax.editing import evaluate
from cl_jax.editing.evaluate import Questions
from cl_jax.editing.rows import Edit
from cl_jax.errors import UserError

ANNA = Edit(
  'the home of {} is', 'Anna', 'New York', 'Rome', ('Anna lives in', 'where is Anna? in'),
  ('the home of Bert is', 'Carla lives in', 'Dirk lives in'), case='a',
)  # fmt: skip
EMIL = Edit('who made {}?', 'Emil', 'Oslo', '', ('say who made Emil:',), ('when is noon?', 'why?'),
            ('at twelve', ''), (('is Emil from Norway?', 'yes'),), case='e')  # fmt: skip


class Words:
  """A tokenizer of words, to which a space before belongs, as to those of byte-level BPE."""

  def __init__(self):
    self.words: list[str] = []

  def encode(self, text, add_special_tokens):
    found = re.findall(r' ?\S+', text)
    self.words += [word for word in dict.fromkeys(found) if word not in self.words]
    ids = [self.words.index(word) for word in found]
    return SimpleNamespace(ids=ids, offsets=[(0, 1)] * len(ids), special_tokens_mask=[0] * len(ids))

  def spelt(self, rows) -> list[tuple[str, str]]:
    """(prompt, answer) of every row, whose tail begins with the prompt's last token."""
    found = []
    for head, tail, before, target in zip(*map(np.asarray, rows), strict=True):
      answer = target[target >= 0]
      assert before[0] == 0 and tail[1 : len(answer) + 1].tolist() == answer.tolist()
      parts = [*head[head >= 0], tail[0]], answer
      found.append(tuple(''.join(self.words[i] for i in part) for part in parts))
    return found


def test_what_is_asked():
  """Of a neighbour the truth is wanted; only a fact with a truth is compared with it."""
  made = Words()
  asked, left = evaluate.questions(made, [ANNA, EMIL], neighbours=2)
  new, true = ' New York', ' Rome'
  wanted = [
    (0, 0, 'the home of Anna is', new, true),
    (1, 0, 'Anna lives in', new, true),
    (1, 0, 'where is Anna? in', new, true),
    (2, 0, 'the home of Bert is', true, new),
    (2, 0, 'Carla lives in', true, new),
    (0, 1, 'who made Emil?', ' Oslo', ''),
    (1, 1, 'say who made Emil:', ' Oslo', ''),
    (2, 1, 'when is noon?', ' at twelve', ''),  # of the other the answer is not known
    (3, 1, 'is Emil from Norway?', ' yes', ''),
  ]
  ones, others = np.split(np.array(made.spelt(asked.rows)), 2)
  found = zip(asked.kind, asked.edit, *ones.T, others[:, 1], strict=True)
  assert [*found] == wanted and ones[:, 0].tolist() == others[:, 0].tolist()
  assert asked.compared.tolist() == [bool(other) for *_, other in wanted] and left == []
  assert evaluate.questions(made, [ANNA], 0)[0].kind.tolist() == [0, 1, 1]
  unknown = Edit('{} is', 'Anna', 'Oslo', neighbours=('Bert is',))
  assert evaluate.questions(made, [unknown])[0].kind.tolist() == [0]


def test_what_is_too_long_is_told():
  """With the longer of its two answers: 5 and 2 tokens fit in 7, in 6 only 4 and 2."""
  made = Words()
  assert evaluate.questions(made, [ANNA], length=7)[1] == []
  asked, left = evaluate.questions(made, [ANNA], length=6)
  assert left == [('a', 'the home of Anna is'), ('a', 'the home of Bert is')]
  assert asked.kind.tolist() == [1, 1, 2, 2]
  with pytest.raises(UserError, match='no prompt of 1 edits is at most 4 tokens'):
    evaluate.questions(made, [ANNA], length=4)


def test_the_wanted_answer_must_be_more_probable():
  said = {
    'the home of Anna is': (-1, -2),  # log p of the new answer and of the truth
    'Anna lives in': (-3, -2),
    'where is Anna? in': (-1.5, -1.6),
    'the home of Bert is': (-2, -1),
    'Carla lives in': (-1, -3),
    'Dirk lives in': (-2, -2),
  }
  shares = {'who made Emil?': 1.0, 'say who made Emil:': 0.0, 'when is noon?': 0.5}
  made = Words()

  def ask(backbone, state, rows):
    assert (backbone, state) == ('model', 'memory')
    found = [
      (said.get(prompt, (-9, -9))[answer == ' Rome'], shares.get(prompt, 0.25))
      for prompt, answer in made.spelt(rows)
    ]
    return tuple(np.array(found).T)

  asked, _ = evaluate.questions(made, [ANNA, EMIL])
  found = evaluate.score(ask, 'model', 'memory', asked)
  assert found.tolist() == [1, 0, 1, 1, 0, 0, 1, 0, 0.5, 0.25]
  here = np.isin(np.arange(10), [1, 3, 4, 8])
  few = evaluate.some(asked, here)
  assert made.spelt(few.rows) == [
    pair for pair, kept in zip(made.spelt(asked.rows), [*here, *here], strict=True) if kept
  ]
  assert (few.kind.tolist(), few.edit.tolist()) == ([1, 2, 2, 2], [0, 0, 0, 1])
  assert evaluate.score(ask, 'model', 'memory', few).tolist() == [0, 1, 0, 0.5]


def test_means_are_over_questions_then_over_edits():
  kind = np.array([0, 1, 1, 2, 2, 2, 0, 2, 2, 3])
  edit = np.array([0, 0, 0, 0, 0, 0, 2, 2, 2, 2])  # of number 1 nothing could be asked
  scores = np.array([1, 1, 0, 1, 1, 0, 0, 1, 0, 0.25])
  asked = Questions(None, kind, edit, kind < 3)
  each = {'es': [1, 0], 'ps': [0.5, None], 'ns': [2 / 3, 0.5], 'portability': [None, 0.25]}
  assert evaluate.by_edit(asked, scores) == each
  means = {'es': 0.5, 'ps': 0.5, 'ns': pytest.approx(7 / 12), 'portability': 0.25}
  assert evaluate.averages(each) == means | {'s': pytest.approx(21 / 40)}
  assert evaluate.measures(asked, scores) == evaluate.averages(each)
  first = evaluate.measures(asked, scores, edit == 0)
  assert first['portability'] is None and (first['es'], first['ns']) == (1, 2 / 3)
  # S is of the measures that are there.
  some = evaluate.measures(asked, scores, (kind == 0) | (kind == 2))
  assert some['ps'] is None and some['s'] == pytest.approx(2 / (2 + 12 / 7))
  assert evaluate.measures(asked, scores, kind == 3)['s'] is None
  assert evaluate.harmonic([1, 0.5]) == pytest.approx(2 / 3)
  assert evaluate.harmonic([1, 0, 1]) == 0


def test_fluency_falls_with_repetition():
  n = 30
  distinct = 1 / 3 * math.log2(n - 1) + 2 / 3 * math.log2(n - 2)
  assert evaluate.fluency([[5] * n]) == 0
  assert evaluate.fluency([[*range(n)]]) == pytest.approx(distinct)
  # Two pairs twice each, a triple twice and one once.
  turns = 1 / 3 * 1 + 2 / 3 * (math.log2(3) - 2 / 3)
  assert evaluate.fluency([[1, 2, 1, 2, 1]]) == pytest.approx(turns)
  assert evaluate.fluency([[1, 2, 1, 2, 1], [*range(n)]]) == pytest.approx((turns + distinct) / 2)
  assert evaluate.fluency([[3]]) == 0


def test_consistency_is_the_cosine_of_weighted_counts():
  one = evaluate.consistency(['Anna is in Rome.'], ['anna IS in rome'])
  assert one == pytest.approx(1)
  assert evaluate.consistency(['Anna'], ['Bert']) == 0
  assert evaluate.consistency(['Anna', 'Bert'], ['', '']) is None
  # Two documents: a is in both and weighs 1, b and c in one each.
  w = math.log(3 / 2) + 1
  wanted = 1 / math.sqrt((1 + (2 * w) ** 2) * (1 + w**2))
  assert evaluate.consistency(['b a b', 'c'], ['a c', '']) == pytest.approx(wanted)
  # Four documents, of which a is in three.
  a, w = math.log(5 / 4) + 1, math.log(5 / 2) + 1
  wanted = a**2 / math.sqrt((a**2 + (2 * w) ** 2) * (a**2 + w**2))
  found = evaluate.consistency(['b a b', 'a'], ['a c', 'd'])
  assert found == pytest.approx(wanted / 2)


def test_references_are_what_is_true_of_others():
  known = [
    Edit('the home of {} is', 'Bert', 'Lima', 'Oslo'),
    Edit('{} lives in', 'Carla', 'Lima', 'Oslo'),
    Edit('{} lives in', 'Dirk', 'Oslo', 'Rome'),
  ]
  found = evaluate.references([EMIL, ANNA, known[2]], known)
  oslo = 'the home of Bert is Oslo. Carla lives in Oslo.'
  assert found == [oslo, '', oslo]
