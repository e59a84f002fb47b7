"""Methods compose: `chain` runs several as one, `gated` switches one on and off inside a program."""

from __future__ import annotations

import zlib

import jax
import jax.numpy as jnp

from cl_jax.errors import UserError
from cl_jax.types import Array, Method, Tree


def named_key(key: Array, name: str) -> Array:
  """A key of its own for `name`, whatever else draws from `key` and in whatever order."""
  return jax.random.fold_in(key, zlib.crc32(name.encode()))


def chain(**methods: Method) -> Method:
  """Runs methods one after the other; the state is a dict by name.

  Hooks see what the earlier methods made of things: `wrap` nests (the last is outermost), `mix`,
  `grads`, `after` and `boundary` thread their value through, `loss` terms add up. Every method draws
  from a key derived from its NAME, so adding a method never changes another one's draws.

  Args:
    **methods: in the order in which their hooks run.

  Returns:
    One method that needs what any of them needs.
  """

  def init(key, params, batch, fwd):
    new, states = {}, {}
    for name, m in methods.items():
      added, states[name] = m.init(named_key(key, name), params, batch, fwd)
      params, new = join(params, added, name), join(new, added, name)
      fwd = fwd._replace(apply=m.wrap(states[name], fwd.apply))
    return new, states

  def wrap(s, apply):
    for name, m in methods.items():
      apply = m.wrap(s[name], apply)
    return apply

  def mix(s, batch):
    for name, m in methods.items():
      batch = m.mix(s[name], batch)
    return batch

  def loss(s, *args):
    return sum((m.loss(s[name], *args) for name, m in methods.items()), 0.0)

  def grads(s, g, *args):
    new = {}
    for name, m in methods.items():
      g, new[name] = m.grads(s[name], g, *args)
    return g, new

  def after(s, params, step, key):
    new = {}
    for name, m in methods.items():
      params, new[name] = m.after(s[name], params, step, named_key(key, name))
    return params, new

  def boundary(s, params, batches, fwd, key):
    new = {}
    for name, m in methods.items():
      params, new[name] = m.boundary(s[name], params, batches, fwd, named_key(key, name))
    return params, new

  needs = tuple(sorted({n for m in methods.values() for n in m.needs}))
  return Method(init, wrap, mix, loss, grads, after, boundary, needs)


def join(params: Tree, added: Tree, name: str) -> Tree:
  """`params` with `added` beside them; two of one name would silently share a weight."""
  if clash := set(params) & set(added):
    raise ValueError(f'method {name!r} adds parameters that exist already: {sorted(clash)}')
  return {**params, **added}


def gated(on: Array | float, method: Method) -> Method:
  """`method` where on > 0, nothing where it is not; `on` may be a tracer and may be mapped.

  Branches are `lax.cond`: real branches in a sequential program, a select under vmap; a disabled term
  that is NaN or inf does no harm (a factor 0 would). Rows that a disabled `mix` appends stay, with
  weight 0, since shapes are static, and its memory goes on being written: only what it does to the
  parameters and the predictions is switched off.
  """
  enabled = jnp.asarray(on) > 0

  def wrap(s, apply):
    wrapped = method.wrap(s, apply)
    if wrapped is apply:
      return apply

    def either(variables, batch, tap, train):
      def on(v, b):
        return wrapped(v, b, tap, train)

      def off(v, b):  # with zeros for what the method hands to its own hooks
        out, other = apply(v, b, tap, train), jax.eval_shape(on, v, b)
        if other.features.shape != out.features.shape:
          raise UserError(
            f'a method with features {other.features.shape} in place of {out.features.shape} makes '
            'another network and cannot be gated: leave it out'
          )
        blank = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), other.aux)
        return out._replace(aux={**blank, **out.aux})

      return jax.lax.cond(enabled, on, off, variables, batch)

    return either

  def mix(s, batch):
    n = batch.y.shape[0]
    mixed = method.mix(s, batch)
    if jax.tree.structure(mixed.x) != jax.tree.structure(batch.x):
      raise UserError('a memory whose rows enter inside the network cannot be gated: leave it out')
    rest = jnp.where(enabled, mixed.w[n:], 0.0)
    return mixed._replace(w=jnp.concatenate([mixed.w[:n], rest]))

  def loss(s, params, batch, out, fwd):
    return jax.lax.cond(
      enabled,
      lambda: jnp.float32(method.loss(s, params, batch, out, fwd)),
      lambda: jnp.float32(0.0),
    )

  def either(hook):
    def run(s, value, *args):
      return jax.lax.cond(enabled, lambda: hook(s, value, *args), lambda: (value, s))

    return run

  def after(s, params, step, key):
    # Not a cond: replay memory that leaves one is copied whole on every step (578 us at 5,000 images).
    new, s = method.after(s, params, step, key)
    return jax.tree.map(lambda a, b: a if a is b else jnp.where(enabled, a, b), new, params), s

  return method._replace(
    wrap=wrap,
    mix=mix,
    loss=loss,
    grads=either(method.grads),
    after=after,
    boundary=either(method.boundary),
  )
