"""The study of methods within budgets of bytes: ranks, their critical difference, and its tables."""

from __future__ import annotations

import json

import pytest

from experiments import framework, survey

BUDGETS = survey.BENCHMARKS['split_fashion']


def test_mean_ranks_share_equals():
  table = {'a': [0.9, 0.8], 'b': [0.9, 0.7], 'c': [0.1, 0.9]}
  assert survey.ranks(table) == {'a': 1.75, 'b': 2.25, 'c': 2.0}


@pytest.mark.parametrize(('k', 'q'), [(2, 1.960), (5, 2.728), (10, 3.164)])
def test_nemenyi_as_in_the_table_of_demsar(k, q):
  """JMLR 7 (2006), table 5a."""
  expected = q * (k * (k + 1) / (6 * 30)) ** 0.5
  assert survey.critical_difference(k, 30) == pytest.approx(expected, rel=1e-3)


def lines(acc, size, **more):
  return [
    {
      'acc': a, 'forgetting': 0.1, 'seed': seed, 'needs': ['task_test'], 'tuning_steps': 30, 'steps': 10,
      'state_bytes': {'total': 1_000_000 + size}, **more,
    }
    for seed, a in enumerate(acc)
  ]  # fmt: skip


def test_tables_hold_what_fits(tmp_path):
  stored = {
    ('fine-tuning', None): lines((0.5, 0.6, 0.4), 0),
    ('EWC', None): lines((0.7, 0.7), 2_000_000),
    ('ER', 400_000): lines((0.9, 0.8, 0.7), 399_000, slots={'er': 470}),
    ('ER', 3_300_000): lines((0.95, 0.9, 0.9), 3_299_000, slots={'er': 4100}),
  }
  for (name, budget), found in stored.items():
    place = survey.place_of(tmp_path, name, budget)
    place.mkdir()
    (place / 'results.jsonl').write_text(''.join(json.dumps(x) + '\n' for x in found))
  small, middle, large = survey.tables(tmp_path, BUDGETS).split('###')[1:]
  assert '0.4 MB beside the weights, 3 class orders' in small
  assert '| ER | task_test | 1.0 | 80.0 ± 24.8 | 10.0 ± 0.0 | 399,000 | 470 | 3.0 |' in small
  assert '| EWC' not in small and 'EWC' in small.split('Too large')[1]
  assert '| ER' not in middle and '| fine-tuning' in middle
  assert '2 class orders' in large  # those that all of its methods have
  assert large.index('| ER') < large.index('| EWC') < large.index('| fine-tuning')


def test_nothing_yet(tmp_path):
  assert 'nothing is finished' in survey.tables(tmp_path, BUDGETS)


def test_commands(tmp_path, monkeypatch, capsys):
  called = []
  monkeypatch.setattr(framework, 'main', lambda words: called.append(words) or 0)
  assert survey.main([f'--workdir={tmp_path}', '--seeds=2', '--only=EWC,R-PM']) == 0
  ewc, *rpm = called
  assert ewc[0].endswith(':task,ewc') and '--config.seeds=0,1' in ewc
  assert len(rpm) == 3 and all('--config.rehearsal.share=partial' in words for words in rpm)
  assert [words[-1] for words in rpm] == [f'--config.budget_bytes={b}' for b in BUDGETS]
  assert (tmp_path / 'survey.md').exists()
  called.clear()
  assert survey.main([f'--workdir={tmp_path}', '--only=HAT', '--benchmark=omniglot']) == 0
  assert called[0][0] == '--config=configs/omniglot.py:task,hat'
  assert '--config.hat.embedding=uniform' in called[0]
  called.clear()
  where = [f'--workdir={tmp_path}', '--only=mean-IMM,mode-IMM', '--benchmark=omniglot']
  assert survey.main(where) == 0
  assert [
    set(words) & {'--config.imm.mode=mean', '--config.imm.mode=mode'} for words in called
  ] == [
    {'--config.imm.mode=mean'},
    {'--config.imm.mode=mode'},
  ]
  monkeypatch.setattr(framework, 'main', lambda words: 130)
  assert survey.main([f'--workdir={tmp_path}']) == 130  # a signal ends it
  with pytest.raises(SystemExit) as stop:
    survey.main([f'--workdir={tmp_path}', '--only=EWK'])
  assert stop.value.code == 2 and "unknown ['EWK']" in capsys.readouterr().err
