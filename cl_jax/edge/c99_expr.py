"""Scalars in C99: literals, and one expression for every elementwise operation."""

from __future__ import annotations

import math
from typing import Any

from cl_jax.edge.c99_core import TYPES
from cl_jax.edge.stablehlo import Op
from cl_jax.errors import UserError

UNARY = {
  'exponential': 'm_exp',
  'exponential_minus_one': 'm_expm1',
  'log': 'm_log',
  'log_plus_one': 'm_log1p',
  'logistic': 'm_logistic',
  'tanh': 'm_tanh',
  'sinh': 'm_sinh',
  'cosh': 'm_cosh',
  'sqrt': 'm_sqrt',
  'rsqrt': 'm_rsqrt',
  'cbrt': 'm_cbrt',
  'sine': 'm_sin',
  'cosine': 'm_cos',
  'tan': 'm_tan',
  'erf': 'm_erf',
  'erfc': 'm_erfc',
  'erf_inv': 'm_erf_inv',
  'floor': 'm_floor',
  'ceil': 'm_ceil',
  'round_nearest_even': 'm_round_even',
  'round_nearest_afz': 'm_round',
  'is_finite': 'm_finite',
}
WRAPPING = {'add': '+', 'subtract': '-', 'multiply': '*'}
BITWISE = {'and': '&', 'or': '|', 'xor': '^'}
CALLS = {
  'maximum': 'max',
  'minimum': 'min',
  'shift_left': 'shl',
  'shift_right_logical': 'shr',
  'shift_right_arithmetic': 'sar',
}
COUNTS = {'popcnt': 'popcnt', 'count_leading_zeros': 'clz'}
COMPARE = {'EQ': '==', 'NE': '!=', 'LT': '<', 'LE': '<=', 'GT': '>', 'GE': '>='}
OTHER = (
  'divide',
  'remainder',
  'power',
  'negate',
  'abs',
  'sign',
  'not',
  'compare',
  'select',
  'clamp',
)
OTHER += ('convert', 'bitcast_convert', 'square', 'reduce_precision')
ELEMENTWISE = {*UNARY, *WRAPPING, *BITWISE, *CALLS, *COUNTS, *OTHER}


def cost(op: Op) -> int:
  """Roughly how many additions an element takes."""
  if op.name in ('divide', 'remainder', 'rsqrt', 'sqrt'):
    return 4
  return 10 if op.name in UNARY or op.name == 'power' else 1


def literal(value: Any, dtype: str) -> str:
  """A constant of that type, exact."""
  if dtype == 'f32':
    x = float(value)
    if math.isnan(x):
      return 'm_float(0x7fc00000u)'  # 0 / 0 has a sign that depends on the target
    if math.isinf(x):
      return '(1.0f / 0.0f)' if x > 0 else '(-1.0f / 0.0f)'
    text = repr(float(f'{x:.9g}'))
    return f'{text}f' if x >= 0 and not text.startswith('-') else f'({text}f)'
  n = int(value)
  if dtype in ('i32', 'i64') and n == -(2 ** (int(dtype[1:]) - 1)):
    return '(-2147483647 - 1)' if dtype == 'i32' else '(-9223372036854775807LL - 1)'
  tail = {'ui32': 'u', 'i64': 'LL', 'ui64': 'ULL'}.get(dtype, '')
  return f'({n}{tail})' if n < 0 else f'{n}{tail}'


def ctype(dtype: str, op: Op | None = None) -> str:
  """The C type of a StableHLO type; UserError where there is none."""
  if dtype not in TYPES:
    place = f' in {op.name} at {op.where()}' if op else ''
    raise UserError(
      f'type {dtype}{place} has no C99 form: convert it to float32 or an integer type'
    )
  return TYPES[dtype]


