"""Knowledge editing: `python -m experiments.edit --config=configs/edit_NAME.py[:WORDS] --workdir=DIR`.

Facts are written into a language model, some at a time, and asked about: the prompt itself, other ways to
ask, neighbours that are to stay as they are, and text that has nothing to do with them. DIR gets a line a
seed in results.jsonl; the command goes on where it stopped when it is repeated.
--grid runs every cell of the configuration's CELLS, each a process in a folder of its own, and
--only=PATTERNS some of them. --trace=N and --moments measure a model instead: the layers in which facts are
looked up, and how many tokens of text the statistics of MEMIT need.

Words behind FILE: choose the editor and how many facts, as in configs/edit_counterfact.py:rome,100. Editors
are rome, memit, pmet, alphaedit, finetune, finetune_l, lora, grace and wise; the file says which words there
are. --config.data=FILE.jsonl edits facts of your own: a line each is {"prompt": "{} is in the city of",
"subject": "Eiffel Tower", "target": "Rome"}, and where there are such "truth", "paraphrases", "neighbours",
"answers" (of the neighbours), "portability" ([[prompt, answer], ...]) and "case".

One fact by hand, with what the model says before and after:

  python -m experiments.edit --subject='Eiffel Tower' --prompt='{} is in the city of' --target=Rome
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cl_jax import durable
from cl_jax.editing import encoding, inside, rows, write
from cl_jax.editing.rows import Edit
from cl_jax.errors import Fault, UserError
from cl_jax.streams import edits as edit_streams
from experiments import (
  cli,
  config,
  edit_config,
  edit_file,
  edit_measures,
  edit_moments,
  edit_run,
  edit_subject,
  edit_trace,
  options,
  results,
  show,
  study,
  workdir,
)
from experiments.pool import Work, default_workers, processes

PROGRAM = 'experiments.edit'
SAVE_EVERY = 60.0


def main(argv: Sequence[str] | None = None) -> int:
  argv = sys.argv[1:] if argv is None else list(argv)
  parser = cli.parser(PROGRAM, __doc__)
  add = parser.add_argument
  add('--config', default='configs/edit_counterfact.py', metavar='FILE[:WORDS]')
  add('--workdir', metavar='DIR', type=Path, help='results.jsonl, and what is needed to go on')
  add('--data_dir', metavar='DIR', help='parent of edit/ and text/; default: CL_JAX_DATA')
  add('--grid', action='store_true', help='every cell of the configuration')
  add('--only', metavar='PATTERNS', help="of the grid, as in 'memit,* *,100' (all)")
  add('--workers', type=int, help='processes at a time (one a core; one with an accelerator)')
  add('--save_every', type=float, default=SAVE_EVERY, metavar='SECONDS')
  add(
    '--save_model',
    metavar='DIR',
    type=Path,
    help='write the edited model there, to be loaded by name',
  )
  add(
    '--save_edits',
    metavar='FILE',
    type=Path,
    help='write the terms there, by which edits can be undone (experiments.weights edits)',
  )
  add(
    '--trace',
    type=int,
    metavar='N',
    help='causal tracing of N facts that the model knows, into DIR',
  )
  add(
    '--moments',
    action='store_true',
    help='how E[kk^T] and what MEMIT writes with it depend on the tokens of the text, into DIR',
  )
  one = parser.add_argument_group('one fact by hand')
  one.add_argument('--subject')
  one.add_argument('--prompt', help='with {} in the place of the subject')
  one.add_argument('--target')
  one.add_argument('--paraphrase', action='append', metavar='TEXT')
  one.add_argument('--neighbour', action='append', metavar='TEXT')
  return cli.guarded(PROGRAM, lambda words: command(parser, words), argv)


def command(parser: argparse.ArgumentParser, argv: list[str]) -> int:
  given, left = parser.parse_known_args(argv)
  overrides = options.fields_of(left)
  if not 0 <= given.save_every < float('inf'):
    raise UserError(f'--save_every must be a number of seconds; got {given.save_every}')
  if given.workers is not None and given.workers < 1:
    raise UserError(f'--workers must be at least 1; got {given.workers}')
  if not given.grid:
    cli.refuse(given, ('--only', '--workers'), 'is of --grid')
  by_hand = [given.subject, given.prompt, given.target]
  if any(v is not None for v in by_hand):
    if None in by_hand:
      raise UserError('one fact needs all of --subject, --prompt and --target')
    others = ('--workdir', '--grid', '--trace', '--moments', '--save_model')
    cli.refuse(given, others, 'does not go with one fact by hand')
    return hand(given, resolved(given.config, overrides))
  cli.refuse(given, ('--paraphrase', '--neighbour'), 'is of one fact by hand: give --subject too')
  if given.moments:
    others = ('--trace', '--grid', '--save_model', '--save_edits')
    cli.refuse(given, others, 'does not go with --moments')
    return converging(given, resolved(given.config, overrides), argv)
  if given.trace is not None:
    others = ('--grid', '--save_model', '--save_edits')
    cli.refuse(given, others, 'does not go with --trace')
    return traced(given, resolved(given.config, overrides), argv)
  if given.grid:
    cli.refuse(given, ('--save_model', '--save_edits'), 'does not go with --grid: name one cell')
    return grid(given, overrides)
  if given.workdir is None:
    raise UserError('--workdir is missing: name a directory for the results')
  return whole(given, resolved(given.config, overrides), argv)


def resolved(source: str, overrides: Sequence[tuple[str, str]]) -> dict[str, Any]:
  raw, rest = edit_config.with_editor(config.load(source), overrides)
  return edit_config.resolve(options.written(edit_config.schema(raw), raw, rest))


# --- one run ----------------------------------------------------------------------------------------


def whole(given: argparse.Namespace, chosen: dict[str, Any], argv: Sequence[str]) -> int:
  """All seeds of a configuration."""
  shown = show.make()
  with workdir.claimed(given.workdir) as place:
    workdir.remember(place, chosen)
    sha = config.sha256(chosen)
    todo = [s for s in chosen['seeds'] if (sha, s) not in results.done(place)]
    cli.devices(1)
    if not todo:
      again = 'comes too late, the run is finished: name another --workdir'
      cli.refuse(given, ('--save_model', '--save_edits'), again)
    if todo:
      data = edit_subject.data_root(given.data_dir)
      edit_streams.load(data / 'edit', chosen['data'])  # a damaged file is refused at once
      subject = edit_subject.opened(chosen['model'])
      words = f'python -m {PROGRAM} ' + ' '.join(map(shlex.quote, argv))
    for seed in todo:
      folder = place / f'seed{seed}'
      folder.mkdir(exist_ok=True)
      where = edit_run.Place(data, folder, given.save_every, given.save_model, given.save_edits)
      line = edit_run.run(chosen, subject, seed, where, shown.say)
      results.append(place, [{**line, 'command': words}])
      shutil.rmtree(folder)
    for line in results.read(place):
      print(edit_measures.summary(line))
  return 0


# --- one fact by hand -------------------------------------------------------------------------------


def hand(given: argparse.Namespace, chosen: dict[str, Any]) -> int:
  """Edits one fact and prints what the model says before and after."""
  edit = Edit(given.prompt, given.subject, given.target, paraphrases=(*(given.paraphrase or ()),),
              neighbours=(*(given.neighbour or ()),))  # fmt: skip
  rows.piece(edit)  # what is no request is refused before the model is read
  cli.devices(1)
  subject = edit_subject.opened(chosen['model'])
  edit_file.writable(chosen, subject, None, given.save_edits)
  shown, seed = show.make(), chosen['seeds'][0]
  prefixes = edit_subject.begin_texts(chosen, subject, seed)
  requests, _, _ = rows.requests(subject.tokenizer, [edit], prefixes, chosen['length'])
  texts = any(edit_config.needs(chosen, name) for name in ('moments', 'unrelated'))
  root = edit_subject.data_root(given.data_dir) if texts else Path()
  editor = edit_subject.editor_of(chosen, subject, root, shown.say)
  state = editor.init(subject.backbone)
  writes, new_state, report = editor.edit(subject.backbone, state, requests, jax.random.key(seed))
  if not edit_run.finite(writes, report):
    raise Fault('the edit gave NaN; nothing was written')
  edited = write.apply(subject.backbone, writes)
  prompts = [('prompt', edit.text), *(('paraphrase', p) for p in edit.paraphrases),
             *(('neighbour', p) for p in edit.neighbours)]  # fmt: skip
  for kind, prompt in prompts:
    print(f'{kind}: {prompt}')
    ids, _ = encoding.prompt(subject.tokenizer, prompt)
    row = rows.layout([(ids, len(ids) - 1, [])])
    for name, p, s in (('before', subject.backbone, state), ('after', edited, new_state)):
      taps = {} if editor.tap is None else {'tap': editor.tap(s, jnp.full(1, row.head.shape[-1]))}
      probability = np.exp(np.asarray(inside.forward(subject.config, p, row, **taps))[0, 0])
      best = np.argsort(-probability)[:5]
      words = '  '.join(
        f'{subject.tokenizer.decode([int(i)])!r} {probability[i]:.3f}' for i in best
      )
      print(f'  {name:7}{words}')
  undo, state_bytes = write.size(writes), edit_run.kept_bytes(new_state, ())
  where = ', --save_edits=FILE keeps them' if writes else ''
  if given.save_edits is not None:
    batch = ([edit], writes)
    edit_file.save(given.save_edits, chosen['model'], subject, chosen['editor'], [batch])
    where = f', in {given.save_edits}'
  words = [f'{undo:,} bytes undo it{where}'] if writes else []
  words += [f'{state_bytes:,} bytes of state'] if state_bytes else []
  print(f'{chosen["editor"]}: {"; ".join(words) or "nothing is written"}')
  return 0


# --- causal tracing ---------------------------------------------------------------------------------


def traced(given: argparse.Namespace, chosen: dict[str, Any], argv: Sequence[str]) -> int:
  if given.trace < 1:
    raise UserError(f'--trace must be at least 1 fact; got {given.trace}')
  data = edit_subject.data_root(given.data_dir)
  folder = given.workdir or Path('runs/trace')
  cli.devices(1)
  subject = edit_subject.opened(chosen['model'])
  words = f'python -m {PROGRAM} ' + ' '.join(map(shlex.quote, argv))
  say = show.make().say
  return edit_trace.trace(subject, chosen['model'], data, given.trace, folder, words, say)


# --- the statistics of the text ---------------------------------------------------------------------


def converging(given: argparse.Namespace, chosen: dict[str, Any], argv: Sequence[str]) -> int:
  data = edit_subject.data_root(given.data_dir)
  folder = given.workdir or Path('runs/moments')
  cli.devices(1)
  words = f'python -m {PROGRAM} ' + ' '.join(map(shlex.quote, argv))
  with workdir.claimed(folder) as place:
    return edit_moments.converge(chosen, data, place, words, show.make().say)


# --- the grid ---------------------------------------------------------------------------------------


def grid(given: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> int:
  """Every cell as a process."""
  module, path, words = study.found(given.config)
  cells = study.chosen(module, given.only or '*')
  folder = given.workdir or Path('runs') / Path(path).stem
  folder.mkdir(parents=True, exist_ok=True)
  keep = [f'--config.{name}={text}' for name, text in overrides]
  keep += [f'--save_every={given.save_every}']
  keep += [f'--data_dir={given.data_dir}'] if given.data_dir else []
  work = []
  for cell in cells:
    name = cell.replace(',', '-')
    source = f'{path}:{",".join((*words, cell))}'
    work.append(
      Work(name, (), folder / name, (f'--config={source}', f'--workdir={folder / name}', *keep))
    )
  begin = time.monotonic()
  say = lambda line: print(f'{show.clock(time.monotonic() - begin):>7}  {line}', flush=True)  # noqa: E731
  failed = {}
  command = (sys.executable, '-m', PROGRAM)
  with processes(work, command, given.workers or default_workers(), say) as ended:
    for w, code in ended:
      failed |= {w.name: code} if code else {}
      say(f'{w.name}: {"failed, " if code else ""}{w.last_words()}')
      lines = [
        line for place in sorted(folder.iterdir()) if place.is_dir() for line in results.read(place)
      ]
      durable.write(folder / results.FILE, ''.join(json.dumps(line) + '\n' for line in lines))
  return max(failed.values(), default=0)


if __name__ == '__main__':
  sys.exit(main())
