"""Many runs in few programs: groups, mapping, the superset program of an ablation."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_jax import sweep
from cl_jax.compose import chain, gated
from cl_jax.errors import UserError
from cl_jax.learner import learner
from cl_jax.loop import programs, run, run_chunks
from cl_jax.methods.lowrank.lora import lora
from cl_jax.methods.regularisation.ewc import ewc
from cl_jax.methods.regularisation.lwf import lwf
from cl_jax.methods.replay.er import er
from cl_jax.models.mlp import mlp
from cl_jax.models.vit import Config, vit
from cl_jax.sweep import MAPPED, SHARED
from cl_jax.types import Batch, Method
from tests.compiling import quick

ABLATED = {'er': lambda: er(40, 5), 'ewc': lambda: ewc(1.0), 'lwf': lambda: lwf(0.5)}


def model():
  return mlp((8,), 6)


def superset(cell, weights):
  """Every method, each behind its switch."""
  method = chain(**{name: gated(cell[name], make()) for name, make in ABLATED.items()})
  return learner(model(), optax.sgd(cell['lr']), method)


def separate(names):
  def build(lr, weights):
    return learner(model(), optax.sgd(lr), chain(**{n: ABLATED[n]() for n in names}))

  return build


def test_factorial_ablation_in_one_program(toy_stream):
  """{ER, EWC, LwF} on and off, 8 seeds: 64 runs of one program equal 8 separately compiled ones."""
  cells = [{**cell, 'lr': 0.05} for cell in sweep.factorial(tuple(ABLATED))]
  seeds = 8
  repeated = [cell for cell in cells for _ in range(seeds)]
  assert len(sweep.compile_groups(repeated)) == 1
  seed_keys = jnp.stack([jax.random.key(s) for s in range(seeds)])
  keys = jnp.concatenate([seed_keys] * len(cells))
  together = sweep.sweep(superset, repeated, keys, toy_stream, devices=jax.devices()[:1])
  accuracies = []
  for c, cell in enumerate(cells):
    names = [n for n in ABLATED if cell[n]]
    one = lambda key, stream, names=names: run(separate(names), 0.05, key, stream)[1].R  # noqa: E731
    program = quick(sweep.map_runs(one, (MAPPED, SHARED), seeds, devices=jax.devices()[:1]))
    alone = np.asarray(program(seed_keys, toy_stream))
    ours = np.stack([together[c * seeds + s][1].R for s in range(seeds)])
    # Rows that a disabled ER appends have weight 0, but sums over 15 rows round unlike sums over 10.
    np.testing.assert_allclose(ours, alone, atol=0.0101)
    assert np.mean(ours == alone) > 0.97
    accuracies.append(alone[:, -1].mean())
  assert (
    accuracies[4] > accuracies[0] + 0.1
  )  # replay alone against nothing: the switches do something


def test_groups_follow_everything_but_floats():
  cells = sweep.grid({'lr': (0.1, 0.2), 'size': (10, 20), 'on': (True,)})
  groups = sweep.compile_groups(cells)
  assert [g.members for g in groups] == [(0, 2), (1, 3)]
  np.testing.assert_allclose(groups[0].floats, [[0.1], [0.2]])
  assert sweep.fill(groups[1].static, groups[1].floats[1]) == {
    'lr': pytest.approx(0.2),
    'on': True,
    'size': 20,
  }
  nested = [{'a': {'x': 1.0, 'y': 2}}, {'a': {'x': 3.0, 'y': 2}}, {'a': {'x': 3.0, 'y': 3}}]
  assert [g.members for g in sweep.compile_groups(nested)] == [(0, 1), (2,)]
  with pytest.raises(UserError, match='arrays belong to weights'):
    sweep.compile_groups([{'order': np.arange(3000)}])


def test_shared_arguments_are_not_copied_per_run():
  """A large shared argument costs its size once, whatever the number of runs."""
  big = jnp.ones((256, 256))
  x = jnp.ones((8, 256))
  f = sweep.map_runs(lambda x, w: jnp.tanh(x @ w), (MAPPED, SHARED), 8, 1, jax.devices()[:1])
  memory = jax.jit(f).lower(x, big).compile().memory_analysis()
  assert memory.argument_size_in_bytes < 1.2 * (big.nbytes + x.nbytes)
  assert memory.temp_size_in_bytes < big.nbytes


@pytest.mark.parametrize('width', [1, 8])
def test_a_frozen_backbone_is_there_once_for_all_runs(width):
  """Eight LoRA runs over one ViT: in the compiled step its bytes appear once, whatever the width."""
  model = vit(Config(8, 4, 1, 96, 4, 4, 384), 3)
  batch = Batch(jnp.ones((4, 8, 8, 1)), jnp.arange(4) % 3, jnp.ones(4), jnp.zeros(4, jnp.int32))
  params, _ = model.init(jax.random.key(0), batch)
  frozen = {'backbone': params['backbone']}
  size = lambda tree: sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))  # noqa: E731
  made = lambda w: learner(model, optax.sgd(0.1), lora(2, targets='.*/(q|v)/w'), w)  # noqa: E731
  begin = jax.vmap(lambda key: made(frozen).init(key, batch))
  states = jax.eval_shape(begin, jax.random.split(jax.random.key(0), 8))

  def step(state, weights, batch):
    return made(weights).step(state, batch)[0].params

  f = sweep.map_runs(step, (MAPPED, SHARED, SHARED), 8, width, jax.devices()[:1])
  compiled = jax.jit(f).lower(states, frozen, batch).compile()
  memory = compiled.memory_analysis()
  own = size(states._replace(key=()))
  assert own < 0.4 * size(frozen)
  assert memory.argument_size_in_bytes < size(frozen) + 1.2 * own + 10_000
  # Activations grow with the width; eight copies of the weights would be eight times their size.
  assert memory.temp_size_in_bytes < (1.5 if width == 1 else 4.0) * size(frozen)


def test_width_and_order_of_results(toy_stream):
  """Any width gives run i at place i, and a number of runs that the width does not divide works."""
  f = lambda a, b: {'sum': a + b, 'twice': 2 * a}  # noqa: E731
  a = jnp.arange(5.0)
  for width in (1, 2, 5, 9):
    out = sweep.map_runs(f, (MAPPED, SHARED), 5, width, jax.devices()[:1])(a, jnp.float32(10))
    np.testing.assert_array_equal(out['sum'], np.arange(5) + 10)
    np.testing.assert_array_equal(out['twice'], 2 * np.arange(5))


def test_streams_of_several_seeds(toy_stream):
  """Orders are mapped, data is shared, shorter streams are padded; mapped chunks equal single runs."""
  other = dataclasses.replace(
    toy_stream,
    index=toy_stream.index[:, ::-1][:, :25],
    ends=toy_stream.ends[:, :1],
    task_names=('c', 'b', 'a'),
  )
  stream, axes = sweep.stack_streams([toy_stream, other])
  assert axes.x == SHARED and axes.index == MAPPED and axes.test.x == SHARED
  assert stream.index.shape == (2, 3, 30, 10) and stream.steps.tolist() == [[30] * 3, [25] * 3]
  build = lambda hp, w: learner(model(), optax.sgd(hp), er(20, 5))  # noqa: E731
  keys = jnp.stack([jax.random.key(0), jax.random.key(1)])
  many = sweep.Many(2, axes, devices=tuple(jax.devices()[:1]))
  *_, last = run_chunks(
    build, jnp.array([0.05, 0.02]), keys, stream, chunk=10, parts=programs(build, 10, many.lift)
  )
  for i, (single, lr) in enumerate(((toy_stream, 0.05), (other, 0.02))):
    _, record = jax.jit(run, static_argnums=0)(build, jnp.float32(lr), keys[i], single)
    np.testing.assert_array_equal(last.record.R[i], record.R)
    steps = single.index.shape[1]
    np.testing.assert_array_equal(last.record.loss[i, :, :steps], record.loss)
    assert np.isnan(last.record.loss[i, :, steps:]).all()
  with pytest.raises(ValueError, match='differ in more'):
    sweep.stack_streams([toy_stream, dataclasses.replace(toy_stream, scenario='class')])


def test_calibration_is_cached(tmp_path):
  calls = []

  def make(width):
    calls.append(width)
    size = 400 if width == 1 else 4
    return lambda: jnp.linalg.matrix_power(jnp.ones((size, size)) / size, 16)

  assert sweep.calibrate(make, (1, 8), 'work', tmp_path) == 8
  assert calls == [1, 8]
  assert sweep.calibrate(make, (1, 8), 'work', tmp_path) == 8
  assert calls == [1, 8]  # read from the file
  assert sweep.calibrate(make, (1, 8), 'other work', tmp_path) == 8
  assert len(json.loads((tmp_path / 'calibration.json').read_text())) == 2
  (tmp_path / 'calibration.json').write_text('{"half')
  assert sweep.calibrate(make, (1, 8), 'work', tmp_path) == 8


def test_naive_is_the_empty_method(toy_stream):
  """A learner without a method and a chain of nothing are the same program."""
  runs = [
    jax.jit(run, static_argnums=0)(
      lambda hp, w, m=m: learner(model(), optax.sgd(hp), m), 0.05, jax.random.key(0), toy_stream
    )[1].R
    for m in (Method(), chain())
  ]
  np.testing.assert_array_equal(*runs)
