"""The contract of every method, discovered by module: what the rest of the library relies on."""

from __future__ import annotations

import dataclasses
import inspect
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_jax import methods
from cl_jax.compose import chain, gated
from cl_jax.errors import UserError
from cl_jax.learner import learner
from cl_jax.loop import (
  Programs,
  Progress,
  Record,
  check_needs,
  host_feed,
  programs,
  run,
  run_chunks,
  strong,
)
from cl_jax.methods.heads.task_head import task_head
from cl_jax.models.mlp import mlp
from cl_jax.models.vit import Config as vit_config
from cl_jax.models.vit import vit
from cl_jax.streams import schedules
from cl_jax.streams.take import take, without_data
from cl_jax.sweep import MAPPED, SHARED, map_runs
from cl_jax.types import Batch, Method, State, Stream
from tests.compiling import bitwise, compiled, quick

SMALL = {
  'capacity': 60,
  'draw': 10,
  'width': 40,
  'rank': 2,
  'targets': 'l./w',
  'coef': 0.5,
  'alpha': 2.0,
  'batches': 2,
  'hidden': (12,),
  'latent': 3,
  'auto': 1.0,
  'tap': 'l0',
  'codebooks': 2,
  'codes': 4,
  'code': 5,
  'samples': 16,
  'length': 2,
  'pool': 6,
  'top': 2,
  'general': 2,
  'expert': 3,
  'general_layers': (0,),
  'expert_layers': (1,),
  'layers': (1,),
  'centroids': 2,
  'iterations': 5,
}
HEADED = ('hat', 'packnet', 'pnn')  # every task has outputs of its own
# Those that need a transformer: prompts, and adapters at its taps.
TRANSFORMER = {n for n, module in methods.names().items() if '.prompts.' in module}
TRANSFORMER |= {'adapter', 'ease', 'partial'}
LOWRANK = {n for n, module in methods.names().items() if '.lowrank.' in module}
# Parameters that methods bring along.
ADDED = {'hat', 'pnn', 'decoder', *LOWRANK, *TRANSFORMER} - {'partial'}
OTHER = ('latent', 'remind', 'pnn')  # rows enter inside the network, or it becomes another one
NAMES = sorted(methods.names())
# One of every kind, for what the loop does in the same way with all of them.
KINDS = ('agem', 'dualprompt', 'er', 'ewc', 'hat', 'icarl', 'lora', 'packnet', 'ranpac', 'remind')
# Compiled as a user's programs: a memory, importances, gates. Others would take four times as long.
AS_USERS = ('er', 'ewc', 'hat')
# Of two programs that LLVM does not optimise only these round in different ways (jax 0.10.2).
UNEVEN = {'dgr', 'mer', *TRANSFORMER}


def kinds_first(names):
  """For tests that compile much: one of every kind with `make test`, the others with `make long`."""
  return [n if n in KINDS else pytest.param(n, marks=pytest.mark.long) for n in names]


class Case(NamedTuple):
  """A method on the toy stream, fed by the host in chunks of 7 steps, and what the run gave.

  Its parts are compiled once for all tests, boundary and prediction by themselves as well.
  """

  name: str
  method: Method
  build: Any
  stream: Stream
  places: list[Progress]  # all that the run yielded; a task has a remainder of 3 steps
  state: State
  record: Record
  parts: Programs
  end: Any
  predict: Any

  def step(self, state: State, batch: Batch, t: int = 0) -> State:
    """The state after one step of task t: the chunk that begins at its last one."""
    rest, last = without_data(self.stream), self.stream.index.shape[1] - 1
    batches = jax.tree.map(lambda a: jnp.stack([a] * self.parts.chunk), batch)
    return self.parts.advance(HP, state, rest, None, t, last, batches)[0]


def make(name, stream) -> Method:
  """The method with small sizes; what a scenario knows is filled in by name, as a config does."""
  factory = methods.find(name)
  tasks = inspect.signature(factory).parameters.get('tasks')
  known = {
    'classes': stream.classes,
    'tasks': stream.tasks if tasks is not None and tasks.default is tasks.empty else 1,
    'task_classes': stream.task_classes,
    'steps_per_epoch': 15,
    'prune_after': 20,
    'wires': mlp((16, 12), 6).wires,
    **SMALL,
  }
  return factory(**{k: known[k] for k in inspect.signature(factory).parameters if k in known})


def network(name=''):
  """An MLP; a transformer for the methods that need one."""
  if name in TRANSFORMER:
    return vit(vit_config(4, 2, 1, 8, 2, 2, 12), 6, init=0.3)
  return mlp((16, 12), 6)


