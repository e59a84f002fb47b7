"""The report: its figures are what the metrics give, oracles stand apart, the bytes are always the same."""

from __future__ import annotations

import html.parser
import json
import re
import struct
from contextlib import contextmanager

import numpy as np
import pytest

from cl_jax import metrics
from cl_jax.errors import UserError
from cl_jax.report import figures, write
from cl_jax.report.figures import named
from cl_jax.report.lines import read, sections
from cl_jax.report.tables import percent, scaled, tables


class Rows(html.parser.HTMLParser):
  """The tables of a page: [(caption, [[cell, ...], ...]), ...]; also checks that tags are closed."""

  def __init__(self, text: str):
    super().__init__()
    self.tables: list[tuple[str, list[list[str]]]] = []
    self.open: list[str] = []
    self.images: list[dict] = []
    self.feed(text)
    assert not self.open

  def handle_starttag(self, tag, attrs):
    if tag in ('meta', 'img', 'source'):
      self.images += [dict(attrs)] if tag == 'img' else []
      return
    self.open.append(tag)
    if tag == 'table':
      self.tables.append(('', []))
    elif tag == 'tr':
      self.tables[-1][1].append([])
    elif tag in ('td', 'th'):
      self.tables[-1][1][-1].append('')

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if 'caption' in self.open:
      self.tables[-1] = (self.tables[-1][0] + data, self.tables[-1][1])
    elif self.open and self.open[-1] in ('td', 'th'):
      self.tables[-1][1][-1][-1] += data


@pytest.fixture
def folder(put, make, fade):
  """Three methods with three seeds, an oracle, a single seed, a bound, and a damaged line."""
  lines = [make('er', s, fade(s, 0.9), total=2_000_000) for s in range(3)]
  lines += [make('naive', s, fade(s, 0.3)) for s in range(3)]
  lines += [make('hat', s, fade(s, 0.99), ('task_test', 'task_train')) for s in range(3)]
  lines += [make('ewc', 0, fade(0, 0.5), ('boundary',))]
  lines += [make('naive', s, fade(s, 0.99), scenario='joint') for s in range(3)]
  return put(*lines, '{"method": "half a li')


def cell(rows: list[list[str]], method: str, column: str) -> str:
  row = next(r for r in rows[1:] if r[0] == method)
  return row[rows[0].index(column)]


def test_the_table_says_what_the_metrics_give(folder, fade):
  page = Rows(write(folder).read_text())
  caption, rows = page.tables[0]
  assert caption == 'Results, not told the task at test time'
  assert [r[0] for r in rows[1:]] == ['er', 'ewc', 'naive', 'joint (bound)']
  for column, measure in (
    ('ACC %', metrics.accuracy),
    ('forgetting', metrics.forgetting),
    ('BWT', metrics.backward_transfer),
    ('learning ACC', metrics.learning_accuracy),
    ('average ACC', metrics.average_incremental_accuracy),
    ('min-ACC', metrics.minimum_accuracy),
  ):
    values = [100 * measure(fade(s, 0.9)) for s in range(3)]
    centre, half = np.mean(values), 4.303 * np.std(values, ddof=1) / np.sqrt(3)
    assert cell(rows, 'er', column) == f'{centre:.1f} ± {half:.1f}'
  assert cell(rows, 'er', 'state') == '2.00 MB' and cell(rows, 'er', 'time') == '12.5 s'
  assert cell(rows, 'er', 'seeds') == '3' and cell(rows, 'ewc', 'needs') == 'boundary'
  assert cell(rows, 'joint (bound)', 'forgetting') == '–'
  assert 'FWT' not in rows[0]  # no line has it


def test_one_seed_has_no_interval(folder, fade):
  rows = Rows(write(folder).read_text()).tables[0][1]
  assert cell(rows, 'ewc', 'ACC %') == f'{100 * fade(0, 0.5)[-1].mean():.1f}'


def test_oracles_are_in_a_table_of_their_own(folder):
  page = Rows(write(folder).read_text())
  with_hat = [c for c, rows in page.tables if any(r[0] == 'hat' for r in rows)]
  assert with_hat == [f'{t}, told the task at test time (an oracle)' for t in ('Results', 'Costs')]
  for caption, rows in page.tables:
    if 'oracle' in caption:
      assert [r[0] for r in rows[1:]] == ['hat']
  assert cell(page.tables[1][1], 'hat', 'needs') == 'task_test, task_train'


