"""One run of an editing experiment: facts are chosen, written and asked about; see experiments.edit."""

from __future__ import annotations

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

from cl_jax import checkpoint, metrics
from cl_jax.editing import evaluate, rows, statistics, write
from cl_jax.editing.rounds import Rounds, straight
from cl_jax.editing.rows import Edit
from cl_jax.editing.write import Editor
from cl_jax.errors import Fault, UserError
from cl_jax.models import causal, decoder, pretrained
from cl_jax.streams import cache, corpora, load
from cl_jax.streams import edits as edit_streams
from cl_jax.streams import tokenizer as tokenizers
from cl_jax.types import Tree
from experiments import config, edit_config, edit_state, results
from experiments.edit_rounds import Watched
from experiments.watch import Clock, Interrupted, Stop


class Subject(NamedTuple):
  """The model that is edited.

  Attributes:
    config, backbone: of `models.decoder.load`.
    tokenizer: and its file.
  """

  config: causal.Config
  backbone: Tree
  tokenizer: Any
  file: Path


def opened(name: str) -> Subject:
  """A language model and its tokenizer."""
  files = pretrained.find(name)
  if files.tokenizer is None:
    raise UserError(f'{name} has no tokenizer, without which prompts cannot be read')
  shape, backbone = decoder.load(files.path)
  return Subject(shape, backbone, tokenizers.load(files.tokenizer), files.tokenizer)


def data_root(data_dir: str | None) -> Path:
  return load.root_of(data_dir, 'for edit/ and text/')


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


class Place(NamedTuple):
  """Where a run reads and writes.

  Attributes:
    data: the folder above edit/ and text/.
    folder: of what is needed to go on.
    save_every: seconds.
    model: where the edited model is to be written, or None.
  """

  data: Path
  folder: Path
  save_every: float
  model: Path | None


def run(
  chosen: dict[str, Any], subject: Subject, seed: int, place: Place, tell: Callable[[str], None]
) -> dict[str, Any]:
  """One seed: the line of results.jsonl, without its command."""
  clock = Clock()
  exam = prepare(chosen, subject, place.data, seed, tell)
  saved, backbone, editor = progress(chosen, subject, exam, seed, place, tell)
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
    'refused': [list(r) for r in exam.refused[:100]],
    'refused_by_editor': about['full'],
    'before': rounded(evaluate.measures(exam.asked, before)),
    **rounded(evaluate.measures(exam.asked, after)),
    'by_edit': {
      name: [None if v is None else round(v, 4) for v in values]
      for name, values in evaluate.by_edit(exam.asked, after).items()
    },
    **matrix(about, exam),
    'perplexity': perplexities(chosen, subject, place.data, backbone, saved.state, editor),
    **written(chosen, subject, exam, backbone, saved.state, editor, seed),
    'seconds_per_edit': round((about['edit_s'] - about['compile_s']) / len(exam.edits), 4),
    'compile_s': round(about['compile_s'], 3),
    'state_bytes': about['state_bytes'],
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
  return line


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


def progress(
  chosen, subject: Subject, exam: Exam, seed: int, place: Place, tell
) -> tuple[edit_state.Saved, Tree, Editor]:
  """Writes the edits, batch by batch; goes on where an earlier process stopped, also within a batch.

  Returns:
    What was measured on the way, the backbone at the end, and the editor.
  """
  stop = Stop()
  rounds = Watched(place.folder, place.save_every, stop, tell)
  editor = editor_of(chosen, subject, place.data, tell, rounds)
  ask = evaluate.asker(subject.config, editor.tap)
  score = lambda p, s, asked: evaluate.score(ask, p, s, asked)  # noqa: E731
  first, n, size, alone = subject.backbone, len(exam.edits), chosen['batch'], chosen['apart']
  fresh, sha = editor.init(first), f'{config.sha256(chosen)}-{seed}'
  saved = edit_state.restore(place.folder, sha, fresh)
  if saved is None:
    begin = score(first, fresh, exam.asked)
    tell(f'before: {said(evaluate.measures(exam.asked, begin))}')
    counted = ('done', 'full', 'edit_s', 'compile_s', 'state_bytes')
    about: dict[str, Any] = dict.fromkeys(counted, 0)
    about |= {'config_sha256': sha, 'before': begin.tolist(), 'after': begin.tolist()}
    saved = edit_state.Saved(about | {'points': [], 'scores': [], 'log_p': []}, [], fresh)
  about, writes, state = saved
  backbone = write.apply(first, writes)
  marks = points(n, size, chosen['evaluate']['points'])
  key = jax.random.fold_in(jax.random.key(seed), 1)
  last_saved = time.monotonic()
  with stop.listening():
    while about['done'] < n:
      lo, hi = about['done'], min(about['done'] + size, n)
      batch = rows.take(exam.requests, np.arange(lo, hi))
      so_far = edit_state.Saved(about, writes, state)
      clock = rounds.begin(f'{sha} {lo}', partial(edit_state.save, place.folder, so_far))
      batch_key = jax.random.fold_in(key, lo)
      new, state = edited(editor, backbone, state, batch, batch_key, about, clock)
      about['done'] = hi
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
        edit_state.save(place.folder, edit_state.Saved(about, writes, state))
        last_saved = time.monotonic()
        tell(f'{hi}/{n} edits, saved')
      if stop():
        raise Interrupted(stop(), f'stopped after {hi} of {n} edits, saved in {place.folder}')
  return edit_state.Saved(about, writes, state), backbone, editor