def elementwise(op: Op, args: list[str]) -> str:
  """The C expression of an operation on scalars; `args` are names, literals or parenthesised."""
  name, out = op.name, op.results[0].dtype
  dtype = op.operands[0].dtype
  kind, real = ctype(out, op), dtype == 'f32'
  a, b = args[0], args[1] if len(args) > 1 else ''
  word = 'uint64_t' if out.endswith('64') else 'uint32_t'
  if name in UNARY:
    if not real:
      raise refused(op, f' on {dtype}')
    return f'{UNARY[name]}({a})'
  if name == 'square':
    name, b = 'multiply', a
  if name in WRAPPING:
    if dtype == 'i1':
      return f'({a} {"&" if name == "multiply" else "|" if name == "add" else "^"} {b})'
    sign = WRAPPING[name]
    return f'({a} {sign} {b})' if real else f'({kind})(({word}){a} {sign} ({word}){b})'
  if name in BITWISE:
    return f'({kind})({a} {BITWISE[name]} {b})'
  if name in CALLS:
    return f'm_{CALLS[name]}{"" if real else f"_{dtype}"}({a}, {b})'
  if name in COUNTS:
    return f'm_{COUNTS[name]}_{dtype}({a})'
  if name in ('divide', 'remainder', 'power'):
    if real:
      return {
        'divide': f'({a} / {b})',
        'remainder': f'm_fmod({a}, {b})',
        'power': f'm_pow({a}, {b})',
      }[name]
    return f'm_{ {"divide": "div", "remainder": "rem", "power": "pow"}[name] }_{dtype}({a}, {b})'
  if name == 'reduce_precision' and real and op.attrs['exponent_bits'] == 8:
    drop = 23 - op.attrs['mantissa_bits']
    return f'm_precision({a}, {drop})' if drop else a
  if name == 'negate':
    return f'(-{a})' if real else f'({kind})(0 - ({word}){a})'
  if name == 'abs':
    return (
      f'm_abs({a})'
      if real
      else a
      if dtype[0] == 'u'
      else f'({a} < 0 ? ({kind})(0 - ({word}){a}) : {a})'
    )
  if name == 'sign':
    return f'm_sign({a})' if real else f'({kind})(({a} > 0) - ({a} < 0))'
  if name == 'not':
    return f'(uint8_t)!{a}' if dtype == 'i1' else f'({kind})~{a}'
  if name == 'select':
    return f'({a} ? {b} : {args[2]})'
  if name == 'clamp':
    tail = '' if out == 'f32' else f'_{out}'
    return f'm_min{tail}(m_max{tail}({b}, {a}), {args[2]})'
  if name == 'compare':
    if op.attrs.get('compare_type') == 'TOTALORDER' and real:
      a, b = f'm_order({a})', f'm_order({b})'
    elif not real:  # compilers warn about what is always true
      way, zero = op.attrs['comparison_direction'], ('0', '0u', '0ULL')
      if a == b:
        return '1' if way in ('EQ', 'LE', 'GE') else '0'
      if dtype[0] == 'u' and (way, b in zero) in (('GE', True), ('LT', True)):
        return '1' if way == 'GE' else '0'
      if dtype[0] == 'u' and (way, a in zero) in (('LE', True), ('GT', True)):
        return '1' if way == 'LE' else '0'
    return f'(uint8_t)({a} {COMPARE[op.attrs["comparison_direction"]]} {b})'
  if name == 'convert':
    return convert(a, dtype, out)
  if name == 'bitcast_convert':
    if real and out != 'f32':
      return f'({kind})m_bits({a})'
    return f'm_float((uint32_t){a})' if out == 'f32' and not real else f'({kind}){a}'
  raise refused(op)


def convert(a: str, source: str, target: str) -> str:
  """From one type to another: to integers towards zero and clamped, as XLA has it."""
  if source == target:
    return a
  if target == 'i1':
    return f'(uint8_t)({a} != 0)'
  if source == 'f32':
    bits = int(target.lstrip('ui'))
    lo, hi = (0, 2**bits - 1) if target[0] == 'u' else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    if bits == 64:
      lo, hi = max(lo, -(2**63)), min(hi, 2**63 - 1)
    return f'({ctype(target)})m_int({a}, {literal(lo, "i64")}, {literal(hi, "i64")})'
  return f'({ctype(target)}){a}'


def refused(op: Op, detail: str = '') -> UserError:
  """What to raise for an operation that has no C99 form."""
  target = op.attrs.get('call_target_name')
  name = f'{op.name} of {target}' if target else op.name
  return UserError(
    f'{name}{detail} at {op.where()} has no C99 form: write it with other operations or leave the method out'
  )
