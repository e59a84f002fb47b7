"""A small convolutional network for images of about 32 pixels."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from cl_jax.errors import UserError
from cl_jax.models import layers
from cl_jax.models.conv import conv, max_pool
from cl_jax.types import Array, Batch, Model, Out, Tree, no_tap


def cnn(
  channels: tuple[int, ...],
  sizes: tuple[int, ...],
  classes: int,
  init: str | float = 'he',
  mean: Any = None,
  std: Any = None,
) -> Model:
  """3x3 convolutions, each followed by ReLU and 2x2 max-pooling, then a multilayer perceptron.

  Parameters: 'c0', 'c1', ... {'w': f32[3, 3, in, out], 'b'}, 'l0', ... {'w': [in, out], 'b'} and
  'head'. Taps of the same names see the activations after the ReLU (after pooling in 'c*').
  `features` are those of the last hidden layer, or all pooled pixels when `sizes` is empty.

  Args:
    channels: filters of each convolution.
    sizes: units of each hidden layer behind them.
    classes: units of the output layer.
    init: see `layers.weight`; biases are 0.
    mean, std: for u8 inputs, see `layers.pixels`.

  Raises:
    UserError: images too small to be halved once for each convolution.
  """

  def init_fn(key: Array, batch: Batch) -> tuple[Tree, Tree]:
    height, width, d = (*batch.x.shape[1:], 1)[:3]
    shrink = 2 ** len(channels)
    if min(height, width) < shrink:
      raise UserError(
        f'images of {height}x{width} are too small for {len(channels)} poolings: use fewer channels'
      )
    keys = iter(jax.random.split(key, len(channels) + len(sizes) + 1))
    params = {}
    for i, out in enumerate(channels):
      w = layers.weight(next(keys), (3, 3, d, out), init)
      params[f'c{i}'], d = {'w': w, 'b': jnp.zeros(out)}, out
    d *= (height // shrink) * (width // shrink)
    for i, out in enumerate(sizes):
      params[f'l{i}'], d = layers.dense_init(next(keys), d, out, init), out
    params['head'] = layers.dense_init(next(keys), d, classes, init)
    return params, {}

  def apply(variables: Tree, batch: Batch, tap=no_tap, train: bool = False) -> Out:
    del train
    h = layers.pixels(batch.x, mean, std)
    h = h if h.ndim == 4 else h[..., None]
    for i in range(len(channels)):
      p = variables[f'c{i}']
      # Pooling first: it commutes with bias and ReLU, which then see a quarter of the units.
      h = tap(f'c{i}', jax.nn.relu(max_pool(conv(h, p['w'])) + p['b']), 0)
    h = h.reshape(h.shape[0], -1)
    for i in range(len(sizes)):
      h = tap(f'l{i}', jax.nn.relu(layers.dense(variables[f'l{i}'], h)), 0)
    return Out(layers.dense(variables['head'], h), h, {})

  names = (*(f'c{i}' for i in range(len(channels))), *(f'l{i}' for i in range(len(sizes))))
  return Model(init_fn, apply, layers.softmax_cross_entropy, layers.in_line(names))
