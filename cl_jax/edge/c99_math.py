"""The arithmetic that the emitted file brings along, in C99 without a library: the same bits on every target.

Floats are IEEE single; the error of every function is a few units in the last place, `m_sqrt` is correctly
rounded. `m_sin` and `m_cos` lose accuracy beyond |x| of about 10,000.
"""

from __future__ import annotations

import re

TYPES = {
  'i1': 'uint8_t',
  **{f'i{n}': f'int{n}_t' for n in (8, 16, 32, 64)},
  **{f'ui{n}': f'uint{n}_t' for n in (8, 16, 32, 64)},
  'f32': 'float',
}

SOURCE = r"""
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

static float m_exp(float x) {
  if (x != x) return x;
  if (x > 88.8f) return m_float(0x7f800000u);
  if (x < -104.0f) return 0.0f;
  const int32_t n = (int32_t)(x * 1.44269504f + (x < 0 ? -0.5f : 0.5f));
  const float r = (x - (float)n * 0.693359375f) + (float)n * 2.12194440e-4f;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  return m_scale(p * r * r + r + 1.0f, n);
}

static float m_log(float x) {
  if (x != x || x < 0) return m_float(0x7fc00000u);
  if (x == 0) return m_float(0xff800000u);
  if (!m_finite(x)) return x;
  int32_t e = 0;
  if (x < 1.17549435e-38f) { x *= 8388608.0f; e = -23; }
  uint32_t b = m_bits(x);
  e += (int32_t)(b >> 23) - 127;
  b = (b & 0x7fffffu) | 0x3f800000u;
  if (b > 0x3fb504f3u) { b -= 0x800000u; e++; }
  const float f = m_float(b) - 1.0f, s = f / (2.0f + f), z = s * s;
  float p = 1.0f / 9;
  p = p * z + 1.0f / 7;
  p = p * z + 1.0f / 5;
  p = p * z + 1.0f / 3;
  /* log(1 + f) = f - f^2/2 + s (f^2/2 + 2 z p): no rounding of f itself */
  const float h = 0.5f * f * f, n = (float)e;
  return n * 0.693359375f + (f - (h - (s * (h + 2.0f * z * p) - n * 2.12194440e-4f)));
}

static float m_log1p(float x) {
  const float u = 1.0f + x;
  if (u == 1.0f) return x;
  if (!(u > 0) || !m_finite(u)) return m_log(u);
  return m_log(u) * (x / (u - 1.0f));
}

static float m_expm1(float x) {
  if (x == 0 || !(m_abs(x) < 0.5f)) return x == 0 ? x : m_exp(x) - 1.0f;
  float p = 1.0f / 40320;
  p = p * x + 1.0f / 5040;
  p = p * x + 1.0f / 720;
  p = p * x + 1.0f / 120;
  p = p * x + 1.0f / 24;
  p = p * x + 1.0f / 6;
  p = p * x + 0.5f;
  return p * x * x + x;
}

static float m_tanh(float x) {
  const float a = m_abs(x);
  if (!(a < 9.1f)) return x != x ? x : m_copysign(1.0f, x);
  const float t = m_expm1(2.0f * a);
  return m_copysign(t / (t + 2.0f), x);
}

static float m_sinh(float x) {
  const float a = m_abs(x), t = m_expm1(a);
  if (!(a < 88.0f)) return m_copysign(m_exp(a - 0.693147181f), x);
  return m_copysign(0.5f * (t + t / (t + 1.0f)), x);
}

static float m_cosh(float x) {
  const float a = m_abs(x);
  if (!(a < 88.0f)) return m_exp(a - 0.693147181f);
  const float e = m_exp(a);
  return 0.5f * e + 0.5f / e;
}

static float m_logistic(float x) { return 1.0f / (1.0f + m_exp(-x)); }

/* Correctly rounded: an estimate, then the integer root of the mantissa. */
static float m_sqrt(float x) {
  if (!(x > 0) || !m_finite(x)) return x == 0 || x > 0 ? x : m_float(0x7fc00000u);
  int32_t e = 0;
  if (x < 1.17549435e-38f) { x *= 16777216.0f; e = -24; }
  e += (int32_t)(m_bits(x) >> 23) - 127;
  uint64_t m = (m_bits(x) & 0x7fffffu) | 0x800000u;
  if (e & 1) { m <<= 1; e--; }
  const float f = (float)m;
  float y = m_float(0x1fbd1df5u + (m_bits(f) >> 1));
  y = 0.5f * (y + f / y);
  y = 0.5f * (y + f / y);
  m <<= 25;
  uint64_t r = (uint64_t)(y * 5792.61875f);
  while (r * r > m) r--;
  while ((r + 1) * (r + 1) <= m) r++;
  r = (r + 1) >> 1; /* 25 bits to 24; a tie cannot happen */
  if (r >> 24) { r >>= 1; e += 2; }
  return m_float(((uint32_t)(e / 2 + 127) << 23) | ((uint32_t)r & 0x7fffffu));
}

static float m_rsqrt(float x) { return 1.0f / m_sqrt(x); }

static float m_cbrt(float x) {
  if (x == 0 || !m_finite(x)) return x;
  const float a = m_abs(x);
  float y = m_exp(m_log(a) / 3.0f);
  y = y - (y - a / (y * y)) / 3.0f;
  return m_copysign(y, x);
}

/* Chebyshev fit of Press et al., Numerical Recipes, fractional error 1.2e-7. */
static float m_erfc_tail(float z) {
  const float t = 1.0f / (1.0f + 0.5f * z);
  float p = 0.17087277f;
  p = p * t - 0.82215223f;
  p = p * t + 1.48851587f;
  p = p * t - 1.13520398f;
  p = p * t + 0.27886807f;
  p = p * t - 0.18628806f;
  p = p * t + 0.09678418f;
  p = p * t + 0.37409196f;
  p = p * t + 1.00002368f;
  p = p * t - 1.26551223f;
  return t * m_exp(p) * m_exp(-z * z);
}

static float m_erf_near(float x) {
  const float z = x * x;
  float p = -1.0f / 76204800;
  p = p * z + 1.0f / 6894720;
  p = p * z - 1.0f / 685440;
  p = p * z + 1.0f / 75600;
  p = p * z - 1.0f / 9360;
  p = p * z + 1.0f / 1320;
  p = p * z - 1.0f / 216;
  p = p * z + 1.0f / 42;
  p = p * z - 1.0f / 10;
  p = p * z + 1.0f / 3;
  return 1.12837917f * (x - x * z * p);
}

static float m_erfc(float x) {
  if (x != x) return x;
  if (m_abs(x) < 1.0f) return 1.0f - m_erf_near(x);
  return x > 0 ? m_erfc_tail(x) : 2.0f - m_erfc_tail(-x);
}

static float m_erf(float x) {
  if (x != x) return x;
  if (m_abs(x) < 1.0f) return m_erf_near(x);
  return x > 0 ? 1.0f - m_erfc_tail(x) : m_erfc_tail(-x) - 1.0f;
}

/* Giles, "Approximating the erfinv function", GPU Computing Gems, 2011: single precision. */
static float m_erf_inv(float x) {
  if (m_abs(x) == 1.0f) return m_copysign(m_float(0x7f800000u), x);
  float w = -m_log1p(-x * x), p;
  if (w < 5.0f) {
    w = w - 2.5f;
    p = 2.81022636e-08f;
    p = p * w + 3.43273939e-07f;
    p = p * w - 3.5233877e-06f;
    p = p * w - 4.39150654e-06f;
    p = p * w + 0.00021858087f;
    p = p * w - 0.00125372503f;
    p = p * w - 0.00417768164f;
    p = p * w + 0.246640727f;
    p = p * w + 1.50140941f;
  } else {
    w = m_sqrt(w) - 3.0f;
    p = -0.000200214257f;
    p = p * w + 0.000100950558f;
    p = p * w + 0.00134934322f;
    p = p * w - 0.00367342844f;
    p = p * w + 0.00573950773f;
    p = p * w - 0.0076224613f;
    p = p * w + 0.00943887047f;
    p = p * w + 1.00167406f;
    p = p * w + 2.83297682f;
  }
  return p * x;
}

/* sin(x + quarter pi / 2). */
static float m_circle(float x, int32_t quarter) {
  if (!m_finite(x) || m_abs(x) > 1e8f) return m_float(0x7fc00000u);
  const int32_t n = (int32_t)(x * 0.636619772f + (x < 0 ? -0.5f : 0.5f));
  const float k = (float)n;
  const float r = ((x - k * 1.5703125f) - k * 4.83751297e-4f) - k * 7.54978942e-8f, z = r * r;
  const float s = r + r * z * (-1.0f / 6 + z * (1.0f / 120 + z * (-1.0f / 5040 + z * (1.0f / 362880))));
  const float c = 1.0f + z * (-0.5f + z * (1.0f / 24 + z * (-1.0f / 720 + z * (1.0f / 40320))));
  const int32_t q = (n + quarter) & 3;
  return q == 0 ? s : q == 1 ? c : q == 2 ? -s : -c;
}

static float m_sin(float x) { return m_circle(x, 0); }

static float m_cos(float x) { return m_circle(x, 1); }

static float m_tan(float x) { return m_circle(x, 0) / m_circle(x, 1); }

/* In double precision: the error of a logarithm grows with the exponent. */
static float m_pow(float x, float y) {
  if (y == 0 || x == 1.0f) return 1.0f;
  if (x != x || y != y) return m_float(0x7fc00000u);
  const float inf = m_float(0x7f800000u), a = m_abs(x);
  const uint8_t whole = m_floor(y) == y, odd = whole && m_abs(y) < 16777216.0f && ((int32_t)y & 1);
  const float sign = x < 0 || (x == 0 && m_bits(x) >> 31) ? (odd ? -1.0f : 1.0f) : 1.0f;
  if (!m_finite(y)) return a == 1.0f ? 1.0f : (a > 1.0f) == (y > 0) ? inf : 0.0f;
  if (a == 0) return sign * (y < 0 ? inf : 0.0f);
  if (!m_finite(a)) return sign * (y > 0 ? inf : 0.0f);
  if (x < 0 && !whole) return m_float(0x7fc00000u);
  int32_t e = 0;
  float m = a;
  if (m < 1.17549435e-38f) { m *= 8388608.0f; e = -23; }
  e += (int32_t)(m_bits(m) >> 23) - 127;
  double f = (double)m_float((m_bits(m) & 0x7fffffu) | 0x3f800000u);
  if (f > 1.41421356) { f *= 0.5; e++; }
  const double s = (f - 1.0) / (f + 1.0), z = s * s;
  double p = 0.0;
  for (int32_t k = 17; k >= 1; k -= 2) p = p * z + 1.0 / k;
  const double t = (double)y * (e * 0.6931471805599453 + 2.0 * s * p);
  if (t > 88.8) return sign * inf;
  if (t < -104.0) return sign * 0.0f;
  const int32_t n = (int32_t)(t * 1.4426950408889634 + (t < 0 ? -0.5 : 0.5));
  const double r = t - n * 0.6931471805599453;
  p = 1.0;
  for (int32_t k = 11; k >= 1; k--) p = 1.0 + p * r / k;
  return sign * m_scale((float)p, n);
}
"""

INTEGER = r"""
static inline T m_div_N(T a, T b) { return b == 0 ? (T)-1 : SIGNEDb == (T)-1 ? (T)(0 - (U)a) : (T)(a / b); }

static inline T m_rem_N(T a, T b) { return b == 0 ? a : SIGNEDb == (T)-1 ? 0 : (T)(a % b); }

static inline T m_max_N(T a, T b) { return a > b ? a : b; }

static inline T m_min_N(T a, T b) { return a < b ? a : b; }

static inline T m_shl_N(T a, T b) { return (uint64_t)b >= W ? 0 : (T)((U)a << b); }

static inline T m_shr_N(T a, T b) { return (uint64_t)b >= W ? 0 : (T)((V)a >> b); }

static inline T m_sar_N(T a, T b) { return (T)(a >> ((uint64_t)b >= W ? W - 1 : b)); }

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
    (r'\bW\b', str(width)),
    (r'_N\b', f'_{dtype}'),
  ):
    text = re.sub(key, value, text)
  return text


def used(code: str) -> str:
  """The functions that a piece of code calls, and those that they call, in an order that compiles."""
  whole = SOURCE + ''.join(integer(d) for d in TYPES if d != 'f32')
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
