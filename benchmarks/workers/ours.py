"""cl_jax: whole runs, steps alone, evaluations alone, with any of a few methods."""

from __future__ import annotations

from benchmarks.workers.serve import options, serve

GIVEN = options()

import time  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402

from benchmarks import workloads  # noqa: E402
from cl_jax import loop  # noqa: E402
from cl_jax.budget import flops  # noqa: E402
from cl_jax.learner import learner  # noqa: E402
from cl_jax.methods.regularisation.ewc import ewc  # noqa: E402
from cl_jax.methods.regularisation.lwf import lwf  # noqa: E402
from cl_jax.methods.regularisation.si import si  # noqa: E402
from cl_jax.methods.replay.er import er  # noqa: E402
from cl_jax.models.cnn import cnn  # noqa: E402
from cl_jax.models.mlp import mlp  # noqa: E402
from cl_jax.models.resnet import resnet  # noqa: E402
from cl_jax.streams.take import put, take  # noqa: E402
from cl_jax.types import Method  # noqa: E402


def method(name: str, draw: int, capacity: int) -> Method:
  match name:
    case 'er':
      return er(capacity, draw)
    case 'ewc':
      return ewc(10.0, 'empirical', online=True, decay=0.9)
    case 'lwf':
      return lwf(1.0)
    case 'si':
      return si(0.1)
  return Method()


def model(name: str, units: int, classes: int):
  match name:
    case 'mlp':
      return mlp((units, units), classes)
    case 'cnn':
      return cnn((32, 64), (128,), classes)
    case 'resnet':
      return resnet(classes)
  raise ValueError(name)


def prepare(
  work: str = 'w1',
  size: tuple = (),
  net: str = 'mlp',
  units: int = 256,
  method_name: str = 'er',
  capacity: int = workloads.MEMORY,
  part: str = 'run',
  rate: float = workloads.RATE,
  count: bool = True,
):
  """What a turn does.

  Args:
    part: 'run', the whole stream in one program; 'steps', its steps without evaluations.
    count: also tell the FLOPs.
  """
  make = {'w1': workloads.w1, 'w2': workloads.w2}[work]
  stream, told = make(workloads.Size(*size)) if size else make()
  stream = put(stream)

  def build(hp, weights):
    chosen = method(method_name, workloads.DRAW[work], capacity)
    return learner(model(net, units, stream.classes), optax.sgd(hp), chosen)

  key, hp = jax.random.key(0), jnp.float32(rate)
  facts = {'data': told['data'], 'steps': int(stream.index.shape[0] * stream.index.shape[1])}
  begin = time.process_time()
  if part == 'run':
    program = jax.jit(lambda hp, key, stream: loop.run(build, hp, key, stream))
    if count:
      facts['flops'] = flops(lambda k, s: loop.run(build, hp, k, s)[1], key, stream)
    program = program.lower(hp, key, stream).compile()
    facts['compile_cpu'] = time.process_time() - begin

    def repeat(i):
      state, record = jax.block_until_ready(program(hp, jax.random.key(i), stream))
      return {'accuracy': float(record.R[-1].mean()), 'loss': float(record.loss[-1, -1])}

    return repeat, facts

  start = jax.jit(lambda k, s: loop.begin(build(hp, None), k, s, take(s, s.index[0, 0], 0))[0])
  state = start(key, stream)

  def legs(state, stream):
    one = lambda s, t: loop.learn(build(hp, None), s, stream, t, 0)[:2]  # noqa: E731
    return jax.lax.scan(one, state, jnp.arange(stream.index.shape[0]))

  facts['flops'] = flops(legs, state, stream)
  program = jax.jit(legs, donate_argnums=0).lower(state, stream).compile()
  held = [full(state)]

  def repeat(i):
    state, loss = jax.block_until_ready(program(held[0], stream))
    held[0] = state  # the next turn goes on from here: its buffers are this one's
    return {'loss': float(loss[-1, -1])}

  return repeat, facts


def full(state):
  """The state as if the memory had been filled long ago, so that draws come from all of it."""
  if not hasattr(state.method, 'rows'):
    return state
  capacity = state.method.rows.y.shape[0] - 1
  return state._replace(method=state.method._replace(aux=jnp.int32(capacity)))


serve(lambda: prepare(**GIVEN))
