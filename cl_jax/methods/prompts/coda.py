"""CODA-Prompt."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cl_jax import prompts
from cl_jax.errors import UserError
from cl_jax.types import Method


def coda(
  tasks: int,
  pool: int = 100,
  length: int = 8,
  coef: float = 0.0,
  layers: tuple[int, ...] = (0, 1, 2, 3, 4),
) -> Method:
  """Prefixes that are weighted sums of components, to which every task adds its share.

  Smith et al., CVPR 2023, eq. 3-6; official code GT-RIPL/CODA-Prompt. Per layer there are components
  P [M, length, d], keys K [M, D] and attention vectors A [M, D]. With q the features of the frozen network
  without prompts, the prefix is sum_m cos(q * A_m, K_m) P_m; the first half of its rows goes before the
  keys, the other half before the values, after the projections. Task t may use the components of tasks
  0 ... t, M / T each, of which only its own are trained; the others keep their values bit for bit,
  whatever the optimiser remembers.

  L = L_task + coef * sum_layers sum_X mean (X X^T - I)^2, X one of P (flattened), K and A, its rows those of
  tasks 0 ... t

  When a task begins its components are made orthogonal, by Gram-Schmidt, to the span of all earlier ones and
  to each other, with length 1. Freeze the backbone and let the current task's classes compete
  (`current_head`).

  Deviations: earlier components, which training moves, are made orthogonal among themselves before new ones
  are projected (the official code subtracts the projections on each of them, which leaves a rest where
  they are not orthogonal); the penalty's weight is the whole factor (official: mu * 10^-6). As there, a
  task's components take part in predictions from its first step on, not from the boundary before it.

  Args:
    tasks: T; later tasks go on with the last share.
    pool: M, at most D; what M / T leaves over is not used.
    length: rows of a component, an even number.
    coef: weight of the orthogonality penalty.
    layers: which have a prefix.

  Raises:
    UserError: the network is no transformer or lacks one of the layers, an odd `length`, or a pool that is
      smaller than the number of tasks or larger than D.

  Needs the boundary. State: 8 bytes (parameters: M (length d + 2 D) per layer). One more forward pass.
  """
  share = pool // tasks
  if length % 2:
    raise UserError(f'coda: length={length} is split in halves for keys and values: make it even')
  if not share:
    raise UserError(f'coda: a pool of {pool} has no component for each of {tasks} tasks')

  def fresh(own, task):
    """The parameters with the components of `task` made orthogonal to the earlier ones."""
    flat = lambda a: a.reshape(*a.shape[:2], -1)  # noqa: E731
    new = lambda a: jax.vmap(lambda x: orthogonal(x, share * task, share))(flat(a))  # noqa: E731
    return {n: new(a).reshape(a.shape) for n, a in own.items()}

  def init(key, params, batch, fwd):
    net = prompts.network('coda', params, batch, fwd)
    prompts.check_layers('coda: layers', layers, net)
    if pool > net.features:
      raise UserError(
        f'coda: {pool} components cannot be orthogonal in {net.features} dimensions: make the pool smaller'
      )
    keys, count = jax.random.split(key, 3), (len(layers), pool)
    own = {
      'prompts': jax.random.normal(keys[0], (*count, length, net.key), jnp.float32),
      'keys': jax.random.normal(keys[1], (*count, net.features), jnp.float32),
      'attention': jax.random.normal(keys[2], (*count, net.features), jnp.float32),
    }
    own = {n: a / jnp.sqrt(a[0, 0].size) for n, a in own.items()}  # length 1, about
    return {'coda': fresh(own, 0)}, prompts.first_task()

  def usable(own, upto):
    """The components of the first `upto` tasks, others 0; those of all but the last are constants."""
    index = jnp.arange(pool)

    def masked(a):
      at = index.reshape(-1, *[1] * (a.ndim - 2))
      a = jnp.where(at < share * (upto - 1), jax.lax.stop_gradient(a), a)
      return jnp.where(at < share * upto, a, 0)

    return {n: masked(a) for n, a in own.items()}

  def wrap(s, apply):
    def prefixed(variables, batch, tap, train):
      q = prompts.query(apply, variables, batch)
      own = usable(variables['coda'], s.now + 1 if train else jnp.maximum(s.begun, 1))
      a, k = own['attention'], prompts.unit(own['keys'])  # [S, M, D]
      norm = jnp.einsum('bd,smd->sbm', jnp.square(q), jnp.square(a))
      cosine = jnp.einsum('bd,smd->sbm', q, a * k) * jax.lax.rsqrt(jnp.maximum(norm, 1e-12))
      rows = jnp.einsum('sbm,smld->sbld', cosine, own['prompts'])
      half = length // 2
      tap = prompts.before_keys(tap, rows[:, :, :half], rows[:, :, half:], layers)
      return apply(variables, batch, tap, train)

    return prefixed

  def loss(s, params, batch, out, fwd):
    upto = share * (s.now + 1)

    def penalty(x):  # [M, n]; the rows past `upto` are 0
      identity = jnp.diag((jnp.arange(pool) < upto).astype(x.dtype))
      return jnp.square(x @ x.T - identity).sum() / jnp.square(upto)

    own = usable(params['coda'], s.now + 1)
    flat = [a.reshape(-1, pool, a[0, 0].size) for a in own.values()]
    return coef * sum(jax.vmap(penalty)(x).sum() for x in flat)

  def after(s, params, step, key):
    mine = (jnp.arange(pool) // share) == s.now
    old, new = step.params['coda'], params['coda']
    kept = {n: prompts.keep_others(old[n], new[n], mine, axis=1) for n in new}
    return {**params, 'coda': kept}, prompts.step_taken(s)

  def boundary(s, params, batches, fwd, key):
    after = prompts.next_task(s, tasks)
    begins = after.now > s.now  # a task past the last one goes on with what is there
    new = fresh(params['coda'], after.now)
    kept = {n: jnp.where(begins, new[n], a) for n, a in params['coda'].items()}
    return {**params, 'coda': kept}, after

  return Method(
    init=init, wrap=wrap, loss=loss, after=after, boundary=boundary, needs=('boundary',)
  )


def orthogonal(x, start, count: int):
  """x [M, n] with its rows start ... start + count made orthogonal to those before, and of length 1.

  Gram-Schmidt, each projection done twice against rounding; earlier rows are taken for their span.
  """
  tiny = 1e-5

  def row(i, carry):
    x, basis = carry
    rest = x[i]
    for _ in range(2):
      rest = rest - (basis @ rest) @ basis
    size = jnp.sqrt(jnp.square(rest).sum())
    new = i >= start
    # An earlier row may lie in the span of those before it: it adds nothing to the basis.
    whole = new | (size > tiny * jnp.sqrt(jnp.square(x[i]).sum()))
    direction = jnp.where(whole, rest / jnp.maximum(size, 1e-30), 0)
    return jnp.where(new, x.at[i].set(direction), x), basis.at[i].set(direction)

  return jax.lax.fori_loop(0, start + count, row, (x, jnp.zeros_like(x)))[0]
