"""What only the Vision Transformer has: patches, prompts, and images that do not fit."""

from __future__ import annotations

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cl_jax.errors import UserError
from cl_jax.models import layers, pretrained, transformer, vit
from cl_jax.types import Batch, no_tap
from tests.compiling import quick

pytestmark = pytest.mark.usefixtures('quickly')

SMALL = vit.Config(8, 4, 1, 8, 2, 2, 12)
BATCH = Batch(
  jnp.asarray(np.random.default_rng(1).random((3, 8, 8, 1), np.float32)),
  jnp.arange(3),
  jnp.ones(3),
  jnp.zeros(3, jnp.int32),
)
PARAMS, _ = quick(vit.vit(SMALL, 4, init=0.5).init)(jax.random.key(0), BATCH)


@partial(jax.jit, static_argnames=('tap', 'remat', 'unroll', 'dtype'))
def features(params=PARAMS, x=BATCH.x, tap=no_tap, **options) -> jax.Array:
  return vit.vit(SMALL, 4, **options).apply(params, BATCH._replace(x=x), tap).features


def test_patches_are_rows_of_pixels():
  x = jnp.arange(64.0).reshape(1, 8, 8, 1)
  rows = vit.patches(SMALL, x)
  assert rows.shape == (1, 4, 16)
  np.testing.assert_array_equal(rows[0, 1].reshape(4, 4), x[0, :4, 4:, 0])
  np.testing.assert_array_equal(rows[0, 2].reshape(4, 4), x[0, 4:, :4, 0])
  np.testing.assert_array_equal(vit.patches(SMALL, x[..., 0]), rows)


def test_scan_equals_a_loop_over_layers():
  @jax.jit
  def loop(p):
    h = layers.dense(p['patch'], vit.patches(SMALL, BATCH.x))
    h = jnp.concatenate([jnp.tile(p['cls'], (3, 1, 1)), h], 1) + p['positions']
    for i in range(SMALL.depth):
      q = jax.tree.map(lambda a, i=i: a[i], p['layers'])
      n = layers.layer_norm(q['norm1'], h, 1e-12)
      h = h + transformer.attention(q, n, None, 2, no_tap, jnp.int32(i))
      m = layers.dense(q['up'], layers.layer_norm(q['norm2'], h, 1e-12))
      h = h + layers.dense(q['down'], jax.nn.gelu(m, approximate=False))
    return layers.layer_norm(p['norm'], h[:, 0], 1e-12)

  want = loop(PARAMS['backbone'])
  np.testing.assert_allclose(features(), want, atol=1e-5)
  np.testing.assert_allclose(features(unroll=True), want, atol=1e-5)


def test_remat_and_bfloat16():
  grad = lambda **o: jax.jit(jax.grad(lambda p: jnp.square(features(p, **o)).sum()))(PARAMS)  # noqa: E731
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # noqa: E731
  jax.tree.map(close, grad(remat=True), grad())
  low = features(dtype=jnp.bfloat16)
  assert low.dtype == jnp.float32
  assert 0 < jnp.abs(low - features()).max() < 0.2


def test_prompts_before_the_class_token():
  def prompt(name, h, layer=0):
    return jnp.concatenate([jnp.full((3, 2, 8), 0.7), h], 1) if name == 'embed' else h

  got = features(tap=prompt)
  assert got.shape == (3, 8) and jnp.abs(got - features()).max() > 1e-3


def test_wrong_shapes_are_refused():
  with pytest.raises(UserError, match=r'images are \(9, 9, 1\), this ViT takes \(8, 8, 1\)'):
    features(x=jnp.zeros((3, 9, 9, 1)))
  with pytest.raises(UserError, match='patches of 3 pixels do not divide'):
    vit.patches(SMALL._replace(patch=3), BATCH.x)
  with pytest.raises(UserError, match='3 attention heads do not divide 8'):
    jax.eval_shape(lambda p: vit.encode(SMALL._replace(heads=3), p, BATCH.x), PARAMS['backbone'])


@pytest.mark.parametrize('config, millions', [(vit.BASE, 85.8), (vit.TINY, 2.7)])
def test_named_shapes(config, millions):
  batch = BATCH._replace(x=jax.ShapeDtypeStruct((1, config.image, config.image, 3), jnp.uint8))
  params, _ = jax.eval_shape(vit.vit(config, 10).init, jax.random.key(0), batch)
  count = sum(a.size for a in jax.tree.leaves(params['backbone']))
  assert count / 1e6 == pytest.approx(millions, abs=0.05)


