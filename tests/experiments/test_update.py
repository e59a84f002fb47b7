"""`config.update` and `config.micro_batches`: what is built, what is printed, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cl_jax import sparse
from cl_jax.errors import UserError
from cl_jax.masks import paths
from cl_jax.report import lines
from cl_jax.types import overlay
from configs import edge_sparse
from experiments import budget, build, config, savings
from experiments.export import main as export
from experiments.verify import main as verify
from tests.experiments.test_build import saved_vit

pytestmark = pytest.mark.usefixtures('quickly')

ROOT = Path(__file__).resolve().parents[2]
RAW = {
  'data': {'examples_per_class': 24, 'test_per_task': 20, 'test_batch': 20},
  'batch': 8,
  'model': {'name': 'mlp', 'sizes': (8, 8)},
  'optimizer': {'name': 'adam', 'lr': 1e-3},
}
SOME = (('l0/.*', 'in 0.25'), ('l1/.*', 'bias'), ('head/.*', 'all'))
UPDATE = {'parts': SOME, 'channels': 'gradient'}
LORA = {'methods': ('lora',), 'update': {'parts': SOME}}
ACE = {'micro_batches': 2, 'methods': ('er_ace',), 'er_ace': {'capacity': 9, 'draw': 4}}


def setup(**fields) -> build.Setup:
  return build.prepare(config.resolve({**RAW, **fields}))[0]


def begun(one: build.Setup, seed: int = 0):
  hp = build.hyper(one.config, one.streams[0])
  made = one.build(hp, one.weights)
  return made, jax.jit(made.init)(jax.random.key(seed), build.example(one.streams[0]))


def test_the_channels_of_largest_gradient_are_trained():
  """Border pixels, that are black in every image, are not among them; other seeds get the same ones."""
  one = setup(update=UPDATE)
  assert set(paths(one.frozen)) == {'rest/in/l0/w', 'l1/w'}
  _, state = begun(one)
  shapes = {p: a.shape for p, a in paths(state.params).items()}
  assert shapes['l0/w'] == (196, 8) and shapes['l0/b'] == (8,) and 'l1/w' not in shapes
  assert one.frozen['rest']['in']['l0']['w'].shape == (588, 8)
  plain = setup()
  _, dense = begun(plain)
  rows = {tuple(row) for row in np.asarray(dense.params['l0']['w']).tolist()}
  assert all(tuple(row) in rows for row in np.asarray(state.params['l0']['w']).tolist())
  first = np.asarray(dense.params['l0']['w'])[:196]
  assert not np.array_equal(first, state.params['l0']['w'])
  batch = build.example(plain.streams[0])
  brightness = np.asarray(batch.x).reshape(8, -1).max(0)
  kept = [rows_of(dense.params['l0']['w'], row) for row in state.params['l0']['w']]
  assert brightness[kept].mean() > 1.3 * brightness.mean()


def rows_of(w, row) -> int:
  return int(np.flatnonzero((np.asarray(w) == np.asarray(row)).all(1))[0])


def test_pretrained_weights_are_apart_and_whole_again(tmp_path):
  shape = saved_vit(tmp_path)
  parts = (
    ('backbone/layers/up/.*', 'out 0.5'), ('backbone/layers/q/.*', 'last 1'), ('backbone/.*', 'none'),
    ('head/.*', 'all'),
  )  # fmt: skip
  model = {'name': 'vit', 'pretrained': str(tmp_path), 'image': 28}
  one, plain = setup(model=model, update={'parts': parts}), setup(model=model)
  state = begun(plain)[1]
  got = sparse.whole(overlay(one.weights['frozen'], one.weights['initial']))['backbone']
  want = paths(state.params['backbone'])
  for path, a in paths(got).items():
    if path != 'positions':  # resampled when the network is made
      np.testing.assert_array_equal(a, want[path], err_msg=path)
  made = jax.eval_shape(lambda: begun(one)[1]).params['backbone']['layers']
  assert made['up']['w'].shape == (shape.depth, shape.d, shape.ffn // 2)
  assert made['q']['w'].shape == (1, shape.d, shape.d)


@pytest.mark.parametrize('bits', [16, 8, 4])
def test_parts_of_pretrained_weights_above_frozen_bits(tmp_path, bits):
  """The same is trained as above float32: no frozen weight in few bits counts as a parameter of its own."""
  saved_vit(tmp_path, 64)
  parts = (
    ('backbone/layers/up/.*', 'out 0.5'), ('backbone/layers/q/.*', 'last 1'),
    # Covers the weights and not the arrays that they are stored in.
    (r'backbone/(.*/[wb]|.*norm.*|.*scale\d|cls|positions)', 'none'),
    ('head/.*', 'all'),
  )  # fmt: skip
  given = {
    'model': {'name': 'vit', 'pretrained': str(tmp_path), 'image': 28},
    'update': {'parts': parts},
    'data': {**RAW['data'], 'examples_per_class': 4},
  }
  few, plain = setup(**given, frozen_bits=bits), setup(**given)
  name = {16: 'bfloat16', 8: 'int8', 4: 'int4'}[bits]
  for path in (
    'backbone/layers/k/w',
    'rest/out/backbone/layers/up/w',
    'rest/last/backbone/layers/q/w',
  ):
    assert f'{path}/{name}' in paths(few.frozen), path
  shapes = lambda one: jax.tree.map(jnp.shape, jax.eval_shape(lambda: begun(one)[1].params))  # noqa: E731
  assert shapes(few) == shapes(plain)
  got, want = (
    sparse.whole(overlay(one.weights['frozen'], one.weights['initial']))['backbone']['layers']
    for one in (few, plain)
  )
  assert set(got['k']['w']) >= {name}  # as it is stored
  for layer, trained in (('up', np.s_[..., :64]), ('q', np.s_[2:])):
    a, b = got[layer]['w'], want[layer]['w']
    np.testing.assert_array_equal(a[trained], b[trained])
    assert 0 < jnp.abs(a - b).max() < {16: 0.02, 8: 0.03, 4: 0.5}[bits]


def test_the_budget_tells_what_is_saved():
  """784-8-8-10, 8 rows, in halves: by hand."""
  resolved = config.resolve({**RAW, 'update': {'parts': SOME}, 'micro_batches': 2})
  about = budget.figures(resolved, ['45nm-cache'])
  own, full = (about['savings'][k] for k in ('own', 'full'))
  n, l0, l1, head = 8, 784 * 8, 8 * 8, 8 * 10
  assert full['macs']['backward'] == n * (l0 + 2 * l1 + 2 * head)
  assert own['macs']['backward'] == n * (l0 // 4 + l1 + 2 * head)
  assert own['macs']['forward'] == full['macs']['forward'] == n * (l0 + l1 + head)
  trained = 4 * (l0 // 4 + 8 + 8 + head + 10)
  assert own['trainable'] == trained and own['optimiser'] == 2 * trained + 4
  assert full['optimiser'] == 2 * full['trainable'] + 4 == 2 * 4 * (l0 + 8 + l1 + 8 + head + 10) + 4
  assert own['temporary_bytes'] < full['temporary_bytes']
  text = budget.table(about)
  assert 'against all in one piece' in text and f'{own["macs"]["total"]:,}' in text
  assert savings.full(config.resolve(RAW)) is None


def test_what_is_compared_has_the_slots_that_a_budget_of_bytes_gives():
  """A penalty's two copies of what is trained grow by all weights; the memory beside them stays as it is."""
  given = {**RAW, 'update': {'parts': (('l[01]/.*', 'none'), ('head/.*', 'all'))}}
  for methods, budget_bytes in ((('er', 'ewc'), 60_000), (('ewc',), 2000)):
    own = {'methods': methods, 'budget_bytes': budget_bytes}
    about = budget.figures(config.resolve({**given, **own}), ['45nm-cache'])
    few, full = (about['savings'][k] for k in ('own', 'full'))
    assert few['methods'] <= budget_bytes < full['methods']
    assert full['methods'] - few['methods'] == 2 * (full['trainable'] - few['trainable'])


