"""What only CLIP has: texts that begin a head, and weights that must be refused."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cl_jax.errors import UserError
from cl_jax.models import clip
from cl_jax.types import Batch

safetensors_numpy = pytest.importorskip('safetensors.numpy')

SMALL = clip.Config(
  8, 4, 3, 8, 2, 2, 12, 1e-5, 'quick_gelu', 6, 20, 7, 4, 2, 2, 10, 1e-5, 'quick_gelu', 19
)
CONFIG = {
  'model_type': 'clip',
  'projection_dim': 6,
  'vision_config': {
    'image_size': 8,
    'patch_size': 4,
    'hidden_size': 8,
    'num_hidden_layers': 2,
    'num_attention_heads': 2,
    'intermediate_size': 12,
  },
  'text_config': {
    'vocab_size': 20,
    'max_position_embeddings': 7,
    'hidden_size': 4,
    'num_hidden_layers': 2,
    'num_attention_heads': 2,
    'intermediate_size': 10,
    'eos_token_id': 19,
  },
}
BATCH = Batch(
  jax.random.uniform(jax.random.key(1), (3, 8, 8, 3)),
  jnp.arange(3),
  jnp.ones(3),
  jnp.zeros(3, jnp.int32),
)
TOKENS = jnp.array([[1, 5, 19, 0], [1, 6, 7, 19], [1, 19, 0, 0]])


@pytest.fixture
def saved(tmp_path):
  """(folder, save with changed tensors): a directory of random weights."""
  rng, shapes = np.random.default_rng(0), {'logit_scale': ()}
  for part, d, ffn in (('vision', 8, 12), ('text', 4, 10)):
    norms = ('pre_layrnorm', 'post_layernorm') if part == 'vision' else ('final_layer_norm',)
    dense = {name: (d,) for name in norms}
    for i in range(2):
      start = f'encoder.layers.{i}.'
      dense |= {f'{start}self_attn.{name}_proj': (d, d) for name in ('q', 'k', 'v', 'out')}
      dense |= {f'{start}layer_norm{n}': (d,) for n in (1, 2)}
      dense |= {f'{start}mlp.fc1': (ffn, d), f'{start}mlp.fc2': (d, ffn)}
    for name, shape in dense.items():
      shapes[f'{part}_model.{name}.weight'] = shape
      shapes[f'{part}_model.{name}.bias'] = shape[:1]
    shapes[f'{"visual" if part == "vision" else "text"}_projection.weight'] = (6, d)
  shapes |= {
    'vision_model.embeddings.class_embedding': (8,),
    'vision_model.embeddings.patch_embedding.weight': (8, 3, 4, 4),
    'vision_model.embeddings.position_embedding.weight': (5, 8),
    'vision_model.embeddings.position_ids': (1, 5),
    'text_model.embeddings.token_embedding.weight': (20, 4),
    'text_model.embeddings.position_embedding.weight': (7, 4),
    'text_model.embeddings.position_ids': (1, 7),
  }
  tensors = {k: np.asarray(rng.standard_normal(v), np.float32) for k, v in shapes.items()}
  (tmp_path / 'config.json').write_text(json.dumps(CONFIG))

  def save(**changes):
    kept = {k: v for k, v in (tensors | changes).items() if v is not None}
    safetensors_numpy.save_file(kept, tmp_path / 'model.safetensors')
    return tmp_path

  return save(), save


def test_zero_shot_is_the_model_at_step_0(saved):
  config, weights = clip.load(saved[0])
  again, text = clip.load_text(saved[0])
  assert config == again == SMALL
  names = clip.prototypes(config, text, TOKENS)
  np.testing.assert_allclose(jnp.linalg.norm(names, axis=-1), 1, rtol=1e-5)
  model = clip.clip(config, 3, weights, clip.zero_shot(text, names))
  params, _ = model.init(jax.random.key(0), BATCH)
  drawn, _ = clip.clip(config, 3).init(jax.random.key(0), BATCH)
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, drawn)
  out = model.apply(params, BATCH)
  np.testing.assert_allclose(jnp.linalg.norm(out.features, axis=-1), 1, rtol=1e-5)
  want = jnp.exp(text['scale']) * out.features @ names.T
  np.testing.assert_allclose(out.logits, want, rtol=1e-5, atol=1e-5)
  with pytest.raises(UserError, match=r'the head is \(6, 3\), this CLIP has 6 features and 4'):
    clip.clip(config, 4, weights, clip.zero_shot(text, names))


def test_texts_end_at_their_end(saved):
  config, text = clip.load_text(saved[0])
  names = jax.jit(lambda tokens, mask=None: clip.prototypes(config, text, tokens, mask))
  want = names(TOKENS)
  padded = jnp.pad(jnp.where(TOKENS == 0, 3, TOKENS), ((0, 0), (0, 3)), constant_values=11)
  np.testing.assert_allclose(names(padded), want, atol=1e-6)
  np.testing.assert_allclose(names(TOKENS, TOKENS > 0), want, atol=1e-6)
  templates = names(jnp.stack([TOKENS, TOKENS[::-1]], 1))
  each = want + want[::-1]
  each = each / jnp.linalg.norm(each, axis=-1, keepdims=True)
  np.testing.assert_allclose(templates, each, atol=1e-6)
  with pytest.raises(UserError, match='texts of 8 tokens exceed the 7 positions'):
    names(jnp.ones((3, 8), jnp.int32))


@pytest.mark.parametrize(
  'load, name, shape',
  [
    (clip.load, 'vision_model.encoder.layers.1.self_attn.q_proj.weight', (8, 8)),
    (clip.load_text, 'text_model.encoder.layers.1.mlp.fc1.weight', (10, 4)),
    (clip.load_text, 'logit_scale', ()),
  ],
)
def test_wrong_tensors_are_refused_by_name(saved, load, name, shape):
  save = saved[1]
  for value, message in (
    (None, f'{name} is missing'),
    (np.zeros((3, 5), np.float32), rf'{name} has the shape \(3, 5\)'),
    (np.zeros(shape, np.int32), f'{name} is int32'),
    (np.full(shape, np.nan, np.float32), f'{name} holds values that are not finite'),
  ):
    with pytest.raises(UserError, match=message):
      load(save(**{name: value}))
  with pytest.raises(UserError, match='extra has no place in this model'):
    load(save(extra=np.zeros(3, np.float32)))


@pytest.mark.parametrize('load', [clip.load, clip.load_text])
def test_damaged_files_and_other_architectures_are_refused(saved, load):
  folder, save = saved
  file = folder / 'model.safetensors'
  whole = file.read_bytes()
  for damaged in (whole[:-1], whole[:100], b'', whole + b'x'):
    file.write_bytes(damaged)
    with pytest.raises(UserError, match='model.safetensors cannot be read'):
      load(folder)
  save()
  for change, message in (
    ({'model_type': 'siglip'}, "model_type is 'siglip'"),
    ({'vision_config': CONFIG['vision_config'] | {'hidden_act': 'relu'}}, "hidden_act is 'relu'"),
    ({'text_config': CONFIG['text_config'] | {'hidden_size': '4'}}, 'hidden_size must be'),
    ({'projection_dim': 0}, 'projection_dim must be a positive integer'),
  ):
    (folder / 'config.json').write_text(json.dumps(CONFIG | change))
    with pytest.raises(UserError, match=message):
      load(folder)


def test_the_default_is_vit_b_32(tmp_path):
  (tmp_path / 'config.json').write_text(json.dumps({'model_type': 'clip'}))
  # As many tensors as layers: a depth that the file cannot have is refused.
  safetensors_numpy.save_file(
    {str(i): np.zeros(1) for i in range(12)}, tmp_path / 'model.safetensors'
  )
  assert clip._config(tmp_path) == clip.Config()
  batch = BATCH._replace(x=jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.uint8))
  params, _ = jax.eval_shape(clip.clip(clip.Config(), 10).init, jax.random.key(0), batch)
  count = sum(a.size for a in jax.tree.leaves(params['backbone']))
  assert count == 87_849_216  # what the image tower and its projection have in transformers
