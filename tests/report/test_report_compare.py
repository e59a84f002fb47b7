"""The command that puts the runs of several directories side by side."""

from __future__ import annotations

import pytest

from cl_jax.report.tables import Table
from experiments import compare


def test_runs_of_several_directories_are_one_table(put, make, fade, capsys):
  a = put(make('er', 0, fade(0, 0.9)), name='a')
  b = put(make('er', 1, fade(1, 0.9)), make('ewc', 0, fade(0, 0.4)), name='b')
  assert compare.main([str(a), str(b)]) == 0
  out = capsys.readouterr().out.splitlines()
  assert out[0] == 'clinc150, class-incremental, 4 tasks'
  assert out[3].split()[:2] == ['method', 'needs']
  assert [line.split()[0] for line in out[4:6]] == ['er', 'ewc']
  assert out[4].split()[2] == '2' and '±' in out[4] and '±' not in out[5]


def test_scenarios_and_oracles_are_not_in_one_ranking(put, make, capsys):
  folder = put(make('er'), make('er', scenario='task'), make('hat', needs=('task_test',)))
  assert compare.main([str(folder)]) == 0
  out = capsys.readouterr().out
  assert out.count('\nmethod ') == 3
  assert 'clinc150, task-incremental, 4 tasks' in out and '(an oracle)' in out


def test_a_run_that_is_in_two_directories_counts_once(put, make, capsys):
  a, b = put(make('er'), name='a'), put(make('er'), name='b')
  assert compare.main([str(a), str(b)]) == 0
  assert capsys.readouterr().out.splitlines()[4].split()[2] == '1'


def test_out_gets_markdown_and_a_report(put, make, tmp_path, capsys):
  folder = put(make('er'), make('a|b'))
  assert compare.main([str(folder), '--out', str(tmp_path / 'new' / 'out')]) == 0
  text = (tmp_path / 'new' / 'out' / 'compare.md').read_text()
  assert '| method | needs | seeds |' in text and '|---|---|---:|' in text and 'a\\|b' in text
  assert (tmp_path / 'new' / 'out' / 'report.html').exists()
  assert 'compare.md' in capsys.readouterr().out


def test_what_has_no_results_is_named_and_left_out(put, make, tmp_path, capsys):
  put(make('er'))
  (tmp_path / 'tuned/er').mkdir(parents=True)
  for _ in range(2):  # the second time what the first one has written is among them
    assert compare.main([*map(str, sorted(tmp_path.iterdir())), '--out', str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert shown.err.count('\n') == 1 and str(tmp_path / 'tuned') in shown.err and 'er' in shown.out
  for name in ('compare.md', 'report.html', 'figures'):
    assert str(tmp_path / name) in shown.err


@pytest.mark.parametrize('names', [('no',), ('no', 'nor')])
def test_missing_directories_are_one_clear_line(names, tmp_path, capsys):
  assert compare.main([str(tmp_path / name) for name in names]) == 2
  error = capsys.readouterr().err
  assert error.count('\n') == 1 and f'{names[-1]}: name the --workdir' in error
  assert all(str(tmp_path / name) in error for name in names)


def test_damaged_lines_go_to_stderr_and_the_rest_is_shown(put, make, capsys):
  assert compare.main([str(put('{', make()))]) == 0
  shown = capsys.readouterr()
  assert 'line 1 left out: not JSON' in shown.err and 'naive' in shown.out


def test_nothing_usable_is_the_users_mistake(put, capsys):
  assert compare.main([str(put('{'))]) == 2
  assert 'no usable result' in capsys.readouterr().err


@pytest.mark.parametrize(('width', 'columns'), [(200, 5), (30, 3)])
def test_a_narrow_terminal_loses_the_columns_that_matter_least(width, columns):
  table = Table(
    't', ('method', 'needs', 'BWT', 'ACC %', 'state'), (('er', 'boundary', '1', '2', '3'),)
  )
  kept = compare.fitted(table, width)
  assert len(kept.head) == columns and {'method', 'ACC %', 'state'} <= {*kept.head}


def test_on_a_terminal_rich_draws_the_same_cells(put, make, capsys, monkeypatch):
  pytest.importorskip('rich')
  monkeypatch.setattr('sys.stdout.isatty', lambda: True, raising=False)
  monkeypatch.setenv('COLUMNS', '200')
  assert compare.main([str(put(make('er')))]) == 0
  out = capsys.readouterr().out
  assert 'average ACC' in out and '1.00 MB' in out and '─' in out
