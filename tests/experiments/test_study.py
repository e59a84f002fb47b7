"""Studies: cells as processes that resume, what moved, tables; every cell of those that ship is valid."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest

from cl_jax import budget
from cl_jax.learner import learner
from cl_jax.report.tables import size
from cl_jax.types import Batch
from configs import study_encoder, study_lm, study_vit
from experiments import build, config, job, run, study
from experiments.chain import chain_of
from tests.experiments.conftest import language_model

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
    (study_encoder, ('clinc150', 'banking77', 'clinc150,large', 'banking77,large')),
    (study_vit, ('cifar10', 'omniglot', 'cifar10,large', 'omniglot,large')),
    (study_lm, ('', 'large')),
  ],
)
def test_every_cell_of_the_studies_that_ship_is_valid(module, data):
  for cell in module.CELLS:
    adapted, _, method = cell.partition(',')
    assert adapted in module.NAMES and adapted in module.RATES
    for word in data:
      resolved = config.resolve(module.get_config(f'{word},{cell}'))
      words = ('naive', 'local', 'joint', 'vote', 'long')
      own = [w for w in method.split(',') if w not in words and not w[0].isdigit()]
      assert resolved.get('l2p', {}).get('vote', False) == ('vote' in cell)
      assert set(own) <= set(resolved['methods'])
      assert resolved['optimizer']['reset'] == (adapted not in ('closed', 'small'))
      assert resolved['epochs'] == 10 or 'long' not in cell
      assert (resolved['scenario'] == 'joint') == ('joint' in cell)
  assert len({json.dumps(module.get_config(c), default=str) for c in module.CELLS}) == len(
    module.CELLS
  )


@pytest.mark.parametrize(
  ('module', 'word', 'x'),
  [
    (study_encoder, 'banking77', {'tokens': ((104,), 'int32'), 'mask': ((104,), 'bool')}),
    (study_vit, 'cifar10', ((224, 224, 3), 'uint8')),
    (
      study_lm,
      '',
      {k: ((512,), t) for k, t in (('tokens', 'int32'), ('mask', 'bool'), ('learn', 'bool'))},
    ),
  ],
)
def test_a_large_network_takes_a_step(module, word, x):
  """By shapes alone, from random weights: bfloat16 between the layers, each of which is computed twice."""
  resolved = config.resolve(module.get_config(f'{word},large,random,naive'))
  rows = resolved['batch']
  assert rows >= 32 and (module is study_vit or resolved['data']['length'] == x['tokens'][0][0])
  struct = lambda shape, kind: jax.ShapeDtypeStruct((rows, *shape), kind)  # noqa: E731
  kinds = jax.tree.map(lambda s: struct(*s), x, is_leaf=lambda s: isinstance(s, tuple))
  batch = Batch(kinds, struct((), 'int32'), struct((), 'float32'), struct((), 'int32'))
  model = build.network(resolved, 77)[0]({'frozen': {}, 'initial': {}})
  made = learner(model, optax.identity())
  state = jax.eval_shape(made.init, jax.random.key(0), batch)
  program = str(jax.make_jaxpr(made.step)(state, batch))
  assert 'remat' in program and 'bf16[' in program
  assert jax.eval_shape(made.step, state, batch)[0].params == state.params


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


@pytest.mark.usefixtures('quickly')
def test_drift_is_from_the_network_without_its_method(tmp_path, monkeypatch):
  """HAT's drawn gates change the features before the first step, which counts as drift."""
  moved = {}
  for method in ('l2', 'hat'):
    file = tmp_path / 'study_tiny.py'
    file.write_text(TINY)
    raw = {**config.load(f'{file}:naive'), 'scenario': 'task', 'methods': (method,)}
    resolved = config.resolve(raw)
    (setup,) = build.prepare(resolved)
    stream, hp = setup.streams[0], build.hyper(resolved, setup.streams[0])
    first = jax.tree.map(lambda a: a[0, 0, :1], stream.test)
    state = jax.jit(setup.build(hp, setup.weights).init)(
      jax.random.key(resolved['seeds'][0]), first
    )
    chosen = chain_of(resolved, stream, hp, setup.model(setup.weights).wires)
    end = run.End(setup, tmp_path / 'none', state, hp, chosen)
    monkeypatch.setattr(run, 'end_of', lambda *a, end=end: end)
    study.measure(SimpleNamespace(config=resolved, data_dir=None), tmp_path, (), print)
    moved[method] = json.loads((tmp_path / study.DRIFT).read_text())['cka']
  assert moved['l2'] == 1 and moved['hat'] < 0.99


