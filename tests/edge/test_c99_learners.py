"""Learners in C99 against JAX: 20 steps with a boundary on the way, integers bitwise, floats to 1e-5."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_jax import budget, methods
from cl_jax.compose import chain
from cl_jax.edge.c99 import emit
from cl_jax.edge.learner import Flat, flatten
from cl_jax.errors import UserError
from cl_jax.learner import learner
from cl_jax.methods.heads.task_head import task_head
from cl_jax.methods.replay.latent import latent
from cl_jax.models.cnn import cnn
from cl_jax.models.identity import identity
from cl_jax.models.mlp import mlp
from cl_jax.streams.take import take
from cl_jax.types import Batch, Method
from tests.compiling import quick
from tests.contract.test_methods import (
  HEADED,
  HP,
  NAMES,
  TRANSFORMER,
  builder,
  kinds_first,
  make,
  short,
)
from tests.edge.agent import Device, sanitized

pytestmark = pytest.mark.usefixtures('quickly')

# Decompositions that XLA leaves to a library of the device.
REFUSED = {'fecam': 'Eigh', 'inflora': 'Qr', 'slca': 'Eigh'}
# JAX's own compiler sums in another order: what a method divides by something small differs by more.
LOOSE = {'hat': 3e-5}


def flat_of(name: str, toy_stream):
  """(flat, stream, ends, predict's shape) of a method of the contract's table."""
  stream = short(toy_stream, name)
  method = chain(**{name: make(name, stream)})
  if name in HEADED:
    method = chain(**{name: make(name, stream), 'head': task_head(stream.task_classes, 6)})
  learn = builder(method, name=name)(HP, None)
  batch = take(stream, stream.index[0, 0], 0)
  ends = jax.vmap(lambda rows: take(stream, rows, 0))(stream.ends[0])
  state = quick(learn.init)(jax.random.key(7), batch)
  return flatten(learn, state, batch, ends), stream, ends


def near(flat: Flat, got, want, tolerance: float) -> None:
  for leaf, a, b in zip(flat.state, got, want, strict=True):
    b = np.asarray(b)
    if b.dtype.kind == 'f':
      np.testing.assert_allclose(a, b, tolerance, tolerance, err_msg=leaf.name)
    else:
      np.testing.assert_array_equal(a, b, leaf.name)


def follow(flat: Flat, device: Device, batches, ends, tolerance=1e-5) -> None:
  """The same calls in both; the boundary comes after 12 steps."""
  step, predict = quick(flat.step), quick(flat.predict)
  leaves = flat.leaves
  for i, rows in enumerate(batches):
    if i == 12 and flat.boundary is not None:
      leaves = quick(flat.boundary)(leaves, jax.tree.leaves(ends))
      device.call('boundary', jax.tree.leaves(ends))
      near(flat, device.leaves(), leaves, tolerance)
    rows = jax.tree.leaves(rows)
    leaves, loss = step(leaves, rows)
    mine = np.zeros((), np.float32)
    device.call('step', rows, mine)
    np.testing.assert_allclose(mine, loss, 1e-4, 1e-5)
  near(flat, device.leaves(), leaves, tolerance)
  logits = np.asarray(predict(leaves, rows))
  mine = np.zeros(logits.shape, np.float32)
  device.call('predict', rows, mine)
  np.testing.assert_allclose(mine, logits, 10 * tolerance, 10 * tolerance)
  near(flat, device.leaves(), leaves, tolerance)  # prediction changes nothing


@pytest.mark.parametrize('name', kinds_first(n for n in NAMES if n not in REFUSED))
def test_every_method(name, toy_stream, tmp_path):
  flat, stream, ends = flat_of(name, toy_stream)
  program = emit(flat, 'cl')
  flags = ('-O0',) if name in TRANSFORMER else ('-O1',)  # long files: compile them quickly
  device = Device(program, flat.leaves, tmp_path, *flags)
  batches = [take(stream, stream.index[int(i >= 12), i], int(i >= 12)) for i in range(20)]
  follow(flat, device, batches, ends, LOOSE.get(name, 1e-5))


@pytest.mark.parametrize('name', REFUSED)
def test_refused_by_name_line_and_method(name, toy_stream):
  flat, _, _ = flat_of(name, toy_stream)
  with pytest.raises(
    UserError, match=rf'{REFUSED[name]} at cl_jax/methods/\w+/{name}\.py:\d+ \(method {name}\)'
  ):
    emit(flat, 'cl')


def small(method: Method, model=None, pixels=(20,), classes=4, rows=6, tx=None):
  """(flat, batches, ends) of an MLP 20-16-4, or of `model` on 8-bit pixels."""
  rng = np.random.default_rng(0)
  centres = 2 * rng.normal(size=(classes, *pixels))

  def batch() -> Batch:
    y = rng.integers(0, classes, rows)
    x = (centres[y] + rng.normal(size=(rows, *pixels))).astype(np.float32)
    x = x if model is None else np.clip(128 + 40 * x, 0, 255).astype(np.uint8)
    one = jnp.ones(rows)
    return Batch(jnp.asarray(x), jnp.asarray(y, jnp.int32), one, jnp.zeros(rows, jnp.int32))

  learn = learner(model or mlp((16,), classes), tx or optax.sgd(0.05, momentum=0.9), method)
  batches = [batch() for _ in range(20)]
  ends = jax.tree.map(lambda *a: jnp.stack(a), *batches[:2])
  state = jax.jit(learn.init)(jax.random.key(1), batches[0])
  return flatten(learn, state, batches[0], ends), batches, ends


def method_of(*names: str) -> Method:
  known = {'capacity': 30, 'draw': 6, 'classes': 4, 'tasks': 1, 'batches': 2}
  parts = {}
  for name in names:
    factory = methods.find(name)
    wanted = factory.__code__.co_varnames[: factory.__code__.co_argcount]
    parts[name] = factory(**{k: v for k, v in known.items() if k in wanted})
  return chain(**parts) if parts else Method()


@pytest.mark.long
@pytest.mark.parametrize('names', [('er', 'lwf'), ('agem',), ('ewc', 'slda')])
def test_sanitizers_find_nothing(names, tmp_path):
  """No access outside of an array, no overflow, no misaligned or wild shift; and the bits of other builds."""
  flat, batches, ends = small(method_of(*names))
  program = emit(flat, 'cl')
  device = Device(program, flat.leaves, tmp_path / 'plain', '-O3')
  before = device.memory.copy()
  follow(flat, device, batches, ends)
  calls = [('step', jax.tree.leaves(b)) for b in batches]
  calls.insert(12, ('boundary', jax.tree.leaves(ends)))
  calls.append(('predict', jax.tree.leaves(batches[-1])))
  after = sanitized(program, before, calls, 4 * 6 * 4, tmp_path / 'sanitized')
  assert after == device.memory.tobytes()


def test_convolutions_batch_in_place(tmp_path):
  """A convolutional network with Adam on 8-bit images: forward, both gradients, pooling."""
  images = {'pixels': (8, 8, 1), 'model': cnn((4, 6), (8,), 4), 'tx': optax.adam(1e-3)}
  flat, batches, ends = small(method_of('er'), **images)
  program = emit(flat, 'cl')
  follow(flat, Device(program, flat.leaves, tmp_path), batches, ends, 3e-5)
  assert any(
    leaf['dtype'] == 'int8' and leaf['meaning'] == 'uint8' for leaf in program.manifest['state']
  )


def test_of_branches_the_dearest_counts():
  """Latent replay runs the layers below its cut by themselves, or not: the budget counts one of the two."""
  learn = learner(mlp((16, 8), 4), optax.sgd(0.05), latent('l0', 30, 6))
  x = jnp.ones((5, 20))
  batch = Batch(x, jnp.zeros(5, jnp.int32), jnp.ones(5), jnp.zeros(5, jnp.int32))
  state = learn.init(jax.random.key(0), batch)
  program = emit(flatten(learn, state, batch, jax.tree.map(lambda a: a[None], batch)), 'cl')
  wanted = budget.macs(learn.step, state, batch)['total']
  assert program.manifest['macs']['step'] == wanted > 0


def test_manifest_counts(tmp_path):
  """MACs by hand, bytes of the arena as the compiler has them, memory updated in place."""
  flat, batches, _ = small(method_of('er'))
  program = emit(flat, 'cl')
  forward = 20 * 16 + 16 * 4
  assert program.manifest['macs']['predict'] == 6 * forward
  assert program.manifest['macs']['step'] == 12 * (2 * forward + 16 * 4)  # no gradient of the input
  assert not program.manifest['copies']
  assert program.manifest['state_bytes'] == sum(a.nbytes for a in flat.leaves)
  text = program.files['cl.c'].replace('} arena;', '} arena;\nconst int arena_size = sizeof arena;')
  device = Device(program._replace(files={**program.files, 'cl.c': text}), flat.leaves, tmp_path)
  import ctypes

  size = ctypes.c_int.in_dll(device.lib, 'arena_size').value
  assert size == program.manifest['arena_bytes']
  assert f'CL_ARENA_BYTES {size}' in program.files['cl.h']
  assert len(program.files['cl_main.c'].splitlines()) <= 15


def test_ranpac_without_a_projection(tmp_path):
  """Structured features: a seed of 4 bytes in the state and in no table of constants what it stands for."""
  ranpac = methods.find('ranpac')(4, 40, 100.0, features='structured')
  flat, batches, ends = small(ranpac, identity(4), rows=12)
  program = emit(flat, 'cl')
  follow(flat, Device(program, flat.leaves, tmp_path, '-O1'), batches, ends, 2e-5)
  held = {leaf.name: leaf for leaf in flat.state}
  seed = held['method/projection']
  assert (seed.shape, seed.dtype, seed.meaning) == ((), 'int32', 'uint32')
  assert program.manifest['constant_bytes'] == 0
  assert program.manifest['state_bytes'] == sum(a.nbytes for a in flat.leaves)


def test_prediction_cannot_write_and_names_are_checked():
  flat, _, _ = small(method_of())
  program = emit(flat, 'net')
  assert 'void net_predict(const net_state *s' in program.files['net.h']
  with pytest.raises(UserError, match='name of a C function'):
    emit(flat, '3d')
