"""The Vision Transformer, for weights of Hugging Face (ViT, DINOv2), timm, ONNX exports, or our own."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cl_jax.errors import UserError
from cl_jax.models import containers, layers, onnx_file, pretrained, sidecar, transformer
from cl_jax.models.sliced import depth
from cl_jax.types import Array, Batch, Model, Out, Tree, no_tap


class Config(NamedTuple):
  """The shape of a ViT (Dosovitskiy et al. 2021); the default is ViT-B/16 at 224 pixels.

  `activation` of the MLPs is 'gelu' (with erf) or 'quick_gelu', x sigmoid(1.702 x).
  """

  image: int = 224
  patch: int = 16
  channels: int = 3
  d: int = 768
  depth: int = 12
  heads: int = 12
  ffn: int = 3072
  eps: float = 1e-12
  activation: str = 'gelu'


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
  image: int | None = None,
  layer: int | None = None,
) -> Model:
  """A pre-norm Vision Transformer and a linear head over images [B, image, image, channels].

  Parameters: 'backbone' {'patch': {'w': f32[patch * patch * channels, d], 'b'}, 'cls': f32[d],
  'positions': f32[1 + patches, d], 'layers': every leaf stacked [depth, ...], 'norm'} and 'head'
  {'w', 'b'}. `features` f32[B, d] are the class token's after the last norm. Taps: 'embed', then
  per layer 'k', 'v', 'scores' (see `transformer.attention`), 'attention' (its output), 'middle' (the
  residual stream that the MLP reads), 'mlp' (its hidden units), 'feedforward' (its output) and 'block', all
  but 'scores' [B, L, .]. What 'embed' puts before the class token is attended to.

  Pretrained weights may have LayerScale (Touvron et al. 2021, eq. 4): 'scale1' and 'scale2' [depth, d] in
  'layers', factors of what attention and MLP add, applied before the taps of these. A drawn model has none.

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
    image: pixels of a side, in the place of those of `config`; `init` resamples the positions of `weights`.
    layer: features are what the last norm makes of the class token after this block (1 is the first); the
      blocks above are left out of the parameters. None is the last.

  Raises:
    UserError: images of another shape than the config says, or a `layer` that is not there.

  Deviations from the original: no dropout, no stochastic depth.
  """
  if layer is not None and not 1 <= layer <= config.depth:
    raise UserError(f'layer={layer} is not there: this ViT has the layers 1 to {config.depth}')
  c = config._replace(image=image or config.image, depth=layer or config.depth)
  weights = None if weights is None else fit(c, weights)
  start = transformer.init_fn(lambda key: draw(key, c, init), weights, c.d, classes, init)

  def apply(variables: Tree, batch: Batch, tap=no_tap, train: bool = False) -> Out:
    del train
    x = layers.pixels(batch.x, mean, std)
    h = encode(c, variables['backbone'], x, tap, remat, unroll, dtype)
    h = h[:, h.shape[1] - 1 - _patches(c)]
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
  """The last hidden states f32[B, 1 + patches, d] of images f32[B, image, image, channels].

  A norm 'before' the layers (CLIP has one) and the bias of 'patch' are used where `p` has them.
  """
  _check(config, p)
  h = patches(config, x) @ p['patch']['w'] + p['patch'].get('b', 0.0)
  h = jnp.concatenate([jnp.broadcast_to(p['cls'], (h.shape[0], 1, config.d)), h], 1)
  h = h + p['positions']
  h = layers.layer_norm(p['before'], h, config.eps) if 'before' in p else h
  h = tap('embed', h, 0).astype(dtype)
  h = run(config, p['layers'], h, None, tap, remat, unroll, dtype)
  return layers.layer_norm(p['norm'], h.astype(jnp.float32), config.eps)


def run(
  config: Config,
  p: Tree,
  h: Array,
  mask: Array | None = None,
  tap=no_tap,
  remat: bool = False,
  unroll: bool = False,
  dtype: jnp.dtype = jnp.float32,
) -> Array:
  """The pre-norm layers `p` over h [B, L, d]; of `config` only heads, eps and activation are read."""
  if config.activation not in _ACTIVATIONS:
    raise UserError(
      f'activation={config.activation!r} is not known: use one of {", ".join(_ACTIVATIONS)}'
    )
  activation = _ACTIVATIONS[config.activation]

  def block(p: Tree, h: Array, i: Array) -> Array:
    p = transformer.cast(p, dtype)
    n = layers.layer_norm(p['norm1'], h, config.eps)
    a = transformer.attention(p, n, mask, config.heads, tap, i)
    h = tap('middle', h + tap('attention', a * p['scale1'] if 'scale1' in p else a, i), i)
    n = layers.layer_norm(p['norm2'], h, config.eps)
    m = layers.dense(p['down'], tap('mlp', activation(layers.dense(p['up'], n)), i))
    return tap('block', h + tap('feedforward', m * p['scale2'] if 'scale2' in p else m, i), i)

  return transformer.stack(block, p, h, remat, unroll)


_ACTIVATIONS = {
  'gelu': lambda x: jax.nn.gelu(x, approximate=False),
  'quick_gelu': lambda x: x * jax.nn.sigmoid(1.702 * x),
}


def fit(config: Config, p: Tree) -> Tree:
  """A 'backbone' of another image size or of more layers as one of `config`.

  Positions are resampled as `transformers` does it in Dinov2: bicubic with a = -0.75, pixel centres at
  halves, the border repeated, no smoothing; the class token keeps its own.
  """
  n, old = math.isqrt(_patches(config)), math.isqrt(p['positions'].shape[0] - 1)
  p = p | {'layers': jax.tree.map(lambda a: a[: config.depth] if jnp.ndim(a) else a, p['layers'])}
  if n == old:
    return p
  m = _bicubic(old, n)
  grid = jnp.reshape(p['positions'][1:], (old, old, config.d))
  grid = jnp.einsum('ia,jb,abd->ijd', m, m, grid).reshape(n * n, config.d)
  return p | {'positions': jnp.concatenate([p['positions'][:1], grid])}


def _bicubic(old: int, new: int) -> np.ndarray:
  """f32[new, old]: each row weighs the old samples around one new sample (Keys 1981, a = -0.75)."""
  at = (np.arange(new) + 0.5) * old / new - 0.5
  near = np.floor(at).astype(int)[:, None] + np.arange(-1, 3)
  x = np.abs(at[:, None] - near)
  a = -0.75
  inner = (a + 2) * x**3 - (a + 3) * x**2 + 1
  outer = a * (x**3 - 5 * x**2 + 8 * x - 4)
  m = np.zeros((new, old), np.float32)
  np.add.at(m, (np.arange(new)[:, None], near.clip(0, old - 1)), np.where(x <= 1, inner, outer))
  return m


def _check(config: Config, p: Tree) -> None:
  there = p['positions'].shape[0], depth(p['layers']['norm1']['scale'])
  if there != (1 + _patches(config), config.depth):
    raise UserError(
      f'the weights have {there[0] - 1} patches and {there[1]} layers, the config says '
      f'{_patches(config)} and {config.depth}: pass them through vit.fit(config, weights)'
    )


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


def draw(key: Array, config: Config, init: str | float) -> Tree:
  """A 'backbone' of random weights."""
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


class _Names(NamedTuple):
  """How a library calls the tensors of a ViT.

  Attributes:
    patch, cls, positions, norm: the modules and tensors outside of the layers.
    layer: how the names of layer i begin, with {} for i.
    block: our name -> theirs inside of a layer.
    scales: the two of LayerScale inside of a layer, () without.
    fused: the module that holds queries, keys and values one below the other; '' where there is none.
    prefix, ignored: see `pretrained.tensors`.
  """

  patch: str
  cls: str
  positions: str
  norm: str
  layer: str
  block: dict[str, str]
  scales: tuple[str, ...] = ()
  fused: str = ''
  prefix: str = ''
  ignored: tuple[str, ...] = ()


_VIT = _Names(
  'embeddings.patch_embeddings.projection',
  'embeddings.cls_token',
  'embeddings.position_embeddings',
  'layernorm',
  'encoder.layer.{}.',
  {
    'q': 'attention.attention.query',
    'k': 'attention.attention.key',
    'v': 'attention.attention.value',
    'o': 'attention.output.dense',
    'norm1': 'layernorm_before',
    'up': 'intermediate.dense',
    'down': 'output.dense',
    'norm2': 'layernorm_after',
  },
  prefix='vit.',
  ignored=('pooler.', 'classifier.'),
)
_DINOV2 = _VIT._replace(
  block=_VIT.block | {'norm1': 'norm1', 'up': 'mlp.fc1', 'down': 'mlp.fc2', 'norm2': 'norm2'},
  scales=('layer_scale1.lambda1', 'layer_scale2.lambda1'),
  prefix='dinov2.',
  ignored=('classifier.', 'embeddings.mask_token'),
)
_TIMM = _Names(
  'patch_embed.proj',
  'cls_token',
  'pos_embed',
  'norm',
  'blocks.{}.',
  {
    'o': 'attn.proj',
    'norm1': 'norm1',
    'up': 'mlp.fc1',
    'down': 'mlp.fc2',
    'norm2': 'norm2',
  },
  fused='attn.qkv',
  ignored=('head.', 'head_dist.', 'pre_logits.'),
)
_TIMM_SCALES = ('ls1.gamma', 'ls2.gamma')
# d, depth and heads of what timm calls by these names.
_TIMM_SIZES = {
  'tiny': (192, 12, 3),
  'small': (384, 12, 6),
  'base': (768, 12, 12),
  'large': (1024, 24, 16),
  'huge': (1280, 32, 16),
}


def load(path: str | Path) -> tuple[Config, Tree]:
  """Reads a ViT: a directory with config.json and model.safetensors, or a file .onnx.

  A config.json may be of Hugging Face (model_type 'vit' or 'dinov2') or of timm (architecture
  'vit_base_patch16_224', 'vit_small_patch14_dinov2', and so on). An ONNX file must be torch's export of
  transformers' Dinov2 below a module 'backbone'; it does not say how many heads there are, which are
  taken to be 64 wide, as in all of DINOv2. How pixels are normalised is none of the weights: see `arguments`.

  Returns:
    Its shape, and the 'backbone' tree of f32 for `vit(config, classes, weights=...)`.

  Raises:
    UserError: another architecture, or tensors that are missing, left over, damaged or of another
      shape, by name. The pooler and the head of pretraining are left out.
  """
  path = Path(path)
  if path.suffix == '.onnx':
    return _load_onnx(path)
  known = pretrained.config(path, {})
  if 'architecture' in known:
    c, names = _of_timm(path, known)
  elif known.get('model_type') == 'dinov2':
    pretrained.config(path, {'hidden_act': 'gelu'})
    c, names = _of_hub(path, known, _DINOV2)
  else:
    pretrained.config(path, {'model_type': 'vit', 'hidden_act': 'gelu'})
    c, names = _of_hub(path, known, _VIT)
  pretrained.layered(path, c.depth)
  wanted = _shapes(c, names)
  return c, _tree(c, names, pretrained.tensors(path, wanted, names.prefix, names.ignored))


def arguments(path: str | Path) -> dict[str, Any]:
  """'mean' and 'std' of `vit` as the files beside the weights say it, {} where they do not."""
  return sidecar.pixels(path)


def save(
  folder: str | Path, config: Config, backbone: Tree, mean: Any = 0.5, std: Any = 0.5
) -> None:
  """Writes a backbone as a Hugging Face directory of model_type 'vit', which `load` reads again.

  Args:
    folder: is made; config.json, preprocessor_config.json and model.safetensors in it are replaced.
    config: its shape.
    backbone: see `vit`, without LayerScale and a norm before the layers.
    mean, std: of the pixels, as of `vit`.

  Raises:
    UserError: another kind of ViT, or a folder that cannot be written.
  """
  c, n = config, _VIT
  if c.activation != 'gelu' or 'scale1' in backbone['layers'] or 'before' in backbone:
    raise UserError(
      'only a ViT with gelu, without LayerScale and a norm before its layers can be written'
    )
  w = np.asarray(backbone['patch']['w']).reshape(c.patch, c.patch, c.channels, c.d)
  tensors = {
    f'{n.patch}.weight': w.transpose(3, 2, 0, 1),
    f'{n.patch}.bias': np.asarray(backbone['patch']['b']),
    n.cls: np.asarray(backbone['cls'])[None, None],
    n.positions: np.asarray(backbone['positions'])[None],
    f'{n.norm}.weight': np.asarray(backbone['norm']['scale']),
    f'{n.norm}.bias': np.asarray(backbone['norm']['bias']),
    **pretrained.unstack(backbone['layers'], n.layer, n.block),
  }
  about = {
    'model_type': 'vit',
    'architectures': ['ViTModel'],
    'image_size': c.image,
    'patch_size': c.patch,
    'num_channels': c.channels,
    'hidden_size': c.d,
    'num_hidden_layers': c.depth,
    'num_attention_heads': c.heads,
    'intermediate_size': c.ffn,
    'layer_norm_eps': c.eps,
    'hidden_act': 'gelu',
    'qkv_bias': True,
  }
  pretrained.write(Path(folder), about, tensors)
  sidecar.write_pixels(Path(folder), c.image, c.channels, mean, std)


def _of_hub(path: Path, known: dict[str, Any], names: _Names) -> tuple[Config, _Names]:
  for key, only in (('qkv_bias', True), ('use_swiglu_ffn', False)):
    if known.get(key, only) is not only:
      raise UserError(f'{path}/config.json: {key} is {not only}, only {only} is supported here')
  keys = ('image_size', 'patch_size', 'num_channels', 'hidden_size', 'num_hidden_layers')
  sizes = [pretrained.count(path, known, key) for key in (*keys, 'num_attention_heads')]
  if names is _DINOV2:
    ffn, eps = sizes[3] * pretrained.count(path, {'mlp_ratio': 4} | known, 'mlp_ratio'), 1e-6
  else:
    ffn, eps = pretrained.count(path, known, 'intermediate_size'), 1e-12
  pretrained.divided(path, sizes[3], sizes[5])
  eps = pretrained.number(path, known, 'layer_norm_eps', eps)
  return Config(*sizes, ffn=ffn, eps=eps), names


def _of_timm(path: Path, known: dict[str, Any]) -> tuple[Config, _Names]:
  name = str(known['architecture'])
  size = re.fullmatch(
    r'vit_(tiny|small|base|large|huge)_patch(\d+)_(?:(\d+)(?:_in21k)?|(dinov2))', name
  )
  if size is None or known.get('global_pool', 'token') != 'token':
    raise UserError(
      f'{path}/config.json: architecture is {name!r}, only vit_SIZE_patchN_PIXELS and '
      'vit_SIZE_patch14_dinov2 with global_pool token are supported here'
    )
  d, depth, heads = _TIMM_SIZES[size[1]]
  shape = {'img_size': int(size[3] or 518), 'patch_size': int(size[2]), 'in_chans': 3}
  shape |= {'embed_dim': d, 'depth': depth, 'num_heads': heads, 'mlp_ratio': 4}
  given = pretrained.section(path, known, 'model_args')
  if more := sorted(set(given) - set(shape)):
    raise UserError(f'{path}/config.json: model_args has {", ".join(more)}: not supported here')
  shape |= given
  sizes = [pretrained.count(path, shape, key) for key in shape if key != 'mlp_ratio']
  ratio = pretrained.number(path, shape, 'mlp_ratio')
  c = Config(*sizes, ffn=int(shape['embed_dim'] * ratio), eps=1e-6)
  pretrained.divided(path, c.d, c.heads)
  return c, _TIMM._replace(scales=_TIMM_SCALES) if size[4] else _TIMM


def _load_onnx(file: Path) -> tuple[Config, Tree]:
  source, names = onnx_file.read(file, prefix='backbone.'), _DINOV2
  d, channels, patch, _ = onnx_file.shape(source, f'{names.patch}.weight', 4)
  # An export keeps the positions as two constants: the class token's and the others'.
  first, rest = 'embeddings.Concat', 'embeddings.Reshape'
  _, positions, _ = onnx_file.shape(source, rest, 3)
  (ffn,) = onnx_file.shape(source, f'{names.layer.format(0)}mlp.fc1.bias', 1)
  depth = sum(name.endswith('.norm1.weight') for name in source.shapes)
  image = math.isqrt(positions) * patch
  c = Config(image, patch, channels, d, depth, max(d // 64, 1), ffn, 1e-6)
  wanted = _shapes(c, names)
  del wanted[names.positions]
  wanted |= {first: (1, 1, d), rest: (1, _patches(c), d)}
  t = containers.exactly(source, wanted, ignored=(*names.ignored, 'decoder.'))
  t[names.positions] = np.concatenate([t.pop(first), t.pop(rest)], 1)
  return c, _tree(c, names, t)


def _shapes(c: Config, names: _Names) -> dict[str, tuple[int, ...]]:
  """The tensors of a file by name, as torch keeps them."""
  d = c.d
  wanted = {
    f'{names.patch}.weight': (d, c.channels, c.patch, c.patch),
    f'{names.patch}.bias': (d,),
    names.cls: (1, 1, d),
    names.positions: (1, 1 + _patches(c), d),
    f'{names.norm}.weight': (d,),
    f'{names.norm}.bias': (d,),
  }
  for i in range(c.depth):
    start = names.layer.format(i)
    wanted |= {f'{start}{scale}': (d,) for scale in names.scales}
    if names.fused:
      wanted |= {f'{start}{names.fused}.weight': (3 * d, d), f'{start}{names.fused}.bias': (3 * d,)}
  return wanted | pretrained.stack_shapes(names.layer, names.block, c.depth, d, c.ffn)


def _tree(c: Config, names: _Names, t: dict[str, np.ndarray]) -> Tree:
  """The tensors as our 'backbone'."""
  block = names.block
  if names.fused:
    block = block | {name: f'{names.fused}.{name}' for name in 'qkv'}
    for i in range(c.depth):
      whole = f'{names.layer.format(i)}{names.fused}'
      for kind in ('weight', 'bias'):
        parts = np.split(t[f'{whole}.{kind}'], 3)
        t |= {f'{whole}.{name}.{kind}': part for name, part in zip('qkv', parts, strict=True)}
  stacked = pretrained.stack(t, names.layer, block, c.depth)
  for ours, theirs in zip(('scale1', 'scale2'), names.scales, strict=False):
    stacked[ours] = np.stack([t[f'{names.layer.format(i)}{theirs}'] for i in range(c.depth)])
  w = t[f'{names.patch}.weight'].transpose(2, 3, 1, 0).reshape(-1, c.d)
  tree = {
    'patch': {'w': w, 'b': t[f'{names.patch}.bias']},
    'cls': t[names.cls][0, 0],
    'positions': t[names.positions][0],
    'layers': stacked,
    'norm': {'scale': t[f'{names.norm}.weight'], 'bias': t[f'{names.norm}.bias']},
  }
  return jax.tree.map(jnp.asarray, tree)
