"""Sparse update: only some layers, biases, channels or upper layers of a network are trained.

  model = sparse(mlp((256, 256), 10), RULES)
  params, _ = model.init(key, batch)
  made = learner(model, optax.adam(1e-3), method, frozen(params, RULES))

What is trained keeps its path and is as large as the part that is chosen; so are its gradient, the
optimiser's moments and whatever a method keeps of it. The rest of a weight is in the branch 'rest', which
`frozen` hands to the learner. No gradient is masked: that of the rest is not computed.

Source: Lin, Zhu, Chen, Wang, Gan & Han, "On-Device Training Under 256KB Memory", NeurIPS 2022, section 2.2
(official code mit-han-lab/tiny-training, algorithm/core/utils/partial_backward.py): biases of the last
layers, and of some of them the weights or a share of their INPUT channels, those with the largest norm
('magnitude+'). Deviations: there the gradient is computed and masked in the Python code, and
pruned by the compiler of the device; shares of output channels, a choice by gradients and the last
layers of a stack are additions; the search for a scheme is left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cl_jax.errors import UserError
from cl_jax.linalg import weighted_mean
from cl_jax.masks import mark, nest, paths
from cl_jax.models.quantised import dequantise, is_stored, matrix
from cl_jax.models.sliced import Sliced, Upper
from cl_jax.types import Array, Batch, Model, Out, Tree, no_tap, overlay

Rules = Sequence[tuple[str, str]]
Orders = Mapping[str, np.ndarray]

REST = 'rest'
BIASES = ('b', 'bias')
CHOICES = ('first', 'magnitude', 'gradient')
GRAMMAR = "'all', 'none', 'bias', 'out F' or 'in F' with F in (0, 1], or 'last N' layers of a stack"


class Part(NamedTuple):
  """How much of a parameter is trained.

  Attributes:
    kind: 'all', 'none', or the first `count` along an axis: 'out' (the last axis), 'in' (the one before); or
      the last `count` layers of a stack, its first axis, 'last'.
    count: 0 for 'all' and 'none'.
  """

  kind: str
  count: int = 0


def parts(params: Tree, rules: Rules) -> dict[str, Part]:
  """What is trained of every parameter, by path.

  Args:
    params: all parameters of the network, arrays or shapes; a weight in few bits is one of them.
    rules: (pattern of whole paths, words) pairs that cover all parameters, the first that matches counts.
      The words: 'all', 'none'; 'bias': all of leaves called 'b' or 'bias', nothing of others; 'out F' and
      'in F': the fraction F of the output or input channels of weights 'w', at least one, and of the other
      leaves of their layers the same output channels ('out') or all ('in'); 'last N': the last N layers of a
      stack [layers, ...].

  Raises:
    UserError: other words, more layers than there are, patterns that do not cover or do not match.
  """
  words = paths(mark(params, rules, _is_leaf))
  leaves = paths(params, _is_leaf)
  return {path: _part(path, matrix(a).shape, words[path]) for path, a in leaves.items()}


def _part(path: str, shape: tuple[int, ...], words: str) -> Part:
  kind, _, amount = words.partition(' ')
  name = path.rsplit('/', 1)[-1]
  if words in ('all', 'none'):
    return Part(words)
  if words == 'bias':
    return Part('all' if name in BIASES else 'none')
  try:
    value = float(amount)
  except ValueError:
    value = 0.0
  if kind == 'last' and value >= 1 and value.is_integer() and shape:
    if 'layers' not in path.split('/'):
      raise UserError(
        f"update {words!r}: {path}{list(shape)} is of no stack of layers ('.../layers/...', as "
        "transformers have): use 'all' or 'none'"
      )
    if value > shape[0]:
      raise UserError(f'update {words!r}: {path} has {shape[0]} layers')
    return Part('all') if value == shape[0] else Part('last', int(value))
  if kind in ('in', 'out') and 0 < value <= 1 and shape:
    if kind == 'in' and name != 'w':
      return Part('all')
    channels = shape[-1 if kind == 'out' else -2]
    count = max(1, round(value * channels))
    return Part('all') if count == channels else Part(kind, count)
  raise UserError(f'update {words!r} for {path}{list(shape)}: use {GRAMMAR}')


def sparse(model: Model, rules: Rules, orders: Orders | None = None) -> Model:
  """The model with the parts that are trained apart from the rest: 'rest/out/l0/w', 'rest/last/...', ...

  Its outputs are those of `model`. Unit by unit methods (HAT, PNN) find no `wires` where channels are apart.

  Args:
    model: see `Model`.
    rules: see `parts`.
    orders: see `order`; None takes the first channels.
  """
  orders = {} if orders is None else orders

  def init(key: Array, batch: Batch) -> tuple[Tree, Tree]:
    params, stats = model.init(key, batch)
    own: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    of = parts(params, rules)
    for path, a in paths(params, _is_leaf).items():
      own[path], left = divided(a, of[path], orders.get(path))
      if left is not None:
        rest[f'{of[path].kind}/{path}'] = left
    return nest(own) | ({REST: nest(rest)} if rest else {}), stats

  def apply(variables: Tree, batch: Batch, tap=no_tap, train: bool = False) -> Out:
    return model.apply(joined(variables, orders), batch, tap, train)

  cut = any(words.startswith(('in ', 'out ')) for _, words in rules)
  return model._replace(init=init, apply=apply, wires=() if cut else model.wires)


def frozen(params: Tree, rules: Rules) -> Tree:
  """Of the parameters of a sparse model, what is not trained: for `learner(frozen=...)`."""
  trained = {k: v for k, v in params.items() if k != REST}
  words = paths(mark(trained, rules, _is_leaf))
  still = {
    path: a
    for path, a in paths(trained, _is_leaf).items()
    if words[path] == 'none' or (words[path] == 'bias' and path.rsplit('/', 1)[-1] not in BIASES)
  }
  return nest(still) | ({REST: params[REST]} if REST in params else {})


def divided(a: Any, part: Part, order: np.ndarray | None) -> tuple[Array, Array | None]:
  """(what is trained of a parameter, the rest of it or None)."""
  if part.kind in ('all', 'none'):
    return a, None
  a = dequantise(a) if is_stored(a) else a
  if part.kind == 'last':
    below = a.shape[0] - part.count
    return a[below:], a[:below]
  axis = a.ndim - (1 if part.kind == 'out' else 2)
  if order is not None:
    at = jnp.asarray(order).reshape(*order.shape[:-1], *[1] * (a.ndim - order.ndim), -1)
    a = jnp.take_along_axis(a, at if part.kind == 'out' else jnp.swapaxes(at, -1, -2), axis)
  own, rest = jnp.split(a, [part.count], axis)
  return own, rest


def joined(variables: Tree, orders: Orders) -> Tree:
  """The variables as the network takes them: with operators in the place of weights that are apart."""
  if REST not in variables:
    return variables
  flat = paths({k: v for k, v in variables.items() if k != REST}, is_leaf=_is_leaf)
  for kind, tree in variables[REST].items():
    for path, rest in paths(tree, is_leaf=is_stored).items():
      own = flat[path]
      if kind == 'last':
        flat[path] = Upper(rest, own)
        continue
      order, inverse = _both(orders.get(path))
      if path.endswith('/w'):
        flat[path] = Sliced(own, rest, order, inverse, kind)
      else:
        b = jnp.concatenate([own, rest], -1)
        flat[path] = b if isinstance(inverse, tuple) else jnp.take_along_axis(b, inverse, -1)
  return nest(flat)


def _is_leaf(a: Any) -> bool:
  return not isinstance(a, dict) or is_stored(a)


def _both(order: np.ndarray | None) -> tuple[Any, Any]:
  if order is None:
    return (), ()
  return jnp.asarray(order, jnp.int32), jnp.asarray(np.argsort(order, -1), jnp.int32)


def whole(variables: Tree, orders: Orders | None = None) -> Tree:
  """The plain parameters again, every weight in one array: for inspection, or to go on without `sparse`.

  A weight of which nothing is trained stays as it is stored, in few bits or not.
  """
  array = lambda a: dequantise(a) if is_stored(a) else a  # noqa: E731

  def one(a: Any) -> Any:
    if isinstance(a, Upper):
      return jnp.concatenate([array(a.lower), a.upper])
    if not isinstance(a, Sliced):
      return a
    rest = array(a.rest)
    axis = jnp.ndim(rest) - (1 if a.axis == 'out' else 2)
    w = jnp.concatenate([a.own, rest], axis)
    if isinstance(a.inverse, tuple):
      return w
    at = a.inverse.reshape(*a.inverse.shape[:-1], *[1] * (w.ndim - a.inverse.ndim), -1)
    return jnp.take_along_axis(w, at if a.axis == 'out' else jnp.swapaxes(at, -1, -2), axis)

  tree = joined(variables, {} if orders is None else orders)
  apart = lambda a: dataclasses.is_dataclass(a) or isinstance(a, Upper)  # noqa: E731
  return jax.tree.map(one, tree, is_leaf=apart)


def layers(variables: Tree) -> int:
  """How many layers the stack 'backbone/layers' has, those below the trained ones too; 0 without one."""
  stack = joined(variables, {}).get('backbone', {}).get('layers', {})
  is_upper = lambda a: isinstance(a, Upper)  # noqa: E731
  first = lambda a: jax.tree.leaves(a)[0].shape[0]  # noqa: E731
  nodes = [a for a in jax.tree.leaves(stack, is_leaf=is_upper) if is_upper(a) or jnp.ndim(a)]
  return max(
    (first(a.lower) + first(a.upper) if is_upper(a) else first(a) for a in nodes), default=0
  )


# --- which channels ---------------------------------------------------------------------------------


def order(sizes: Tree, rules: Rules) -> dict[str, np.ndarray]:
  """{path: i32[..., channels]}, the chosen channels in rising order, then the others; for `sparse`.

  A channel's score is the sum of `sizes` over everything but the channel (and the layer of a stack);
  the largest are chosen. What is not called 'w' follows the output channels of its layer's weight where as
  many of them are chosen.

  Args:
    sizes: like the parameters: their squares, the squares of their gradients.
    rules: see `parts`.
  """
  of, leaves = parts(sizes, rules), paths(sizes)
  found: dict[str, np.ndarray] = {}
  for path in sorted(leaves, key=lambda p: not p.endswith('/w')):  # weights first
    part, a = of[path], np.asarray(leaves[path])
    if part.kind not in ('in', 'out'):
      continue
    weight = f'{path.rsplit("/", 1)[0]}/w'
    if of.get(weight) == part and path != weight:
      found[path] = found[weight]
      continue
    score = a if part.kind == 'out' else np.swapaxes(a, -1, -2)
    own = 3 if path == weight else 2
    stacked = a.ndim == own and (path == weight or 'layers' in path.split('/'))
    score = score.sum(tuple(range(1 if stacked else 0, a.ndim - 1)))
    best = np.argsort(-score, -1, kind='stable')
    first, others = np.split(best, [part.count], -1)
    found[path] = np.concatenate([np.sort(first, -1), np.sort(others, -1)], -1).astype(np.int32)
  return found


def squared_gradients(model: Model, params: Tree, stats: Tree, batches: Batch) -> Tree:
  """The sum over batches of the squared gradient of each batch's task loss, like the parameters.

  An importance before anything is learnt: the diagonal of the Fisher information up to a factor, with the
  mean over a batch in the place of one example.

  Args:
    model: the plain one.
    params, stats: what its `init` gave.
    batches: the first task's, every leaf [S, B, ...].
  """

  def loss(params: Tree, batch: Batch) -> Array:
    out = model.apply(overlay(stats, params), batch, no_tap, True)
    return weighted_mean(model.loss(out, batch), batch.w)

  def add(total: Tree, batch: Batch) -> tuple[Tree, None]:
    g = jax.grad(loss)(params, batch)
    return jax.tree.map(lambda t, g: t + jnp.square(g), total, g), None

  zeros = jax.tree.map(jnp.zeros_like, params)
  return jax.jit(lambda b: jax.lax.scan(add, zeros, b)[0])(batches)
