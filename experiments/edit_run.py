"""A run of an editing experiment: facts are written, batch by batch, and asked about (experiments.edit)."""

from __future__ import annotations

import itertools
import platform
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cl_jax import checkpoint
from cl_jax.editing import evaluate, rows, write
from cl_jax.editing.write import Editor
from cl_jax.errors import Fault
from cl_jax.models import decoder
from cl_jax.types import Tree
from experiments import config, edit_config, edit_file, edit_state, results
from experiments.edit_exam import Exam, prepare
from experiments.edit_measures import matrix, perplexities, rounded, said, texts, written
from experiments.edit_rounds import Watched
from experiments.edit_subject import Subject, editor_of
from experiments.watch import Clock, Interrupted, Stop

FULL = 'the editor had no room for it'


class Place(NamedTuple):
  """Where a run reads and writes.

  Attributes:
    data: the folder above edit/ and text/.
    folder: of what is needed to go on.
    save_every: seconds.
    model: where the edited model is to be written, or None.
    edits: where the terms are to be written, by which edits can be undone, or None.
    statistics: where E[k k^T] of this model is kept; None is below CL_JAX_CACHE, for the runs to come.
  """

  data: Path
  folder: Path
  save_every: float
  model: Path | None = None
  edits: Path | None = None
  statistics: Path | None = None


def run(
  chosen: dict[str, Any], subject: Subject, seed: int, place: Place, tell: Callable[[str], None]
) -> dict[str, Any]:
  """One seed: the line of results.jsonl, without its command."""
  clock = Clock()
  edit_file.writable(chosen, subject, place.model, place.edits)
  # A mistake in their names is found now, not after all edits.
  blocks = texts(chosen, subject, place.data)
  exam = prepare(chosen, subject, place.data, seed, tell)
  saved, backbone, editor = progress(chosen, subject, exam, seed, place, tell, clock)
  about = saved.about
  before, after = (np.array(about[k], np.float64) for k in ('before', 'after'))
  line = {
    'config': chosen,
    'config_sha256': config.sha256(chosen),
    'model': chosen['model'],
    'editor': chosen['label'] or chosen['editor'],
    'edits': len(exam.edits),
    'mode': mode(chosen),
    'seed': seed,
    'asked': len(exam.seen),
    'refused': [*map(list, exam.refused), *([exam.edits[i].case, FULL] for i in about['full'])],
    'refused_by_editor': len(about['full']),
    'unknown': exam.unknown,
    'not_asked': [*map(list, exam.not_asked)],
    'before': rounded(evaluate.measures(exam.asked, before)),
    **rounded(evaluate.measures(exam.asked, after)),
    'cases': [exam.edits[exam.seen[i]].case for i in np.unique(exam.asked.edit)],
    'by_edit': {
      name: [None if v is None else round(v, 4) for v in values]
      for name, values in evaluate.by_edit(exam.asked, after).items()
    },
    **matrix(about, exam),
    'perplexity': perplexities(blocks, subject, backbone, saved.state, editor),
    **written(chosen, subject, exam, backbone, saved.state, editor, seed),
    'seconds_per_edit': round((about['edit_s'] - about['compile_s']) / len(exam.edits), 4),
    'compile_s': round(about['compile_s'], 3),
    'state_bytes': about['state_bytes'],
    'statistics_bytes': statistics_bytes(chosen, subject),
    'log_p': about['log_p'],
    'state_sha256': checkpoint.digest([backbone, saved.state]),
    'wall_s': round(clock.wall(), 3),
    'peak_rss_bytes': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    'commit': results.commit(),
    'versions': {'python': platform.python_version()}
    | {name: results.version(name) for name in results.LIBRARIES},
    'device': results.device(),
    'started': clock.started,
  }
  if place.model is not None:
    decoder.save(place.model, subject.config, backbone, subject.file)
    tell(f'the edited model: {place.model}')
  if place.edits is not None:
    size = chosen['batch']
    facts = [exam.edits[lo : lo + size] for lo in range(0, len(exam.edits), size)]
    terms = iter(saved.writes)
    batches = [
      (f, list(itertools.islice(terms, n))) for f, n in zip(facts, about['terms'], strict=True)
    ]
    edit_file.save(place.edits, chosen['model'], subject, line['editor'], batches)
    tell(f'the edits, to be undone by experiments.weights edits: {place.edits}')
  return line


