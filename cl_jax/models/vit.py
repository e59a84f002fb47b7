"""The Vision Transformer, for weights of Hugging Face ViT directories or our own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cl_jax.errors import UserError
from cl_jax.models import layers, pretrained, transformer
from cl_jax.types import Array, Batch, Model, Out, Tree, no_tap


class Config(NamedTuple):
  """The shape of a ViT (Dosovitskiy et al. 2021); the default is ViT-B/16 at 224 pixels."""

  image: int = 224
  patch: int = 16
  channels: int = 3
  d: int = 768
  depth: int = 12
  heads: int = 12
  ffn: int = 3072
  eps: float = 1e-12


BASE = Config()
TINY = Config(image=32, patch=4, d=192, depth=6, heads=3, ffn=768)


def vit(
  config: Config,
  classes: int,
  weights: Tree = None,
  init: str | float = 0.02,
  remat: bool = False,
  unroll: bool = False,
  dtype: jnp.dtype = jnp.float32,
  mean: Any = 0.5,
  std: Any = 0.5,
) -> Model:
  """A pre-norm Vision Transformer and a linear head over images [B, image, image, channels].

  Parameters: 'backbone' {'patch': {'w': f32[patch * patch * channels, d], 'b'}, 'cls': f32[d],
  'positions': f32[1 + patches, d], 'layers': every leaf stacked [depth, ...], 'norm'} and 'head'
  {'w', 'b'}. `features` f32[B, d] are the class token's after the last norm. Taps: 'embed', then
  per layer 'k', 'v', 'scores' (see `transformer.attention`), 'attention' (its output), 'middle' (the
  residual stream that the MLP reads), 'mlp' (its hidden units), 'feedforward' (its output) and 'block', all
  but 'scores' [B, L, .]. What 'embed' puts before the class token is attended to.

  Where `init` is traced, let `weights` be an argument of the program, as `cl_jax.loop.run` does:
  closed over, they would be copied into it as constants.

  Args:
    config: the shape; `load` returns the one of a directory.
    classes: units of the output layer.
    weights: the 'backbone' that `init` returns instead of drawing one; the head is always drawn.
    init: of all weights that are drawn, see `layers.weight`.
    remat, unroll: see `transformer.stack`.
    dtype: of the activations between the layers; norms, softmax, features and logits are f32.
    mean, std: for u8 inputs, see `layers.pixels`.

  Raises:
    UserError: images of another shape than the config says.

  Deviations from the original: no dropout, no stochastic depth.
  """

  start = transformer.init_fn(
    lambda key: _draw(key, config, init), weights, config.d, classes, init
  )

  def apply(variables: Tree, batch: Batch, tap=no_tap, train: bool = False) -> Out:
    del train
    x = layers.pixels(batch.x, mean, std)
    h = encode(config, variables['backbone'], x, tap, remat, unroll, dtype)
    h = h[:, h.shape[1] - 1 - _patches(config)]
    return Out(layers.dense(variables['head'], h), h, {})

  return Model(start, apply, layers.softmax_cross_entropy, transformer.wires())


def encode(
  config: Config,
  p: Tree,
  x: Array,
  tap=no_tap,
  remat: bool = False,
  unroll: bool = False,
  dtype: jnp.dtype = jnp.float32,
) -> Array:
  """The last hidden states f32[B, 1 + patches, d] of images f32[B, image, image, channels]."""
  h = layers.dense(p['patch'], patches(config, x))
  h = jnp.concatenate([jnp.broadcast_to(p['cls'], (h.shape[0], 1, config.d)), h], 1)
  h = tap('embed', h + p['positions'], 0).astype(dtype)

  def block(p: Tree, h: Array, i: Array) -> Array:
    p = transformer.cast(p, dtype)
    n = layers.layer_norm(p['norm1'], h, config.eps)
    h = h + tap('attention', transformer.attention(p, n, None, config.heads, tap, i), i)
    h = tap('middle', h, i)
    n = layers.layer_norm(p['norm2'], h, config.eps)
    m = tap('mlp', jax.nn.gelu(layers.dense(p['up'], n), approximate=False), i)
    return tap('block', h + tap('feedforward', layers.dense(p['down'], m), i), i)

  h = transformer.stack(block, p['layers'], h, remat, unroll)
  return layers.layer_norm(p['norm'], h.astype(jnp.float32), config.eps)


def patches(config: Config, x: Array) -> Array:
  """Cuts [B, image, image, channels] into rows of patches [B, patches, patch * patch * channels]."""
  size, c = config.patch, config.channels
  x = x if x.ndim == 4 else x[..., None]
  if x.shape[1:] != (config.image, config.image, c):
    raise UserError(
      f'images are {x.shape[1:]}, this ViT takes {(config.image, config.image, c)}: '
      'set image and channels of its config'
    )
  if config.image % size:
    raise UserError(f'patches of {size} pixels do not divide images of {config.image}')
  n = config.image // size
  x = x.reshape(-1, n, size, n, size, c).swapaxes(2, 3)
  return x.reshape(-1, n * n, size * size * c)


def _patches(config: Config) -> int:
  return (config.image // config.patch) ** 2


def _draw(key: Array, config: Config, init: str | float) -> Tree:
  keys = jax.random.split(key, 4)
  d = config.d
  block = lambda k: transformer.block_init(k, d, config.ffn, init)  # noqa: E731
  return {
    'patch': layers.dense_init(keys[0], config.patch**2 * config.channels, d, init),
    'cls': layers.weight(keys[1], (1, d), init)[0],
    'positions': layers.weight(keys[2], (1 + _patches(config), d), init),
    'layers': jax.vmap(block)(jax.random.split(keys[3], config.depth)),
    'norm': transformer.norm_init(d),
  }


# Our name -> theirs, below 'encoder.layer.{i}.'.
_BLOCK = {
  'q': 'attention.attention.query',
  'k': 'attention.attention.key',
  'v': 'attention.attention.value',
  'o': 'attention.output.dense',
  'norm1': 'layernorm_before',
  'up': 'intermediate.dense',
  'down': 'output.dense',
  'norm2': 'layernorm_after',
}
_IGNORED = ('pooler.', 'classifier.')


def load(path: str | Path) -> tuple[Config, Tree]:
  """Reads a directory with config.json and model.safetensors of a Hugging Face ViT.

  Returns:
    Its shape, and the 'backbone' tree of f32 for `vit(config, classes, weights=...)`.

  Raises:
    UserError: another architecture, or tensors that are missing, left over, damaged or of another
      shape, by name. The pooler and the head of pretraining are left out.
  """
  known = pretrained.config(path, {'model_type': 'vit', 'hidden_act': 'gelu'})
  if not known.get('qkv_bias', True):
    raise UserError(f'{path}/config.json: qkv_bias is false, only true is supported here')
  names = ('image_size', 'patch_size', 'num_channels', 'hidden_size', 'num_hidden_layers')
  names += ('num_attention_heads', 'intermediate_size')
  c = Config(
    *(pretrained.count(path, known, name) for name in names),
    eps=float(known.get('layer_norm_eps', 1e-12)),
  )
  d, patch = c.d, 'embeddings.patch_embeddings.projection'
  wanted = {
    f'{patch}.weight': (d, c.channels, c.patch, c.patch),
    f'{patch}.bias': (d,),
    'embeddings.cls_token': (1, 1, d),
    'embeddings.position_embeddings': (1, 1 + _patches(c), d),
    'layernorm.weight': (d,),
    'layernorm.bias': (d,),
  }
  wanted |= pretrained.stack_shapes('encoder.layer.{}.', _BLOCK, c.depth, d, c.ffn)
  t = pretrained.tensors(path, wanted, prefix='vit.', ignored=_IGNORED)
  w = t[f'{patch}.weight'].transpose(2, 3, 1, 0).reshape(-1, d)
  tree = {
    'patch': {'w': w, 'b': t[f'{patch}.bias']},
    'cls': t['embeddings.cls_token'][0, 0],
    'positions': t['embeddings.position_embeddings'][0],
    'layers': pretrained.stack(t, 'encoder.layer.{}.', _BLOCK, c.depth),
    'norm': {'scale': t['layernorm.weight'], 'bias': t['layernorm.bias']},
  }
  return c, jax.tree.map(jnp.asarray, tree)
