"""Tables of docs/edge.md from results/spoken_digits/ alone: `python -m tools.device [--write]`.

results.jsonl holds the runs in JAX (`experiments.run`, a line a seed), device.jsonl what `experiments.device`
found on the emulated device. Without --write the command only says whether the page is current.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cl_jax.report.tables import NONE, spread
from tools.figures import RESULTS, ROOT, markdown
from tools.pages import fill, lines_of, update

MAKER = 'tools/device.py'
PAGE = ROOT / 'docs/edge.md'
FOLDER = RESULTS / 'spoken_digits'
NAMES = {
  'joint': 'all at once, the bound',
  'naive': 'fine-tuning',
  'er': 'experience replay',
  'slda': 'streaming LDA, 128 random units',
  'ncm': 'nearest class mean',
}
STREAMS = {'class': 'new words', 'domain': 'new speakers'}

Line = dict[str, Any]


def read(name: str) -> list[Line]:
  return lines_of(FOLDER / name)


def stream_of(config: Mapping[str, Any]) -> str:
  """'class' or 'domain', also of the bound."""
  return config['base'] or config['scenario']


def accuracies(lines: Sequence[Line], found: Sequence[Line]) -> str:
  """A row a stream and method: mean and 95 % interval over seeds, and the RAM of the device."""
  if not lines:
    return 'Not run yet: results/spoken_digits/results.jsonl is not there.'
  groups: dict[tuple[str, str], list[Line]] = {}
  for line in lines:
    name = 'joint' if line['scenario'] == 'joint' else line['method']
    groups.setdefault((stream_of(line['config']), name), []).append(line)
  known = {(f['scenario'], f['learner']): f for f in found}
  head = ('stream', 'method', 'accuracy %', 'orders', 'forgetting %', 'RAM, bytes', 'MACs / step')
  rows = []
  for (stream, name), group in sorted(
    groups.items(), key=lambda g: (g[0][0], -np.mean([line['acc'] for line in g[1]]))
  ):
    device = known.get((stream, name), {})
    values = [100 * line['acc'] for line in group]
    lost = [100 * line['forgetting'] for line in group if line['forgetting'] is not None]
    rows.append((
      STREAMS[stream], NAMES.get(name, name), spread(values),
      ', '.join(f'{v:.1f}' for v in values), spread(lost), count(device.get('ram_linked')),
      count(device.get('macs_per_step')),
    ))  # fmt: skip
  first = lines[0]
  where = f'{first["device"]}; jax {first["versions"].get("jax")}'
  return f'{markdown(head, rows)}\n\nAccuracies in JAX on {where}; RAM as linked for the Cortex-M7.'


def count(n: int | None) -> str:
  return NONE if n is None else f'{n:,}'


def cuts(lines: Sequence[Line], found: Sequence[Line]) -> str:
  """What the device did in each power cut, and the whole stream on it beside the run of that seed."""
  whole = [f for f in found if 'accuracy' in f]
  if not whole:
    return 'Not run yet: results/spoken_digits/device.jsonl holds no whole stream.'
  first = next((f for f in whole if f['scenario'] == 'class'), whole[0])
  head = ('the power goes when', 'boots', 'went on from', 'state at the end')
  rows = [('never', '1', 'slot 0, save 0, byte 0', first['hash'])]
  rows += [
    (
      c['cut'], str(c['boots']),
      f'slot {c["slot"]}, save {c["sequence"] - 1}, byte {c["position"]:,}', c['hash'],
    )
    for c in first['cuts']
  ]  # fmt: skip
  runs = {
    (stream_of(line['config']), line['method'], line['seed']): line['acc']
    for line in lines
    if line['scenario'] != 'joint'
  }
  return '\n\n'.join((
    markdown(head, rows),
    f'That is {NAMES[first["learner"]]}, {STREAMS[first["scenario"]]}, {first["steps"]} steps with a save '
    f'every {first["every"]} calls. The whole stream, with the power cut in one save:',
    learnt(whole, runs),
  ))  # fmt: skip


def learnt(whole: Sequence[Line], runs: Mapping[tuple, float]) -> str:
  """A row a whole stream on the device."""
  head = (
    'stream', 'method', 'seed', 'calls', 'accuracy, device', 'JAX, step by step', 'JAX, `experiments.run`',
    'RAM linked', 'planned', 'of', 'stack touched', 'code', 'state at the end',
  )  # fmt: skip
  percent = lambda values: f'{100 * np.mean(values):.2f} %'  # noqa: E731
  rows = []
  for f in whole:
    run = runs.get((f['scenario'], f['learner'], f['seed']))
    rows.append((
      STREAMS[f['scenario']], NAMES[f['learner']], str(f['seed']), count(f['calls']), percent(f['accuracy']),
      percent(f['accuracy_jax']), NONE if run is None else percent(run), count(f['ram_linked']),
      count(f['ram_planned']), count(f['ram_budget']), count(f['stack_used']), count(f['code_bytes']),
      f['end_hash'],
    ))  # fmt: skip
  return markdown(head, rows)


def page() -> str:
  lines, found = read('results.jsonl'), read('device.jsonl')
  text = fill(PAGE.read_text(), f'{MAKER} accuracies', accuracies(lines, found))
  return fill(text, f'{MAKER} cuts', cuts(lines, found))


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--write', action='store_true', help='write them instead of comparing')
  return update({PAGE: page()}, parser.parse_args().write, 'figures')


if __name__ == '__main__':
  sys.exit(main())