def test_costs_are_listed_by_role(folder):
  page = Rows(write(folder).read_text())
  rows = next(r for c, r in page.tables if c == 'Costs, not told the task at test time')
  assert rows[0][1:6] == ['frozen', 'trainable', 'optimiser', 'method state', 'loop']
  assert cell(rows, 'er', 'method state') == '300 B' and cell(rows, 'er', 'frozen') == '500 kB'
  assert cell(rows, 'er', 'FLOPs / step') == '2.50 M' and cell(rows, 'er', 'backward') == '1'
  assert cell(rows, 'er', 'of it compiling') == '2.50 s'


def test_costs_tell_what_cached_features_stand_for(put, make):
  """Of a line that says it, and of one from before, whose configuration says how often an example is seen."""
  said = {
    'train_forward': 0.5,
    'predict_forward': 1.0,
    'flops_per_step': 7e9,
    'flops_per_prediction': 1e10,
  }
  kept = {'cache_features': True}
  lines, _ = read(
    put(make('er', config=kept, backbone=said), make('ncm', config=kept)) / 'results.jsonl'
  )
  ((_, costs),) = tables(sections(lines)[0])
  first, second = (dict(zip(costs.head, row, strict=True)) for row in costs.rows)
  assert 'features are cached' in costs.caption
  assert first['FLOPs / step'] == '2.50 M + 7.00 G' and second['FLOPs / step'] == '2.50 M + ?'
  for row in (first, second):
    assert [row[k] for k in ('passes: forward', 'backward', 'predict')] == ['1 + 0.5', '1', '1 + 1']
  ((_, costs),) = tables(
    sections([{**lines[1], 'config': {**lines[1]['config'], 'iterations': 9}}])[0]
  )
  assert '1 + ?' in costs.rows[0]


def test_damage_is_reported_by_line(folder):
  text = write(folder).read_text()
  assert '1 run or line was left out' in text and 'results.jsonl, line 14: not JSON' in text


def test_the_page_needs_no_other_file(folder):
  text = write(folder).read_text()
  page = Rows(text)
  assert len(page.images) == 3
  assert all(i['src'].startswith('data:image/png;base64,') and i['alt'] for i in page.images)
  assert not re.search(r'<(script|link|iframe)|https?://|url\(', text)
  assert 'prefers-color-scheme: dark' in text and '<html lang="en">' in text


@pytest.mark.parametrize('wanted', [False, True])
def test_growth_is_drawn_where_a_method_grows(put, make, wanted):
  """Bytes after each task; a method without such a list is bounded."""
  grown = [900_000, 1_000_000, 1_100_000, 1_200_000]
  more = {'state_bytes_by_task': grown} if wanted else {}
  folder = put(make(), make('pnn', total=1_200_000, **more))
  text = write(folder).read_text()
  assert ('Bytes of state after each task' in text) == wanted
  assert ('it comes. pnn: more with every task' in text) == wanted
  assert (folder / 'figures/clinc150-class-growth.png').exists() == wanted


def test_growth_must_be_a_list_of_numbers(put, make):
  folder = put(make(state_bytes_by_task=7), make('er'))
  assert 'must be a list of numbers' in write(folder).read_text()


def test_figures_are_pngs_and_always_the_same_bytes(folder, monkeypatch):
  page = write(folder).read_bytes()
  names = sorted(p.name for p in (folder / 'figures').iterdir())
  assert names == [f'clinc150-class-{n}.png' for n in ('accuracy', 'bytes', 'matrices')]
  before = {n: (folder / 'figures' / n).read_bytes() for n in names}
  for png in before.values():
    assert png.startswith(b'\x89PNG') and b'tEXt' not in png and b'tIME' not in png
    width, height = struct.unpack('>II', png[16:24])
    assert 500 < width < 2500 and 300 < height < 2500 and len(png) < 300_000
  import matplotlib

  with matplotlib.rc_context({'axes.facecolor': 'red', 'font.size': 30, 'savefig.dpi': 40}):
    assert write(folder).read_bytes() == page  # the user's own style changes nothing
  assert before == {n: (folder / 'figures' / n).read_bytes() for n in names}


def test_a_curve_inside_the_tasks_is_drawn_where_there_is_one(put, make):
  curve = np.random.default_rng(0).random((4, 5, 4)).round(3)
  curve[2, 3:] = np.nan  # a shorter leg
  rows = [[[None if np.isnan(v) else v for v in r] for r in leg] for leg in curve]
  folder = put(make('er', curve=rows, config={'eval_every': 10}), make())
  page = Rows(write(folder).read_text())
  assert (folder / 'figures' / 'clinc150-class-stability.png').stat().st_size > 5000
  assert any('during training of er' in i['alt'] for i in page.images)


