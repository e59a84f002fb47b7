"""What a learner costs: bytes of state by role, exact FLOPs, bytes moved, peak memory, passes per step."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend import core, source_info_util
from jax.interpreters import partial_eval

from cl_jax.learner import learner
from cl_jax.models import quantised
from cl_jax.types import Array, Batch, Learner, Model, State, Tree


def tree_bytes(tree: Tree) -> int:
  """Bytes of all leaves, arrays or `ShapeDtypeStruct`s; typed keys count their words."""
  total = 0
  for leaf in jax.tree.leaves(tree):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      leaf = jax.eval_shape(jax.random.key_data, leaf)
    total += math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
  return total


def state_bytes(state: State, frozen: Tree = None) -> dict[str, int]:
  """Every byte that is kept between steps, by role.

  Returns:
    'frozen' (weights that are not trained, one copy for any number of runs), 'trainable', 'statistics'
    (norm layers), 'optimiser', 'method/<name>' for each method of a chain, 'loop' (key and step), 'total'.
  """
  roles = {
    'frozen': tree_bytes(frozen),
    'trainable': tree_bytes(state.params),
    'statistics': tree_bytes(state.stats),
    'optimiser': tree_bytes(state.opt),
  }
  named = isinstance(state.method, dict)
  for name, s in (state.method if named else {'method': state.method}).items():
    roles[f'method/{name}' if named else name] = tree_bytes(s)
  roles['loop'] = tree_bytes((state.key, state.step))
  return {**roles, 'total': sum(roles.values())}


class Leaf(NamedTuple):
  """One array that is kept: its path ('params/l0/w'), shape, dtype and bytes."""

  name: str
  shape: tuple[int, ...]
  dtype: str
  bytes: int


def leaves(state: State, frozen: Tree = None) -> list[Leaf]:
  """Every array that `state_bytes` counts, the largest first; those of `frozen` are 'frozen/...'."""
  found = []
  for prefix, tree in (('frozen/', frozen), ('', state)):
    for path, a in jax.tree_util.tree_flatten_with_path(tree)[0]:
      name = prefix + jax.tree_util.keystr(path, simple=True, separator='/')
      found.append(Leaf(name, tuple(a.shape), str(a.dtype), tree_bytes(a)))
  return sorted(found, key=lambda leaf: (-leaf.bytes, leaf.name))


def macs(f: Callable, *args) -> dict[str, int]:
  """Multiply-adds of f(*args), half of its `flops`, by role.

  Returns:
    'forward', 'backward' (of a model in a scope of that name, see `scoped`), 'other', 'total'.
  """
  found = count(used(f, *args))
  roles = {role: found[role] // 2 for role in ('forward', 'backward', 'other')}
  return {**roles, 'total': sum(roles.values())}


class Traffic(NamedTuple):
  """Bytes that a program reads and writes.

  Attributes:
    read: the inputs of its equations.
    written: the outputs of its equations.
    unbounded: the source lines of its loops of unknown length, whose body counts once here and in
      `flops`: with any, the figures are no bound.
  """

  read: int
  written: int
  unbounded: tuple[str, ...]

  @property
  def moved(self) -> int:
    return self.read + self.written


def traffic(f: Callable, *args) -> Traffic:
  """Bytes read and written by f(*args), as its program is written.

  Every equation reads its whole inputs and writes its whole outputs, as often as the loops around it run;
  of the branches of a condition the dearest counts; constants written into the program are free. What a
  compiler makes of it is not knowable from here: it fuses elementwise chains, updates the rows of a memory
  in place, reads only those that are gathered, and a cache may fetch an operand more than once.
  """
  return _traffic(used(f, *args), 1)


# Their programs say how two numbers become one: the equation itself moves the arrays.
_COMBINERS = ('scatter', 'reduce', 'select_and')


def _traffic(jaxpr: core.Jaxpr, times: int) -> Traffic:
  read = written = 0
  unbounded: list[str] = []
  for eqn in jaxpr.eqns:
    name = eqn.primitive.name
    inner = [] if name.startswith(_COMBINERS) else subjaxprs(eqn)
    if not inner:
      read += times * sum(_bytes(v) for v in eqn.invars if not isinstance(v, core.Literal))
      written += times * sum(map(_bytes, eqn.outvars))
      continue
    if name == 'while':
      unbounded.append(source_info_util.summarize(eqn.source_info))
    length = eqn.params.get('length', 1) if name == 'scan' else 1
    parts = [_traffic(sub, times * length) for sub in inner]
    unbounded += [line for part in parts for line in part.unbounded]
    if name == 'cond':
      parts = [max(parts, key=lambda part: part.moved)]
    read += sum(part.read for part in parts)
    written += sum(part.written for part in parts)
  return Traffic(read, written, tuple(dict.fromkeys(unbounded)))


def _bytes(var: Any) -> int:
  """Of a variable's value; tokens and the like have none."""
  return tree_bytes(var.aval) if hasattr(var.aval, 'dtype') else 0


class Peak(NamedTuple):
  """Bytes of a compiled program on the device at hand; `peak` is the sum of what there is at once.

  Attributes:
    arguments, results: those that the program uses.
    shared: results that take the place of a donated argument.
    temporary: what it needs besides.
  """

  arguments: int
  results: int
  shared: int
  temporary: int

  @property
  def peak(self) -> int:
    return self.arguments + self.results - self.shared + self.temporary


