"""The multilayer perceptron, the workhorse of the MNIST protocols."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax

from cl_jax.models import layers
from cl_jax.types import Array, Batch, Model, Out, Tree, no_tap


def mlp(
  sizes: tuple[int, ...],
  classes: int,
  init: str | float = 'he',
  activation: Callable[[Array], Array] = jax.nn.relu,
  bias: float = 0.0,
  mean: Any = None,
  std: Any = None,
) -> Model:
  """A multilayer perceptron over flattened inputs.

  Parameters: 'l0', 'l1', ... of the hidden layers and 'head', each {'w': [in, out], 'b': [out]}.
  Taps: 'l0', 'l1', ... see the activations f32[B, size]. `features` are those of the last hidden
  layer (the flattened input when there is none).

  Args:
    sizes: units of each hidden layer.
    classes: units of the output layer.
    init: see `layers.weight`; 'torch' draws the biases too.
    activation: elementwise.
    bias: initial value of the biases.
    mean, std: for u8 inputs, see `layers.pixels`.
  """
  names = tuple(f'l{i}' for i in range(len(sizes)))

  def init_fn(key: Array, batch: Batch) -> tuple[Tree, Tree]:
    units = (math.prod(batch.x.shape[1:]), *sizes, classes)
    keys = jax.random.split(key, len(sizes) + 1)
    params = {
      name: layers.dense_init(k, d_in, d_out, init, bias)
      for name, k, d_in, d_out in zip((*names, 'head'), keys, units[:-1], units[1:], strict=True)
    }
    return params, {}

  def apply(variables: Tree, batch: Batch, tap=no_tap, train: bool = False) -> Out:
    del train
    h = layers.pixels(batch.x, mean, std)
    h = h.reshape(h.shape[0], -1)
    for name in names:
      h = tap(name, activation(layers.dense(variables[name], h)), 0)
    return Out(layers.dense(variables['head'], h), h, {})

  return Model(init_fn, apply, layers.softmax_cross_entropy, layers.in_line(names))