def test_positions_of_another_image_size():
  p = PARAMS['backbone']
  assert vit.fit(SMALL, p)['positions'] is p['positions']
  large = SMALL._replace(image=20)
  flat = vit.fit(large, p | {'positions': jnp.concatenate([p['positions'][:1], jnp.ones((4, 8))])})
  np.testing.assert_array_equal(flat['positions'][0], p['positions'][0])
  np.testing.assert_allclose(flat['positions'][1:], np.ones((25, 8)), rtol=1e-6)
  wide = jax.tree.map(jnp.shape, vit.vit(large, 4).init(jax.random.key(0), BATCH)[0])
  given = vit.vit(SMALL, 4, p, image=20)
  assert jax.tree.map(jnp.shape, given.init(jax.random.key(0), BATCH)[0]) == wide
  with pytest.raises(
    UserError, match='the weights have 4 patches and 2 layers, the config says 25'
  ):
    vit.encode(large, p, jnp.zeros((1, 20, 20, 1)))


def test_features_of_an_earlier_layer():
  model = vit.vit(SMALL, 4, PARAMS['backbone'], layer=1)
  params, _ = model.init(jax.random.key(0), BATCH)
  assert {len(a) for a in jax.tree.leaves(params['backbone']['layers'])} == {1}
  one = SMALL._replace(depth=1)
  h = layers.dense(PARAMS['backbone']['patch'], vit.patches(SMALL, BATCH.x))
  h = jnp.concatenate([jnp.tile(PARAMS['backbone']['cls'], (3, 1, 1)), h], 1)
  h = h + PARAMS['backbone']['positions']
  first = jax.tree.map(lambda a: a[:1], PARAMS['backbone']['layers'])
  h = layers.layer_norm(PARAMS['backbone']['norm'], vit.run(one, first, h)[:, 0], 1e-12)
  np.testing.assert_allclose(model.apply(params, BATCH).features, h, atol=1e-5)
  for layer in (0, 3, -1):
    with pytest.raises(UserError, match=f'layer={layer} is not there'):
      vit.vit(SMALL, 4, layer=layer)
  with pytest.raises(UserError, match='4 patches and 2 layers, the config says 4 and 1'):
    model.apply(PARAMS, BATCH)


def test_layer_scale_is_a_factor_of_what_a_layer_adds():
  def scaled(one: float, two: float):
    scales = {'scale1': jnp.full((2, 8), one), 'scale2': jnp.full((2, 8), two)}
    stack = PARAMS['backbone']['layers'] | scales
    return features(PARAMS | {'backbone': PARAMS['backbone'] | {'layers': stack}})

  np.testing.assert_allclose(scaled(1.0, 1.0), features(), atol=1e-6)
  nothing = PARAMS['backbone']['cls'] + PARAMS['backbone']['positions'][0]
  nothing = layers.layer_norm(PARAMS['backbone']['norm'], nothing, 1e-12)
  np.testing.assert_allclose(scaled(0.0, 0.0), jnp.tile(nothing, (3, 1)), atol=1e-5)
  assert jnp.abs(scaled(0.0, 1.0) - scaled(1.0, 0.0)).max() > 1e-3


def test_unknown_activations_are_refused():
  with pytest.raises(
    UserError, match="activation='relu' is not known: use one of gelu, quick_gelu"
  ):
    vit.encode(SMALL._replace(activation='relu'), PARAMS['backbone'], BATCH.x)


DINOV2 = {
  'model_type': 'dinov2',
  'hidden_act': 'gelu',
  'image_size': 8,
  'patch_size': 4,
  'num_channels': 1,
  'hidden_size': 8,
  'num_hidden_layers': 2,
  'num_attention_heads': 2,
  'mlp_ratio': 2,
}
TIMM = {
  'architecture': 'vit_tiny_patch16_224',
  'model_args': {
    'img_size': 8,
    'patch_size': 4,
    'in_chans': 1,
    'embed_dim': 8,
    'depth': 2,
    'num_heads': 2,
    'mlp_ratio': 2,
  },
}


def shapes(names: vit._Names) -> dict[str, tuple[int, ...]]:
  return vit._shapes(vit.Config(8, 4, 1, 8, 2, 2, 16, 1e-6), names)


