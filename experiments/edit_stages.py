"""Edits among stages of learning: `python -m experiments.edit_stages --workdir=DIR`.

Chains of stages start from one model: `edit-lora` writes the facts and then reads some domains with LoRA,
`lora-edit` the other way round. After every stage the same questions are asked about the same facts (ES,
PS, NS, S), and the perplexity of texts is measured. Stages that chains have in common are made once.
DIR gets a line a stage in results.jsonl. The command goes on where it stopped when it is repeated: inside a
stage too, after the last batch of edits or the last checkpoint.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cl_jax import durable
from cl_jax.editing import evaluate
from cl_jax.errors import UserError
from cl_jax.models import decoder
from cl_jax.streams import corpora
from experiments import (
  cli,
  config,
  edit_config,
  edit_exam,
  edit_file,
  edit_measures,
  edit_rounds,
  edit_run,
  edit_state,
  edit_subject,
  fields,
  options,
  results,
  run,
  show,
  workdir,
)
from experiments.merge import merge
from experiments.watch import Clock

PROGRAM = 'experiments.edit_stages'
LEARNERS = ('lora', 'full', 'half', 'bitfit')  # adaptations whose network can be merged
SAVE_EVERY = 300.0
MODEL, MADE, LINE, STATISTICS = 'model', 'made.json', 'stage.json', 'statistics'
# What this command adds to the fields of an editing experiment.
OWN: dict[str, Any] = {
  'chains': ('edit-lora', 'lora-edit'),
  'learn': {
    'source': 'configs/study_lm.py',  # how a domain is read
    'domains': ('shakespeare', 'medical', 'french_law'),
    'steps': 30,  # a domain
    'batch': 4,
    'length': 32,  # tokens
  },
}

Prefix = tuple[str, ...]  # stages from the first model on, as in ('edit', 'lora.medical')


def main(argv: Sequence[str] | None = None) -> int:
  argv = sys.argv[1:] if argv is None else list(argv)
  parser = cli.parser(PROGRAM, __doc__)
  add = parser.add_argument
  add('--config', default='configs/edit_stages.py', metavar='FILE[:WORDS]')
  add('--workdir', metavar='DIR', type=Path, help='results.jsonl, and what is needed to go on')
  add('--data_dir', metavar='DIR', help='parent of edit/ and text/; default: CL_JAX_DATA')
  add('--only', default='*', metavar='PATTERNS', help="some chains, as in 'edit-lora lora-*'")
  add('--save_every', type=float, default=SAVE_EVERY, metavar='SECONDS')
  return cli.guarded(PROGRAM, lambda words: command(parser, words), argv)


def command(parser: argparse.ArgumentParser, argv: list[str]) -> int:
  given, left = parser.parse_known_args(argv)
  chosen = resolved(given.config, options.fields_of(left))
  if given.workdir is None:
    raise UserError('--workdir is missing: name a directory for the results')
  patterns = given.only.split()
  chains = [c for c in chosen['chains'] if any(fnmatch.fnmatch(c, p) for p in patterns)]
  if not chains:
    raise UserError(f'--only={given.only} matches no chain; there are {" ".join(chosen["chains"])}')
  data = edit_subject.data_root(given.data_dir)
  shown, words = show.make(), f'python -m {PROGRAM} ' + ' '.join(map(shlex.quote, argv))
  cli.devices(1)
  with workdir.claimed(given.workdir) as place:
    workdir.remember(place, chosen)
    try:
      for seed in chosen['seeds']:
        whole(Bench(chosen, seed, place, data, given.save_every, words, shown), chains)
    finally:
      shown.close()
    for line in results.read(place):
      print(summary(line))
  return 0


def resolved(source: str, overrides: Sequence[tuple[str, str]]) -> dict[str, Any]:
  """Every field with its value, checked."""
  raw, rest = edit_config.with_editor(config.load(source), overrides)
  own = {
    name: {k: fields.field(v) for k, v in default.items()}
    if isinstance(default, dict)
    else fields.field(default)
    for name, default in OWN.items()
  }
  raw = options.written(edit_config.schema(raw) | own, raw, rest)
  mine = config.complete('config', {k: raw[k] for k in OWN if k in raw}, own)
  chosen = edit_config.resolve({k: v for k, v in raw.items() if k not in OWN}) | mine
  if chosen['editor'] in edit_file.STATEFUL or chosen['apart']:
    raise UserError(
      f'config.editor={chosen["editor"]!r}, config.apart={chosen["apart"]}: later stages need edits that '
      'are written into weights, all into one model'
    )
  for name in ('steps', 'batch', 'length'):
    if chosen['learn'][name] < 1:
      raise UserError(f'config.learn.{name} must be at least 1; got {chosen["learn"][name]}')
  if not Path(chosen['learn']['source']).is_file():
    raise UserError(f'config.learn.source: there is no file {chosen["learn"]["source"]}')
  for chain in chosen['chains']:
    odd = [w for w in chain.split('-') if w not in ('edit', *LEARNERS)]
    if odd:
      raise UserError(
        f'config.chains: {odd[0]!r} in {chain!r} is no stage; there are edit, {", ".join(LEARNERS)}'
      )
    if {*chain.split('-')} - {'edit'} and not chosen['learn']['domains']:
      raise UserError(f'config.learn.domains is empty, and {chain!r} in config.chains reads them')
  return chosen


class Bench(NamedTuple):
  """What all stages of a seed share.

  Attributes:
    chosen: the configuration.
    seed: draws the edits, and the batches of every domain.
    place: the --workdir.
    data: the folder above edit/ and text/.
    save_every: seconds.
    command: for the lines.
    shown: progress.
  """

  chosen: dict[str, Any]
  seed: int
  place: Path
  data: Path
  save_every: float
  command: str
  shown: show.Show

  def folder(self, prefix: Prefix) -> Path:
    return self.place / f'seed{self.seed}' / ('-'.join(prefix) or 'start')

  @property
  def editing(self) -> dict[str, Any]:
    """The configuration of experiments.edit."""
    return {k: v for k, v in self.chosen.items() if k not in OWN}


def prefixes(chains: Sequence[str], domains: Sequence[str]) -> list[Prefix]:
  """Every stage of the chains by its way from the first model, each once; () is that model."""
  found: dict[Prefix, None] = {}
  for chain in chains:
    stages: list[str] = []
    for word in chain.split('-'):
      stages += [word] if word == 'edit' else [f'{word}.{domain}' for domain in domains]
    found |= {tuple(stages[:n]): None for n in range(len(stages) + 1)}
  return list(found)


def whole(bench: Bench, chains: Sequence[str]) -> None:
  """All stages of a seed that have not been measured."""
  domains = bench.chosen['learn']['domains']
  every = prefixes(chains, domains)
  todo = [p for p in every if not (bench.folder(p) / LINE).exists()]
  gather(bench)  # a process that was killed may have left both undone
  tidy(bench, todo)
  if not todo:
    return
  begin, subject = time.monotonic(), edit_subject.opened(bench.chosen['model'])
  if any(p[-1] != 'edit' for p in todo if p):
    # A mistake in their names is found now, not hours later.
    folder, length = bench.data / 'text/corpora', bench.chosen['learn']['length']
    corpora.load(folder, domains, subject.file, length)
  exam = edit_exam.prepare(bench.editing, subject, bench.data, bench.seed, bench.shown.say)
  while todo:
    prefix = todo.pop(0)
    bench.folder(prefix).mkdir(parents=True, exist_ok=True)
    line = measured(bench, exam, prefix)
    durable.write(bench.folder(prefix) / LINE, json.dumps(line) + '\n')
    gather(bench)
    done = len(every) - len(todo)
    spent = show.clock(time.monotonic() - begin)
    bench.shown.say(f'{spent:>7}  stage {done}/{len(every)}  {summary(line)}')
    tidy(bench, todo)


def tidy(bench: Bench, todo: Sequence[Prefix]) -> None:
  """Leaves the models that a stage to come is or starts from: larger ones have a gigabyte each."""
  needed = {bench.folder(p[:n]) for p in todo for n in (len(p) - 1, len(p)) if p}
  for folder in (bench.place / f'seed{bench.seed}').glob('*'):
    if folder not in needed:
      shutil.rmtree(folder / MODEL, ignore_errors=True)


def gather(bench: Bench) -> None:
  """results.jsonl of all that is there.

  Raises:
    UserError: a stage of another configuration, as where results.jsonl was removed to begin anew.
  """
  every = prefixes(bench.chosen['chains'], bench.chosen['learn']['domains'])
  files = [
    bench._replace(seed=seed).folder(p) / LINE for seed in bench.chosen['seeds'] for p in every
  ]
  lines = {f: f.read_text() for f in files if f.exists()}
  for file, line in lines.items():
    if json.loads(line)['config_sha256'] != config.sha256(bench.chosen):
      raise UserError(f'{file} is of another configuration: name another --workdir')
  if lines:
    durable.write(bench.place / results.FILE, ''.join(lines.values()))


def model_of(bench: Bench, exam: edit_exam.Exam, prefix: Prefix) -> str:
  """The model after some stages, made if it is not there."""
  if not prefix:
    return bench.chosen['model']
  folder = bench.folder(prefix)
  if not (folder / MODEL / MADE).exists():
    source = model_of(bench, exam, prefix[:-1])
    bench.shown.say(f'{"-".join(prefix)}: begins')
    make = edited if prefix[-1] == 'edit' else learnt
    about = make(bench, exam, prefix, source)
    durable.write(folder / MODEL / MADE, json.dumps(about) + '\n')
  # What it was made of goes when it is there and not before, so that a kill at any point costs nothing.
  for name in (edit_state.FILE, edit_rounds.FILE):
    (folder / name).unlink(missing_ok=True)
  for name in ('run', STATISTICS):
    shutil.rmtree(folder / name, ignore_errors=True)
  return str(folder / MODEL)


def edited(bench: Bench, exam: edit_exam.Exam, prefix: Prefix, source: str) -> dict[str, Any]:
  """Writes the facts into a model; what that took."""
  chosen, folder, tell = bench.editing, bench.folder(prefix), bench.shown.say
  subject = edit_subject.opened(source)
  own = folder / STATISTICS if len(prefix) > 1 else None  # nobody else starts from such a model
  where, clock = edit_run.Place(bench.data, folder, bench.save_every, statistics=own), Clock()
  saved, backbone, _ = edit_run.progress(chosen, subject, exam, bench.seed, where, tell, clock)
  decoder.save(folder / MODEL, subject.config, backbone, subject.file)
  seconds = saved.about['edit_s'] - saved.about['compile_s']
  about = {'seconds': round(seconds, 3), 'log_p_target': saved.about['log_p']}
  return about | {'wall_s': clock.wall(), 'started': clock.started}


def learnt(bench: Bench, exam: edit_exam.Exam, prefix: Prefix, source: str) -> dict[str, Any]:
  """Reads one domain with a fresh optimiser, and merges what was learnt into the weights."""
  del exam
  folder, learn = bench.folder(prefix), bench.chosen['learn']
  adapt, _, domain = prefix[-1].partition('.')
  words = {
    'dataset': f'corpora:{domain}', 'seeds': bench.seed, 'order': 'fixed', 'iterations': learn['steps'],
    'batch': learn['batch'], 'ends_batch': learn['batch'], 'data.length': learn['length'],
    'data.test_per_task': 8, 'model.pretrained': source,
  }  # fmt: skip
  argv = [f'--config={learn["source"]}:{adapt},naive', f'--workdir={folder / "run"}']
  argv += [f'--data_dir={bench.data}', f'--save_every={bench.save_every}']
  argv += [f'--config.{name}={value}' for name, value in words.items()]
  parsed = options.parse(argv, run.PROGRAM, run.ABOUT)
  with workdir.claimed(parsed.workdir) as place:
    workdir.remember(place, parsed.config)
    (line,) = run.run(parsed, place, bench.shown)
    clock = Clock(line['wall_s'], started=line['started'])
    merge(place, folder / MODEL, str(bench.data), bench.shown.say)
  about = {'seconds': round(line['wall_s'] - line['compile_s'], 3), 'steps': line['steps']}
  return about | {'wall_s': clock.wall(), 'started': clock.started}


asker: Callable[..., evaluate.Ask] = cache(evaluate.asker)  # models of a chain share their programs


def measured(bench: Bench, exam: edit_exam.Exam, prefix: Prefix) -> dict[str, Any]:
  """The line of a stage: what the model says after it."""
  chosen, name = bench.chosen, model_of(bench, exam, prefix)
  made = json.loads((Path(name) / MADE).read_text()) if prefix else {}
  clock = Clock(made.get('wall_s', 0.0), started=made.get('started', ''))
  subject, asked = edit_subject.opened(name), exam.asked
  log_p, right = asker(subject.config)(subject.backbone, (), asked.rows)
  scores = evaluate.score(lambda *_: (log_p, right), subject.backbone, (), asked)
  new, true = np.split(log_p, 2)
  own = asked.kind == 0
  mean = lambda a: float(a.mean()) if len(a) else None  # noqa: E731
  return {
    'config': chosen,
    'config_sha256': config.sha256(chosen),
    'model': chosen['model'],
    'editor': chosen['label'] or chosen['editor'],
    'edits': len(exam.edits),
    'seed': bench.seed,
    'stages': list(prefix),
    'asked': len(exam.seen),
    **edit_measures.rounded(evaluate.measures(asked, scores)),
    **edit_measures.rounded(
      {'log_p_new': mean(new[own]), 'log_p_true': mean(true[own & asked.compared])}
    ),
    'rewrites': [round(float(v), 6) for v in scores[own]],
    'perplexity': perplexities(bench, subject),
    **made,
    'wall_s': round(clock.wall(), 3),
    'commit': results.commit(),
    'versions': {name: results.version(name) for name in results.LIBRARIES},
    'device': results.device(),
    'started': clock.started,
    'command': bench.command,
  }


def perplexities(bench: Bench, subject: edit_subject.Subject) -> dict[str, float]:
  """{corpus: perplexity} on test text."""
  asked = edit_measures.texts(bench.chosen, subject, bench.data)
  ask = lambda blocks: evaluate.perplexity(subject.config, subject.backbone, blocks)  # noqa: E731
  return {name: round(ask(blocks), 4) for name, blocks in asked.items()}


def summary(line: Mapping[str, Any]) -> str:
  """A line about a stage."""
  measures = edit_measures.said({k: line[k] for k in ('s', 'es', 'ps', 'ns')})
  texts = ', '.join(f'{k} {v:.1f}' for k, v in line['perplexity'].items())
  return (
    f'{"-".join(line["stages"]) or "start"}, seed {line["seed"]}: {measures}; perplexity {texts}'
  )


if __name__ == '__main__':
  sys.exit(main())