def test_a_run_without_them_is_the_run_it_was():
  resolved = config.resolve(RAW)
  younger = ('budget', 'update', 'micro_batches', 'compress')
  older = {k: v for k, v in resolved.items() if k not in younger}
  assert len(older) == len(resolved) - 4
  assert config.sha256(older) == config.sha256(resolved)
  assert lines.setting({'config': older}) == lines.setting({'config': resolved})
  for fields in (
    {'update': {'parts': SOME}}, {'micro_batches': 2}, {'compress': {'optimizer': 'dynamic8'}}
  ):  # fmt: skip
    other = config.resolve({**RAW, **fields})
    assert config.sha256(other) != config.sha256(resolved)
    assert lines.setting({'config': other}) != lines.setting({'config': resolved})
  build.prepare(older)  # an artefact of then


@pytest.mark.parametrize(
  'fields, message',
  [
    ({'update': {'parts': ('l0/.*',)}}, r'config\.update\.parts must be \(\(pattern, words\)'),
    ({'update': {'parts': SOME, 'channels': 'random'}}, r'config\.update\.channels must be one of'),
    ({'update': {'parts': (('.*', 'bias'),), 'channels': 'magnitude'}}, "needs an 'in F' or 'out F'"),
    ({'update': {'parts': SOME}, 'freeze': ('l0/.*',)}, r'leave config\.freeze'),
    ({'update': {'parts': (('l0/.*', 'half'), ('.*', 'all'))}}, r"config\.update\.parts: update 'half'"),
    ({'update': {'parts': (('l0/.*', 'all'),)}}, r'config\.update\.parts: no pattern covers'),
    ({'micro_batches': 3}, r'config\.micro_batches=3 must divide config\.batch=8'),
    ({'update': {'parts': (('l0/.*', 'last 3'), ('.*', 'all'))}}, r"update 'last 3': l0/\w.* of no stack"),
    (LORA | {'lora': {'targets': '.*l0/w'}}, r"lora targets .* match 'l0/w', of which config.update"),
    (LORA | {'lora': {'targets': 'rest/.*'}}, "match 'rest/in/l0/w', of which config.update"),
    ({'update': {'parts': (('(', 'all'),)}}, r"config\.update\.parts: pattern '\(' is no regular"),
    ({'freeze': ('*',)}, r"config\.freeze: pattern '\*' is no regular"),
    ({'optimizer': {'groups': (('[', 1.0),)}}, r"config\.optimizer\.groups: pattern '\[' is no reg"),
    ({'compress': {'state': (('(', 'bfloat16'),)}}, r"config\.compress\.state: pattern '\(' is no reg"),
    ({'compress': {'state': (('x', 'bfloat16'),)}}, r"config\.compress\.state: pattern 'x' packs noth"),
    (ACE, r'config\.micro_batches: er_ace'),
    ({'micro_batches': 4, 'methods': ('er',), 'er': {'capacity': 9, 'draw': 3}}, 'there are 11'),
  ],
)  # fmt: skip
def test_mistakes_are_one_line(fields, message):
  with pytest.raises(UserError, match=message) as caught:
    setup(**fields)
  assert '\n' not in str(caught.value)


@pytest.mark.skipif(not shutil.which('gcc'), reason='needs a cross compiler or gcc')
def test_a_sparse_learner_in_c(tmp_path):
  """Exported and verified on this machine, in micro-batches; bytes and multiply-adds by hand."""
  file, out = tmp_path / 'some.json', tmp_path / 'some'
  file.write_text(json.dumps({**RAW, 'update': UPDATE, 'micro_batches': 2}))
  assert export([f'--config={file}', '--target=host', f'--out={out}']) == 0
  manifest = json.loads((out / 'manifest.json').read_text())
  assert manifest['ram_bytes']['trainable'] == 4 * (196 * 8 + 8 + 8 + 80 + 10)
  assert manifest['macs']['step'] == 8 * (6272 + 64 + 80) + 8 * (1568 + 64 + 2 * 80)
  assert verify([str(out), '--steps=4']) == 0


@pytest.mark.parametrize('cell', edge_sparse.CELLS)
def test_every_cell_of_the_list_is_a_configuration(cell):
  resolved = config.resolve(config.load(f'{ROOT}/configs/edge_sparse.py:{cell}'))
  assert bool(resolved['update']['parts']) == (cell not in ('full', 'micro'))
