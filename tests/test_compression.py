"""Compression as an option of any method: what is stored, what is trained, what it costs."""

from __future__ import annotations

import dataclasses
import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_jax import budget, checkpoint, codecs, compression, cut, methods, product
from cl_jax.codecs import Packed, Rows
from cl_jax.compose import chain
from cl_jax.errors import UserError
from cl_jax.learner import learner
from cl_jax.loop import run
from cl_jax.models.mlp import mlp
from cl_jax.streams.take import take
from cl_jax.types import Method
from tests.compiling import quick
from tests.contract.test_methods import make, same

pytestmark = pytest.mark.usefixtures('quickly')

KEEP_EXAMPLES = 'er er_ace mir agem gem mer gdumb icarl rehearsal der derpp'.split()


def made(method, tx=None):
  return learner(mlp((16,), 6), tx or optax.sgd(0.02, momentum=0.9), method)


def first(stream, task=0):
  return take(stream, stream.index[task, 0], task)


def ends_of(stream, task=0):
  return jax.vmap(lambda rows: take(stream, rows, task))(stream.ends[task])


def leaves(tree, kind):
  found = jax.tree.leaves(tree, is_leaf=lambda a: isinstance(a, kind))
  return [a for a in found if isinstance(a, kind)]


def trained(stream, method, steps=8, tasks=2, **tx):
  """The state after `steps` steps of each task and its boundary."""
  learn = made(method, **tx)

  def whole(key, stream):
    state = learn.init(key, first(stream))
    for t in range(tasks):
      one = lambda s, rows, t=t: learn.step(s, take(stream, rows, t))  # noqa: E731
      state, loss = jax.lax.scan(one, state, stream.index[t, :steps])
      state = learn.boundary(state, ends_of(stream, t))
    return state, loss

  return quick(whole)(jax.random.key(7), stream)


def test_the_methods_with_a_memory_are_those():
  found = [
    n for n in methods.names() if 'capacity' in inspect.signature(methods.find(n)).parameters
  ]
  assert sorted(found) == sorted([*KEEP_EXAMPLES, 'latent', 'remind'])