def exactly(name):
  """How the method is compiled where bits of two programs are compared."""
  if name in AS_USERS:
    return jax.jit
  return bitwise if name in KINDS and jax.__version_info__ >= (0, 11) else quick


def builder(method, frozen=None, name=''):
  def build(hp, weights):
    return learner(network(name), optax.sgd(hp['lr'], momentum=0.9), method, frozen)

  return build


HP = {'lr': jnp.float32(0.02)}
KEY = 7


@pytest.fixture(scope='module', params=NAMES)
def case(request, toy_stream) -> Case:
  name = request.param
  stream = short(toy_stream, name)
  method = chain(**{name: make(name, stream)})
  if name in HEADED:
    method = chain(**{name: make(name, stream), 'head': task_head(stream.task_classes, 6)})
  build = builder(method, name=name)
  learn = build(HP, None)
  parts = Programs(*map(exactly(name), programs(build, 7)[:-1]), 7)
  places = list(
    run_chunks(build, HP, jax.random.key(KEY), stream, chunk=7, parts=parts, feed=host_feed(stream))
  )
  own = (quick(learn.boundary), quick(learn.predict))
  return Case(name, method, build, stream, places, places[-1].state, places[-1].record, parts, *own)


@pytest.fixture(scope='module')
def naive(toy_stream):
  """(name) -> (final state, logits of the first test batch) of plain fine-tuning of that method's network."""

  @lru_cache
  def plain(transformer):
    name = min(TRANSFORMER) if transformer else ''
    program = quick(partial(trained, builder(Method(), name=name)))
    return program(HP, jax.random.key(KEY), short(toy_stream, name))

  return lambda name: plain(name in TRANSFORMER)


def trained(build, hp, key, stream):
  """The final state of a run that measures nothing, and its logits of the first test batch."""
  learn = build(hp, None)

  def leg(state, t):
    state, _ = jax.lax.scan(
      lambda s, rows: learn.step(s, take(stream, rows, t)), state, stream.index[t]
    )
    ends = jax.vmap(lambda rows: take(stream, rows, t))(stream.ends[t])
    return strong(learn.boundary(state, ends)), None

  state = strong(learn.init(key, take(stream, stream.index[0, 0], 0)))
  state, _ = jax.lax.scan(leg, state, jnp.arange(stream.tasks))
  return state, learn.predict(state, jax.tree.map(lambda a: a[0, 0], stream.test))


def short(stream, name=''):
  """Enough steps to pass every phase: 24 a task. A transformer gets the 8 numbers twice, as 4 x 4 pixels."""
  stream = dataclasses.replace(stream, index=stream.index[:, :24])
  if name not in TRANSFORMER:
    return stream
  image = lambda x: jnp.tile(x, 2).reshape(*x.shape[:-1], 4, 4, 1)  # noqa: E731
  test = stream.test._replace(x=image(stream.test.x))
  return dataclasses.replace(stream, x=image(stream.x), test=test)


def data(tree):
  """Leaves as NumPy, keys as words."""
  key = lambda a: jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key)  # noqa: E731
  return [np.asarray(jax.random.key_data(a) if key(a) else a) for a in jax.tree.leaves(tree)]


def same(a, b):
  a, b = data(a), data(b)
  assert len(a) == len(b)
  for x, y in zip(a, b, strict=True):
    np.testing.assert_array_equal(x, y)


def differ(a, b):
  return any(not np.array_equal(x, y) for x, y in zip(data(a), data(b), strict=True))


def near(a, b, rtol):
  for x, y in zip(data(a), data(b), strict=True):
    np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol)


def test_learns(case):
  """Every method learns the task at hand better than chance, and every figure is finite."""
  assert np.isfinite(case.record.R).all() and np.isfinite(case.record.loss).all()
  assert np.diag(case.record.R)[0] > 0.5


def test_state_keeps_its_structure(case):
  """Shapes and dtypes of the final state are those of the first one: it can be a loop's carry."""
  learn = case.build(HP, None)
  first = take(case.stream, case.stream.index[0, 0], 0)
  start = jax.eval_shape(learn.init, jax.random.key(0), first)
  shapes = lambda s: jax.tree.map(lambda a: (a.shape, a.dtype), s)  # noqa: E731
  assert shapes(start) == shapes(case.state)


def again(case, **how):
  """The run once more, with other data or from another place."""
  how = {'parts': case.parts, 'feed': host_feed(case.stream)} | how
  *_, last = run_chunks(case.build, HP, jax.random.key(KEY), case.stream, chunk=7, **how)
  return last