@pytest.fixture(params=['dinov2', 'timm'])
def saved(request, tmp_path):
  """(folder, config.json, save with changed tensors, the name of one tensor)."""
  safetensors_numpy = pytest.importorskip('safetensors.numpy')
  rng = np.random.default_rng(0)
  dino = request.param == 'dinov2'
  own, config = shapes(vit._DINOV2 if dino else vit._TIMM), DINOV2 if dino else TIMM
  own |= {'embeddings.mask_token': (1, 8)} if dino else {'head.bias': (3,)}
  tensors = {name: rng.standard_normal(size).astype(np.float32) for name, size in own.items()}
  (tmp_path / 'config.json').write_text(json.dumps(config))

  def save(**changes):
    kept = {k: v for k, v in (tensors | changes).items() if v is not None}
    safetensors_numpy.save_file(kept, tmp_path / 'model.safetensors')
    return tmp_path

  save()
  one = 'encoder.layer.1.layer_scale2.lambda1' if dino else 'blocks.1.attn.qkv.weight'
  return tmp_path, config, save, one


def test_load_and_init(saved):
  config, weights = vit.load(saved[0])
  assert config == vit.Config(8, 4, 1, 8, 2, 2, 16, 1e-6)
  params, _ = vit.vit(config, 4, weights).init(jax.random.key(0), BATCH)
  assert params['backbone']['layers']['v']['w'].shape == (2, 8, 8)
  assert ('scale1' in weights['layers']) == ('model_type' in saved[1])


def test_what_is_saved_is_read_again(tmp_path):
  """Every tensor of a drawn ViT, bit for bit, in the names of Hugging Face; other kinds are refused."""
  p = jax.tree.map(
    lambda a: np.arange(a.size, dtype=np.float32).reshape(a.shape), PARAMS['backbone']
  )
  vit.save(tmp_path / 'new', SMALL, p)
  read, back = vit.load(tmp_path / 'new')
  assert read == SMALL
  jax.tree.map(np.testing.assert_array_equal, back, p)
  assert vit.arguments(tmp_path / 'new') == {'mean': 0.5, 'std': 0.5}
  vit.save(tmp_path / 'new', SMALL, p, (0.25,), 2.0)
  assert vit.arguments(tmp_path / 'new') == {'mean': 0.25, 'std': 2.0}
  with pytest.raises(UserError, match='only a ViT with gelu, without LayerScale'):
    vit.save(tmp_path, SMALL, p | {'before': p['norm']})


def test_wrong_tensors_are_refused_by_name(saved):
  _, _, save, one = saved
  for value, message in (
    (None, f'{one} is missing'),
    (np.zeros((3, 5), np.float32), rf'{one} has the shape \(3, 5\)'),
  ):
    with pytest.raises(UserError, match=message):
      vit.load(save(**{one: value}))
  like = np.ones({'encoder': (8,)}.get(one.split('.')[0], (24, 8)), np.float32)
  with pytest.raises(UserError, match=f'{one} is int32'):
    vit.load(save(**{one: like.astype(np.int32)}))
  with pytest.raises(UserError, match=f'{one} holds values that are not finite'):
    vit.load(save(**{one: like * np.inf}))
  with pytest.raises(UserError, match='norm_pre.weight has no place in this model'):
    vit.load(save(**{'norm_pre.weight': like}))


def test_damaged_files_and_other_architectures_are_refused(saved):
  folder, config, save, _ = saved
  file = folder / 'model.safetensors'
  whole = file.read_bytes()
  for damaged in (whole[:-1], whole[:100], b'', whole + b'x'):
    file.write_bytes(damaged)
    with pytest.raises(UserError, match='model.safetensors cannot be read'):
      vit.load(folder)
  save()
  if 'architecture' in config:
    changes = [
      (
        {'architecture': 'vit_base_patch16_clip_224'},
        "architecture is 'vit_base_patch16_clip_224'",
      ),
      ({'architecture': 'resnet50'}, "architecture is 'resnet50'"),
      ({'global_pool': 'avg'}, 'global_pool token'),
      ({'model_args': {'class_token': False}}, 'model_args has class_token'),
      ({'model_args': {'depth': '2'}}, 'depth must be a positive integer'),
    ]
  else:
    changes = [
      ({'model_type': 'swin'}, "model_type is 'swin', only 'vit'"),
      ({'use_swiglu_ffn': True}, 'use_swiglu_ffn is True, only False'),
      ({'hidden_act': 'relu'}, "hidden_act is 'relu'"),
      ({'hidden_size': 10}, r'weight has the shape \(8, 1, 4, 4\)'),
    ]
  for change, message in changes:
    (folder / 'config.json').write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=message):
      vit.load(folder)


