"""Operations in C99 against JAX, the arithmetic they bring along, the plan of the arena, what is refused."""

from __future__ import annotations

from typing import NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from cl_jax.edge import stablehlo
from cl_jax.edge.arena import Place, plan
from cl_jax.edge.c99 import emit, emit_function
from cl_jax.edge.c99_core import used
from cl_jax.edge.learner import Flat, Leaf, describe, lower
from cl_jax.errors import UserError
from tests.edge.agent import Device, library, pointer

RNG = np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray:
  return RNG.normal(size=shape).astype(np.float32)


def ints(*shape: int, low=-100, high=100, dtype='int32') -> np.ndarray:
  return RNG.integers(low, high, shape).astype(dtype)


def check(tmp_path, f, *args, tolerance=1e-5) -> None:
  """f(*args) in C against JAX: integers bitwise."""
  args = [np.asarray(a) for a in args]
  flat = lambda r: list(r) if isinstance(r, (tuple, list)) else [r]  # noqa: E731
  want = [np.asarray(a) for a in flat(jax.jit(f)(*args))]
  text, _ = emit_function(lambda a: flat(f(*a)), describe(args, signed=False), 'f', len(want))
  lib = library({'f.c': text}, tmp_path, '-O1')
  outs = [np.full(w.shape, 7, w.dtype) for w in want]
  lib.f(*map(pointer, [*map(np.ascontiguousarray, args), *outs]))
  for k, (a, b) in enumerate(zip(outs, want, strict=True)):
    if b.dtype.kind == 'f':
      np.testing.assert_allclose(a, b, tolerance, tolerance, err_msg=f'output {k}')
    else:
      np.testing.assert_array_equal(a, b, f'output {k}')


def gradient(f):
  """Of a sum of f's outputs with unequal weights, for every argument."""

  def weighted(*a):
    out = f(*a)
    return (out * jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)).sum()

  return lambda *a: jax.grad(weighted, argnums=tuple(range(len(a))))(*a)


def test_elementwise_floats(tmp_path):
  def f(x, y):
    a = jnp.abs(x)
    return (
      jnp.exp(x), jnp.log(a), jnp.log1p(a), jnp.expm1(x), jnp.tanh(x), lax.erf(x), lax.erfc(x), jnp.sin(x),
      jnp.cos(x), jnp.sqrt(a), lax.rsqrt(a), jax.nn.sigmoid(x), jnp.cbrt(x), jnp.floor(x), jnp.ceil(x),
      jnp.round(x), lax.round(x), jnp.sign(x), jnp.sinh(x), jnp.cosh(x), jnp.tan(x / 9), a**y, x**3, x**-2,
      lax.rem(x, y), jnp.mod(x, y), lax.erf_inv(jnp.tanh(x / 2)), jnp.hypot(x, y), jnp.maximum(x, y),
      jnp.minimum(x, y), lax.clamp(-1.0, x, 0.5), x < y, jnp.where(x > y, x, 2 * y), jax.nn.gelu(x),
      lax.reduce_precision(x, 8, 7), jnp.logaddexp(x, y),
    )  # fmt: skip

  check(tmp_path, f, 3 * floats(200), 2 * floats(200))


def test_special_floats(tmp_path):
  x = np.array([np.nan, np.inf, -np.inf, 0, -0.0, 1, 3e38, 1e-37], np.float32)

  def f(x):
    return (
      jnp.isnan(x), jnp.isfinite(x), jnp.nan_to_num(x), jnp.maximum(x, 0.5), jnp.minimum(x, 0.5), jnp.exp(x),
      jnp.log(x), jnp.tanh(x), jnp.sqrt(x), jnp.sort(x), jnp.argmax(x), x == x[::-1], jax.nn.sigmoid(x),
      lax.erf(x), x.astype(bool),
      jnp.sort(x)[::-1] + np.array([np.nan, 1, np.inf, 0, 0, 0, 0, 0], np.float32),
    )  # fmt: skip

  check(tmp_path, f, x)