def test_resumed_is_the_same_run(case):
  """Bitwise, from the start, inside a task and right after a boundary, through host arrays."""
  assert [(p.leg, p.done) for p in case.places[:6]] == [
    (0, 0),
    (0, 7),
    (0, 14),
    (0, 21),
    (0, 24),
    (1, 0),
  ]
  for at in (0, 2, 5):
    stored = case.places[at]
    words = jax.random.key_data(stored.state.key)
    host = jax.tree.map(np.asarray, stored._replace(state=stored.state._replace(key=words)))
    state = jax.tree.map(jnp.asarray, host.state)._replace(key=jax.random.wrap_key_data(words))
    last = again(case, resume=host._replace(state=state))
    same(last.state, case.state)
    same(last.record, case.record)


@pytest.mark.parametrize('case', KINDS, indirect=True)
def test_data_on_the_device_give_the_same_run(case):
  """In chunks and in one program, bitwise (see `UNEVEN`)."""
  alike = partial(near, rtol=1e-5) if case.name in UNEVEN else same
  jit = exactly(case.name)
  parts = Programs(*map(jit, programs(case.build, 7)[:-1]), 7)
  last = again(case, parts=parts, feed=None)
  assert [f._cache_size() for f in parts[:3]] == [1, 1, 1]
  alike((last.state, last.record), (case.state, case.record))
  alike(
    jit(partial(run, case.build))(HP, jax.random.key(KEY), case.stream), (case.state, case.record)
  )


def first_chunk(case, key, stream):
  learn = case.build(HP, None)
  state = learn.init(key, take(stream, stream.index[0, 0], 0))
  return jax.lax.scan(
    lambda s, rows: learn.step(s, take(stream, rows, 0)), state, stream.index[0, :7]
  )


def first_of_two(case, width, jit):
  """The first of two runs in one program, `width` of them at a time."""
  keys = jnp.stack([jax.random.key(KEY), jax.random.key(1)])
  both = map_runs(partial(first_chunk, case), (MAPPED, SHARED), 2, width, jax.devices()[:1])
  return jax.tree.map(lambda a: a[0], jit(both)(keys, case.stream))


@pytest.mark.parametrize('case', sorted({*KINDS, *OTHER}), indirect=True)
def test_vmapped_runs_are_near_single_ones(case):
  """Mapped over keys; what every method does when it is mapped, `test_gated_off_is_absent` shows."""
  near(
    first_of_two(case, 2, quick), (case.places[1].state, case.places[1].record.loss[0, :7]), 2e-4
  )


@pytest.mark.parametrize('case', KINDS, indirect=True)
def test_runs_one_after_the_other_are_single_runs(case):
  """Bitwise. From jax 0.12 on the compiler rounds a mapped run's sums in another order: some 1e-7."""
  one_by_one = same if jax.__version_info__ < (0, 12) else partial(near, rtol=1e-5)
  single, one = (
    (case.places[1].state, case.places[1].record.loss[0, :7]),
    first_of_two(case, 1, exactly(case.name)),
  )
  if differ(one, single):  # XLA may round a loop in another way where it knows its length
    single = exactly(case.name)(partial(first_chunk, case))(jax.random.key(KEY), case.stream)
  one_by_one(one, single)


def test_no_recompilation_and_no_host_transfer(case):
  """One program serves every chunk of every task, one every boundary; a step calls nothing on the host."""
  parts, learn, stream = case.parts, case.build(HP, None), case.stream
  assert [f._cache_size() for f in parts[:3]] == [1, 1, 1]
  text = str(jax.make_jaxpr(learn.step)(case.state, take(stream, stream.index[0, 0], 0)))
  assert 'callback' not in text and 'infeed' not in text and 'outfeed' not in text


def test_exports(case):
  """The step lowers to a serialisable program for a CPU, a GPU and a TPU from this machine."""
  learn = case.build(HP, None)
  batch = take(case.stream, case.stream.index[0, 0], 0)
  flat, tree = jax.tree.flatten(
    (case.state._replace(key=jax.random.key_data(case.state.key)), batch)
  )

  def step(*leaves):
    state, batch = jax.tree.unflatten(tree, leaves)
    state = state._replace(key=jax.random.wrap_key_data(state.key))
    state, loss = learn.step(state, batch)
    return jax.tree.leaves(state._replace(key=jax.random.key_data(state.key))), loss

  exported = jax.export.export(jax.jit(step), platforms=('cpu', 'cuda', 'tpu'))(*flat)
  assert exported.platforms == ('cpu', 'cuda', 'tpu')
  assert len(exported.in_avals) == len(flat)