def edited(editor: Editor, backbone, state, batch: rows.Requests, key, about: dict, clock: Clock):
  """(new writes, new state) of a batch; its seconds and how far targets were said are added to `about`."""
  with clock.running():
    new, state, report = editor.edit(backbone, state, batch, key)
    jax.block_until_ready(([w.left for w in new], state))
  about['edit_s'] += clock.wall()
  about['compile_s'] += clock.compile_s
  log_p = np.asarray(report.get('log_p', ()), np.float64)
  if not np.isfinite(log_p).all() or not all(bool(jnp.isfinite(w.term).all()) for w in new):
    raise Fault(f'an edit after number {about["done"]} gave NaN; nothing of it was written')
  about['log_p'] += [round(float(v), 5) for v in log_p]
  about['full'] += int(np.sum(report.get('refused', 0)))
  return new, state


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


def points(n: int, size: int, most: int) -> set[int]:
  """After how many edits questions are asked: at most `most` times, at ends of batches, the last always."""
  ends = [min(lo + size, n) for lo in range(0, n, size)]
  chosen = np.linspace(0, len(ends) - 1, min(most, len(ends))).round().astype(int)
  return {ends[i] for i in chosen} | {n}


def begin_texts(chosen, subject: Subject, seed: int) -> list[str]:
  """Texts by the model itself that prompts are put behind, as in MEMIT: each goes on from a common word."""
  words = ('The', 'Therefore', 'Because', 'I', 'You')
  n, steps = chosen['prefixes'], chosen['prefix_tokens']
  if not n or not steps:
    return [words[i % len(words)] for i in range(n)]
  ids = [
    subject.tokenizer.encode(words[i % len(words)], add_special_tokens=False).ids for i in range(n)
  ]
  found = []
  for i, row in enumerate(ids):
    tokens = jnp.asarray([row], jnp.int32)
    key = jax.random.fold_in(jax.random.key(seed), i)
    mask = jnp.ones(tokens.shape, bool)
    new = _continued(subject.config, subject.backbone, tokens, mask, steps, key)
    text = subject.tokenizer.decode([*row, *np.asarray(new[0]).tolist()])
    found.append(' '.join(text.replace('{', ' ').replace('}', ' ').split()))
  return found


def editor_of(chosen, subject: Subject, data: Path, tell, rounds: Rounds = straight) -> Editor:
  """The editor, with the statistics and the texts that it needs."""
  known: dict[str, Any] = {'config': subject.config, 'rounds': rounds}
  known['moments'] = moments_of(chosen, subject, data, tell)
  if edit_config.needs(chosen, 'unrelated'):
    about = chosen['moments']
    text = data / 'text/corpora' / about['corpus'] / 'train.txt'
    starts = corpora.blocks(text, subject.file, about['block'])[:32, :12]
    known['unrelated'] = rows.layout([(row.tolist(), len(row) - 1, []) for row in starts])
  return edit_config.make(chosen, known)


def moments_of(chosen, subject: Subject, data: Path, tell) -> dict[int, np.ndarray]:
  """E[k k^T] of the layers that the editor needs, measured once and kept below CL_JAX_CACHE."""
  layers = edit_config.layers(chosen)
  if not layers:
    return {}
  blocks = moment_blocks(chosen, subject, data)
  name = '-'.join(map(str, (chosen['moments']['corpus'], blocks.size, *layers)))
  model = checkpoint.digest(subject.backbone)[:16]
  folder = cache.directory() / 'editing' / model / name
  found = statistics.moments(subject.config, subject.backbone, blocks, layers, folder, tell=tell)
  return found.moments()


