"""Tables and figures of docs/editing.md, and results/edit.csv, from results/edit/ alone:
`python -m tools.edit [--write]`.

results/edit/NAME/results.jsonl are what `experiments.edit` left, results/edit/trace/trace.json what its
--trace did; tools/edit_stages.py has the parts about stages and statistics. Without --write the command only
says whether page and table are current.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from cl_jax import durable
from cl_jax.editing import evaluate, tracing
from cl_jax.report import tracing as maps
from cl_jax.report.tables import NONE, percent, size, spread
from experiments import edit_exam, edit_measures
from experiments.edit_trace import read as read_trace
from tools import edit_stages
from tools.figures import FAINT, RESULTS, markdown
from tools.pages import commits, fill, lines_of, update
from tools.pictures import FIGURES, FORMS, ROOT, check, drawn, stamp
from tools.pictures import shown as picture

MAKER = 'tools/edit.py'
PAGE, TABLE = ROOT / 'docs/editing.md', RESULTS / 'edit.csv'
# Folders of results/edit and the configurations that they were made with.
DATA = {'counterfact': 'counterfact', 'known': 'known', 'zsre': 'zsre', 'ablation': 'zsre'}
COLUMNS = (
  'model', 'editor', 'edits', 'mode', 'es', 'ps', 'ns', 's', 'ge', 'rs', 'ppl_before', 'ppl_after',
  'seconds_per_edit', 'state_bytes', 'seeds', 'command',
)  # fmt: skip
MODES = ('single', 'batch', 'sequential')

Lines = list[dict[str, Any]]


def read() -> dict[str, dict[tuple, Lines]]:
  """{data: {(model, editor, edits, mode, batch): a line a seed}}, in the order of the tables."""
  found: dict[str, dict[tuple, Lines]] = {}
  for name in DATA:
    groups: dict[tuple, Lines] = defaultdict(list)
    for line in lines_of(RESULTS / 'edit' / name / 'results.jsonl'):
      key = (line['model'], line['editor'], line['edits'], line['mode'], line['config']['batch'])
      groups[key].append(line)
    found[name] = dict(sorted(groups.items(), key=order))
  return found


def values(lines: Lines, key: str) -> list[float]:
  return [line[key] for line in lines if line.get(key) is not None]


def order(group: tuple[tuple, Lines]) -> tuple:
  """By model, number and mode, the best editor first."""
  (model, _, edits, mode, batch), lines = group
  return model, edits, MODES.index(mode), batch, -mean(lines, 's')


def mean(lines: Lines, key: str) -> float:
  return float(np.mean(values(lines, key) or [0.0]))


def perplexity(lines: Lines, which: int) -> dict[str, float]:
  """{corpus: mean} before (0) or after (1)."""
  names = lines[0]['perplexity']
  return {n: float(np.mean([line['perplexity'][n][which] for line in lines])) for n in names}


def table(groups: dict[tuple, Lines]) -> str:
  """A row an editor, number and mode."""
  head = ('edits', 'how', 'editor', 'S', 'ES', 'PS', 'NS', 'forgotten', 'wiki, math', 'fluency',
          'consistency', 's an edit', 'bytes', 'seeds')  # fmt: skip
  rows = []
  for (_, editor, edits, mode, batch), lines in groups.items():
    one, two = (perplexity(lines, which) for which in (0, 1))
    how = f'{mode}, {batch} at a time' if mode == 'sequential' else mode
    rows.append((
      str(edits), how, editor, *(asked(lines, k) for k in ('s', 'es', 'ps', 'ns')),
      percent(forgotten(lines)), ', '.join(f'{one[n]:.1f} → {two[n]:.1f}' for n in one) or NONE,
      spread(values(lines, 'ge'), 2), percent(values(lines, 'rs')),
      spread(values(lines, 'seconds_per_edit'), 2), size(round(mean(lines, 'state_bytes'))),
      str(len(lines)),
    ))  # fmt: skip
  return markdown(head, rows)


def forgotten(lines: Lines) -> list[float]:
  """The forgetting of each line by facts, also of lines that were written when intervals counted alike."""
  found = []
  for line in lines:
    seen = np.array(edit_exam.at_most(line['edits'], line['asked']))
    facts = edit_measures.facts_between(seen, [c['edits'] for c in line['curve']])
    R = np.array(line['R'], float)
    found.append(edit_measures.forgetting(R, facts))
  return [f for f in found if f is not None]


def asked(lines: Lines, key: str) -> str:
  """'84.5 ± 3.1': a measure and its 95 % interval over the facts of all seeds; over seeds where lines do not
  say what each fact scored."""
  if not all('by_edit' in line for line in lines):
    return percent(values(lines, key))
  facts = {k: [v for line in lines for v in line['by_edit'][k]] for k in lines[0]['by_edit']}
  if key != 's':
    return percent([v for v in facts[key] if v is not None])
  whole, n = s_of(facts), len(facts['es'])
  if n < 2:
    return percent([whole])
  # The jackknife: S without one of the facts, for each, as pseudo-values around S. Of a plain mean their
  # interval is Student's.
  without = [s_of({k: v[:i] + v[i + 1 :] for k, v in facts.items()}) for i in range(n)]
  return percent([whole + (n - 1) * (np.mean(without) - v) for v in without])


def s_of(facts: dict[str, list[float | None]]) -> float:
  return evaluate.averages(facts)['s'] or 0.0


def start(groups: dict[tuple, Lines]) -> str:
  """What the model says before, a line a number of edits: each is asked about other facts."""
  found: dict[int, dict[int, dict[str, Any]]] = {}
  for lines in groups.values():
    for line in lines:
      found.setdefault(line['edits'], {})[line['seed']] = line
  text = ['Before, in the rows of', '']
  for edits, seeds in sorted(found.items()):
    measures = ((k, [line['before'] for line in seeds.values()]) for k in ('s', 'es', 'ps', 'ns'))
    parts = (f'{k.upper()} {percent(values(before, k))}' for k, before in measures)
    asked = ', '.join(dict.fromkeys(str(line['asked']) for line in seeds.values()))
    how = f'{asked} facts asked about' + (
      f' in each of {len(seeds)} seeds' if len(seeds) > 1 else ''
    )
    text.append(f'- {edits} edits: {", ".join(parts)} ({how})')
  return '\n'.join(text)


def part(groups: dict[tuple, Lines], name: str) -> str:
  if not groups:
    return f'Not run yet: results/edit/{name} is not there.'
  lines = [line for group in groups.values() for line in group]
  first = lines[0]
  where = f'{first["device"]}; jax {first["versions"].get("jax")}; {commits(lines)}'
  command = f'`{first["command"]}`; each run has its own in its line, with its configuration'
  config = f'configs/edit_{DATA[name]}.py'
  beneath = (f'results/edit/{name}', command, f'[{config}](../{config})')
  left = 'what is left over the edits'
  pictures = [picture(f'edit_{name}', left, *beneath)] if curves(groups) else []
  return '\n\n'.join((start(groups), table(groups), f'On {where}.', *pictures))


def curves(groups: dict[tuple, Lines]) -> dict[str, Lines]:
  """The sequences, by editor."""
  return {f'{k[1]}, {k[4]} at a time': v for k, v in groups.items() if k[3] == 'sequential'}


def draw(groups: dict[tuple, Lines], path: Path, source: str) -> None:
  """Efficacy, paraphrase, neighbourhood and their mean over the number of edits, a line an editor."""
  parts = (('s', 'S'), ('es', 'efficacy'), ('ps', 'paraphrase'), ('ns', 'neighbourhood'))
  with drawn(path, source, 12, 3.2, len(parts)) as (figure, axes):
    for name, lines in curves(groups).items():
      points = [c['edits'] for c in lines[0]['curve']]
      for axis, (key, title) in zip(axes, parts, strict=True):
        found = [[c.get(key) for c in line['curve']] for line in lines]
        rows = np.array(found, float)
        axis.plot(points, 100 * np.nanmean(rows, 0), marker='o', markersize=3, label=name)
        axis.set(title=title, xlabel='edits', ylim=(0, 102))
        axis.grid(color=FAINT, linewidth=0.5)
    axes[0].set_ylabel('%')
    figure.legend(
      *axes[0].get_legend_handles_labels(), loc='outside right upper', frameon=False, fontsize=8
    )


def traced() -> str:
  file = RESULTS / 'edit/trace/trace.json'
  if not file.exists():
    return 'Not run yet: results/edit/trace is not there.'
  about, average = json.loads(file.read_text()), tracing.average(*read_trace(file))
  effect = average.effect[1, :, 2]
  best = int(np.argmax(effect))
  lowest = about['window'] // 2
  how = f'{about["samples"]} samples of noise, window {about["window"]}'
  return (
    f'{len(about["facts"])} facts ({about["rule"]}; {about["asked"]} were asked), {how}: '
    f'p {average.clean:.3f} clean, {average.corrupted:.3f} corrupted. MLPs put back at the last subject '
    f'token help most around layer {best} ({effect[best]:.3f}); from layer {lowest} on, the rule picks '
    f'{tracing.layers_of(average, lowest=lowest)}.\n\n'
    + picture(
      'edit_trace',
      'average indirect effects',
      'results/edit/trace/trace.json',
      f'`{about["command"]}`',
      '[experiments/edit_trace.py](../experiments/edit_trace.py)',
    )
  )


def summary(found: dict[str, dict[tuple, Lines]]) -> str:
  """results/edit.csv."""
  out = io.StringIO()
  writer = csv.DictWriter(out, COLUMNS, lineterminator='\n')
  writer.writeheader()
  for groups in found.values():
    for (model, editor, edits, mode, _), lines in groups.items():
      before, after = (perplexity(lines, which).get('wiki') for which in (0, 1))
      numbers = {k: mean(lines, k) if values(lines, k) else None for k in COLUMNS[4:10]}
      numbers |= {'ppl_before': before, 'ppl_after': after}
      numbers |= {k: mean(lines, k) for k in ('seconds_per_edit', 'state_bytes')}
      text = {k: '' if v is None else f'{v:.6g}' for k, v in numbers.items()}
      text['state_bytes'] = str(round(numbers['state_bytes'] or 0))
      row = {'model': model, 'editor': editor, 'edits': edits, 'mode': mode, 'seeds': len(lines)}
      writer.writerow(row | text | {'command': lines[0]['command']})
  return out.getvalue()


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--write', action='store_true', help='write them instead of comparing')
  write = parser.parse_args().write
  found, sources = read(), {}
  text = PAGE.read_text()
  for name, groups in found.items():
    text = fill(text, f'{MAKER} {name}', part(groups, name))
    if curves(groups):
      sources[f'edit_{name}'] = source = RESULTS / 'edit' / name
      if write:
        draw(groups, FIGURES / f'edit_{name}.png', stamp(source))
  text = fill(text, f'{MAKER} trace', traced())
  trace = RESULTS / 'edit/trace/trace.json'
  if trace.exists():
    sources['edit_trace'] = trace
    if write:
      draw_trace(trace)
  text = fill(text, f'{MAKER} stages', edit_stages.staged())
  text = fill(text, f'{MAKER} moments', edit_stages.converged())
  if edit_stages.MOMENTS.exists():
    sources['edit_moments'] = source = edit_stages.MOMENTS
    if write:
      edit_stages.draw(FIGURES / 'edit_moments.png', stamp(source))
  if write and not TABLE.exists():
    TABLE.write_text('')
  return update({PAGE: text, TABLE: summary(found)}, write, 'figures') | check(sources)


def draw_trace(trace: Path) -> None:
  average, window = tracing.average(*read_trace(trace)), json.loads(trace.read_text())['window']
  for form in FORMS:
    image = maps.averages(average, window, form=form, source=stamp(trace))
    durable.replace(FIGURES / f'edit_trace.{form}', lambda f, image=image: f.write(image))
  print('edit_trace drawn')


if __name__ == '__main__':
  sys.exit(main())