def test_padding_does_not_matter(case):
  """Rows with w = 0 may hold any finite values: the step and the boundary ignore them."""
  batch = take(case.stream, case.stream.index[1, 0], 1)
  part = batch._replace(w=batch.w.at[7:].set(0))
  other = part._replace(x=part.x.at[7:].multiply(-3.0), y=part.y.at[7:].set(5))
  near(case.step(case.state, part, 1).params, case.step(case.state, other, 1).params, 1e-6)
  ends = jax.vmap(lambda r: take(case.stream, r, 1))(case.stream.ends[1])
  ends = ends._replace(w=ends.w.at[:, 60:].set(0))
  wild = ends._replace(x=ends.x.at[:, 60:].multiply(-3.0), y=ends.y.at[:, 60:].set(5))
  near(case.end(case.state, ends), case.end(case.state, wild), 1e-5)


def test_predictions_are_per_row(case):
  """Nothing looks across the batch or at labels and weights."""
  predict = case.predict
  batch = jax.tree.map(lambda a: a[1, 0], case.stream.test)
  whole = predict(case.state, batch)
  blind = predict(case.state, batch._replace(y=jnp.zeros_like(batch.y), w=jnp.zeros_like(batch.w)))
  np.testing.assert_array_equal(whole, blind)
  mixed = batch._replace(x=batch.x.at[10:].set(5.0))
  near(predict(case.state, mixed)[:10], whole[:10], 1e-5)


@pytest.mark.parametrize('case', kinds_first(NAMES), indirect=True)
def test_gated_off_is_absent(case, naive):
  """`gated(0, method)` trains and predicts like no method at all, and `gated(1)` as without a gate.

  Both are one mapped program over the whole stream, as the runs of a factorial ablation are.
  """
  # What methods add is there without effect.
  compare = lambda p: {k: v for k, v in p.items() if k not in ADDED}  # noqa: E731

  def switched(hp, weights):
    method = chain(**{case.name: gated(hp['on'], make(case.name, case.stream))})
    return learner(network(case.name), optax.sgd(hp['lr'], momentum=0.9), method)

  # inflora's third task finds none of the 8 input directions free: what it then reads are singular
  # vectors of rounding errors, which only the options that `case` was compiled with repeat.
  jit = exactly(case.name) if case.name == 'inflora' else quick
  axes, two = (MAPPED, SHARED, SHARED), 2
  program = jit(map_runs(partial(trained, switched), axes, two, two, jax.devices()[:1]))
  hp = {'lr': jnp.stack([HP['lr']] * two), 'on': jnp.float32([0, 1])}
  if case.name in OTHER:
    with pytest.raises(UserError, match='cannot be gated'):
      program(hp, jax.random.key(KEY), case.stream)
    return
  states, logits = program(hp, jax.random.key(KEY), case.stream)
  off, on = (jax.tree.map(lambda a, i=i: a[i], states) for i in range(two))
  plain, expected = naive(case.name)
  near(compare(off.params), plain.params, 2e-4)
  near(logits[0], expected, 2e-3)
  if case.name not in HEADED:  # those runs have a head besides
    near(on.params, case.state.params, 2e-4)
    alike = ('er', 'fecam', 'imm', 'ncm', 'slda', 'ranpac', 'task_head')  # in their parameters
    assert case.name in alike or differ(on.params, off.params)


def test_needs_are_enforced(case):
  for need in case.method.needs:
    told = tuple(n for n in case.stream.told if n != need)
    with pytest.raises(UserError, match=need):
      check_needs(case.method.needs, schedules.tell(case.stream, told))


def test_draws_do_not_depend_on_the_chain(toy_stream):
  """Another method before, or after, does not move the draws of replay: keys come from names."""
  batch = take(toy_stream, toy_stream.index[0, 0], 0)
  after = []
  for order in (('er',), ('ewc', 'er'), ('er', 'lwf', 'ewc')):
    method = chain(**{n: make(n, toy_stream) for n in order})
    learn = compiled(builder(method)(HP, None))
    state = learn.init(jax.random.key(0), batch)
    for i in range(8):
      state, _ = learn.step(state, take(toy_stream, toy_stream.index[0, i], 0))
    after.append(state.method['er'])
  same(after[0].rows, after[1].rows)
  same(after[0].rows, after[2].rows)
  same(after[0].draw, after[2].draw)


def test_every_method_is_found():
  """A method is a module with a factory of its name; a typo is answered with what is close."""
  assert {'er', 'agem', 'ewc', 'lwf', 'hat', 'packnet', 'lora', 'ncm', 'slda', 'ranpac'} <= set(
    NAMES
  )
  for name in NAMES:
    assert callable(methods.find(name)) and methods.find(name).__doc__
  with pytest.raises(UserError, match='did you mean packnet'):
    methods.find('paknet')
