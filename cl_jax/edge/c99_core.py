"""C types, and the arithmetic of bits and integers that the emitted file brings along."""

from __future__ import annotations

import re

from cl_jax.edge.c99_math import SOURCE

TYPES = {
  'i1': 'uint8_t',
  **{f'i{n}': f'int{n}_t' for n in (8, 16, 32, 64)},
  **{f'ui{n}': f'uint{n}_t' for n in (8, 16, 32, 64)},
  'f32': 'float',
}

CORE = r"""
static inline uint32_t m_bits(float x) { union { float f; uint32_t u; } c; c.f = x; return c.u; }

static inline float m_float(uint32_t x) { union { float f; uint32_t u; } c; c.u = x; return c.f; }

/* The order of IEEE totalOrder. */
static inline int32_t m_order(float x) {
  const int32_t i = (int32_t)m_bits(x);
  return i < 0 ? i ^ 0x7fffffff : i;
}

/* Without the last `drop` bits of the mantissa, to nearest even. */
static inline float m_precision(float x, int32_t drop) {
  const uint32_t b = m_bits(x), half = (uint32_t)1 << (drop - 1);
  if (x != x) return x;
  return m_float((b + half - 1 + ((b >> drop) & 1)) & ~(2 * half - 1));
}

static inline float m_abs(float x) { return m_float(m_bits(x) & 0x7fffffffu); }

static inline float m_copysign(float x, float s) {
  return m_float((m_bits(x) & 0x7fffffffu) | (m_bits(s) & 0x80000000u));
}

static inline float m_sign(float x) { return x > 0 ? 1.0f : x < 0 ? -1.0f : x; }

static inline uint8_t m_finite(float x) { return (m_bits(x) & 0x7f800000u) != 0x7f800000u; }

static inline float m_max(float a, float b) { return (a >= b || a != a) ? a : b; }

static inline float m_min(float a, float b) { return (a <= b || a != a) ? a : b; }

/* To an integer: towards zero, kept in [lo, hi]; NaN is 0. */
static inline int64_t m_int(float x, int64_t lo, int64_t hi) {
  if (x != x) return 0;
  if (x >= (float)hi) return hi;
  if (x <= (float)lo) return lo;
  return (int64_t)x;
}

static float m_floor(float x) {
  if (!(m_abs(x) < 8388608.0f)) return x;
  const float t = (float)(int32_t)x;
  return m_copysign(t > x ? t - 1.0f : t, x);
}

static float m_ceil(float x) { return -m_floor(-x); }

static float m_round_even(float x) {
  if (!(m_abs(x) < 8388608.0f)) return x;
  const float big = m_copysign(8388608.0f, x);
  volatile float sum = x + big;
  return m_copysign(sum - big, x);
}

static float m_round(float x) {
  if (!(m_abs(x) < 8388608.0f)) return x;
  const float a = m_abs(x), t = (float)(int32_t)a;
  return m_copysign(a - t >= 0.5f ? t + 1.0f : t, x);
}

/* x - n y with n the quotient towards zero, exact. */
static float m_fmod(float x, float y) {
  const uint32_t a = m_bits(x) & 0x7fffffffu, b = m_bits(y) & 0x7fffffffu;
  if (b == 0 || a >= 0x7f800000u || b > 0x7f800000u) return m_float(0x7fc00000u);
  if (a < b) return x;
  int32_t ea = (int32_t)(a >> 23), eb = (int32_t)(b >> 23);
  uint32_t ma = a & 0x7fffffu, mb = b & 0x7fffffu;
  if (ea) ma |= 0x800000u; else ea = 1;
  if (eb) mb |= 0x800000u; else eb = 1;
  ma %= mb;
  for (; ea > eb && ma; ea--) ma = (ma << 1) % mb;
  if (!ma) return m_copysign(0.0f, x);
  while (ma < 0x800000u && eb > 1) { ma <<= 1; eb--; }
  return m_copysign(m_float(ma < 0x800000u ? ma : ((uint32_t)eb << 23) | (ma & 0x7fffffu)), x);
}

/* x 2^n for |n| < 250. */
static float m_scale(float x, int32_t n) {
  const int32_t half = n / 2;
  return x * m_float((uint32_t)(half + 127) << 23) * m_float((uint32_t)(n - half + 127) << 23);
}
"""

INTEGER = r"""
static inline T m_div_N(T a, T b) { return b == 0 ? (T)-1 : SIGNEDb == (T)-1 ? (T)(0 - (U)a) : (T)(a / b); }

static inline T m_rem_N(T a, T b) { return b == 0 ? a : SIGNEDb == (T)-1 ? 0 : (T)(a % b); }

static inline T m_max_N(T a, T b) { return a > b ? a : b; }

static inline T m_min_N(T a, T b) { return a < b ? a : b; }

static inline T m_shl_N(T a, T b) { return (uint64_t)b >= W ? 0 : (T)((U)a << b); }

static inline T m_shr_N(T a, T b) { return (uint64_t)b >= W ? 0 : (T)((V)a >> b); }

static inline T m_sar_N(T a, T b) { return (T)((I)a >> ((uint64_t)b >= W ? W - 1 : b)); }

static inline T m_pow_N(T a, T b) {
  U r = 1, x = (U)a;
  if (b < 1) return b == 0 || a == 1 ? 1 : 0;
  for (; b; b = (T)(b / 2)) { if (b % 2) r *= x; x *= x; }
  return (T)r;
}

static inline T m_popcnt_N(T a) { T n = 0; for (V x = (V)a; x; x = (V)(x & (x - 1))) n++; return n; }

static inline T m_clz_N(T a) { T n = W; for (V x = (V)a; x; x = (V)(x >> 1)) n--; return n; }
"""


def integer(dtype: str) -> str:
  """The functions of one integer type."""
  name, width = TYPES[dtype], int(dtype.lstrip('ui')) if dtype != 'i1' else 8
  signed = dtype[0] == 'i' and dtype != 'i1'
  text = INTEGER if signed else INTEGER.replace('SIGNEDb == (T)-1 ? (T)(0 - (U)a) : ', '')
  text = text if signed else text.replace('SIGNEDb == (T)-1 ? 0 : ', '')
  word = 'uint64_t' if width == 64 else 'uint32_t'
  for key, value in (
    ('SIGNED', ''),
    (r'\bT\b', name),
    (r'\bU\b', word),
    (r'\bV\b', f'uint{width}_t'),
    (r'\bI\b', f'int{width}_t'),
    (r'\bW\b', str(width)),
    (r'_N\b', f'_{dtype}'),
  ):
    text = re.sub(key, value, text)
  return text


def used(code: str) -> str:
  """The functions that a piece of code calls, and those that they call, in an order that compiles."""
  whole = CORE + SOURCE + ''.join(integer(d) for d in TYPES if d != 'f32')
  parts = re.split(r'\n\n(?=static|/\*)', whole.strip())
  names = [re.search(r'\b(m_\w+)\(', re.sub(r'/\*.*?\*/', '', part, flags=re.S)) for part in parts]
  bodies = {m[1]: part for m, part in zip(names, parts, strict=True) if m}
  wanted: set[str] = set()
  queue = set(re.findall(r'\bm_\w+', code))
  while queue:
    name = queue.pop()
    if name in bodies and name not in wanted:
      wanted.add(name)
      queue |= set(re.findall(r'\bm_\w+', bodies[name]))
  return '\n\n'.join(part for name, part in bodies.items() if name in wanted)