@pytest.mark.parametrize('segments', [4, 2, 9])
def test_the_axis_of_accuracy_ends_with_the_last_evaluation(put, make, monkeypatch, segments):
  """Of a blurry stream, which may be evaluated more or less often than it has tasks; its lines are whole."""
  drawn, canvas = {}, figures.canvas

  @contextmanager
  def kept(*args):
    with canvas(*args) as (fig, png):
      yield fig, png
      drawn[fig.axes[0].get_ylabel()] = fig.axes[0]

  monkeypatch.setattr(figures, 'canvas', kept)
  R = np.random.default_rng(0).random((segments, 4)).round(3)
  text = write(put(make('er', R=R, scenario='blurry', config={'base': 'class'}))).read_text()
  square = segments == 4
  ax = drawn[f'accuracy on {"tasks seen so far" if square else "all tasks"}, %']
  assert ax.get_xlabel() == ('tasks learnt' if square else 'evaluations')
  assert ax.get_xlim() == (0.8, segments + 0.15)
  assert ax.get_xticks().tolist() == ax.lines[0].get_xdata().tolist() == [*range(1, segments + 1)]
  (leader,) = ax.texts
  assert leader.xy == (segments, pytest.approx(100 * R[-1].mean()))
  assert ('after each task' in text) == square == ('at each evaluation' not in text)


def test_names_from_the_lines_cannot_break_the_page(put, make):
  folder = put(make('<b>$x_1$ & "er"', dataset='a<script>alert(1)</script>'))
  text = write(folder).read_text()
  assert '<script>' not in text and '<b>' not in text
  assert Rows(text).tables[0][1][1][0] == '<b>$x_1$ & "er"'


def test_many_methods_make_readable_figures_that_say_what_is_left_out(put, make, fade):
  lines = [make(f'method{i}', R=fade(i, 0.05 * i)) for i in range(15)]
  text = write(put(*lines)).read_text()
  assert 'The first 12 methods of the table; 3 are left out.' in text


def test_a_report_without_a_single_usable_line_says_so(put):
  text = write(put('nonsense')).read_text()
  assert '1 run or line was left out' in text and '<table' not in text


def test_runs_that_nan_stopped_are_listed(put, make):
  folder = put(make())
  fault = {'run': 'optimizer.lr 10.0, seed 1', 'what': 'the loss', 'value': 'nan', 'leg': 1}
  (folder / 'faults.jsonl').write_text(json.dumps({**fault, 'seed': 1}) + '\n[]\n')
  text = write(folder).read_text()
  assert '2 runs or lines were left out' in text
  assert 'line 1: optimizer.lr 10.0, seed 1: stopped, the loss is nan in leg 2' in text
  assert 'faults.jsonl, line 2: not a run that was stopped' in text


def test_a_place_that_cannot_be_written_is_one_clear_line(put, make):
  folder = put(make())
  (folder / 'figures').write_text('in the way')
  with pytest.raises(UserError, match=r'report\.html cannot be written'):
    write(folder)


def test_no_table_holds_oracles_and_others(folder):
  lines, _ = read(folder / 'results.jsonl')
  for section in sections(lines):
    for pair in tables(section):
      for table in pair:
        assert ('hat' in {row[0] for row in table.rows}) == ('oracle' in table.caption)


def test_answers_to_whole_batches_are_in_a_table_of_their_own(put, make):
  """A batch of one task tells it; who is told the task as well stands with the oracles."""
  needs = {'naive': (), 'l2p': ('batch_test',), 'hat': ('task_test', 'batch_test')}
  lines, _ = read(put(*(make(name, needs=n) for name, n in needs.items())) / 'results.jsonl')
  (section,) = sections(lines)
  found = {costs.caption: [row[0] for row in costs.rows] for _, costs in tables(section)}
  plain, batches, told = found
  assert [*found.values()] == [['naive'], ['l2p'], ['hat']]
  assert 'oracle' not in plain and 'told the task' in told
  assert 'test batches as a whole' in batches and '(an oracle)' in batches
  assert [named(g) for g in section.groups if g.oracle] == ['hat (oracle)', 'l2p (oracle)']


@pytest.mark.parametrize(
  ('n', 'shown'),
  [
    (None, '–'),
    (0, '0 B'),
    (999, '999 B'),
    (999_600, '1.00 MB'),
    (1500, '1.50 kB'),
    (4.25e10, '42.5 GB'),
  ],
)
def test_sizes_have_three_digits(n, shown):
  assert scaled(n, 'B') == shown


def test_percent_of_nothing_is_a_dash():
  assert percent([]) == '–' and percent([0.5]) == '50.0'
  assert percent([0.5, 0.6]) == '55.0 ± 63.5'
