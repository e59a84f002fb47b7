"""Many devices: the leaf rule, the same step cut over 8 virtual devices, what it needs, mapped runs apart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cl_jax import footprint, shard
from cl_jax.errors import UserError
from cl_jax.masks import paths
from cl_jax.models.mlp import mlp
from cl_jax.types import Batch
from tests.compiling import QUICKLY

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='module')
def eight() -> dict:
  """What tests/eight.py found."""
  environment = {k: v for k, v in os.environ.items() if k != 'JAX_NUM_CPU_DEVICES'}
  # Compiling is most of it, and what LLVM makes of the programs is not what is asked.
  environment |= QUICKLY
  done = subprocess.run(
    [sys.executable, '-m', 'tests.eight', 'steps', 'ablation', 'memory'],
    cwd=ROOT, env=environment, capture_output=True, text=True,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1])


def test_the_leaf_rule():
  axis = shard.axis
  assert axis('backbone/embed/tokens', (128256, 4096), 8) == 0  # the longest
  assert axis('backbone/layers/q/w', (32, 4096, 4096), 8) == 2  # of equals the last
  assert axis('backbone/layers/down/w', (32, 14336, 4096), 8) == 1
  assert axis('backbone/layers/norm1/scale', (32, 4096), 8) == 1  # never a stack's axis of layers
  assert axis('0/mu/backbone/layers/norm1/scale', (32, 4096), 8) == 1  # moments as their weights
  assert axis('head/w', (4099, 4096), 8) == 1  # what 8 divides
  assert axis('head/w', (4099, 4097), 8) is None
  assert axis('head/b', (4096,), 8) == 0
  assert axis('head/b', (4088,), 8) is None  # a small one
  assert axis('backbone/embed/tokens', (128256, 4096), 1) is None


def test_floats_are_cut_and_nothing_else():
  mesh = jax.sharding.AbstractMesh((2,), (shard.AXIS,))
  cut = shard.Cut(mesh, 'fsdp')  # pyright: ignore[reportArgumentType]
  struct = jax.ShapeDtypeStruct
  tree = {
    'w': struct((64, 128), jnp.float32),
    'half': struct((128, 64), jnp.bfloat16),
    'pixels': struct((4096, 4096), jnp.uint8),
    'tokens': struct((4096, 4096), jnp.int32),
    'key': struct((4096, 2), jax.random.key(0).dtype),
    'few': struct((63, 64), jnp.float32),
    'method': {
      'der': {'rows': {'logits': struct((4097, 10), jnp.float32)}}
    },  # floats of a memory are no exception
  }
  P = jax.sharding.PartitionSpec
  found = {name: s.spec for name, s in paths(shard.rule(cut, tree)).items()}
  assert found == {
    'w': P(None, shard.AXIS), 'half': P(shard.AXIS, None), 'method/der/rows/logits': P(None, shard.AXIS),
    'pixels': P(), 'tokens': P(), 'key': P(), 'few': P(),
  }  # fmt: skip
  whole = shard.rule(cut._replace(mode='data'), tree)
  assert all(s.spec == P() for s in paths(whole).values())


@pytest.mark.parametrize('name', ['llama fsdp', 'vit fsdp', 'vit data'])
def test_a_step_on_eight_devices_is_the_step_of_one(eight, name):
  found = eight['steps'][name]
  assert max(found[what] for what in ('parameters', 'losses')) <= 1e-5
  assert found['report'] <= 1e-4  # sums over a row's tokens, or logits
  assert found['moved'] > 0.005  # and it is a step
  if name.endswith('fsdp'):
    assert found['share'] < 0.2  # an eighth, and what is small
    assert found['loops']['all-gather'] >= 6  # weights, one layer at a time
  else:
    assert found['share'] == 1 and 'all-gather' not in found['loops']
  moved = {'all-to-all', 'collective-permute'}  # activations stay where they are
  assert not moved & set(found['loops'])


def test_a_mapped_ablation_on_eight_devices_is_that_of_one_and_talks_to_nobody(eight):
  assert eight['ablation'] == {'same': True, 'collectives': {}, 'spread': True}


def test_the_memory_plan_agrees_with_xla(eight):
  found = eight['memory']
  assert {f['stage'] for f in found} == {'unembedding', 'one layer'}
  for f in found:
    # What is kept is exact, up to the batch and the step's number.
    assert 0 <= f['arguments'] - f['kept'] < 20_000, f
    assert 0.8 < f['plan'] / f['xla'] < 1.25, f


def test_plans_of_the_shapes_that_ship():
  counts = {'llama-1b': 1_235_814_400, 'llama-8b': 8_030_261_248, 'llama-70b': 70_553_706_496}
  for name, count in counts.items():
    step = footprint.Step(footprint.SHAPES[name])
    assert footprint.parameters(step) == count
    one, eight = (footprint.footprint(step, n) for n in (1, 8))
    assert one.parameters == 4 * count and one.optimiser == pytest.approx(8 * count, abs=100)
    assert eight.parameters == pytest.approx(count / 2, rel=1e-3)
    assert footprint.footprint(step._replace(mode='data'), 8).parameters == 4 * count
  assert footprint.fewest(step, 1e9) is None
  least = footprint.fewest(step, 72e9) or 1
  assert (
    footprint.footprint(step, least).total <= 72e9 < footprint.footprint(step, least // 2).total
  )


def test_rows_that_the_devices_cannot_share_are_refused():
  cut = shard.over(jax.devices()[:1])
  two = cut._replace(mesh=jax.sharding.AbstractMesh((2,), (shard.AXIS,)))
  batch = Batch(jnp.ones((3, 4)), jnp.zeros(3, jnp.int32), jnp.ones(3), jnp.zeros(3, jnp.int32))
  model = mlp((8,), 2)
  params, _ = model.init(jax.random.key(0), batch)
  with pytest.raises(UserError, match='2 devices cannot share 3 rows of a step evenly'):
    shard.sharded(model, two).apply(params, batch, train=True)
  with pytest.raises(UserError, match="shard='zero' is not known"):
    shard.over(mode='zero')
  assert np.array_equal(shard.put(cut, {'a': np.arange(3)})['a'], np.arange(3))
