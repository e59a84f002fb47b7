"""The tools of make lint, make docs and make figures notice what they are there to notice."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tools import device, edit, edit_stages, figures, licences, method_table, pages, pictures, study

NOTICE = """x

--------------------------------------------------
cl_jax/data/words.npz

From https://example.org/words. The MIT License.
"""
PUBLISHED = {
  'table': 'split_mnist',
  'dataset': 'mnist',
  'scenario': 'class',
  'method': 'ewc',
  'setting': 'lambda 1e9',
  'needs': 'boundary task_train',
  'metric': 'acc',
  'published': '19.9',
  'published_err': '0.1',
  'ours': '20.1',
  'ours_ci95': '0.2',
  'seeds': '5',
  'command': 'c',
  'note': 'a|b',
}
BENCH = {
  'work': 'W1',
  'against': 'peer',
  'metric': 'time',
  'ratio_median': '3.5',
  'ratio_min': '3.0',
  'ratio_max': '4.0',
  'ours': '1',
  'theirs': '3.5',
  'unit': 's',
  'runs': '5',
  'versions': 'v',
  'device': 'd',
  'date': '2026-01-01',
}


@pytest.mark.parametrize(
  'expression, allowed',
  [
    ('MIT', True),
    ('Apache-2.0 WITH LLVM-exception AND BSD-3-Clause', True),
    ('GPL-3.0-only OR MIT', True),
    ('MIT AND GPL-3.0-only', False),
    ('(MIT OR Apache-2.0) AND GPL-3.0-only', False),
    ('(MIT OR GPL-3.0-only) AND (BSD-3-Clause)', True),
    ('MIT OR', False),
    ('(MIT', False),
    ('no licence stated', False),
  ],
)
def test_licences_in_the_list(expression, allowed):
  assert licences.permitted(expression) == allowed


def test_data_without_attribution_is_found(tmp_path):
  (tmp_path / 'words.npz').touch()
  assert licences.data(tmp_path, NOTICE) == []
  (tmp_path / 'more_words.npz').touch()
  assert len(licences.data(tmp_path, NOTICE)) == 1
  assert len(licences.data(tmp_path, NOTICE.replace('MIT License', 'End'))) == 2


def test_dependencies_of_extras_are_followed():
  found, _ = licences.packages('cl-jax')
  assert {'jax', 'numpy', 'pytest', 'jaxlib'} <= set(found)


def test_hooks_are_read_off_the_method():
  assert method_table.hooks(method_table.make('er')) == ['init', 'mix', 'after']
  assert method_table.hooks(method_table.make('task_head')) == ['wrap']


def test_a_stale_page_is_noticed_and_written(tmp_path, capsys):
  page = tmp_path / 'page.md'
  begin, end = pages.marks('me')
  page.write_text(f'before\n{begin}\nold\n{end}\nafter\n')
  new = {page: pages.fill(page.read_text(), 'me', 'new')}
  assert pages.update(new, False, 'docs') == 1 and 'make docs' in capsys.readouterr().err
  assert pages.update(new, True, 'docs') == 0
  assert page.read_text() == f'before\n{begin}\n\nnew\n\n{end}\nafter\n'
  assert pages.update(new, False, 'docs') == 0
  with pytest.raises(SystemExit):
    pages.fill('no marks', 'me', 'new')


def test_every_commit_of_the_lines_is_named_once():
  lines = [{'commit': c * 40} for c in 'abba']
  assert pages.commits(lines) == 'commits aaaaaaa, bbbbbbb'
  assert pages.commits(lines[1:3]) == 'commit bbbbbbb'


def test_every_command_of_the_lines_is_named_once(tmp_path, monkeypatch):
  """Chains of stages may come from several, as by --only."""
  lines = [{'command': f'python -m {c}'} for c in 'abba']
  assert pages.commands(lines) == 'Commands: `python -m a`, `python -m b`'
  assert pages.commands(lines[1:3]) == 'Command: `python -m b`'
  rows = edit_stages.STAGES.read_text().splitlines()[:2]
  made = [{**json.loads(row), **line} for row, line in zip(rows, lines, strict=False)]
  monkeypatch.setattr(edit_stages, 'STAGES', tmp_path / 'results.jsonl')
  edit_stages.STAGES.write_text('\n'.join(map(json.dumps, made)))
  assert f'. {pages.commands(lines)}. Configuration' in edit_stages.staged()


def test_results_become_tables_and_pictures(tmp_path):
  other = {**PUBLISHED, 'table': 'other', 'needs': '', 'ours': '', 'seeds': '0'}
  table = figures.published([PUBLISHED, other])
  row = (
    '| class | ewc | lambda 1e9 | boundary, task_train | acc | 19.9 ± 0.1 | 20.1 ± 0.2 | 5 | a/b |'
  )
  assert row in table and '| lambda 1e9 | nothing | acc |' in table
  assert table.count('###') == 2
  assert '| 3.5 | 3.0 to 4.0 | 1 / 3.5 s | 5 |' in figures.bench([BENCH])
  place = lambda folder: [tmp_path / folder / f'{name}.png' for name in ('published', 'bench')]  # noqa: E731
  script = (
    'from pathlib import Path\n'
    'from tools.figures import draw_bench, draw_published\n'
    f'one, two = {[str(p) for p in place("there")]}\n'
    f'draw_published({[PUBLISHED] * 2}, Path(one), "of (this)")\n'
    f'draw_bench({[BENCH] * 2}, Path(two), "of (this)")\n'
  )
  # Another process with another order of sets, and with settings of its own.
  (tmp_path / 'matplotlibrc').write_text('font.size: 30\naxes.facecolor: red\npdf.compression: 0\n')
  other = {**os.environ, 'PYTHONHASHSEED': '7', 'MATPLOTLIBRC': str(tmp_path / 'matplotlibrc')}
  subprocess.run([sys.executable, '-c', script], cwd=pictures.ROOT, env=other, check=True)
  one, two = place('here')
  figures.draw_published([PUBLISHED] * 2, one, 'of (this)')
  figures.draw_bench([BENCH] * 2, two, 'of (this)')
  kinds = {'png': b'\x89PNG', 'pdf': b'%PDF'}
  for here, there in zip(place('here'), place('there'), strict=True):
    for form, magic in kinds.items():
      drawn = here.with_suffix(f'.{form}').read_bytes()
      assert drawn == there.with_suffix(f'.{form}').read_bytes()
      assert drawn.startswith(magic) and b'Date' not in drawn and b'atplotlib' not in drawn


def test_a_figure_of_other_data_is_noticed(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(pictures, 'ROOT', tmp_path)
  monkeypatch.setattr(pictures, 'FIGURES', tmp_path)
  source = tmp_path / 'study'
  source.mkdir()
  (source / 'a.jsonl').write_text('1')
  (source / 'b.jsonl').write_text('2')
  with pictures.drawn(tmp_path / 'x.png', pictures.stamp(source), 2, 1) as (_, axis):
    axis.plot([0, 1])
  assert pictures.check({'x': source}) == 0
  (source / 'b.jsonl').write_text('3')
  assert pictures.check({'x': source}) == 1
  assert 'x.png' in (said := capsys.readouterr().err) and 'x.pdf' in said
  assert pictures.check({'never_drawn': source}) == 1


def test_a_device_becomes_two_tables():
  """The bound in the table of its stream; RAM from the line of the device, the newest of several."""
  run = {
    'device': 'd',
    'versions': {'jax': '1'},
    'forgetting': 0.25,
    'seed': 0,
    'method': 'naive',
    'scenario': 'class',
  }
  config = {'base': '', 'scenario': 'class'}
  bound = {'base': 'class', 'scenario': 'joint'}
  lines = [{**run, 'config': config, 'acc': a, 'method': 'er'} for a in (0.5, 0.7)]
  lines += [{**run, 'config': bound, 'scenario': 'joint', 'acc': 0.9, 'forgetting': None}]
  found = {
    'learner': 'er', 'scenario': 'class', 'target': 't', 'seed': 0, 'ram_linked': 1000, 'ram_planned': 1001,
    'ram_budget': 1024, 'macs_per_step': 5, 'steps': 4, 'hash': 'abc', 'float_error': 2e-7, 'stack_used': 9,
    'code_bytes': 7, 'every': 2, 'end_hash': 'f00', 'calls': 1350,
    'accuracy': [0.5, 1.0], 'accuracy_jax': [0.5, 0.5],
    'cuts': [{'cut': 'save 1: x', 'boots': 2, 'slot': 1, 'sequence': 4, 'position': 1234, 'hash': 'abc'}],
  }  # fmt: skip
  table = device.accuracies(lines, [{**found, 'ram_linked': 1}, found])
  first, second = table.splitlines()[2:4]
  assert first.startswith('| new words | all at once, the bound | 90.0 |')
  assert '| experience replay | 60.0 ' in second and second.endswith(
    '| 50.0, 70.0 | 25.0 ± 0.0 | 1,000 | 5 |'
  )
  text = device.cuts(lines, [found])
  assert '| save 1: x | 2 | slot 1, save 3, byte 1,234 | abc |' in text
  assert '| 1,350 | 75.00 % | 50.00 % | 70.00 % | 1,000 | 1,001 | 1,024 | 9 | 7 | f00 |' in text


def test_intervals_of_edits_are_over_facts():
  """Of all seeds; the jackknife of S, a harmonic mean, is Student's interval where a measure stands alone."""
  es, ps = [1.0, 1.0, 0.0, 0.0], [0.5, 1.0, 0.0, None]
  lines = [{'by_edit': {'es': es[:2], 'ps': ps[:2], 'ns': [None] * 2}},
           {'by_edit': {'es': es[2:], 'ps': ps[2:], 'ns': [None] * 2}}]  # fmt: skip
  assert edit.asked(lines, 'es') == '50.0 ± 91.9'  # 3.182 * 0.577 / 2
  assert edit.asked(lines, 'ps') == '50.0 ± 124.2'  # 4.303 * 0.5 / sqrt(3)
  alone = [{'by_edit': {'es': es, 'ps': [None] * 4, 'ns': [None] * 4}}]
  assert edit.asked(alone, 's') == edit.asked(alone, 'es')
  assert edit.asked(lines, 's').startswith('50.0 ± ')
  # Lines that do not say what each fact scored: over seeds.
  assert edit.asked([{'s': 0.5}, {'s': 0.7}], 's') == '60.0 ± 127.1'


def test_cells_of_a_study_that_have_not_been_run_are_named():
  cell = lambda words, *seeds: study.Cell(words, [{'seed': s} for s in seeds], [])  # noqa: E731
  cells = [cell('lora,er', 0, 1), cell('lora,naive', 1), cell('random,er'), cell('full,er', 0, 1)]
  assert study.left(cells) == (
    'Not run: `random,er` (1 of the 4 cells of the configuration). '
    'Run with 1 of the 2 orders of the tasks: `lora,naive`.'
  )
  assert study.left(cells[::3]) == 'All 2 cells of the configuration were run.'
