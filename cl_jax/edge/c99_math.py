"""Functions of real numbers in C99 without a library: the same bits on every target.

Floats are IEEE single; the error of every function is a few units in the last place, up to 70 in the tails of
`m_erfc` and `m_erf_inv`, and `m_sqrt` is correctly rounded. `m_sin`, `m_cos` and `m_tan` lose accuracy beyond
|x| of about 10,000 and are NaN beyond 1e8. All begin with `m_`.
"""

SOURCE = r"""
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
