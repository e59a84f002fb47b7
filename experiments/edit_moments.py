"""How E[k k^T] converges with the tokens of a text: what `experiments.edit --moments` does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cl_jax import checkpoint, durable
from cl_jax.editing import evaluate, memit, statistics, write
from cl_jax.editing.statistics import Collected
from cl_jax.editing.target import Recipe, optimise
from cl_jax.errors import UserError
from experiments import (
  config,
  edit_config,
  edit_exam,
  edit_measures,
  edit_subject,
  results,
  workdir,
)

FILE = 'moments.json'
HALVINGS = 6  # the first point has a 64th of the text


def converge(
  chosen: dict[str, Any], data: Path, folder: Path, command: str, tell: Callable[[str], None]
) -> int:
  """Writes moments.json; goes on after the last part of the text that was read when it is repeated,
  and only says what is there where that is finished.

  A point is the beginning of the text: 1/64, 1/32, ... 1/2 and all of its blocks. It has, by layer, the
  |C_n - C|_F / |C|_F of the moments, and |D_n - D|_F / |D|_F of what MEMIT writes with them towards the same
  targets, and what is then said of the facts. Half of the text differs from all of it by half of what it
  differs from the other half by, which for independent halves is the error of all of it.

  Raises:
    UserError: another editor than MEMIT, a sketch, too short a text, or results of another configuration.
  """
  if chosen['editor'] != 'memit':
    raise UserError(f'--moments is about what memit writes; config.editor is {chosen["editor"]!r}')
  if chosen['moments']['sketch']:
    raise UserError('--moments compares whole sums: leave config.moments.sketch at 0')
  path, parts = folder / FILE, folder / 'parts'
  if path.exists():  # finished, but for what a kill has left
    there: dict[str, Any] = json.loads(path.read_text())
    if differing := config.difference(there['config'], chosen):
      raise UserError(
        f'{path} is of another configuration ({differing[0]}; there / here): name another --workdir'
      )
    shutil.rmtree(parts, ignore_errors=True)
    print('\n'.join((*map(said, there['points']), str(path))))
    return 0
  workdir.remember(folder, chosen)
  subject = edit_subject.opened(chosen['model'])
  seed, own = chosen['seeds'][0], chosen['memit']
  layers = edit_config.layers(chosen)
  blocks = edit_subject.moment_blocks(chosen, subject, data)
  if len(blocks) < 1 << HALVINGS:
    raise UserError(
      f'config.moments.tokens={chosen["moments"]["tokens"]}: {len(blocks)} blocks are fewer than the '
      f'{1 << HALVINGS} that can be halved {HALVINGS} times'
    )
  found = beginnings(
    subject, blocks, layers, parts / checkpoint.digest(subject.backbone)[:16], tell
  )
  exam = edit_exam.prepare(chosen, subject, data, seed, tell)
  recipe = Recipe(**own['recipe'])
  target = optimise(
    subject.config, subject.backbone, exam.requests, layers[-1], ('block',), recipe, own['width']
  )
  goal, ask = target.at('block'), evaluate.asker(subject.config)
  whole = found[-1].moments()
  points: list[dict[str, Any]] = []
  all_terms: dict[int, np.ndarray] | None = None
  for one in reversed(found):  # all of the text first: the others are compared with it
    moments = one.moments()
    solve = memit.solver(moments, own['coef'])
    try:
      writes = memit.spread(subject.config, subject.backbone, exam.requests, goal, layers, solve)
    except np.linalg.LinAlgError:  # fewer tokens than units may leave nothing to invert
      writes = []
    terms = {w.layer: np.asarray(w.term, np.float64) for w in writes}
    all_terms = terms if all_terms is None else all_terms
    measures = {}
    if writes and all(np.isfinite(a).all() for a in terms.values()):
      scores = evaluate.score(ask, write.apply(subject.backbone, writes), (), exam.asked)
      measures = edit_measures.rounded(evaluate.measures(exam.asked, scores))
    points.append({
      'tokens': one.tokens,
      'moment': [relative(moments[i], whole[i]) for i in layers],
      'delta': [relative(terms[i], all_terms[i]) if i in terms.keys() & all_terms else None for i in layers],
      **measures,
    })  # fmt: skip
    tell(said(points[-1]))
  about = {
    'model': chosen['model'], 'corpus': chosen['moments']['corpus'], 'layers': list(layers),
    'units': subject.config.ffn, 'edits': len(exam.edits), 'seed': seed, 'config': chosen,
    'points': points[::-1], 'commit': results.commit(),
    'versions': {name: results.version(name) for name in results.LIBRARIES},
    'device': results.device(), 'command': command,
  }  # fmt: skip
  durable.write(path, json.dumps(about) + '\n')
  shutil.rmtree(parts)
  print('\n'.join((*map(said, about['points']), str(path))))
  return 0


def beginnings(
  subject: edit_subject.Subject, blocks: np.ndarray, layers: Sequence[int], folder: Path, tell
) -> list[Collected]:
  """The moments of 1/64, ... 1/2 and all of the blocks, every block read once; each part keeps a file."""
  ends = [len(blocks) >> i for i in reversed(range(HALVINGS + 1))]
  found: list[Collected] = []
  for lo, hi in zip([0, *ends], ends, strict=False):
    part = statistics.moments(
      subject.config, subject.backbone, blocks[lo:hi], layers, folder / f'{lo}-{hi}', tell=tell
    )
    if found:
      before = found[-1]
      sums = before.arrays['sums'] + part.arrays['sums']
      part = part._replace(arrays={'sums': sums}, tokens=before.tokens + part.tokens)
    found.append(part)
  return found


def relative(a: np.ndarray, whole: np.ndarray) -> float:
  """|a - whole|_F / |whole|_F."""
  return float(f'{np.linalg.norm(a - whole) / np.linalg.norm(whole):.6g}')


def said(point: dict[str, Any]) -> str:
  """A line about a point: means over layers."""
  moment, delta = (
    np.mean([np.nan if v is None else v for v in point[k]]) for k in ('moment', 'delta')
  )
  measures = edit_measures.said({k: point.get(k) for k in ('s', 'es', 'ps', 'ns')})
  off = f'E[kk^T] off by {moment:.3f}, what is written by {delta:.3f}'
  return f'{point["tokens"]:>8} tokens: {off}  {measures}'