def moment_blocks(chosen, subject: Subject, data: Path) -> np.ndarray:
  """The text that E[k k^T] is measured on, i32[n, L]."""
  about, length = chosen['moments'], chosen['moments']['block']
  text = data / 'text/corpora' / about['corpus'] / 'train.txt'
  blocks = corpora.blocks(text, subject.file, length)
  if about['tokens'] > blocks.size:
    raise UserError(
      f'config.moments.tokens={about["tokens"]}, and {text} has {blocks.size} in whole blocks'
    )
  return blocks[: -(-about['tokens'] // length)]


def kept_bytes(state: Tree, writes: Sequence[write.Write]) -> int:
  """All bytes that are kept: the editor's state, and the terms by which edits can be undone."""
  return write.size(writes) + sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state))


def mode(chosen: Mapping[str, Any]) -> str:
  if chosen['apart']:
    return 'single'
  return 'batch' if chosen['batch'] == chosen['edits'] else 'sequential'


def matrix(about: Mapping[str, Any], exam: Exam) -> dict[str, Any]:
  """R[t, i], how well the edits between two points are known after each, its measures, and the curves."""
  marks, asked = about['points'], exam.asked
  bounds = [0, *marks]
  position = np.array(exam.seen)[asked.edit]
  R = np.full((len(marks), len(marks)), np.nan)
  curve = []
  for t, (mark, found) in enumerate(zip(marks, about['scores'], strict=True)):
    scores = np.asarray(found)
    for i in range(len(marks)):
      here = (asked.kind == 0) & (position >= bounds[i]) & (position < bounds[i + 1])
      R[t, i] = scores[here].mean() if here.any() else np.nan
    done = position < mark
    if done.any():
      curve.append({'edits': mark, **rounded(evaluate.measures(asked, scores, done))})
  whole = len(marks) > 1 and not np.isnan(R).any()
  forgotten = metrics.forgetting(R) if whole else None
  return {
    'R': results.nested(R),
    'forgetting': None if forgotten is None else round(forgotten, 6),
    'curve': curve,
  }


def perplexities(chosen, subject: Subject, data: Path, backbone, state, editor: Editor) -> dict:
  """{corpus: [before, after]}: what happened to text that has nothing to do with the edits."""
  about, found = chosen['evaluate'], {}
  if chosen['apart']:
    return found
  for name in about['texts']:
    file = data / 'text/corpora' / name / 'test.txt'
    blocks = corpora.blocks(file, subject.file, about['block'])[: about['blocks']]
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
  some = [exam.edits[i] for i in at_most(exam.edits, about['written'])]
  references = evaluate.references(some, exam.known)
  key, prompts = jax.random.key(seed), [e.text for e in some]
  before = go_on(subject, subject.backbone, prompts, about['tokens'], key)
  after = go_on(subject, backbone, prompts, about['tokens'], key, state, editor.tap)
  for name, ids in (('_before', before), ('', after)):
    texts = [e.text + subject.tokenizer.decode(i) for e, i in zip(some, ids, strict=True)]
    found[f'ge{name}'] = evaluate.fluency(ids)
    found[f'rs{name}'] = evaluate.consistency(texts, references)
  return rounded(found)


def go_on(
  subject: Subject, backbone, prompts: Sequence[str], steps: int, key, state: Any = (), tap=None
) -> list[list[int]]:
  """The tokens that the model writes after each prompt, all at once; `tap` is an `Editor.tap`."""
  ids = [subject.tokenizer.encode(p, add_special_tokens=False).ids for p in prompts]
  if tap is not None:
    begun = rows.layout([(row, len(row) - 1, []) for row in ids])
    drawn = _tapped(subject.config, tap, steps, backbone, state, begun, key)
  else:
    width = max(map(len, ids))
    tokens = np.array([[0] * (width - len(row)) + row for row in ids], np.int32)
    mask = np.array([[False] * (width - len(row)) + [True] * len(row) for row in ids])
    drawn = _continued(subject.config, backbone, tokens, mask, steps, key)
  return np.asarray(drawn).tolist()


_continued = jax.jit(causal.generate, static_argnums=(0, 4))
_tapped = jax.jit(evaluate.written, static_argnums=(0, 1, 2))


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
