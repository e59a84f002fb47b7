"""What a learner keeps between steps, in fewer bits: memories, parts of a method's state, moments.

`memory` and `state` make a method of a method, `moments` an optimiser of an optimiser. What they wrap never
sees codes: arrays are decoded when they are read and encoded when they are written; see `cl_jax.codecs`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cl_jax import codecs, product
from cl_jax.codecs import Packed, Rows
from cl_jax.cut import Joined
from cl_jax.errors import UserError
from cl_jax.masks import matches, path_name
from cl_jax.types import Array, Batch, Forward, Method, Tree

MOMENTS = ('bfloat16', 'dynamic8')
# Fields of optax's states whose numbers are not negative.
POSITIVE = ('nu', 'nu_max', 'sum_of_squares', 'e_g', 'e_x')


class Coder(NamedTuple):
  """encode, decode: of the inputs of a batch, as they are stored and as the stream has them."""

  encode: Callable[[Tree], Tree]
  decode: Callable[[Tree], Tree]


def memory(codec: str, method: Method, name: str = 'the method') -> Method:
  """`method`, whose memory keeps the stream's examples in the bytes of a codec.

  Its hooks are handed encoded batches, which is what they store, and networks that decode what they are
  given. The rows of the stream that a step trains on stay as they are; what a method reads from a batch that
  it stores itself (`mer` its examples, `icarl` a task's) is what the memory will hold. With 'pqMxK' the state
  is `product.Quantised`: codebooks that learn from each batch before it is stored, and the method's own.

  Args:
    codec: one of `codecs.ROWS` or 'pqMxK' (`product.form`); applied to the leaves of `Batch.x` that are
      floats or uint8.
    method: one that keeps examples as the stream has them. Activations are `latent`'s own argument `codec`,
      and `remind` has a quantiser already.
    name: of the method, for errors.

  Raises:
    UserError: at init, of a method that keeps no such examples, or examples that M does not divide.
  """
  form = product.form(codec)
  if form is None and codec not in codecs.ROWS:
    raise UserError(f'no codec {codec!r} for a memory: one of {", ".join(codecs.ROWS)} or pqMxK')

  def opened(s) -> tuple[Coder, Tree]:
    """What encodes and decodes, and the method's own state."""
    if form is None:
      return Coder(partial(codecs.encode_tree, codec), codecs.decode_tree), s
    return Coder(
      partial(product.encode_tree, form, s.books), partial(product.decode_tree, s.books)
    ), s.method

  def closed(s, inner):
    return inner if form is None else s._replace(method=inner)

  def learnt(s, batch):
    return s if form is None else s._replace(books=product.learn_tree(s.books, batch.x, batch.w))

  def coded(coder: Coder, batch: Batch) -> Batch:
    if isinstance(batch.x, Joined):
      raise UserError(
        f'{name} in {codec} cannot follow a memory whose rows enter inside the network: name it first'
      )
    return batch._replace(x=coder.encode(batch.x))

  def init(key, params, batch, fwd):
    s = None
    if form is not None:
      try:
        s = product.Quantised(product.begin_tree(form, batch.x), None)
      except UserError as error:
        raise UserError(f'{name} in {error}') from error
    coder, _ = opened(s)
    added, inner = method.init(key, params, coded(coder, batch), decoding(fwd, coder.decode))
    if not any(isinstance(a, Rows) for a in _leaves(inner, Rows)):
      raise UserError(
        f'{name} keeps no examples with floats or 8-bit pixels that could be in {codec}: leave the codec out'
      )
    return added, closed(s, inner)

  def wrap(s, apply):
    return method.wrap(opened(s)[1], apply)

  def mix(s, batch):
    coder, inner = opened(s)
    n, mixed = batch.y.shape[0], method.mix(inner, coded(coder, batch))
    rest = jax.tree.map(lambda a: a[n:], mixed)
    rest = rest._replace(x=coder.decode(rest.x))
    whole = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), batch, rest)
    return whole._replace(w=mixed.w)

  def loss(s, params, batch, out, fwd):
    coder, inner = opened(s)
    return method.loss(inner, params, batch, out, decoding(fwd, coder.decode))

  def grads(s, g, params, batch, grad_fn):
    coder, inner = opened(learnt(s, batch))  # `after` keeps it

    def decoded(params, batch):
      return grad_fn(params, batch._replace(x=coder.decode(batch.x)))

    g, inner = method.grads(inner, g, params, coded(coder, batch), decoded)
    return g, closed(s, inner)

  def after(s, params, step, key):
    s = learnt(s, step.batch)
    coder, inner = opened(s)
    step = step._replace(batch=coded(coder, step.batch))
    params, inner = method.after(inner, params, step, key)
    return params, closed(s, inner)

  def boundary(s, params, batches, fwd, key):
    coder, inner = opened(s)
    held = jax.vmap(partial(coded, coder))(batches)
    params, inner = method.boundary(inner, params, held, decoding(fwd, coder.decode), key)
    return params, closed(s, inner)

  default = Method()
  return method._replace(
    init=init,
    boundary=boundary,
    after=after,
    loss=loss,
    wrap=method.wrap if method.wrap is default.wrap else wrap,
    mix=method.mix if method.mix is default.mix else mix,
    grads=method.grads if method.grads is default.grads else grads,
  )


