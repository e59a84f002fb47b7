"""Reading results.jsonl: what is used, what is left out and why, what may be ranked together."""

from __future__ import annotations

import json

import numpy as np
import pytest

from cl_jax.errors import UserError
from cl_jax.report.lines import read, sections


def test_damaged_and_foreign_lines_are_named_and_the_rest_is_used(put, make):
  cut = json.dumps(make(seed=2))[:-20]
  lines = [
    make(seed=0),  # 1
    '{"no": "result"}',  # 2
    '[1, 2]',  # 3
    '',  # 4, nothing
    'null',  # 5
    make(seed=1) | {'R': [[0.1, 0.2], [0.3]]},  # 6
    make(seed=1) | {'acc': 0.123},  # 7
    make(seed=1) | {'seed': 'one'},  # 8
    make(seed=1) | {'wall_s': '12'},  # 9
    make(seed=1) | {'needs': 'boundary'},  # 10
    make(seed=1) | {'R': None},  # 11
    make(seed=1),  # 12
    cut,  # 13
  ]
  found, problems = read(put(*lines) / 'results.jsonl')
  assert [line['seed'] for line in found] == [0, 1]
  assert [p.number for p in problems] == [2, 3, 5, 6, 7, 8, 9, 10, 11, 13]
  why = {p.number: p.why for p in problems}
  assert "'method'" in why[2] and 'list' in why[3] and "'R'" in why[6] and "'acc'" in why[7]
  assert "'seed'" in why[8] and "'wall_s'" in why[9] and "'needs'" in why[10]
  assert 'not JSON' in why[13]


def test_a_hole_in_the_last_row_is_damage_and_in_others_is_not(put, make, fade):
  R = fade(0, 0.5)
  early, late = R.copy(), R.copy()
  early[0, 1], late[-1, 1] = np.nan, np.nan
  found, problems = read(put(make(R=early), make(seed=1, R=late)) / 'results.jsonl')
  assert [line['seed'] for line in found] == [0] and [p.number for p in problems] == [2]


def test_of_a_run_that_is_there_twice_the_last_line_counts(put, make):
  first, second = make(wall_s=1.0), make(wall_s=2.0)
  found, problems = read(put(first, make('er'), second) / 'results.jsonl')
  assert {line['method']: line['wall_s'] for line in found} == {'naive': 2.0, 'er': 12.5}
  assert [(p.number, 'line 3' in p.why) for p in problems] == [(1, True)]


def test_numbers_that_are_not_finite_are_unknown(put, make):
  found, problems = read(put(make(flops_per_step=float('nan'))) / 'results.jsonl')
  assert found[0]['flops_per_step'] is None and not problems


@pytest.mark.parametrize(
  'change',
  [
    {'wall_s': 10**400},
    {'R': [[10**400]], 'tasks': 1},
    {'config': {'told': 3}},
    {'config': {'transform': 'permuted'}},
    {'config': {'update': [1]}},
    {'config': {'methods': 'er'}},
  ],
)
def test_values_of_another_kind_are_damage(put, make, change):
  found, problems = read(put(make(), {**make(seed=1), **change}) / 'results.jsonl')
  assert len(found) == 1 and len(problems) == 1 and problems[0][1] == 2


def test_no_file_is_one_clear_line(tmp_path):
  with pytest.raises(UserError, match=r'results\.jsonl does not exist: .*workdir'):
    read(tmp_path / 'results.jsonl')


def ranked(*lines):
  return [[(g.label, len(g.lines)) for g in s.groups] for s in sections(lines)]


def test_seeds_are_one_row_whatever_list_of_seeds_they_were_run_with(make):
  lines = [make(seed=0), make(seed=1, config={'seeds': [1]}), make('er', seed=0)]
  assert sorted(ranked(*lines)[0]) == [('er', 1), ('naive', 2)]


def test_scenarios_datasets_and_protocols_are_not_mixed_but_bounds_join_theirs(make, fade):
  lines = [
    make(R=fade(0, 0.9)),
    make(scenario='task', R=fade(0, 0.95)),
    make(dataset='banking77'),
    make(config={'by': 'domain'}),
    make(config={'evaluate': 'valid'}),
    make(config={'told': []}),
    make(scenario='joint', R=fade(0, 0.5)),
  ]
  groups = ranked(*lines)
  assert len(groups) == 6
  assert groups[0] == [('naive', 1), ('joint (bound)', 1)]
  assert all(g == [('naive', 1)] for g in groups[1:])
  titles = [s.title for s in sections(lines)]
  assert len(set(titles)) == 6 and titles[0] == 'clinc150, class-incremental, 4 tasks'
  assert len({s.slug for s in sections(lines)}) == 6
  online = {'scenario': 'online', 'config': {'base': 'domain'}}
  assert len(ranked(make(scenario='online'), make(**online))) == 2, 'ten outputs are not two'
  assert len({s.title for s in sections([make(scenario='online'), make(**online)])}) == 2
  assert (
    len(ranked(make(scenario='online'), make(scenario='online', config={'base': 'class'}))) == 1
  )
  files = [make(dataset='jsonl:/data/x'), make(dataset='jsonl:/data/x', config={'by': 'domain'})]
  assert [s.slug for s in sections(files)] == ['jsonl-data-x-class', 'jsonl-data-x-class--2']


def test_the_best_comes_first_and_bounds_last(make, fade):
  lines = [
    make('ewc', R=fade(0, 0.5)),
    make(scenario='joint', R=fade(0, 0.99)),
    make('er', R=fade(0, 0.9)),
  ]
  assert [label for label, _ in ranked(*lines)[0]] == ['er', 'ewc', 'joint (bound)']


def test_rows_of_one_method_say_what_tells_them_apart(make):
  lines = [
    make('er', config={'er': {'capacity': 100, 'draw': 10}}),
    make('er', config={'er': {'capacity': 500, 'draw': 10}}),
    make('ewc', config={'ewc': {'coef': 1.0}}),
  ]
  labels = {label for label, _ in ranked(*lines)[0]}
  assert labels == {'er [capacity=100]', 'er [capacity=500]', 'ewc'}