def compiled(f: Callable, *args, donate: tuple[int, ...] = ()) -> Peak:
  """Compiles f for these arguments (shapes are enough) and asks what memory it takes.

  XLA's own 'peak' leaves temporary values out; this does not.

  Args:
    donate: which arguments it may overwrite, as a training step does its state.

  Raises:
    ValueError: the backend does not tell.
  """
  with warnings.catch_warnings():
    warnings.filterwarnings('ignore', 'Some donated buffers were not usable')
    memory = jax.jit(f, donate_argnums=donate).lower(*args).compile().memory_analysis()
  if memory is None:
    raise ValueError(f'the backend {jax.default_backend()!r} does not tell what memory it needs')
  return Peak(
    memory.argument_size_in_bytes,
    memory.output_size_in_bytes,
    memory.alias_size_in_bytes,
    memory.temp_size_in_bytes,
  )


def flops(f: Callable, *args) -> int:
  """Floating-point operations of the matrix products and convolutions of f(*args): 2 per multiply-add.

  Exact for programs whose loops have a static length; the body of a `while` of unknown length counts once
  (see `count`). Elementwise work is left out, as in the literature's counts.
  """
  return sum(count(used(f, *args)).values())


def used(f: Callable, *args) -> core.Jaxpr:
  """The program f(*args) without what no output needs, which the compiler leaves out as well."""
  jaxpr = jax.make_jaxpr(f)(*args).jaxpr
  return partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]


def count(jaxpr: core.Jaxpr, where: str = '', times: int = 1) -> Counter:
  """FLOPs by what the equations belong to: 'forward' and 'backward' of a scope named 'model', 'other'."""
  total: Counter = Counter()
  for eqn in jaxpr.eqns:
    stack = f'{where}/{eqn.source_info.name_stack}'
    role = 'other'
    if 'model' in stack:
      role = 'backward' if 'transpose' in stack else 'forward'
    inner = times * eqn.params.get('length', 1) if eqn.primitive.name == 'scan' else times
    branches = [count(sub, stack, inner) for sub in subjaxprs(eqn)]
    if eqn.primitive.name == 'cond':  # one branch is taken: the dearest bounds it
      total += max(branches, key=lambda c: sum(c.values()), default=Counter())
    else:
      total += sum(branches, Counter())
    if eqn.primitive.name == 'dot_general':
      (contract, _), _ = eqn.params['dimension_numbers']
      k = math.prod(shape(eqn.invars[0])[i] for i in contract)
      total[role] += 2 * times * k * math.prod(shape(eqn.outvars[0]))
    elif eqn.primitive.name == 'conv_general_dilated':
      kernel, out = shape(eqn.invars[1]), shape(eqn.outvars[0])
      spec = eqn.params['dimension_numbers'].rhs_spec  # (out features, in features, *window)
      # Of a strided layer's gradient the values stand apart, and products with what is between are not made.
      per_output = math.prod(kernel) / kernel[spec[0]] / math.prod(eqn.params['lhs_dilation'])
      total[role] += round(2 * times * per_output * math.prod(out))
  return total


def shape(var: Any) -> tuple[int, ...]:
  return var.aval.shape


def subjaxprs(eqn) -> list[core.Jaxpr]:
  """The programs inside an equation's parameters, of a linear solve the one that runs."""
  if eqn.primitive.name == 'custom_linear_solve':
    return [eqn.params['jaxprs'].solve.jaxpr]
  found = []
  for value in eqn.params.values():
    for item in value if isinstance(value, (tuple, list)) else (value,):
      if isinstance(item, core.ClosedJaxpr):
        found.append(item.jaxpr)
      elif isinstance(item, core.Jaxpr):
        found.append(item)
  return found


def scoped(model: Model) -> Model:
  """The model with its forward pass in a named scope, so that `count` can tell its FLOPs apart."""

  def apply(*args):
    with jax.named_scope('model'):
      return model.apply(*args)

  return model._replace(apply=apply)


def passes(
  build: Callable[[Model], Learner], model: Model, state: State, batch: Batch
) -> dict[str, float]:
  """Forward and backward passes of a training step and forward passes of a prediction.

  The unit is plain training of the WHOLE model on one stream batch: 2.0 forward passes are its FLOPs twice,
  whether by a second pass or by twice the rows; 0.5 backward passes are half of its gradient's, as
  where weights are frozen. Measured on the traced programs, not declared. All 0 for a model without
  matrix products, such as cached features.

  Args:
    build: model -> Learner, as in the run: its method, optimiser and frozen weights.
    model: the model of the run.
    state: a state of the run (arrays or shapes).
    batch: a stream batch (arrays or shapes).
  """

  def init(key: Array, batch: Batch) -> tuple[Tree, Tree]:
    params, stats = model.init(key, batch)
    return quantised.dequantise_tree(params), stats  # what is kept in few bits would be trained too

  own, naive = build(scoped(model)), learner(scoped(model._replace(init=init)), optax.identity())
  plain = jax.eval_shape(naive.init, jax.random.key(0), batch)

  def roles(f, *args) -> Counter:
    return count(used(f, *args))

  step, unit = roles(own.step, state, batch), roles(naive.step, plain, batch)
  once, again = roles(own.predict, state, batch), roles(naive.predict, plain, batch)
  ratio = lambda a, b: round(a / b, 3) if b else 0.0  # noqa: E731
  return {
    'train_forward': ratio(step['forward'], unit['forward']),
    'train_backward': ratio(step['backward'], unit['backward']),
    'predict_forward': ratio(once['forward'], again['forward']),
  }
