"""Studies: cells as processes that resume, what moved, tables; every cell of those that ship is valid."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from configs import study_encoder, study_lm, study_vit
from experiments import config, study

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
TINY = """
from configs.common import words

CELLS = ('naive', 'er')

def get_config(arg='naive'):
  fields, methods = words(arg, 'class')
  return {
    **fields,
    'name': 'tiny',
    'data': {'examples_per_class': 20, 'test_per_task': 20, 'test_batch': 20},
    'batch': 10,
    'model': {'name': 'mlp', 'sizes': (16,)},
    'methods': methods,
    **({'er': {'capacity': 30, 'draw': 5}} if 'er' in methods else {}),
  }
"""


@pytest.mark.parametrize(
  ('module', 'data'),
  [
    (study_encoder, ('clinc150', 'banking77')),
    (study_vit, ('cifar10', 'omniglot')),
    (study_lm, ('', 'large')),
  ],
)
def test_every_cell_of_the_studies_that_ship_is_valid(module, data):
  for cell in module.CELLS:
    adapted, _, method = cell.partition(',')
    assert adapted in module.NAMES and adapted in module.RATES
    for word in data:
      resolved = config.resolve(module.get_config(f'{word},{cell}'))
      own = [
        w for w in method.split(',') if w not in ('naive', 'local', 'joint') and not w[0].isdigit()
      ]
      assert set(own) <= set(resolved['methods'])
      assert (resolved['scenario'] == 'joint') == ('joint' in cell)
  assert len({json.dumps(module.get_config(c), default=str) for c in module.CELLS}) == len(
    module.CELLS
  )


def test_cka_is_one_up_to_rotation_and_scale_and_falls_with_noise():
  rng = np.random.default_rng(0)
  a = rng.normal(size=(50, 6))
  turned = a @ np.linalg.qr(rng.normal(size=(6, 6)))[0] * 3 + 7
  assert study.cka(a, a) == pytest.approx(1)
  assert study.cka(a, turned) == pytest.approx(1)
  little, much = (study.cka(a, a + s * rng.normal(size=a.shape)) for s in (0.1, 3.0))
  assert 0.95 < little < 1 and much < 0.6
  # By its definition through centred Gram matrices.
  b = rng.normal(size=(50, 4))
  k, m = (c @ c.T for c in (a - a.mean(0), b - b.mean(0)))
  assert study.cka(a, b) == pytest.approx((k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum()))


def test_a_study_runs_resumes_and_draws(tmp_path, monkeypatch, capfd):
  file = tmp_path / 'study_tiny.py'
  file.write_text(TINY)
  argv = [f'--config={file}', f'--workdir={tmp_path / "runs"}', '--seeds=2']
  assert study.main([*argv, '--only=naive', '--workers=1']) == 0
  assert study.main([*argv, '--workers=2']) == 0
  out = capfd.readouterr().out
  assert '2 of 2 runs to do' in out and '2 of 4 runs to do' in out
  lines = [json.loads(r) for r in (tmp_path / 'runs/results.jsonl').read_text().splitlines()]
  assert sorted((r['method'], r['seed']) for r in lines) == [
    ('er', 0), ('er', 1), ('naive', 0), ('naive', 1),
  ]  # fmt: skip
  drift = [json.loads(r) for r in (tmp_path / 'runs/drift.jsonl').read_text().splitlines()]
  assert {(d['cell'], d['seed']) for d in drift} == {(r['method'], r['seed']) for r in lines}
  assert all(0 < d['cka'] < 1 for d in drift)
  assert 'naive' in (tmp_path / 'runs/table.md').read_text()
  left = [p for p in (tmp_path / 'runs').rglob('checkpoints/**/*') if p.is_file()]
  assert not left, 'a study of large models would fill the disk'
  assert study.main([*argv]) == 0
  assert '0 of 4 runs to do' in capfd.readouterr().out


def test_a_plan_says_what_is_needed_and_runs_nothing(tmp_path, capfd):
  file = tmp_path / 'study_tiny.py'
  file.write_text(TINY)
  assert study.main([f'--config={file}', f'--workdir={tmp_path / "runs"}', '--plan']) == 0
  out = capfd.readouterr().out
  assert 'naive-0' in out and 'er-0' in out and not (tmp_path / 'runs').exists()


@pytest.mark.parametrize(
  ('argv', 'match'),
  [
    (['--config=configs/study_nothing.py'], 'there is no file'),
    (['--config=configs/demo.py'], 'has no CELLS and is no study'),
    (['--config=configs/study_lm.py', '--only=lroa,*'], 'matches no cell; there are lora,naive'),
    (['--config=configs/study_lm.py', '--seeds=0'], 'must be at least 1'),
  ],
)
def test_mistakes_are_one_line(argv, match, monkeypatch, capsys):
  monkeypatch.chdir(CONFIGS.parent)
  assert study.main(argv) == 2
  err = capsys.readouterr().err
  assert match in err and len(err.strip().splitlines()) == 1
