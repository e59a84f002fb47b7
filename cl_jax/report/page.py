"""The page: one HTML file with its style and pictures inside, readable by day and by night."""

from __future__ import annotations

import base64
import html
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from cl_jax.errors import UserError
from cl_jax.report import figures
from cl_jax.report.lines import Line, Problem, Section, read, sections
from cl_jax.report.tables import Table, as_html, settings, tables

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1b1b1b; --soft: #5a5a5a; --line: #d0d0d0;
  --shade: #f4f4f2; --warn: #8a3b00; }
@media (prefers-color-scheme: dark) { :root { --paper: #16181c; --ink: #e8e6e3; --soft: #a9a9a9;
  --line: #3a3d44; --shade: #1f2227; --warn: #ffb27d; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 78rem; padding: 2rem 1.25rem 4rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue",
  "Noto Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .75rem; padding-top: 1rem; border-top: 1px solid var(--line); }
p { max-width: 46rem; }
.soft, figcaption { color: var(--soft); font-size: .92rem; }
.scroll { overflow-x: auto; margin: 1.25rem 0; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: 0 0 .4rem; }
th, td { padding: .3rem .75rem; text-align: left; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
thead th { background: var(--shade); border-bottom: 2px solid var(--line); font-weight: 600; }
tbody th { font-weight: 500; }
.n { text-align: right; }
figure { margin: 1.75rem 0; }
figure img { max-width: min(100%, 54rem); height: auto; display: block; }
figcaption { margin-top: .5rem; max-width: 46rem; }
.warn { border-left: 4px solid var(--warn); padding: .25rem 1rem; margin: 1.25rem 0; }
.warn strong { color: var(--warn); }
details { margin: .75rem 0; }
summary { cursor: pointer; }
pre { overflow-x: auto; background: var(--shade); padding: .75rem 1rem; font-size: .85rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; font-size: .92rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
"""
LEGEND = (
  'ACC is the mean accuracy over all tasks at the end. Forgetting is the best accuracy on a task before '
  'the last one was learnt, minus the accuracy at the end. Average ACC is the accuracy on the tasks seen '
  'so far, averaged over the stream. All in percent; ± is the 95 % confidence interval of the mean over '
  'seeds (Student’s t), and a single seed has none. State counts every byte kept between steps. Bounds '
  '(joint, cumulative) see the past again; they come last, whatever they reach.'
)


def write(workdir: Path) -> Path:
  """Makes DIR/report.html and the PNG figures in DIR/figures from DIR/results.jsonl.

  Lines that are damaged, or are not results, are listed in the report by number; the others are used. So are
  the runs of a grid that NaN stopped, from DIR/faults.jsonl.

  Args:
    workdir: DIR.

  Returns:
    The path of report.html.

  Raises:
    UserError: there is no results.jsonl, or the report cannot be written.
  """
  workdir = Path(workdir)
  lines, problems = read(workdir / 'results.jsonl')
  return save(workdir, lines, [*problems, *stopped(workdir / 'faults.jsonl')])


def stopped(path: Path) -> list[Problem]:
  """The runs of a grid that have no results, each with what stopped it; [] where there is no such file."""
  found = []
  for number, row in enumerate(path.read_text().splitlines() if path.exists() else (), 1):
    try:
      run = json.loads(row)
      of = run.get('run', f'seed {run["seed"]}')  # grids of before have no name for it
      why = f'{of}: stopped, {run["what"]} is {run["value"]} in leg {run["leg"] + 1}'
    except (ValueError, KeyError, TypeError, AttributeError):
      why = 'not a run that was stopped'
    found.append(Problem(str(path), number, why))
  return found


def save(folder: Path, lines: Sequence[Line], problems: Sequence[Problem] = ()) -> Path:
  """The same, from lines that were read already, into `folder`."""
  parts = [head(lines, problems)]
  pictures: dict[str, bytes] = {}
  for section in sections(lines):
    parts.append(body(section, pictures))
  parts.append('</body>\n</html>\n')
  path = folder / 'report.html'
  try:
    (folder / 'figures').mkdir(parents=True, exist_ok=True)
    for name, png in pictures.items():
      replace(folder / 'figures' / name, png)
    replace(path, ''.join(parts).encode())
  except OSError as error:
    raise UserError(f'{path} cannot be written: {error.strerror or error}') from error
  return path


def head(lines: Sequence[Line], problems: Sequence[Problem]) -> str:
  e = html.escape
  found = [s.title for s in sections(lines)]
  name = found[0] if len(found) == 1 else f'{len(found)} comparisons'
  facts = {
    'runs': str(len(lines)),
    'commit': listed(line.get('commit') for line in lines),
    'device': listed(line.get('device') for line in lines),
    'versions': listed(
      ', '.join(f'{k} {v}' for k, v in line['versions'].items() if v) for line in lines
    ),
    'started': span([line['started'] for line in lines if isinstance(line.get('started'), str)]),
  }
  rows = ''.join(f'<dt>{k}</dt><dd>{e(v)}</dd>' for k, v in facts.items() if v)
  return (
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f'<title>cl_jax: {e(name)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n'
    f'<h1>{e(name)}</h1>\n<dl>{rows}</dl>\n{left_out(problems)}'
    f'<p class="soft">{LEGEND}</p>\n'
  )


def left_out(problems: Sequence[Problem]) -> str:
  """What could not be used, by line number."""
  if not problems:
    return ''
  e = html.escape
  items = ''.join(
    f'<li>{e(Path(p.path).name)}, line {p.number}: {e(p.why)}</li>\n' for p in problems
  )
  n = len(problems)
  what = '1 run or line was left out' if n == 1 else f'{n} runs or lines were left out'
  return f'<div class="warn"><strong>{what}</strong><ul>\n{items}</ul></div>\n'


def body(section: Section, pictures: dict[str, bytes]) -> str:
  """A section's tables, figures and configurations; its light PNGs are added to `pictures`."""
  e = html.escape
  parts = [f'<h2>{e(section.title)}</h2>\n']
  pairs = tables(section)
  parts += [as_html(result) for result, _ in pairs]
  for figure in figures.figures(section):
    light, dark = figure.draw(figures.LIGHT), figure.draw(figures.DARK)
    pictures[f'{section.slug}-{figure.name}.png'] = light
    parts.append(
      f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{data(dark)}">'
      f'<img src="{data(light)}" alt="{e(figure.alt)}"></picture>\n'
      f'<figcaption>{e(figure.caption)}</figcaption></figure>\n'
    )
  more: list[Table] = [cost for _, cost in pairs]
  if differs := settings(section):
    more.append(differs)
  parts += [as_html(t) for t in more]
  for group in section.groups:
    commands = dict.fromkeys(str(line.get('command', '')) for line in group.lines)
    config = json.dumps(group.first['config'], indent=1, ensure_ascii=False)
    parts.append(
      f'<details><summary>{e(group.label)}: command and configuration</summary>\n'
      f'<pre>{e(chr(10).join(filter(None, commands)))}</pre>\n<pre>{e(config)}</pre></details>\n'
    )
  return ''.join(parts)


def data(png: bytes) -> str:
  return f'data:image/png;base64,{base64.b64encode(png).decode()}'


def listed(values: Iterable[object]) -> str:
  """Different texts once each, in order of first appearance."""
  return '; '.join(dict.fromkeys(str(v) for v in values if v))


def span(times: Sequence[str]) -> str:
  """'first to last' of ISO times."""
  if not times:
    return ''
  first, last = min(times), max(times)
  return first if first == last else f'{first} to {last}'


def replace(path: Path, content: bytes) -> None:
  """Writes a whole file or leaves the one that was there."""
  part = path.with_name(f'.{path.name}.{os.getpid()}.part')
  try:
    part.write_bytes(content)
    part.replace(path)
  finally:
    part.unlink(missing_ok=True)