def test_elementwise_integers(tmp_path):
  """Wrapping, division by zero and by -1, shifts past the width."""
  a = np.array([2**31 - 1, -(2**31), -(2**31), 7, -9, 5, 0, 2**31 - 1], np.int32)
  b = np.array([1, -1, 0, 3, 2, -4, 7, 2**30], np.int32)

  def arithmetic(a, b):
    n = jnp.abs(b) % 40
    return (
      a + b, a - b, a * b, lax.div(a, b), lax.rem(a, b), a & b, a | b, a ^ b, ~a, -a, jnp.maximum(a, b),
      jnp.minimum(a, b), jnp.abs(a), jnp.sign(a), lax.shift_left(a, n), lax.shift_right_logical(a, n),
      lax.shift_right_arithmetic(a, n), a < b, a >= b, a**3, lax.population_count(a), lax.clz(a),
    )  # fmt: skip

  def f(a, b, c, d):
    small = [
      x
      for n in ('uint8', 'int8', 'int16', 'uint32')
      for x in arithmetic(c.astype(n), d.astype(n))[:4]
    ]
    casts = (
      c.astype(jnp.float32) / 255, (c.astype(jnp.float32) * 3 - 99).astype(jnp.uint8), c.astype(jnp.int8),
      c >= 0, c < 0, 0 > c,
      c.astype(bool), (c > d).astype(jnp.int32), lax.bitcast_convert_type(a, jnp.float32) == 1,
      lax.clamp(-5, a, 9),
      lax.bitcast_convert_type(a, jnp.uint8), lax.bitcast_convert_type(c.reshape(3, 4), jnp.int32),
      lax.bitcast_convert_type(c.astype(jnp.float32), jnp.int32),
    )  # fmt: skip
    wide = [
      lax.shift_right_arithmetic(c.astype(n), jnp.ones_like(c, n)) for n in ('uint8', 'uint32')
    ]
    wide += [lax.shift_right_arithmetic(a.astype(jnp.uint32), jnp.full_like(a, 3, jnp.uint32))]
    return (*arithmetic(a, b), *small, *casts, *wide)

  byte = {'low': 0, 'high': 256, 'dtype': 'uint8'}
  check(tmp_path, f, a, b, ints(12, **byte), ints(12, **byte))


def test_views_and_joins(tmp_path):
  def f(x):
    return (
      x.T.reshape(-1), x[::-1, 1:3].reshape(2, -1), jnp.flip(x, 1), jnp.pad(x, ((1, 2), (0, 1))),
      lax.pad(x, 0.5, ((-1, 2, 1), (1, -1, 0))), jnp.concatenate([x, 2 * x[:2]]), jnp.repeat(x, 2, 1),
      jnp.tile(x, (2, 1)), jnp.stack([x, x + 1], 1), x.reshape(2, 2, 5)[..., None].transpose(1, 3, 2, 0),
      jnp.roll(x, 1, 0), x + np.arange(5, dtype=np.float32), jnp.arange(6).reshape(2, 3), x,
      jnp.zeros((3, 2)),      jnp.eye(4) @ x, np.array([True, False]), x.T @ x[:, ::-1],
    )  # fmt: skip

  check(tmp_path, f, floats(4, 5))


def test_reductions_and_windows(tmp_path):
  def f(x, n, image):
    first = lambda v: lax.reduce_window(v, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), 'SAME')  # noqa: E731
    mean = lambda v: lax.reduce_window(v, 0.0, lax.add, (1, 3, 3, 1), (1, 1, 2, 1), 'VALID')  # noqa: E731
    return (
      x.sum(), x.max(0), x.min(1), x.mean((0, 2)), x.prod(2), (x > 0).any(1), (x > 0).all(), x.var(0),
      jnp.argmax(jnp.round(x), 1), jnp.argmin(jnp.round(x), 2), jax.nn.softmax(x), jnp.cumsum(x, 1),
      jnp.cumsum(n), jnp.cumprod(x, 0), first(image), *gradient(first)(image), mean(image),
      *gradient(mean)(image),
    )  # fmt: skip

  check(tmp_path, f, floats(3, 4, 5), ints(17), floats(2, 7, 6, 3))


