"""The parts of docs/editing.md about stages and about the statistics of the text, for tools.edit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from cl_jax.report.tables import NONE, percent, spread
from tools.figures import FAINT, RESULTS, markdown
from tools.pages import commands, commits, lines_of
from tools.pictures import drawn
from tools.pictures import shown as picture

STAGES, MOMENTS = RESULTS / 'edit/stages/results.jsonl', RESULTS / 'edit/moments/moments.json'
NAMES = {'lora': 'LoRA', 'full': 'all weights', 'half': 'upper half', 'bitfit': 'norm scales'}

Lines = list[dict[str, Any]]


def label(stages: list[str]) -> str:
  """'edits → LoRA shakespeare, medical' of ['edit', 'lora.shakespeare', 'lora.medical']."""
  parts: list[tuple[str, list[str]]] = []
  for stage in stages:
    word, _, domain = stage.partition('.')
    if domain and parts and parts[-1][0] == word:
      parts[-1][1].append(domain)
    else:
      parts.append((word, [domain] if domain else []))
  words = (f'{NAMES[w]} {", ".join(d)}' if d else 'edits' for w, d in parts)
  return ' → '.join(words) or 'the model as it was'


def staged() -> str:
  """A row a stage, in the order of the chains."""
  lines = lines_of(STAGES)
  if not lines:
    return 'Not run yet: results/edit/stages is not there.'
  groups: dict[tuple[str, ...], Lines] = {}
  for line in lines:
    groups.setdefault(tuple(line['stages']), []).append(line)
  first = lines[0]
  texts = list(first['perplexity'])
  head = ('after', 'S', 'ES', 'PS', 'NS', 'log p new', 'log p true', *texts, 'seeds')
  rows = []
  for stages, same in groups.items():
    of = lambda k, same=same: [line[k] for line in same if line[k] is not None]  # noqa: E731
    logs = (spread(of(k), 2) if of(k) else NONE for k in ('log_p_new', 'log_p_true'))
    means = (np.mean([line['perplexity'][t] for line in same]) for t in texts)
    rows.append((
      label(list(stages)), *(percent(of(k)) for k in ('s', 'es', 'ps', 'ns')), *logs,
      *(f'{v:.1f}' for v in means), str(len(same)),
    ))  # fmt: skip
  learn = first['config']['learn']
  minutes = sum(line['wall_s'] for line in lines) / 60
  return '\n\n'.join((
    f'{first["edits"]} edits by {first["editor"]} ({first["asked"]} asked about); a domain is '
    f'{learn["steps"]} steps of {learn["batch"]} x {learn["length"]} tokens. log p are means over the '
    "prompts of the edits, of a token of the new target and of the truth; the last columns are perplexities "
    'of test text.',
    markdown(head, rows),
    f'On {first["device"]}; jax {first["versions"].get("jax")}; {minutes:.0f} minutes; {commits(lines)}. '
    f'{commands(lines)}. Configuration: [configs/edit_stages.py](../configs/edit_stages.py).',
  ))  # fmt: skip


def converged() -> str:
  """The moments and what is written with them over the tokens of the text."""
  if not MOMENTS.exists():
    return 'Not run yet: results/edit/moments is not there.'
  about = json.loads(MOMENTS.read_text())
  layers = about['layers']
  head = ('tokens', *(f'layer {i}' for i in layers), 'written, layers', 'S', 'ES', 'PS', 'NS')
  rows = []
  for point in about['points']:
    delta = [v for v in point['delta'] if v is not None]
    written = f'{min(delta):.3g} to {max(delta):.3g}' if delta else NONE
    measures = (
      percent([point[k]] if point.get(k) is not None else []) for k in ('s', 'es', 'ps', 'ns')
    )
    rows.append(
      (f'{point["tokens"]:,}', *(f'{v:.3f}' for v in point['moment']), written, *measures)
    )
  name = 'how far the moments and the edits are from those of all tokens'
  return '\n\n'.join((
    f'‖Cₙ − C‖ / ‖C‖ of C = E[kkᵀ] ({about["units"]:,} units): the first n tokens of {about["corpus"]} '
    f'against all, by layer; the same of what MEMIT writes with it ({about["edits"]} edits '
    'towards the same targets), and what is then said of the facts.',
    markdown(head, rows),
    f'On {about["device"]}; jax {about["versions"].get("jax")}; commit {about["commit"][:7]}.',
    picture('edit_moments', name, 'results/edit/moments/moments.json', f'`{about["command"]}`',
            '[experiments/edit_moments.py](../experiments/edit_moments.py)'),
  ))  # fmt: skip


def draw(path: Path, source: str) -> None:
  """Both over the tokens, a line a layer, and n^-1/2 beside them."""
  about = json.loads(MOMENTS.read_text())
  points = about['points'][:-1]
  tokens = np.array([p['tokens'] for p in points], float)
  with drawn(path, source, 8, 3.4, 2) as (figure, axes):
    for axis, (key, title) in zip(
      axes, (('moment', 'E[kkᵀ]'), ('delta', 'what MEMIT writes')), strict=True
    ):
      values = np.array([p[key] for p in points], float)
      for layer, row in zip(about['layers'], values.T, strict=True):
        axis.loglog(tokens, row, marker='o', markersize=3, label=f'layer {layer}')
      guide = np.nanmedian(values[-1]) * (tokens[-1] / tokens) ** 0.5
      axis.loglog(tokens, guide, color='0.5', linestyle=':', label='n^-1/2')
      axis.set(title=title, xlabel='tokens')
      axis.set_xticks(tokens, [f'{int(t):,}' for t in tokens], fontsize=7)
      axis.set_xticks([], minor=True)
      axis.grid(color=FAINT, linewidth=0.5)
    axes[0].set_ylabel('relative distance to all tokens')
    figure.legend(
      *axes[0].get_legend_handles_labels(), loc='outside right upper', frameon=False, fontsize=8
    )
