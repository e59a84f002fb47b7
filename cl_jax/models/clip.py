"""CLIP as an image classifier whose head begins as text, for weights of Hugging Face directories."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cl_jax.errors import UserError
from cl_jax.models import layers, pretrained, sidecar, transformer, vit
from cl_jax.types import Array, Batch, Model, Out, Tree, no_tap

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class Config(NamedTuple):
  """The shape of the two towers (Radford et al. 2021, section 2.4); the default is CLIP ViT-B/32.

  `projection` is the width of what both towers end in. `eos` is the token whose position stands for the
  text, at its first place; 2 means the position of the largest token, as in the configs of OpenAI's weights.
  """

  image: int = 224
  patch: int = 32
  channels: int = 3
  d: int = 768
  depth: int = 12
  heads: int = 12
  ffn: int = 3072
  eps: float = 1e-5
  activation: str = 'quick_gelu'
  projection: int = 512
  vocabulary: int = 49408
  positions: int = 77
  text_d: int = 512
  text_depth: int = 12
  text_heads: int = 8
  text_ffn: int = 2048
  text_eps: float = 1e-5
  text_activation: str = 'quick_gelu'
  eos: int = 49407


def clip(
  config: Config,
  classes: int,
  weights: Tree = None,
  head: Tree = None,
  init: str | float = 0.02,
  remat: bool = False,
  unroll: bool = False,
  dtype: jnp.dtype = jnp.float32,
  mean: Any = MEAN,
  std: Any = STD,
  image: int | None = None,
) -> Model:
  """The image tower of CLIP and a linear head over images [B, image, image, channels].

  Radford et al., Learning Transferable Visual Models From Natural Language Supervision, ICML 2021, figure 3:
  logits = exp(t) * I_e @ T_e^T. Official code: github.com/openai/CLIP. With `head=zero_shot(...)` the model
  at step 0 is CLIP's zero-shot classifier; then the head and the tower train like any other.

  Parameters: 'backbone' {'patch': {'w': f32[patch * patch * channels, d]}, 'cls', 'positions', 'before'
  (the norm before the layers), 'layers', 'norm', 'projection': {'w': f32[d, projection]}} and 'head' {'w':
  f32[projection, classes], 'b'}. `features` f32[B, projection] are image embeddings of length 1. Taps as in
  `vit`; what 'embed' puts before the class token comes after the norm 'before'.

  Args:
    config: the shape; `load` returns the one of a directory.
    classes: units of the output layer.
    weights: the 'backbone' that `init` returns instead of drawing one.
    head: the 'head' that `init` returns instead of drawing one, see `zero_shot`.
    init: of all weights that are drawn, see `layers.weight`.
    remat, unroll, dtype, mean, std, image: see `vit`.

  Raises:
    UserError: images of another shape than the config says, or a head of another shape.

  Deviations from the original: the text tower is not trained; what it made of the class names is the head,
  so the temperature is a part of that. The head has a bias, zero in the beginning.
  """
  if head is not None and jnp.shape(head['w']) != (config.projection, classes):
    raise UserError(
      f'the head is {jnp.shape(head["w"])}, this CLIP has {config.projection} features and '
      f'{classes} classes: give one text to every class'
    )
  c = tower(config._replace(image=image or config.image))
  weights = None if weights is None else vit.fit(c, weights)
  draw = transformer.init_fn(
    lambda key: _draw(key, config, c, init), weights, config.projection, classes, init
  )

  def start(key: Array, batch: Batch) -> tuple[Tree, Tree]:
    params, stats = draw(key, batch)
    return params if head is None else params | {'head': head}, stats

  def apply(variables: Tree, batch: Batch, tap=no_tap, train: bool = False) -> Out:
    del train
    p = variables['backbone']
    h = vit.encode(c, p, layers.pixels(batch.x, mean, std), tap, remat, unroll, dtype)
    h = h[:, h.shape[1] - p['positions'].shape[0]]
    h = _normalised(h @ p['projection']['w'])
    return Out(layers.dense(variables['head'], h), h, {})

  return Model(start, apply, layers.softmax_cross_entropy, transformer.wires())


def tower(config: Config) -> vit.Config:
  """The image tower as a ViT."""
  return vit.Config(**{name: getattr(config, name) for name in vit.Config._fields})


def prototypes(config: Config, weights: Tree, tokens: Array, mask: Array | None = None) -> Array:
  """Text embeddings of length 1, f32[C, projection].

  Args:
    config: the shape.
    weights: what `load_text` returns.
    tokens: i32[C, L], or i32[C, T, L] for T templates of every class, whose embeddings are averaged (section
      3.1.4 of the paper). Every text ends with the token `config.eos`.
    mask: bool of that shape, the positions that may be attended to; None for all. Padding behind the end
      is out of sight without one, since no position sees what comes after it.
  """
  if tokens.ndim == 3:
    rows = lambda a: a.reshape(-1, a.shape[-1])  # noqa: E731
    each = prototypes(config, weights, rows(tokens), None if mask is None else rows(mask))
    return _normalised(each.reshape(*tokens.shape[:2], -1).mean(1))
  length = tokens.shape[1]
  if length > config.positions:
    raise UserError(
      f'texts of {length} tokens exceed the {config.positions} positions of this CLIP: cut them '
      'when they are tokenised'
    )
  seen = jnp.tril(jnp.ones((length, length), bool))[None]
  if mask is not None:
    seen = seen & (mask > 0)[:, None, :]
  embed = weights['embed']
  h = embed['tokens'][tokens] + embed['positions'][:length]
  shape = tower(config)._replace(
    heads=config.text_heads, eps=config.text_eps, activation=config.text_activation
  )
  h = layers.layer_norm(weights['norm'], vit.run(shape, weights['layers'], h, seen), shape.eps)
  end = tokens if config.eos == 2 else tokens == config.eos
  h = jnp.take_along_axis(h, end.argmax(-1)[:, None, None], 1)[:, 0]
  return _normalised(h @ weights['projection']['w'])


def zero_shot(weights: Tree, prototypes: Array) -> Tree:
  """The 'head' {'w': f32[projection, C], 'b'} that makes of features the logits of the zero-shot classifier.

  Args:
    weights: what `load_text` returns.
    prototypes: f32[C, projection], of the class names.
  """
  w = jnp.exp(weights['scale']) * prototypes.T
  return {'w': w, 'b': jnp.zeros(w.shape[1])}


def _normalised(h: Array) -> Array:
  return h * jax.lax.rsqrt(jnp.maximum(jnp.square(h).sum(-1, keepdims=True), 1e-24))


def _draw(key: Array, config: Config, c: vit.Config, init: str | float) -> Tree:
  k_tower, k_projection = jax.random.split(key)
  drawn = vit.draw(k_tower, c, init)
  return drawn | {
    'patch': {'w': drawn['patch']['w']},
    'before': transformer.norm_init(c.d),
    'projection': {'w': layers.weight(k_projection, (c.d, config.projection), init)},
  }


# Our name -> theirs, below 'vision_model.encoder.layers.{i}.' and 'text_model.encoder.layers.{i}.'.
_BLOCK = {
  'q': 'self_attn.q_proj',
  'k': 'self_attn.k_proj',
  'v': 'self_attn.v_proj',
  'o': 'self_attn.out_proj',
  'norm1': 'layer_norm1',
  'up': 'mlp.fc1',
  'down': 'mlp.fc2',
  'norm2': 'layer_norm2',
}
_IMAGE = ('vision_model.', 'visual_projection.')
_TEXT = ('text_model.', 'text_projection.', 'logit_scale')
_IDS = ('vision_model.embeddings.position_ids', 'text_model.embeddings.position_ids')
# What a config.json leaves out where it is as in CLIP ViT-B/32.
_BOTH = {'num_hidden_layers': 12, 'hidden_act': 'quick_gelu', 'layer_norm_eps': 1e-5}
_VISION_CONFIG = _BOTH | {
  'image_size': 224,
  'patch_size': 32,
  'num_channels': 3,
  'hidden_size': 768,
  'num_attention_heads': 12,
  'intermediate_size': 3072,
}
_TEXT_CONFIG = _BOTH | {
  'vocab_size': 49408,
  'max_position_embeddings': 77,
  'hidden_size': 512,
  'num_attention_heads': 8,
  'intermediate_size': 2048,
  'eos_token_id': 49407,
}


def load(path: str | Path) -> tuple[Config, Tree]:
  """Reads the image tower in a directory with config.json and model.safetensors of a Hugging Face CLIP.

  Returns:
    Its shape, and the 'backbone' tree of f32 for `clip(config, classes, weights=...)`.

  Raises:
    UserError: another architecture, or tensors that are missing, left over, damaged or of another
      shape, by name.
  """
  c, start = _config(path), 'vision_model.'
  d, embed = c.d, 'vision_model.embeddings.'
  patches = (c.image // c.patch) ** 2
  norms = {'before': f'{start}pre_layrnorm', 'norm': f'{start}post_layernorm'}
  wanted = {
    f'{embed}patch_embedding.weight': (d, c.channels, c.patch, c.patch),
    f'{embed}class_embedding': (d,),
    f'{embed}position_embedding.weight': (1 + patches, d),
    'visual_projection.weight': (c.projection, d),
  }
  wanted |= {f'{name}.{kind}': (d,) for name in norms.values() for kind in ('weight', 'bias')}
  layer = f'{start}encoder.layers.{{}}.'
  wanted |= pretrained.stack_shapes(layer, _BLOCK, c.depth, d, c.ffn)
  t = pretrained.tensors(path, wanted, ignored=(*_TEXT, *_IDS))
  tree = {
    'patch': {'w': t[f'{embed}patch_embedding.weight'].transpose(2, 3, 1, 0).reshape(-1, d)},
    'cls': t[f'{embed}class_embedding'],
    'positions': t[f'{embed}position_embedding.weight'],
    'layers': pretrained.stack(t, layer, _BLOCK, c.depth),
    'projection': {'w': t['visual_projection.weight'].T},
  }
  return c, jax.tree.map(jnp.asarray, tree | _norms(t, norms))


def arguments(path: str | Path) -> dict[str, Any]:
  """'mean' and 'std' of `clip` as the files beside the weights say it, {} where they do not."""
  return sidecar.pixels(path)


def load_text(path: str | Path) -> tuple[Config, Tree]:
  """Reads the text tower in the directory of a Hugging Face CLIP, for `prototypes` and `zero_shot`.

  Returns:
    Its shape, and {'embed': {'tokens', 'positions'}, 'layers', 'norm', 'projection': {'w'}, 'scale'} of f32.

  Raises:
    UserError: as `load` does.
  """
  c, start = _config(path), 'text_model.'
  d, embed = c.text_d, 'text_model.embeddings.'
  norms = {'norm': f'{start}final_layer_norm'}
  wanted = {
    f'{embed}token_embedding.weight': (c.vocabulary, d),
    f'{embed}position_embedding.weight': (c.positions, d),
    'text_projection.weight': (c.projection, d),
    'logit_scale': (),
  }
  wanted |= {f'{name}.{kind}': (d,) for name in norms.values() for kind in ('weight', 'bias')}
  layer = f'{start}encoder.layers.{{}}.'
  wanted |= pretrained.stack_shapes(layer, _BLOCK, c.text_depth, d, c.text_ffn)
  t = pretrained.tensors(path, wanted, ignored=(*_IMAGE, *_IDS))
  tree = {
    'embed': {
      'tokens': t[f'{embed}token_embedding.weight'],
      'positions': t[f'{embed}position_embedding.weight'],
    },
    'layers': pretrained.stack(t, layer, _BLOCK, c.text_depth),
    'projection': {'w': t['text_projection.weight'].T},
    'scale': t['logit_scale'],
  }
  return c, jax.tree.map(jnp.asarray, tree | _norms(t, norms))


def _norms(t: dict, norms: dict[str, str]) -> Tree:
  return {
    ours: {'scale': t[f'{name}.weight'], 'bias': t[f'{name}.bias']} for ours, name in norms.items()
  }


def _config(path: str | Path) -> Config:
  known = pretrained.config(path, {'model_type': 'clip'})
  image = _VISION_CONFIG | pretrained.section(path, known, 'vision_config')
  text = _TEXT_CONFIG | pretrained.section(path, known, 'text_config')
  for part in (image, text):
    if part['hidden_act'] not in ('gelu', 'quick_gelu'):
      raise UserError(
        f"{path}/config.json: hidden_act is {part['hidden_act']!r}, only 'gelu' and 'quick_gelu' "
        'are supported here'
      )
  known = {'projection_dim': 512} | known
  sizes: dict[str, Any] = {'projection': pretrained.count(path, known, 'projection_dim')}
  for part, start, names in ((image, '', _SIZES | _IMAGE_SIZES), (text, 'text_', _SIZES)):
    sizes |= {start + ours: pretrained.count(path, part, name) for ours, name in names.items()}
    sizes |= {f'{start}eps': pretrained.number(path, part, 'layer_norm_eps')}
    sizes |= {f'{start}activation': part['hidden_act']}
  sizes |= {ours: pretrained.count(path, text, name) for ours, name in _TEXT_SIZES.items()}
  c = Config(**sizes)
  pretrained.divided(path, c.d, c.heads)
  pretrained.divided(path, c.text_d, c.text_heads)
  pretrained.layered(path, max(c.depth, c.text_depth))
  return c


# Our name -> theirs.
_SIZES = {
  'd': 'hidden_size',
  'depth': 'num_hidden_layers',
  'heads': 'num_attention_heads',
  'ffn': 'intermediate_size',
}
_IMAGE_SIZES = {'image': 'image_size', 'patch': 'patch_size', 'channels': 'num_channels'}
_TEXT_SIZES = {
  'vocabulary': 'vocab_size',
  'positions': 'max_position_embeddings',
  'eos': 'eos_token_id',
}
