"""W1 with replay as one hand-written scan in JAX: what the library's abstraction is measured against.

No hooks, no options, float32 images in memory, and every shortcut that one experiment allows: one call of
the generator a step, draws with replacement, and evaluation by permuting the rows of the first weight.
"""

from __future__ import annotations

from benchmarks.workers.serve import options, serve

GIVEN = options()

import time  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

DRAW, CAPACITY, RATE = 10, 100, 0.1


def forward(p, x):
  h = jax.nn.relu(x @ p['w0'] + p['b0'])
  h = jax.nn.relu(h @ p['w1'] + p['b1'])
  return h @ p['w2'] + p['b2']


def loss(p, x, y, w):
  logp = jax.nn.log_softmax(forward(p, x))
  label = y[:, None] == jnp.arange(10)
  return -jnp.sum(w * jnp.where(label, logp, 0).sum(1)) / w.sum()


def init(key, units):
  params, widths = {}, (784, units, units, 10)
  for i, (k, m, n) in enumerate(
    zip(jax.random.split(key, 3), widths[:-1], widths[1:], strict=True)
  ):
    params[f'w{i}'] = jax.random.normal(k, (m, n)) * jnp.sqrt(2 / m)
    params[f'b{i}'] = jnp.zeros(n)
  return params


def run(key, data, units):
  x, y, index, views, raw, test_y = data
  k_init, k_steps = jax.random.split(key)

  def accuracy(params):
    def one(inputs):
      view, y = inputs
      seen = {**params, 'w0': params['w0'][jnp.argsort(view)]}
      return (forward(seen, raw).argmax(1) == y).mean()

    return jax.lax.map(one, (views, test_y))

  def step(carry, inputs):
    params, memory_x, memory_y, old_x, old_y, old_w, n = carry
    rows, view = inputs
    new_x, new_y = x[rows][:, view], y[rows]
    size = rows.shape[0]
    w = jnp.concatenate([jnp.ones(size), old_w])
    grads = jax.grad(loss)(
      params, jnp.concatenate([new_x, old_x]), jnp.concatenate([new_y, old_y]), w
    )
    params = jax.tree.map(lambda p, g: p - RATE * g, params, grads)
    bits = jax.random.bits(jax.random.fold_in(k_steps, n), (size + DRAW,))
    nth = n + jnp.arange(size, dtype=jnp.uint32)
    slot = jnp.where(nth < CAPACITY, nth, jnp.minimum(bits[:size] % (nth + 1), CAPACITY))
    memory_x, memory_y = memory_x.at[slot].set(new_x), memory_y.at[slot].set(new_y)
    n = n + size
    draw = bits[size:] % jnp.minimum(n, CAPACITY)
    return (params, memory_x, memory_y, memory_x[draw], memory_y[draw], jnp.ones(DRAW), n), None

  def task(carry, inputs):
    rows, view = inputs
    carry, _ = jax.lax.scan(lambda c, r: step(c, (r, view)), carry, rows)
    return carry, accuracy(carry[0])

  params = init(k_init, units)
  blank = lambda n: (jnp.zeros((n, 784)), jnp.zeros(n, y.dtype))  # noqa: E731
  carry = (params, *blank(CAPACITY + 1), *blank(DRAW), jnp.zeros(DRAW), jnp.uint32(0))
  carry, R = jax.lax.scan(task, carry, (index, views))
  return carry[0], accuracy(params), R


def prepare(data: str, units: int = 256):
  with np.load(data) as stored:
    pixels = lambda a: jnp.asarray(a.reshape(len(a), -1), jnp.float32) / 255  # noqa: E731
    given = (
      pixels(stored['x']),
      *(jnp.asarray(stored[name]) for name in ('y', 'index', 'views')),
      pixels(stored['raw']),
      jnp.asarray(stored['test_y']),
    )
  begin = time.process_time()
  program = jax.jit(run, static_argnums=2).lower(jax.random.key(0), given, units).compile()
  facts = {'compile_cpu': time.process_time() - begin}

  def repeat(i):
    params, start, R = jax.block_until_ready(program(jax.random.key(i), given))
    return {'accuracy': float(R[-1].mean())}

  return repeat, facts


serve(lambda: prepare(**GIVEN))
