"""Compressed memories, states and moments in C99 against JAX."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cl_jax import compression, methods
from cl_jax.compose import chain
from cl_jax.edge.c99 import emit
from cl_jax.edge.learner import flatten
from cl_jax.learner import learner
from cl_jax.models.mlp import mlp
from cl_jax.models.quantised import quantise_tree
from cl_jax.models.vit import Config, vit
from cl_jax.types import Batch
from tests.compiling import quick
from tests.edge.agent import Device
from tests.edge.test_c99_learners import follow, small


def test_images_in_four_bits_are_equal_bit_for_bit(tmp_path):
  """20 steps and a boundary; codes of what arrives depend on no sum, so there is nothing to differ."""
  er = chain(er=compression.memory('int4', methods.find('er')(30, 6)))
  flat, batches, ends = small(er, mlp((12,), 4), (5, 5, 1), tx=optax.sgd(0.05))
  follow(flat, Device(emit(flat, 'cl'), flat.leaves, tmp_path, '-O0'), batches, ends)
  held = next(leaf for leaf in flat.state if leaf.name == 'method/er/rows/x/codes')
  assert held.shape == (31, 13) and held.meaning == 'uint8'


def test_activations_importances_and_moments_are_near(tmp_path):
  """What is rounded was summed in another order: a few codes may be one level away, nothing else."""
  parts = {
    'latent': methods.find('latent')('l0', 20, 6, 'int4'),
    'ewc': methods.find('ewc')(0.1, 'empirical'),
  }
  method = compression.state((('.*importance/.*', 'bfloat16'),), chain(**parts))
  tx = compression.moments('dynamic8', optax.adam(1e-3, b2=0.95))
  flat, batches, ends = small(method, tx=tx)
  device = Device(emit(flat, 'cl'), flat.leaves, tmp_path, '-O0')
  leaves, step = flat.leaves, jax.jit(flat.step)
  for i, batch in enumerate(batches[:12]):
    if i == 6:
      leaves = jax.jit(flat.boundary)(leaves, jax.tree.leaves(ends))
      device.call('boundary', jax.tree.leaves(ends))
    leaves, _ = step(leaves, jax.tree.leaves(batch))
    device.call('step', jax.tree.leaves(batch), np.zeros((), np.float32))
  kinds = set()
  for leaf, a, b in zip(flat.state, device.leaves(), leaves, strict=True):
    b = np.asarray(b)
    if leaf.name.endswith('codes'):
      kinds.add(leaf.meaning)
      a, b = a.view(f'u{a.itemsize}'), b.view(f'u{b.itemsize}')
      assert (a != b).mean() <= 0.02, leaf.name
    elif b.dtype.kind == 'f':
      np.testing.assert_allclose(a, b, 2e-3, 2e-3, err_msg=leaf.name)
    else:
      np.testing.assert_array_equal(a, b, leaf.name)
  assert kinds == {'uint8', 'uint16'}


def test_a_frozen_transformer_in_eight_bits(tmp_path):
  """Its matrices are constants of one byte a number, above which adapters and a prompt learn."""
  model = vit(Config(4, 2, 1, 8, 1, 2, 12), 4, init=0.3)
  rows = Batch(
    jnp.asarray(np.random.default_rng(0).integers(0, 256, (6, 4, 4, 1)), jnp.uint8),
    jnp.arange(6) % 4, jnp.ones(6), jnp.zeros(6, jnp.int32),
  )  # fmt: skip
  whole = quick(lambda key: model.init(key, rows)[0])(jax.random.key(0))
  frozen = quantise_tree({'backbone': whole['backbone']}, 8)
  parts = {
    'lora': methods.find('lora')(2, 2.0, 'backbone/layers/(q|v)/w'),
    'prompt_tuning': methods.find('prompt_tuning')(2),
    'er': methods.find('er')(8, 6),
  }
  learn = learner(model, optax.adam(1e-2), chain(**parts), frozen)
  state = quick(learn.init)(jax.random.key(1), rows)
  flat = flatten(learn, state, rows)
  program = emit(flat, 'cl')
  follow(flat, Device(program, flat.leaves, tmp_path, '-O0'), [rows] * 8, None)
  held = re.findall(r'static const int8_t \w+\[(\d+)\]', program.files['cl.c'])
  assert sum(map(int, held)) == 4 * 8 * 8 + 2 * 8 * 12
  assert not any(leaf.name.startswith('params/backbone') for leaf in flat.state)