@pytest.mark.parametrize('name', KEEP_EXAMPLES)
def test_every_method_that_keeps_examples_takes_a_codec(name, toy_stream):
  """Its programs trace, the state stays as it begins, and it is smaller by what the codec says."""
  method = make(name, toy_stream)
  plain = jax.eval_shape(made(method).init, jax.random.key(0), first(toy_stream)).method
  learn = made(compression.memory('int4', method, name))
  state = jax.eval_shape(learn.init, jax.random.key(0), first(toy_stream))
  after, _ = jax.eval_shape(learn.step, state, first(toy_stream))
  ended = jax.eval_shape(learn.boundary, after, ends_of(toy_stream))
  for other in (after, ended):
    assert jax.tree.structure(other) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(state), strict=True):
      assert (a.shape, a.dtype) == (b.shape, b.dtype)
  rows = sum(r.codes.shape[0] for r in leaves(state.method, Rows))
  saved = rows * (4 * 8 - (8 // 2 + 4))  # 8 floats a row
  assert rows >= 30 and budget.tree_bytes(plain) - budget.tree_bytes(state.method) == saved


# For every hook that is handed codes: mix with weights (er), loss, grads, boundary, and icarl has them all.
@pytest.mark.parametrize('name', ['er', 'rehearsal', 'derpp', 'agem', 'gdumb', 'icarl'])
def test_a_lossless_codec_changes_nothing(name, toy_stream):
  """The same run, bit for bit: draws, losses and parameters."""
  method = make(name, toy_stream)
  plain = trained(toy_stream, method)
  coded = trained(toy_stream, compression.memory('float32', method, name))
  same((coded[0].params, coded[1]), (plain[0].params, plain[1]))


def test_memory_holds_the_codes_of_what_was_shown(toy_stream):
  """And the stream's own rows are trained on as they are: the first step is that without a codec."""
  method = make('er', toy_stream)
  coded, plain = made(compression.memory('int4', method)), made(method)
  state, bare = (jax.jit(m.init)(jax.random.key(7), first(toy_stream)) for m in (coded, plain))
  step = jax.jit(coded.step)
  state, loss = step(state, first(toy_stream))
  assert loss == jax.jit(plain.step)(bare, first(toy_stream))[1]
  for i in range(1, 4):
    state, _ = step(state, take(toy_stream, toy_stream.index[0, i], 0))
  held, shown = state.method.rows, toy_stream.x[toy_stream.index[0, :4].reshape(-1)]
  kept = np.asarray(held.w)[:-1] > 0
  rows = np.asarray(codecs.decode(held.x))[:-1][kept]
  near = (
    np.abs(rows[:, None] - np.asarray(shown)[None]) <= np.abs(shown).max(1)[None, :, None] / 13.9
  )
  assert kept.sum() == 40 and near.all(-1).any(1).all()
  assert held.x.codes.dtype == jnp.uint8 and held.x.codes.shape[1:] == (4,)


def test_latent_rows_in_few_bits(toy_stream):
  """Stored are the codes of activations at the cut of the network as it then is, and they are learnt from."""
  learn = made(methods.find('latent')('l0', 60, 10, 'int4'))
  begun, _ = trained(toy_stream, methods.find('latent')('l0', 60, 10, 'int4'), tasks=1)
  rows = begun.method.rows
  kept = np.asarray(rows.w) > 0
  back = np.asarray(codecs.decode(rows.x))[kept]
  batch = first(toy_stream)._replace(x=toy_stream.x[:200])
  h = np.asarray(cut.at_cut(mlp((16,), 6).apply, begun.params, batch, 'l0'))
  near = np.abs(back[:, None] - h[None]) <= h.max(1)[None, :, None] / 13.9
  assert rows.x.codes.shape == (61, 8) and kept.sum() == 60 and near.all(-1).any(1).all()
  assert np.asarray(begun.method.draw.w).all()
  step = jax.jit(learn.step)
  blank = jax.tree.map(jnp.zeros_like, begun.method.draw.x)
  other = begun._replace(method=begun.method._replace(draw=begun.method.draw._replace(x=blank)))
  assert step(begun, first(toy_stream, 1))[1] != step(other, first(toy_stream, 1))[1]


def test_codebooks_learn_before_the_memory_stores(toy_stream):
  """`er` in codes: rows that are fewer than the codewords are stored as they were, from the first step on."""
  learn = made(compression.memory('pq4x256', make('er', toy_stream)))
  state = jax.jit(learn.init)(jax.random.key(7), first(toy_stream))
  step = jax.jit(learn.step)
  for i in range(3):
    state, _ = step(state, take(toy_stream, toy_stream.index[0, i], 0))
  books, inner = state.method.books[0], state.method.method
  shown = np.asarray(toy_stream.x[toy_stream.index[0, :3].reshape(-1)])
  assert books.count.sum(1).tolist() == [30] * 4
  kept = np.asarray(inner.rows.w)[:-1] > 0
  rows = np.asarray(product.decode(product.used(books), inner.rows.x))[:-1][kept]
  assert kept.sum() == 30  # fewer than codewords: as they were
  np.testing.assert_allclose(np.sort(rows, 0), np.sort(shown, 0), atol=1e-6)
  blank = jax.tree.map(jnp.zeros_like, inner.draw.x)
  other = state._replace(
    method=state.method._replace(method=inner._replace(draw=inner.draw._replace(x=blank)))
  )
  assert step(state, first(toy_stream))[1] != step(other, first(toy_stream))[1]


@pytest.mark.parametrize('name', ['er', 'mer', 'agem', 'gdumb', 'icarl'])
def test_every_method_that_keeps_examples_takes_codes(name, toy_stream):
  learn = made(compression.memory('pq4x3', make(name, toy_stream), name))
  state = jax.eval_shape(learn.init, jax.random.key(0), first(toy_stream))
  after, _ = jax.eval_shape(learn.step, state, first(toy_stream))
  for other in (after, jax.eval_shape(learn.boundary, after, ends_of(toy_stream))):
    assert jax.tree.structure(other) == jax.tree.structure(state)
    assert [a.shape for a in jax.tree.leaves(other)] == [a.shape for a in jax.tree.leaves(state)]
  assert all(r.codes.shape[1:] == (2,) for r in leaves(state.method, Rows))


def test_latent_fits_its_codewords_to_the_first_task_and_keeps_them(toy_stream):
  def after(tasks, words):
    method = methods.find('latent')('l0', 60, 10, f'pq8x{words}')
    return trained(toy_stream, method, tasks=tasks)[0]

  def error(words):
    state = after(1, words)
    rows = state.method.rows
    kept = np.asarray(rows.w) > 0
    back = np.asarray(product.decode(state.method.words, rows.x))[kept]
    batch = first(toy_stream)._replace(x=toy_stream.x[:200])
    h = np.asarray(cut.at_cut(mlp((16,), 6).apply, state.params, batch, 'l0'))
    assert rows.x.codes.shape == (61, 8 if words > 16 else 4) and kept.sum() == 60
    return np.square(back[:, None] - h[None]).sum(-1).min(1).mean()

  few, many = error(2), error(32)
  assert few > 4 * many
  once, twice = after(1, 32).method, after(2, 32).method
  same(once.words, twice.words)
  assert not np.array_equal(once.rows.x.codes, twice.rows.x.codes)
  with pytest.raises(UserError, match='latent in pq8x61: 61 codewords .* capacity is 60'):
    after(1, 61)
  with pytest.raises(UserError, match="latent at 'l0' in pq3x4: rows of 16 numbers cannot"):
    trained(toy_stream, methods.find('latent')('l0', 60, 10, 'pq3x4'))


@pytest.mark.parametrize('name', ['er', 'latent'])
def test_codes_of_two_seeds_in_one_program_go_on_from_a_checkpoint(name, toy_stream, tmp_path):
  """From a saved state the same bits as without a pause."""
  codec = 'pq4x5'
  method = methods.find('latent')('l0', 30, 10, codec)
  learn = made(method if name == 'latent' else compression.memory(codec, make('er', toy_stream)))

  def task(state):
    one = lambda s, rows: learn.step(s, take(toy_stream, rows, 0))  # noqa: E731
    return learn.boundary(jax.lax.scan(one, state, toy_stream.index[0, :4])[0], ends_of(toy_stream))

  whole = quick(jax.vmap(task))
  middle = whole(
    jax.vmap(lambda key: learn.init(key, first(toy_stream)))(
      jnp.stack([jax.random.key(7), jax.random.key(1)])
    )
  )
  checkpoint.save(tmp_path, 3, middle)
  like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), middle)
  back = checkpoint.restore(tmp_path, like)
  assert back is not None
  end = whole(middle)
  same(whole(back.tree), end)
  (rows, *_) = leaves(end.method, Rows)
  assert rows.codes.dtype == jnp.uint8 and not np.array_equal(rows.codes[0], rows.codes[1])