def test_computed_places(tmp_path):
  """Indices out of range are clipped or left out, and nothing else is touched."""
  i = np.array([3, -1, 99, 0, 3], np.int32)
  pairs = np.array([[1, 9], [0, 0], [3, 2], [2, -1], [1, 1]], np.int32)

  def f(x, i, u, pairs):
    cut = lambda a, j: lax.dynamic_slice(a, (j, i[3]), (2, 3))  # noqa: E731
    return (
      x[i], jnp.take(x, i, 0, mode='clip'), x.at[i].get(mode='fill', fill_value=7.0), cut(x, i[2]),
      cut(x, i[1]),
      jnp.take_along_axis(x, jnp.abs(i[:, None]) % 4, 1), x.at[i].set(u, mode='drop'), x.at[i].add(u),
      x.at[i, 1].max(u[:, 0]), x.at[:, i % 4].mul(2.0), x.at[i].min(u, mode='clip'),
      lax.dynamic_update_slice(x, u[:2, :2], (i[0], i[1])), lax.dynamic_update_slice(x, u[:2], (i[2], i[2])),
      jax.vmap(lambda a, j: a[j])(x, pairs), jax.vmap(lambda a, j, v: a.at[j].add(v))(x, pairs, u[:, :2]),
    )  # fmt: skip

  check(tmp_path, f, floats(5, 4), i, floats(5, 4), pairs)


def test_products(tmp_path):
  def f(a, b, p, q):
    return (
      jnp.einsum('bik,bkj->bij', a, b), jnp.einsum('bik,bkj->ij', a, b), jnp.einsum('bik,bkj->jb', a, b),
      jnp.einsum('bik,bkj->kij', a, b), jnp.einsum('bik,lik->bl', a, a), 
      jnp.einsum('bik,lki->bl', a.transpose(0, 2, 1), a),
      a[0] @ a[1].T, jnp.exp(a[0]) @ b[0], jnp.broadcast_to(a[0, 0], (4, 7)) @ b[1],
      lax.dot(p, q, preferred_element_type=jnp.int32), p.astype(jnp.int32) @ q.astype(jnp.int32),
    )  # fmt: skip

  byte = {'low': -128, 'high': 128, 'dtype': 'int8'}
  check(tmp_path, f, floats(3, 5, 7), floats(3, 7, 6), ints(5, 9, **byte), ints(9, 6, **byte))


def test_convolutions(tmp_path):
  """Strides, padding, dilation, groups, both layouts, and the gradients that XLA writes as convolutions."""

  def conv(x, w, layout=('NHWC', 'HWIO', 'NHWC'), **k):
    return lax.conv_general_dilated(x, w, dimension_numbers=layout, **k)

  ways = (
    {'window_strides': (1, 1), 'padding': 'SAME'},
    {'window_strides': (2, 2), 'padding': 'VALID'},
    {'window_strides': (1, 2), 'padding': ((1, 2), (0, 1)), 'rhs_dilation': (2, 1)},
  )
  same = ways[0]

  def f(x, w, each, nchw, oihw, wide, one):
    outs = []
    for way in ways:
      forward = lambda x, w, way=way: conv(x, w, **way)  # noqa: E731
      outs += [forward(x, w), *gradient(forward)(x, w)]
    depth = lambda x, w: conv(x, w, feature_group_count=3, **same)  # noqa: E731
    outs += [depth(x, each), *gradient(depth)(x, each)]
    outs.append(conv(nchw, oihw, ('NCHW', 'OIHW', 'NCHW'), window_strides=(2, 1), padding='SAME'))
    outs.append(conv(wide, one, batch_group_count=2, **same))
    outs.append(conv(x, w[:1], **same))
    return outs

  shapes = [
    (2, 7, 6, 3),
    (3, 3, 3, 4),
    (3, 3, 1, 6),
    (2, 3, 5, 6),
    (4, 3, 2, 3),
    (4, 5, 5, 3),
    (2, 2, 3, 4),
  ]
  check(tmp_path, f, *(floats(*s) for s in shapes), tolerance=2e-5)