def test_find_a_package_of_a_single_file(saved, monkeypatch):
  folder = saved[0]
  assert pretrained.find(folder) == (folder, None)
  (folder / 'a_package_with_a_vit.py').write_text('raise RuntimeError("imported")')
  monkeypatch.syspath_prepend(folder)
  digest = {'model.onnx': 'of another file'}
  package = pretrained.Package('tiny==1', 'a_package_with_a_vit', '.', digest)
  monkeypatch.setitem(pretrained.PACKAGES, 'tiny', package)
  with pytest.raises(UserError, match=r'has no model\.onnx'):
    pretrained.find('tiny')
  (folder / 'model.onnx').write_bytes(b'')
  with pytest.raises(UserError, match=r'model\.onnx is not the file that was published'):
    pretrained.find('tiny')
  digest['model.onnx'] = pretrained.sha256(folder / 'model.onnx')
  assert pretrained.find('tiny') == (folder / 'model.onnx', None)


@pytest.fixture
def exported(tmp_path):
  """A file such as torch exports of a Dinov2 of width 64, (changes of its tensors) -> its path."""
  onnx = pytest.importorskip('onnx', reason='weights in ONNX files need onnx')
  config = vit.Config(8, 4, 1, 64, 2, 1, 128, 1e-6)
  rng = np.random.default_rng(0)

  def save(external: bool = False, **changes):
    own = vit._shapes(config, vit._DINOV2)
    own |= {'embeddings.Concat': (1, 1, 64), 'embeddings.Reshape': (1, 4, 64)}
    del own['embeddings.position_embeddings']
    tensors = {k: rng.standard_normal(v).astype(np.float32) for k, v in own.items()} | changes
    tensors = {f'backbone.{k}': v for k, v in tensors.items() if v is not None}
    tensors['decoder.final_conv.bias'] = np.zeros(1, np.float32)
    initializers, nodes = [], []
    for name, a in tensors.items():
      kind = 'MatMul' if name.endswith('weight') and 'norm' not in name and a.ndim == 2 else ''
      kind = name.split('.')[-1] if name.endswith(('.Concat', '.Reshape')) else kind
      if kind:
        scope = name.removesuffix(f'.{kind}').removesuffix('.weight').replace('.', '/')
        scope = scope.replace('layer/', 'layer.')
        known = f'onnx::{kind}_{len(nodes)}'
        nodes.append(onnx.helper.make_node(kind, ['x', known], ['y'], f'/{scope}/{kind}'))
        if kind == 'Concat':
          nodes[-1].name += '_4'
        name, a = known, a.T if kind == 'MatMul' else a
      initializers.append(onnx.numpy_helper.from_array(np.ascontiguousarray(a), name))
    if external:
      initializers[0].data_location = onnx.TensorProto.EXTERNAL
    graph = onnx.helper.make_graph(nodes, 'g', [], [], initializers)
    file = tmp_path / 'tiny.onnx'
    file.write_bytes(onnx.helper.make_model(graph).SerializeToString())
    return file, tensors

  return save, config


def test_an_onnx_export(exported):
  save, config = exported
  file, tensors = save()
  found, weights = vit.load(file)
  assert found == config
  query = 'backbone.encoder.layer.1.attention.attention.query.weight'
  np.testing.assert_array_equal(weights['layers']['q']['w'][1], tensors[query].T)
  np.testing.assert_array_equal(
    weights['positions'][0], tensors['backbone.embeddings.Concat'][0, 0]
  )
  np.testing.assert_array_equal(weights['positions'][1:], tensors['backbone.embeddings.Reshape'][0])


def test_wrong_onnx_exports_are_refused(exported):
  save, _ = exported
  query = 'encoder.layer.1.attention.attention.query.weight'
  lambda1 = 'encoder.layer.0.layer_scale1.lambda1'
  for changes, message in (
    ({query: None}, f'{query} is missing'),
    ({query: np.zeros((64, 63), np.float32)}, rf'{query} has the shape \(64, 63\)'),
    ({lambda1: np.zeros(64, np.int32)}, f'{lambda1} is int32'),
    ({lambda1: np.full(64, np.nan, np.float32)}, f'{lambda1} holds values that are not finite'),
    ({'extra': np.zeros(3, np.float32)}, 'tensor extra has no place in this model'),
    ({'embeddings.Reshape': None}, 'embeddings.Reshape is missing'),
    ({'embeddings.Reshape': np.zeros((4, 64), np.float32)}, 'not one of 3 axes'),
  ):
    with pytest.raises(UserError, match=message):
      vit.load(save(**changes)[0])
  with pytest.raises(UserError, match='lies in another file'):
    vit.load(save(external=True)[0])
  file, _ = save()
  whole = file.read_bytes()
  for damaged in (whole[:-1], whole[: len(whole) // 2], b'\xff' * 9):
    file.write_bytes(damaged)
    with pytest.raises(UserError, match='tiny.onnx'):
      vit.load(file)
  file.write_bytes(b'')
  with pytest.raises(UserError, match='is missing'):
    vit.load(file)