def decoding(fwd: Forward, decode: Callable[[Tree], Tree] = codecs.decode_tree) -> Forward:
  """The forward pass that takes encoded batches too."""

  def apply(variables, batch, tap, train):
    return fwd.apply(variables, batch._replace(x=decode(batch.x)), tap, train)

  return fwd._replace(apply=apply)


def state(
  rules: Sequence[tuple[str, str]], method: Method, name: str = 'a state in fewer bits'
) -> Method:
  """`method`, with parts of its state packed between its hooks.

  Importances in 8 bits are (('.*importance/.*', 'udynamic8'),), an old network in bfloat16
  (('.*teacher/.*', 'bfloat16'),). What a hook leaves as it was is not packed again.

  Args:
    rules: (regular expression of a whole path in the method's state, one of `codecs.TENSORS`); the first
      that matches a float32 array counts. The dynamic codecs leave arrays of less than 256 numbers as they
      are; 'udynamic8' is for numbers >= 0 alone.
    method: or a chain, whose paths begin with the names of its methods.
    name: of the rules, for errors.

  Raises:
    UserError: at init: a pattern that is none or packs nothing, or one that matches the rows of a memory,
      which would be unpacked whole in every step.
  """

  def init(key, params, batch, fwd):
    added, s = method.init(key, params, batch, fwd)
    try:
      return added, packed_by(rules, s)
    except UserError as error:
      raise UserError(f'{name}: {error}') from error

  def run(hook: Callable, s: Tree, *args):
    """hook(unpacked s, ...) -> (value, s) with the new state packed as the old one was."""
    plain = codecs.unpack_tree(s)
    value, new = hook(plain, *args)
    return value, repacked(s, plain, new)

  def grads(s, g, *args):
    return run(method.grads, s, g, *args)

  def after(s, params, *args):
    return run(method.after, s, params, *args)

  def boundary(s, params, *args):
    return run(method.boundary, s, params, *args)

  return method._replace(
    init=init,
    wrap=lambda s, apply: method.wrap(codecs.unpack_tree(s), apply),
    mix=lambda s, batch: method.mix(codecs.unpack_tree(s), batch),
    loss=lambda s, *args: method.loss(codecs.unpack_tree(s), *args),
    grads=grads,
    after=after,
    boundary=boundary,
  )