def test_sorting(tmp_path):
  def f(x, n, keys, row):
    return (
      jnp.sort(x, 0), jnp.argsort(n, 1, stable=True), jnp.sort(n, descending=True),
      *lax.sort((keys, row, keys * row), num_keys=2),
      *lax.top_k(x, 3), *lax.top_k(n, 4), jnp.median(x),
    )  # fmt: skip

  few = {'low': -3, 'high': 3}
  check(tmp_path, f, floats(9, 5), ints(3, 33, **few), ints(20, **few), ints(20, **few))


def test_random_bits(tmp_path):
  """Threefry is integer arithmetic: the draws are JAX's."""

  def f(words):
    key = jax.random.wrap_key_data(words)
    return (
      jax.random.randint(key, (7,), -3, 99), jax.random.permutation(key, 11), 
      jax.random.bits(key, (5,), jnp.uint8),
      jax.random.bernoulli(key, 0.3, (9,)), jax.random.key_data(jax.random.split(key, 3)),
      lax.bitcast_convert_type(jax.random.uniform(jax.random.fold_in(key, 3), (4,)), jnp.int32),
      jax.random.normal(key, (3, 5)),
    )  # fmt: skip

  check(tmp_path, f, np.array([3, 4], np.uint32))


def test_control(tmp_path):
  """Loops in loops, branches in loops, values of an outer block, carries that change places."""

  def f(x, y, n, p):
    z, w, k = jnp.exp(x).T, y[::-1], jnp.arange(12.0).reshape(3, 4)

    def body(i, c):
      a, b, pair = c
      a = a + 0.01 * (z.reshape(-1)[:12].reshape(3, 4) @ w.T @ w) + 0.01 * k.T.reshape(3, 4)

      def turn(s):
        return s[0] + 1, s[1].at[s[0] % 3].set(0.5 * s[1][(s[0] + 1) % 3] + a[s[0] % 3, 0])

      _, other = lax.while_loop(lambda s: s[0] < i + 2, turn, (0, b))
      b = lax.cond(i % 2 == 0, lambda b: b + other, lambda b: jnp.flip(b, 0) - other, b)
      return a, b, (pair[1], pair[0] + 1)

    start = (x, 2 * x, (jnp.float32(0), jnp.float32(1)))
    branches = [lambda x: x, lambda x: x + 1, lambda x: jnp.sort(x)]
    turns = lax.while_loop(
      lambda c: c[0] < n, lambda c: (c[0] + 1, 0.5 * c[1] + c[2], c[1]), (0, x, x + 1)
    )
    return (
      *jax.tree.leaves(lax.fori_loop(0, 5, body, start)), *turns,
      *lax.scan(lambda c, v: (jnp.tanh(0.1 * c + v), c.sum()), jnp.zeros(4), x),
      *(lax.switch(q, branches, x) for q in (p, p - 5, p + 5)),
      lax.map(lambda r: jnp.sort(r) * x[0, n % 4], x),
    )  # fmt: skip

  check(tmp_path, f, floats(3, 4), floats(3, 4), np.int32(5), np.int32(1))


def test_a_condition_leaves_what_the_body_reads(tmp_path):
  """Though it reads it for the last time before the body, in another order or changed in a few places."""

  def f(x, n):
    few = lambda c: (c[1].at[c[0]].set(0).sum() < 8) & (c[0] < n)  # noqa: E731
    ordered = lambda c: (jnp.sort(-c[1])[0] > -50) & (c[0] < n)  # noqa: E731
    turn = lambda c: (c[0] + 1, 2 * c[1])  # noqa: E731
    return tuple(lax.while_loop(go, turn, (0, jnp.abs(x)))[1] for go in (few, ordered))

  check(tmp_path, f, floats(8), np.int32(7))


