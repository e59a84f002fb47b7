"""The reduced ResNet-18 of the continual-learning literature (GEM, A-GEM and all that followed)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from cl_jax.errors import UserError
from cl_jax.models import layers
from cl_jax.models.conv import conv
from cl_jax.types import Array, Batch, Model, Out, Tree, Wire, no_tap


def resnet(
  classes: int,
  width: int = 20,
  blocks: tuple[int, ...] = (2, 2, 2, 2),
  init: str | float = 'torch',
  mean: Any = None,
  std: Any = None,
  renorm: tuple[float, ...] = (),
) -> Model:
  """A residual network with basic blocks for images [B, H, W, C] or [B, H, W] of about 32 pixels.

  Parameters: 'stem', then 's0b0', 's0b1', 's1b0', ... (stage, block), each of the units 'conv1',
  'conv2' and, where the shape changes, 'skip'; a unit is a filter 'w' f32[k, k, in, out] and the
  'scale' and 'bias' of its batch norm, whose 'mean' and 'var' are `stats` under the same names.
  'head' is {'w', 'b'}. Taps: 'stem', 's0b0/conv1', 's0b0', ... see the activations f32[B, H, W, C]
  after the ReLU. `features` f32[B, width * 2**(stages - 1)] are averages over all pixels.

  Args:
    classes: units of the output layer.
    width: filters of the first stage; every later stage has twice as many at half the resolution.
    blocks: of each stage; (2, 2, 2, 2) is ResNet-18.
    init: see `layers.weight`.
    mean, std: for u8 inputs, see `layers.pixels`.
    renorm: () for batch norm, (r_max, d_max) for batch renormalisation; see `layers.batch_norm`.

  Source: He et al. 2016; 20 filters and no pooling in the stem as in Lopez-Paz & Ranzato, GEM,
  2017 (github.com/facebookresearch/GradientEpisodicMemory, model/common.py).
  """

  if len(renorm) not in (0, 2):
    raise UserError(f'resnet renorm={renorm}: (r_max, d_max), or () for batch norm')

  def init_fn(key: Array, batch: Batch) -> tuple[Tree, Tree]:
    channels = batch.x.shape[3] if batch.x.ndim == 4 else 1
    keys = iter(jax.random.split(key, 2 + 3 * sum(blocks)))

    def unit(k: int, d_in: int, d_out: int) -> Tree:
      w = layers.weight(next(keys), (k, k, d_in, d_out), init)
      return {'w': w, 'scale': jnp.ones(d_out), 'bias': jnp.zeros(d_out)}

    params, d_in = {'stem': unit(3, channels, width)}, width
    for stage, count in enumerate(blocks):
      d = width * 2**stage
      for i in range(count):
        block = {'conv1': unit(3, d_in, d), 'conv2': unit(3, d, d)}
        if d_in != d:
          block['skip'] = unit(1, d_in, d)
        params[f's{stage}b{i}'], d_in = block, d
    stats = _stats(params)
    params['head'] = layers.dense_init(next(keys), d_in, classes, init)
    return params, stats

  def apply(variables: Tree, batch: Batch, tap=no_tap, train: bool = False) -> Out:
    def unit(p: Tree, x: Array, stride: int = 1) -> tuple[Array, Tree]:
      h = jnp.asarray(conv(x, p['w'], stride))
      return layers.batch_norm(p, h, batch.w, train, renorm=renorm)

    stats = {}
    h = layers.pixels(batch.x, mean, std)
    h, stats['stem'] = unit(variables['stem'], h if h.ndim == 4 else h[..., None])
    h = tap('stem', jax.nn.relu(h), 0)
    for stage, count in enumerate(blocks):
      for i in range(count):
        name, new = f's{stage}b{i}', {}
        p = variables[name]
        stride = 2 if stage and not i else 1
        a, new['conv1'] = unit(p['conv1'], h, stride)
        a = tap(f'{name}/conv1', jax.nn.relu(a), 0)
        a, new['conv2'] = unit(p['conv2'], a)
        if 'skip' in p:
          h, new['skip'] = unit(p['skip'], h, stride)
        h = tap(name, jax.nn.relu(a + h), 0)
        stats[name] = new
    h = h.mean((1, 2))
    return Out(layers.dense(variables['head'], h), h, stats if train else {})

  return Model(init_fn, apply, layers.softmax_cross_entropy, _wires(blocks))


def _wires(blocks: tuple[int, ...]) -> tuple[Wire, ...]:
  """A unit of a block's output belongs to its second convolution, to its skip and to the identity."""
  found, before = [Wire('stem', '', 'stem')], 'stem'
  for stage, count in enumerate(blocks):
    for name in (f's{stage}b{i}' for i in range(count)):
      found += [
        Wire(f'{name}/conv1', before, f'{name}/conv1'),
        Wire(f'{name}/conv2', f'{name}/conv1', name),
        Wire(f'{name}/skip', before, name),
      ]
      before = name
  return (*found, Wire('head', before, ''))


def _stats(params: Tree) -> Tree:
  """The statistics before any batch, for every batch norm in the parameters."""
  if 'scale' in params:
    return {'mean': jnp.zeros_like(params['bias']), 'var': jnp.ones_like(params['scale'])}
  return {name: _stats(p) for name, p in params.items()}