@pytest.mark.long
def test_a_study_runs_resumes_and_draws(tmp_path, monkeypatch, capfd):
  file = tmp_path / 'study_tiny.py'
  file.write_text(TINY)
  argv = [f'--config={file}', f'--workdir={tmp_path / "runs"}', '--seeds=2']
  assert study.main([*argv, '--only=naive', '--workers=1']) == 0
  out = capfd.readouterr().out
  assert '2 of 2 runs to do' in out
  assert (
    out.index('what they will need') < out.index('the most, naive-0: ') < out.index('forgetting')
  )
  planned = []
  monkeypatch.setattr(study, 'foretell', lambda options, cells: planned.append(cells))
  assert study.main([*argv, '--workers=2']) == 0
  assert '2 of 4 runs to do' in capfd.readouterr().out and planned == [['er']]
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
  head, naive, er, most = capfd.readouterr().out.splitlines()
  assert head.split()[0] == 'cell' and not (tmp_path / 'runs').exists()
  # 784-16-10 with plain SGD, a key of two words and the step.
  kept = 4 * (784 * 16 + 16 + 16 * 10 + 10) + 12
  assert naive.split()[:2] == ['naive-0', '0'] and size(kept) in naive
  (setup,) = build.prepare(config.resolve(config.load(f'{file}:er')))
  state = jax.jit(setup.build(build.hyper(setup.config, setup.streams[0]), setup.weights).init)(
    jax.random.key(0), build.example(setup.streams[0])
  )
  assert er.startswith('er-0 ') and size(budget.tree_bytes(state)) in er and size(kept) not in er
  assert most.startswith('the most, er-0: ')


@pytest.mark.usefixtures('quickly')
def test_what_is_needed_is_what_lies_on_the_device(tmp_path):
  """Bytes of arrays: frozen weights, pretrained ones that are trained, the stream and the state of a run."""
  words = 'what is my balance please transfer some money to the bank'.split()
  raw = {
    'dataset': 'clinc150',
    'by': 'domain',
    'tasks': None,
    'data': {'length': 8, 'examples_per_class': 1, 'test_per_task': 5, 'test_batch': 5},
    'batch': 5,
    'model': {
      'name': 'decoder',
      'pretrained': str(language_model(tmp_path / 'lm', words)),
      'pool': 'mean',
    },
    'freeze': ('backbone/embed/.*',),
    'optimizer': {'name': 'adam', 'lr': 1e-3},
  }
  (setup,) = build.prepare(config.resolve(raw))
  cost = study.needed(setup)
  plan = job.spread(run.job(setup, tmp_path, 'sha'))
  real = lambda tree: sum(a.nbytes for a in jax.tree.leaves(tree))  # noqa: E731
  frozen, initial = (real(plan.weights[k]) for k in ('frozen', 'initial'))
  assert min(frozen, initial) > 0 and cost['weights'] == frozen + initial
  assert cost['data'] == real(plan.stream) > 8 * 4 * 150
  made = setup.build(plan.hp, plan.weights)
  state = jax.jit(made.init)(plan.key, build.example(setup.streams[0]))
  assert cost['state'] == budget.tree_bytes(state) > 3 * initial
  assert cost['temporary'] > real(state.params)  # a gradient
  assert (
    cost['together'] == sum(cost[k] for k in ('weights', 'data', 'temporary')) + 2 * cost['state']
  )
  assert cost['steps'] == 10 * 3 and cost['flops'] > 0


def test_the_network_behind_cached_features_is_needed_too(tmp_path, monkeypatch):
  monkeypatch.setenv('CL_JAX_CACHE', str(tmp_path))
  (tmp_path / 'study_tiny.py').write_text(TINY)
  raw = config.load(f'{tmp_path / "study_tiny.py"}:naive') | {
    'freeze': ('l0/.*',),
    'cache_features': True,
  }
  cost = study.needed(build.prepare(config.resolve(raw))[0])
  assert cost['weights'] == 4 * (784 * 16 + 16) and cost['state'] < 1000


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