def progress(
  chosen, subject: Subject, exam: Exam, seed: int, place: Place, tell, whole: Clock
) -> tuple[edit_state.Saved, Tree, Editor]:
  """Writes the edits, batch by batch; goes on where an earlier process stopped, also within a batch.

  Args:
    whole: of the run; what earlier processes have spent is added to it.

  Returns:
    What was measured on the way, the backbone at the end, and the editor.
  """
  stop = Stop()
  rounds = Watched(place.folder, place.save_every, stop, tell, whole)
  editor = editor_of(chosen, subject, place.data, tell, rounds, place.statistics)
  ask = evaluate.asker(subject.config, editor.tap)
  score = lambda p, s, asked: evaluate.score(ask, p, s, asked)  # noqa: E731
  first, n, size, alone = subject.backbone, len(exam.edits), chosen['batch'], chosen['apart']
  fresh, sha = editor.init(first), f'{config.sha256(chosen)}-{seed}'
  # A configuration names a model and a file of facts, which may have changed under these names.
  of = {'config_sha256': sha, 'backbone': checkpoint.digest(first)}
  of['requests'] = checkpoint.digest(exam.requests)
  saved = edit_state.restore(place.folder, of, fresh)
  if saved is None:
    begin = score(first, fresh, exam.asked)
    tell(f'before: {said(evaluate.measures(exam.asked, begin))}')
    counted = ('done', 'edit_s', 'compile_s', 'state_bytes')
    about: dict[str, Any] = dict.fromkeys(counted, 0)
    about |= {**of, 'before': begin.tolist(), 'after': begin.tolist()}
    saved = edit_state.Saved(
      about | {'points': [], 'scores': [], 'log_p': [], 'full': [], 'terms': []},
      [],
      fresh,
    )
  about, writes, state = saved
  whole.add(about.pop('clock', {}))
  backbone = write.apply(first, writes)
  marks = points(n, size, chosen['evaluate']['points'])
  key = jax.random.fold_in(jax.random.key(seed), 1)
  last_saved = time.monotonic()
  with stop.listening():
    while about['done'] < n:
      lo, hi = about['done'], min(about['done'] + size, n)
      batch = rows.take(exam.requests, np.arange(lo, hi))
      keep = partial(kept_so_far, place.folder, edit_state.Saved(about, writes, state), whole)
      clock = rounds.begin(f'{sha} {lo}', keep)
      batch_key = jax.random.fold_in(key, lo)
      try:
        new, state = edited(editor, backbone, state, batch, batch_key, about, clock)
      except Fault:
        keep()
        raise
      about['done'] = hi
      about['terms'].append(len(new))
      kept = new if alone else [*writes, *new]
      kept = kept if chosen['undo'] else write.merged(kept)
      about['state_bytes'] = max(about['state_bytes'] if alone else 0, kept_bytes(state, kept))
      if alone:  # every batch is asked about in a model that has nothing else in it
        here = np.isin(exam.asked.edit, [j for j, i in enumerate(exam.seen) if lo <= i < hi])
        if here.any():
          now = score(write.apply(first, new), state, evaluate.some(exam.asked, here))
          for q, v in zip(np.flatnonzero(here), now, strict=True):
            about['after'][q] = float(v)
        state = fresh
      else:
        writes = kept
        backbone = write.apply(backbone, new)
        if hi in marks:
          about['after'] = score(backbone, state, exam.asked).tolist()
          about['points'].append(hi)
          about['scores'].append(about['after'])
          tell(f'{hi}/{n} edits  {said(evaluate.measures(exam.asked, np.array(about["after"])))}')
      if stop() or time.monotonic() - last_saved > place.save_every:
        kept_so_far(place.folder, edit_state.Saved(about, writes, state), whole)
        last_saved = time.monotonic()
        tell(f'{hi}/{n} edits, saved')
      if stop():
        raise Interrupted(stop(), f'stopped after {hi} of {n} edits, saved in {place.folder}')
  return edit_state.Saved(about, writes, state), backbone, editor


def kept_so_far(folder: Path, saved: edit_state.Saved, whole: Clock) -> None:
  """Saves what there is, and how long that took."""
  edit_state.save(folder, saved._replace(about=saved.about | {'clock': whole.stand()}))


def edited(editor: Editor, backbone, state, batch: rows.Requests, key, about: dict, clock: Clock):
  """(new writes, new state) of a batch; its seconds and how far targets were said are added to `about`."""
  with clock.running():
    new, state, report = editor.edit(backbone, state, batch, key)
    jax.block_until_ready(([w.left for w in new], state))
  about['edit_s'] += clock.wall()
  about['compile_s'] += clock.compile_s
  if not finite(new, report):
    raise Fault(
      f'an edit after number {about["done"]} gave NaN; nothing of it was written, those before are saved'
    )
  about['log_p'] += [round(float(v), 5) for v in np.asarray(report.get('log_p', ()), np.float64)]
  about['full'] += [about['done'] + int(i) for i in np.flatnonzero(report.get('refused', ()))]
  return new, state


def finite(writes: Sequence[write.Write], report: Mapping[str, Any]) -> bool:
  """Whether there is no NaN in what an editor has written and found."""
  log_p = np.asarray(report.get('log_p', ()), np.float64)
  return bool(np.isfinite(log_p).all()) and all(bool(jnp.isfinite(w.term).all()) for w in writes)


def points(n: int, size: int, most: int) -> set[int]:
  """After how many edits questions are asked: at most `most` times, at ends of batches, the last always."""
  ends = [min(lo + size, n) for lo in range(0, n, size)]
  if most == 1:
    return {n}
  chosen = np.linspace(0, len(ends) - 1, min(most, len(ends))).round().astype(int)
  return {ends[i] for i in chosen}


def kept_bytes(state: Tree, writes: Sequence[write.Write]) -> int:
  """All bytes that are kept: the editor's state, and the terms by which edits can be undone."""
  return write.size(writes) + sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state))


def statistics_bytes(chosen: Mapping[str, Any], subject: Subject) -> int:
  """Of E[k k^T], without which there are no further edits: half of a symmetric matrix a layer, in f64, or a
  sketch. AlphaEdit's projections, which take its place, are in the state."""
  if chosen['editor'] == 'alphaedit':
    return 0
  units, rows = subject.config.ffn, chosen['moments']['sketch']
  each = 4 * units * (rows + 2) if rows else 4 * units * (units + 1)
  return each * len(edit_config.layers(chosen))


def mode(chosen: Mapping[str, Any]) -> str:
  if chosen['apart']:
    return 'single'
  return 'batch' if chosen['batch'] == chosen['edits'] else 'sequential'