def packed_by(rules: Sequence[tuple[str, str]], tree: Tree) -> Tree:
  """The tree with the arrays that the rules name packed; see `state`."""
  used = [False] * len(rules)
  seen: list[str] = []

  def inside(path, node: Any, rows: bool) -> Any:
    name = path_name(path)
    seen.append(name)
    for i, (pattern, codec) in enumerate(rules):
      if codec not in codecs.TENSORS:
        raise UserError(f'no codec {codec!r} for a state: one of {", ".join(codecs.TENSORS)}')
      if matches(pattern, name) and codecs.packs(codec, node):
        if rows:
          raise UserError(
            f'pattern {pattern!r} matches {name}, rows of a memory: those have a codec of their own'
          )
        used[i] = True
        return begun(codec, node)
    return node

  def top(path, node: Any) -> Any:
    if not isinstance(node, Batch):
      return inside(path, node, False)
    return jax.tree_util.tree_map_with_path(lambda p, a: inside((*path, *p), a, True), node)

  made = jax.tree_util.tree_map_with_path(top, tree, is_leaf=lambda a: isinstance(a, Batch))
  for hit, (pattern, codec) in zip(used, rules, strict=True):
    if not hit:
      raise UserError(
        f'pattern {pattern!r} packs nothing in {codec}: the state has {", ".join(seen[:6]) or "no arrays"}'
        + (f' and {len(seen) - 6} more' if len(seen) > 6 else '')
      )
  return made


def begun(codec: str, a: Array) -> Packed:
  """An initial array packed. The compiler is kept from packing its zeros itself, which takes it seconds."""
  return codecs.pack(codec, jax.lax.optimization_barrier(a))


def repacked(old: Tree, plain: Tree, new: Tree) -> Tree:
  """`new` packed where `old` is; `plain` is `old` unpacked, and what is still the same array stays."""

  def one(was, before, now):
    if not isinstance(was, Packed):
      return now
    return was if now is before else codecs.pack(was.codec, now)

  return jax.tree.map(one, old, plain, new, is_leaf=lambda a: isinstance(a, Packed))


def moments(codec: str, tx: optax.GradientTransformation) -> optax.GradientTransformation:
  """`tx`, whose momentum and moments are packed between steps.

  'dynamic8' is that of Dettmers et al., ICLR 2022; see `codecs.pack` for what deviates, and: arrays of less
  than 256 numbers stay in float32 (there: of less than 4096), embedding layers get no norm of their own.

  Rounding to the nearest loses changes of less than half a level in a step: with Adam's b2=0.999 a second
  moment grows, and falls by no more than 0.1 % a step, which bfloat16 rounds away; in 'dynamic8' it falls
  with the largest of its block alone. A smaller b2 (0.95) does better in both.

  Args:
    codec: 'bfloat16' or 'dynamic8', which is 'udynamic8' for second moments; optax's names tell them.
    tx: an optax optimiser.

  Raises:
    UserError: at init, where there is nothing to pack.
  """
  if codec not in MOMENTS:
    raise UserError(f'no codec {codec!r} for moments: one of {", ".join(MOMENTS)}')
  tx = optax.with_extra_args_support(tx)

  def pack(path, a):
    if not codecs.packs(codec, a):
      return a
    names = {getattr(step, 'name', '') for step in path}
    return begun('udynamic8' if codec == 'dynamic8' and names & {*POSITIVE} else codec, a)

  def init(params: Tree) -> Tree:
    s = jax.tree_util.tree_map_with_path(pack, tx.init(params))
    if not any(isinstance(a, Packed) for a in _leaves(s, Packed)):
      raise UserError(
        f'moments in {codec}: the optimiser keeps no momentum or moment of {codecs.BLOCK} numbers or more'
      )
    return s

  def update(updates, state, params=None, **more):
    plain = codecs.unpack_tree(state)
    updates, new = tx.update(updates, plain, params, **more)
    return updates, repacked(state, plain, new)

  return optax.GradientTransformationExtraArgs(init, update)


def _leaves(tree: Tree, kind: type) -> list:
  return jax.tree.leaves(tree, is_leaf=lambda a: isinstance(a, kind))