def test_carries_that_change_places_keep_apart_in_the_state(tmp_path):
  """The state becomes what one carry ends with, and the other, which nobody reads, has a place of its own."""

  def step(leaves, rows):
    _, new = lax.fori_loop(0, 3, lambda i, c: (c[1] + 1, 0.5 * c[0]), (leaves[0], rows[0]))
    return [new], new.sum()

  (state,), (batch,) = ((Leaf(n, (3,), 'float32', 'float32'),) for n in 'ay')
  leaves, y = [floats(3)], floats(3)
  flat = Flat(step, lambda leaves, rows: leaves[0] + rows[0], None, (state,), (batch,), (), leaves)
  device = Device(emit(flat, 'turn'), leaves, tmp_path)
  wanted, loss = jax.jit(step)(leaves, [y])
  mine = np.zeros((), np.float32)
  device.call('step', [y], mine)
  np.testing.assert_allclose(device.leaves()[0], wanted[0], 1e-6)
  np.testing.assert_allclose(mine, loss, 1e-5)


def test_linear_algebra(tmp_path):
  def f(a, b, c):
    positive = a @ a.T + jnp.eye(6)
    solve = [
      jax.scipy.linalg.solve_triangular(a + 4 * jnp.eye(6), b, trans=t, lower=low, unit_diagonal=u)
      for t in (0, 1) for low in (True, False) for u in (False, True)
    ]  # fmt: skip
    right = [
      lax.linalg.triangular_solve(a + 4 * jnp.eye(6), c, left_side=False, lower=low, transpose_a=t)
      for low in (True, False) for t in (True, False)
    ]  # fmt: skip
    lone = jnp.linalg.cholesky(-positive)
    return (
      jnp.linalg.cholesky(positive),
      jnp.isnan(lone),
      jnp.linalg.solve(positive, b),
      jnp.linalg.inv(positive),
      *solve,
      *right,
    )

  check(tmp_path, f, floats(6, 6), floats(6, 3), floats(2, 6), tolerance=2e-4)


def test_state_that_changes_places(tmp_path):
  """Leaves that are swapped, read after another was written, or scattered into while read."""

  def step(leaves, rows):
    a, b, c, d, e, table, n = leaves
    (i,) = rows
    table2 = table.at[i].set(table[(i + 1) % 6] + a[0]).at[3:5].set(2 * table[2:4])
    loss = (table[i] + table2[i]).sum() + (a @ b)[0, 0]
    rolled = lax.dynamic_update_slice(table2, table2[1:4] + 1, (2, 0))
    return [b, a + b.T, c.T + 1, e, d, rolled, n + 1], loss

  shapes = (*[(3, 3)] * 5, (6, 3))
  state = tuple(Leaf(n, s, 'float32', 'float32') for n, s in zip('abcdet', shapes, strict=True))
  state += (Leaf('n', (), 'int32', 'int32'),)
  leaves = [np.asarray(a) for a in (*(floats(*s) for s in shapes), np.int32(3))]
  batch = (Leaf('i', (), 'int32', 'int32'),)
  flat = Flat(step, lambda leaves, rows: leaves[0] + rows[0], None, state, batch, (), leaves)
  device = Device(emit(flat, 'swap'), leaves, tmp_path)
  for i in (2, 5, 0):
    leaves, loss = jax.jit(step)(leaves, [np.int32(i)])
    mine = np.zeros((), np.float32)
    device.call('step', [np.int32(i)], mine)
    np.testing.assert_allclose(mine, loss, 1e-5)
    for a, b in zip(device.leaves(), leaves, strict=True):
      np.testing.assert_allclose(a, b, 1e-6)