def test_state_in_eight_bits_is_near_and_is_packed_once(toy_stream):
  """EWC with importances in 8 bits: near the plain ones; between boundaries the codes do not move."""
  wide = dataclasses.replace(toy_stream, x=jnp.tile(toy_stream.x, 2))
  ewc = chain(ewc=methods.find('ewc')(1.0, 'empirical'))
  plain, coded = made(ewc), made(compression.state((('.*importance/l0/w', 'udynamic8'),), ewc))
  states = []
  for learn in (plain, coded):
    begin = lambda key, learn=learn: learn.boundary(learn.init(key, first(wide)), ends_of(wide))  # noqa: E731
    states.append(jax.jit(begin)(jax.random.key(7)))
  want, state = states
  (packed,) = leaves(state.method, Packed)
  assert packed.codes.shape == (256,) and packed.scale.shape == (1,)
  assert budget.tree_bytes(want.method) - budget.tree_bytes(state.method) == 4 * 256 - (256 + 4)
  exact = np.asarray(want.method['ewc'].importance['l0']['w'])
  assert exact.max() > 0
  np.testing.assert_allclose(codecs.unpack(packed), exact, 0.2, 0.004 * exact.max())
  moved = state._replace(params=jax.tree.map(lambda a: a + 0.1, state.params))
  near = want._replace(params=moved.params)
  (after, loss), (_, expected) = (
    jax.jit(learn.step)(s, first(wide)) for learn, s in ((coded, moved), (plain, near))
  )
  np.testing.assert_allclose(loss, expected, 0.05)
  (still,) = leaves(after.method, Packed)
  same(still, packed)


