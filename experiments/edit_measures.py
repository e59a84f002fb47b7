"""What a line of results.jsonl says of a run: R, perplexities, fluency and consistency, and it in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cl_jax.editing import evaluate
from cl_jax.editing.write import Editor
from cl_jax.streams import corpora
from experiments import results
from experiments.edit_exam import Exam, at_most
from experiments.edit_subject import Subject, go_on


def matrix(about: Mapping[str, Any], exam: Exam) -> dict[str, Any]:
  """R[t, i], how well the edits between two points are known after each, its measures, and the curves."""
  marks, asked = about['points'], exam.asked
  bounds, seen = [0, *marks], np.array(exam.seen)
  position = seen[asked.edit]
  R = np.full((len(marks), len(marks)), np.nan)
  curve = []
  for t, (mark, found) in enumerate(zip(marks, about['scores'], strict=True)):
    scores = np.asarray(found)
    for i in range(len(marks)):
      here = (asked.kind == 0) & (position >= bounds[i]) & (position < bounds[i + 1])
      R[t, i] = scores[here].mean() if here.any() else np.nan
    done = position < mark
    if done.any():
      facts = int((seen < mark).sum())
      curve.append(
        {'edits': mark, 'facts': facts, **rounded(evaluate.measures(asked, scores, done))}
      )
  forgotten = forgetting(R, facts_between(seen, marks))
  return {'R': results.nested(R), **rounded({'forgetting': forgotten}), 'curve': curve}


def facts_between(seen: np.ndarray, marks: Sequence[int]) -> np.ndarray:
  """i[len(marks)], how many of the edits that are asked about (`seen`) were made between two points."""
  return np.diff([0, *((seen < mark).sum() for mark in marks)])


def forgetting(R: np.ndarray, facts: np.ndarray) -> float | None:
  """What was known best of each fact's interval and is not at the end, a mean over the facts of all intervals
  but the last; None without intervals, or where nothing was asked about one."""
  if len(R) < 2 or np.isnan(R).any():
    return None
  lost = R[:-1, :-1].max(0) - R[-1, :-1]
  return float(np.average(lost, weights=facts[:-1]))


def texts(chosen, subject: Subject, data: Path) -> dict[str, np.ndarray]:
  """{corpus: blocks of its test text} whose perplexity is to be measured; {} where edits are apart."""
  about = chosen['evaluate']
  names = () if chosen['apart'] else about['texts']
  files = {name: data / 'text/corpora' / name / 'test.txt' for name in names}
  return {
    name: corpora.blocks(file, subject.file, about['block'])[: about['blocks']]
    for name, file in files.items()
  }


def perplexities(
  asked: Mapping[str, np.ndarray], subject: Subject, backbone, state, editor: Editor
) -> dict[str, list[float]]:
  """{corpus: [before, after]}: what happened to `texts`, which have nothing to do with the edits."""
  found = {}
  for name, blocks in asked.items():
    pair = [evaluate.perplexity(subject.config, subject.backbone, blocks)]
    pair.append(evaluate.perplexity(subject.config, backbone, blocks, state, editor.tap))
    found[name] = [round(v, 4) for v in pair]
  return found


def written(
  chosen, subject: Subject, exam: Exam, backbone, state, editor: Editor, seed: int
) -> dict[str, float | None]:
  """Fluency and consistency of what the model writes after some prompts, before and after the edits; None
  where every edit was made in a model of its own."""
  found: dict[str, float | None] = dict.fromkeys(('ge_before', 'rs_before', 'ge', 'rs'))
  about = chosen['evaluate']
  if not about['written'] or chosen['apart']:
    return found
  some = [exam.edits[i] for i in at_most(len(exam.edits), about['written'])]
  references = evaluate.references(some, exam.known)
  key, prompts = jax.random.key(seed), [e.text for e in some]
  before = go_on(subject, subject.backbone, prompts, about['tokens'], key)
  after = go_on(subject, backbone, prompts, about['tokens'], key, state, editor.tap)
  for name, ids in (('_before', before), ('', after)):
    texts = [e.text + subject.tokenizer.decode(i) for e, i in zip(some, ids, strict=True)]
    found[f'ge{name}'] = evaluate.fluency(ids)
    found[f'rs{name}'] = evaluate.consistency(texts, references)
  return rounded(found)


def rounded(found: Mapping[str, float | None]) -> dict[str, float | None]:
  return {k: None if v is None else round(v, 6) for k, v in found.items()}


def said(found: Mapping[str, float | None]) -> str:
  return '  '.join(f'{k} {100 * v:.1f}' for k, v in found.items() if v is not None)


def summary(line: Mapping[str, Any]) -> str:
  """A line about a result."""
  texts = ', '.join(f'{k} {a:.1f} -> {b:.1f}' for k, (a, b) in line['perplexity'].items()) or '-'
  return (
    f'{line["editor"]}, {line["edits"]} edits ({line["mode"]}), seed {line["seed"]}: '
    f'{said({k: line[k] for k in ("s", "es", "ps", "ns", "portability")})}; perplexity {texts}; '
    f'{line["seconds_per_edit"]:.2f} s an edit; {line["state_bytes"] / 1e6:.2f} MB; '
    f'{len(line["refused"])} refused'
  )