def test_arithmetic_is_accurate(tmp_path):
  """Against double precision: square roots rounded correctly, the others within units in the last place."""
  import math

  x = np.concatenate(
    [np.exp(RNG.uniform(-80, 80, 20000)), RNG.uniform(0, 4, 20000), [0.0, 1, 4, 3.9999998]]
  )
  x = np.concatenate([x, [2.0**-140, 1.9999999, 16777215.0]]).astype(np.float32)
  low = RNG.uniform(-8, 8, len(x)).astype(np.float32)
  cases = {
    'm_sqrt': (x, np.sqrt(x.astype(np.float64)), 0.5),
    'm_log': (x[x > 0], np.log(x[x > 0].astype(np.float64)), 2),
    'm_exp': (low, np.exp(low.astype(np.float64)), 2),
    'm_tanh': (low, np.tanh(low.astype(np.float64)), 4),
    'm_expm1': (low, np.expm1(low.astype(np.float64)), 4),
    'm_erf': (low, np.array([math.erf(v) for v in low.astype(np.float64)]), 4),
    'm_sin': (low, np.sin(low.astype(np.float64)), 4),
  }
  text = '#include <stdint.h>\n'
  calls = ''
  for name in cases:
    calls += f'void map_{name}(const float *x, float *y, int32_t n) '
    calls += f'{{ for (int32_t i = 0; i < n; i++) y[i] = {name}(x[i]); }}\n'
  lib = library({'m.c': text + used(calls) + '\n' + calls}, tmp_path, '-O2')
  for name, (given, exact, units) in cases.items():
    given, mine = np.ascontiguousarray(given), np.zeros(len(given), np.float32)
    getattr(lib, f'map_{name}')(pointer(given), pointer(mine), len(given))
    spacing = np.spacing(np.abs(exact.astype(np.float32)).clip(1e-7))
    error = np.abs(mine - exact) / spacing
    assert error.max() <= units + 0.01, (name, error.max(), given[error.argmax()])


def test_text_and_module_are_the_same():
  module = lower(lambda a: [jnp.sort(a[0]) @ a[1]], describe([floats(4, 4), floats(4, 2)]))
  names = lambda region: [op.name for op in region.ops]  # noqa: E731
  assert (
    names(stablehlo.parse(module)) == names(stablehlo.parse(str(module))) == ['sort', 'dot_general']
  )
  with pytest.raises(UserError, match='no StableHLO module'):
    stablehlo.parse('module { nonsense }')


@pytest.mark.parametrize(
  ('f', 'message'),
  [
    (lambda x: x.astype(jnp.bfloat16) + 1, r'type bf16 in \w+ at tests/edge/test_c99\.py:\d+'),
    (lambda x: jnp.fft.fft(x).real, 'complex|fft'),
    (lambda x: jnp.linalg.eigh(x @ x.T)[0], r'custom_call of Eigh at tests/edge/test_c99\.py:\d+'),
    (lambda x: lax.lgamma(x), 'lgamma|no C99 form'),
    (lambda x: (x > 0) @ (x < 0), 'of i1'),
  ],
)
def test_refused(f, message):
  with pytest.raises(UserError, match=message):
    emit_function(lambda a: [f(a[0])], describe([floats(3, 3)]))


class Life(NamedTuple):
  size: int
  first: int
  length: int
  dtype: str


lives = st.lists(
  st.builds(
    Life,
    st.integers(1, 40),
    st.integers(0, 12),
    st.integers(0, 6),
    st.sampled_from(['f32', 'i1', 'ui8']),
  ),
  max_size=25,
)


@hypothesis.given(lives)
def test_plan_keeps_lives_apart(lives):
  """Places that are needed at the same time share no element; sharing never costs."""
  places = [Place(n.size, n.dtype, str, first=n.first, last=n.first + n.length) for n in lives]
  sizes = plan(places)
  kind = lambda p: 'f32' if p.dtype == 'f32' else 'u8'  # noqa: E731
  for k, p in enumerate(places):
    assert 0 <= p.offset and p.offset + p.size <= sizes[kind(p)]
    for q in places[:k]:
      if kind(p) == kind(q) and p.first <= q.last and q.first <= p.last:
        assert p.offset + p.size <= q.offset or q.offset + q.size <= p.offset
  for member, n in sizes.items():
    assert n <= sum(p.size for p in places if kind(p) == member)