@pytest.mark.parametrize('codec', compression.MOMENTS)
def test_moments_in_few_bits_follow_adam(codec):
  """A quadratic is solved as with plain Adam, in the bytes that are stated; second moments never vanish."""
  wanted = jnp.linspace(-2.0, 2.0, 600)
  plain = optax.adam(0.05, b2=0.95)
  tx = compression.moments(codec, plain)
  params = {'w': jnp.zeros(600), 'b': jnp.zeros(3)}

  def step(tx, carry):
    p, s = carry
    g = {'w': p['w'] - wanted, 'b': p['b'] - 1}
    updates, s = tx.update(g, s, p)
    return optax.apply_updates(p, updates), s

  def after(n, tx):
    many = lambda c: jax.lax.fori_loop(0, n, lambda i, c: step(tx, c), c)  # noqa: E731
    return jax.jit(many)((params, tx.init(params)))

  moments, exact = codecs.unpack_tree(after(4, tx)[1]), after(4, plain)[1]
  for a, b in zip(jax.tree.leaves(moments), jax.tree.leaves(exact), strict=True):
    np.testing.assert_allclose(a, b, 0.1, 0.02 * np.abs(b).max())
  p, s = after(200, tx)
  assert np.abs(p['w'] - wanted).max() < 0.05 and np.abs(p['b'] - 1).max() < 0.05
  sizes = {'bfloat16': 2 * 2 * 603, 'dynamic8': 2 * (600 + 4 * 3 + 4 * 3)}
  assert budget.tree_bytes(s) == sizes[codec] + 4  # and the count
  kinds = {p.codec for p in leaves(s, Packed)}
  assert kinds == ({'dynamic8', 'udynamic8'} if codec == 'dynamic8' else {'bfloat16'})


def test_runs_of_seeds_whole_programs_and_checkpoints(toy_stream, tmp_path):
  """All three together over two seeds at once, in one program with boundaries and evaluations."""
  method = compression.state(
    (('.*importance/.*', 'bfloat16'),),
    chain(
      er=compression.memory('int8', make('er', toy_stream)),
      ewc=methods.find('ewc')(1.0, 'empirical'),
    ),
  )
  stream = dataclasses.replace(toy_stream, index=toy_stream.index[:, :10])

  def build(hp, weights):
    return made(method, compression.moments('bfloat16', optax.sgd(0.02, momentum=0.9)))

  keys = jnp.stack([jax.random.key(7), jax.random.key(1)])
  one = partial(run, build)
  state, record = jax.jit(jax.vmap(lambda k: one({}, k, stream)))(keys)
  assert np.isfinite(record.R).all() and np.diagonal(record.R, 0, 1, 2)[:, 0].min() > 0.5
  assert all(a.shape[0] == 2 for a in jax.tree.leaves(state))
  checkpoint.save(tmp_path, 3, state)
  like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), state)
  back = checkpoint.restore(tmp_path, like)
  assert back is not None and jax.tree.structure(back.tree) == jax.tree.structure(state)
  same(back.tree, state)


def test_refusals_name_what_and_why(toy_stream):
  batch = first(toy_stream)
  start = lambda m, tx=None: jax.eval_shape(made(m, tx).init, jax.random.key(0), batch)  # noqa: E731
  ewc, er = make('ewc', toy_stream), make('er', toy_stream)
  with pytest.raises(UserError, match='ewc keeps no examples .* in int8: leave the codec out'):
    start(compression.memory('int8', ewc, 'ewc'))
  with pytest.raises(UserError, match='ewc keeps no examples .* in pq4x4: leave the codec out'):
    start(compression.memory('pq4x4', ewc, 'ewc'))
  with pytest.raises(UserError, match='er in pq3x4: rows of 8 numbers cannot be cut into 3 equal'):
    start(compression.memory('pq3x4', er, 'er'))
  with pytest.raises(
    UserError, match=r"'.\*/fisher' packs nothing in udynamic8: the state has anchor"
  ):
    start(compression.state((('.*/fisher', 'udynamic8'),), ewc))
  with pytest.raises(UserError, match='rows/x, rows of a memory: those have a codec of their own'):
    start(compression.state((('rows/x', 'bfloat16'),), er))
  with pytest.raises(UserError, match='keeps no momentum or moment of 256 numbers'):
    start(Method(), compression.moments('dynamic8', optax.sgd(0.1)))
  for wrong in (compression.memory, compression.moments):
    with pytest.raises(UserError, match="no codec 'int3'"):
      wrong('int3', er)
