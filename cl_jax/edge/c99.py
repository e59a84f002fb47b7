"""A learner as one file of freestanding C99: no allocation, no library, the same bits on every target.

The step, the prediction and the boundary are taken from the StableHLO that JAX itself would compile, so what
runs on the device is the method as it is written. Intermediate results are in a static arena whose size is
known before anything is flashed; the state is one struct that the caller owns and that is updated in place.

Build with `-std=c99 -O2 -ffp-contract=off`: contraction into fused multiply-adds would make targets differ.
Unlike XLA on a CPU, the emitted code keeps denormal numbers; the products and sums of a dot product or a
reduction are taken in the order of their index.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from cl_jax.edge import c99_control, c99_linear, c99_ops, c99_window
from cl_jax.edge.arena import BYTES, Place, plan
from cl_jax.edge.c99_block import Block, Emitter, Tables
from cl_jax.edge.c99_expr import ctype
from cl_jax.edge.c99_math import used
from cl_jax.edge.c99_scope import Scope
from cl_jax.edge.learner import Flat, Leaf, lower
from cl_jax.edge.stablehlo import Region, Value, parse
from cl_jax.errors import UserError

KERNELS = {**c99_ops.KERNELS, **c99_linear.KERNELS, **c99_window.KERNELS, **c99_control.KERNELS}
FLAGS = ('-std=c99', '-Wall', '-Wextra', '-Werror', '-O2', '-ffp-contract=off')
MLIR = {'bool': 'i1', 'float32': 'f32', **{f'int{n}': f'i{n}' for n in (8, 16, 32, 64)}}
MLIR |= {f'uint{n}': f'ui{n}' for n in (8, 16, 32, 64)}


class Program(NamedTuple):
  """What `emit` returns.

  Attributes:
    files: name -> text: NAME.c, NAME.h, NAME_main.c (an example).
    manifest: names, shapes and bytes of the state's leaves and of what the functions take; bytes of the arena
      and of constants; multiply-adds of each function; copies of memory that could not be avoided.
  """

  files: dict[str, str]
  manifest: dict[str, Any]


class Function(NamedTuple):
  """An emitted function: its text (arena offsets set), elements of the arena by type, counts."""

  signature: str
  text: str
  sizes: dict[str, int]
  macs: int
  copies: list[str]


def emit(flat: Flat, name: str = 'learner') -> Program:
  """The C99 of a learner.

  Args:
    flat: see `edge.learner.flatten`.
    name: prefix of the files and of all that they define.

  Raises:
    UserError: an operation without a C99 form, by its name, its line of Python and the method it is in.
  """
  if not re.fullmatch(r'[A-Za-z_]\w*', name):
    raise UserError(f'{name!r} cannot be the name of a C function: give letters, digits and _')
  tables, helpers = Tables(name), {}
  fields = identifiers(flat.state)
  functions = {}
  ends = () if flat.boundary is None else flat.ends
  for part, f, rows, out in (
    ('step', flat.step, flat.batch, 'loss'),
    ('predict', flat.predict, flat.batch, 'logits'),
    ('boundary', flat.boundary, ends, None),
  ):
    if f is None:
      continue
    region = parse(lower(f, flat.state, rows))
    state = [f's->{field}' for field in fields]
    constant = 'const ' if part == 'predict' else ''
    functions[part] = function(
      f'{name}_{part}', region, state, identifiers(rows), [out] if out else [], tables, helpers,
      written=part != 'predict', state_type=f'{constant}{name}_state',
    )  # fmt: skip
  return _files(name, flat, fields, functions, tables, helpers)


def emit_function(
  f: Callable, args: Sequence[Leaf], name: str = 'f', outs: int = 1
) -> tuple[str, Function]:
  """A function of arrays, (list of arrays) -> list of `outs` arrays, as C: pointers in, pointers out."""
  tables, helpers = Tables(name), {}
  region = parse(lower(f, args))
  made = function(
    name, region, [], identifiers(args), [f'out{k}' for k in range(outs)], tables, helpers
  )
  return source([made], tables, helpers), made


def identifiers(leaves: Sequence[Leaf]) -> list[str]:
  """A C identifier for every leaf, from its path."""
  names: list[str] = []
  for leaf in leaves:
    base = re.sub(r'\W+', '_', leaf.name).strip('_') or 'x'
    base = base if base[0].isalpha() else f'x_{base}'
    name, k = base, 2
    while name in names or name in ('s', 'arena', 'loss', 'logits'):
      name, k = f'{base}_{k}', k + 1
    names.append(name)
  return names


def function(
  name: str,
  region: Region,
  state: Sequence[str],
  inputs: Sequence[str],
  outputs: Sequence[str],
  tables: Tables,
  helpers: dict[str, str],
  written: bool = True,
  state_type: str = '',
) -> Function:
  """The C of a region whose arguments are the state's leaves, then `inputs`; what it returns likewise."""
  e = Emitter(tables, KERNELS, helpers)
  e.count(region)

  def held(v: Value, text: str, owned: bool) -> Place:
    ctype(v.dtype, v.op)
    return Place(v.size, v.dtype, lambda index: f'{text}[{index}]', owned)

  leaves = [held(v, text, written) for v, text in zip(region.args, state, strict=False)]
  rows = region.args[len(state) :]
  given = [held(v, text, False) for v, text in zip(rows, inputs, strict=True)]
  e.places.update(zip(region.args, [*leaves, *given], strict=True))
  ties = leaves if written else []
  results = region.outs[len(ties) :]
  ties = ties + [held(v, text, True) for v, text in zip(results, outputs, strict=True)]
  body = Scope(None, wall=True)
  Block(e, region, ties, body)
  sizes = plan(e.arena.places)
  offsets = [p.offset for p in e.arena.places]
  text = '\n'.join(body.render(0))
  text = re.sub(
    r'@(\d+)@( \+ )?(?:(\d+)(?=\]))?', lambda m: _offset(offsets[int(m[1])], m[2], m[3]), text
  )
  text = without_unread(text)
  parameters = [f'{state_type} *s'] if state else []
  parameters += [f'const {ctype(v.dtype)} *{t}' for v, t in zip(rows, inputs, strict=True)]
  parameters += [f'{ctype(v.dtype)} *{t}' for v, t in zip(results, outputs, strict=True)]
  names = (['s'] if state else []) + [*inputs, *outputs]
  unread = [n for n in names if not re.search(rf'\b{n}(?:\[|->)', text)]
  text = text or '{\n}'
  if unread:
    text = text.replace('{\n', '{\n' + ''.join(f'  (void){n};\n' for n in unread), 1)
  signature = f'void {name}({", ".join(parameters) or "void"})'
  return Function(signature, f'{signature} {text}', sizes, e.macs, e.copies)


def without_unread(text: str) -> str:
  """The code without locals that nothing reads; no expression has an effect."""
  declaration = re.compile(r'\s*const \w+ (\w+) = .*;')
  lines = text.split('\n')
  counts = Counter(re.findall(r'[A-Za-z]\w*', text))
  kept = []
  for line in reversed(lines):
    found = declaration.fullmatch(line)
    if found and counts[found[1]] == 1:
      counts.subtract(re.findall(r'[A-Za-z]\w*', line))
    else:
      kept.append(line)
  return '\n'.join(kept[::-1])


def arena_of(functions: Sequence[Function]) -> dict[str, int]:
  """Elements by type that serve every function: they share the arena, as only one runs at a time."""
  sizes: dict[str, int] = {}
  for f in functions:
    for dtype, n in f.sizes.items():
      sizes[dtype] = max(sizes.get(dtype, 0), n)
  return sizes


def mlir(member: str) -> str:
  """The type of an array of the arena."""
  return member.replace('u', 'ui')


def width(member: str) -> int:
  return BYTES[mlir(member)]


def arena_bytes(sizes: dict[str, int]) -> int:
  """The size that C gives the struct: the widest types come first, so only its end is padded."""
  total = sum(n * width(m) for m, n in sizes.items())
  widest = max(map(width, sizes), default=1)
  return -(-total // widest) * widest


def source(
  functions: Sequence[Function], tables: Tables, helpers: dict[str, str], include: str = ''
) -> str:
  """The whole C file."""
  sizes = arena_of(functions)
  lines = [
    f'  {ctype(mlir(m))} {m}[{sizes[m]}];' for m in sorted(sizes, key=lambda m: (-width(m), m))
  ]
  code = '\n\n'.join([*helpers.values(), *(f.text for f in functions)])
  parts = [
    '/* Freestanding C99, generated by cl_jax.edge.c99: build with -std=c99 -O2 -ffp-contract=off. */',
    include or '#include <stdint.h>',
    used(code),
    '\n'.join(tables.lines),
    'static struct {\n' + '\n'.join(lines) + '\n} arena;' if lines else '',
    code,
  ]
  return '\n\n'.join(part for part in parts if part) + '\n'


def _files(name, flat: Flat, fields, functions, tables: Tables, helpers) -> Program:
  size = arena_bytes(arena_of(list(functions.values())))
  state = [(field, leaf, MLIR[leaf.dtype]) for field, leaf in zip(fields, flat.state, strict=True)]
  elements = lambda leaf: max(_size(leaf), 1)  # noqa: E731
  nbytes = sum(_size(leaf) * BYTES[d] for _, leaf, d in state)
  guard = f'{name.upper()}_H'
  header = [
    f'#ifndef {guard}',
    f'#define {guard}',
    '',
    '#include <stddef.h>',
    '#include <stdint.h>',
    '',
    f'#define {name.upper()}_ARENA_BYTES {size}',
    f'#define {name.upper()}_LEAVES {len(state)}',
    '',
    'typedef struct {',
    *(
      f'  {ctype(d)} {field}[{elements(leaf)}]; /* {leaf.name} {list(leaf.shape)} */'
      for field, leaf, d in state
    ),
    f'}} {name}_state;',
    '',
    '/* A leaf of the state: where it is, for loading and saving. */',
    f'typedef struct {{ const char *name, *type; size_t offset, bytes; }} {name}_leaf;',
    f'extern const {name}_leaf {name}_leaves[{name.upper()}_LEAVES];',
    '',
    *(f'{f.signature};' for f in functions.values()),
    '',
    '#endif',
  ]
  table = [f'const {name}_leaf {name}_leaves[{name.upper()}_LEAVES] = {{']
  for field, leaf, d in state:
    table.append(
      f'  {{"{leaf.name}", "{leaf.meaning}", offsetof({name}_state, {field}), {_size(leaf) * BYTES[d]}}},'
    )
  table.append('};')
  text = source(list(functions.values()), tables, helpers, f'#include "{name}.h"')
  text += '\n' + '\n'.join(table) + '\n'
  batch = [
    f'{n}[{elements(leaf)}]' for n, leaf in zip(identifiers(flat.batch), flat.batch, strict=True)
  ]
  kinds = [ctype(MLIR[leaf.dtype]) for leaf in flat.batch]
  names = ', '.join(identifiers(flat.batch))
  main = [
    '/* Fill the state from state0 and the batch from a sensor; every call is a training step. */',
    f'#include "{name}.h"',
    f'static {name}_state state;',
    *(f'static {kind} {n};' for kind, n in zip(kinds, batch, strict=True)),
    'int main(void) {',
    '  float loss = 0;',
    f'  for (int step = 0; step < 10; step++) {name}_step(&state, {names}, &loss);',
    '  return loss != loss;',
    '}',
  ]
  manifest = {
    'name': name,
    'state': [
      {'name': leaf.name, 'field': field, 'shape': list(leaf.shape), 'dtype': leaf.dtype,
       'meaning': leaf.meaning, 'bytes': _size(leaf) * BYTES[d]}
      for field, leaf, d in state
    ],
    'batch': [leaf._asdict() for leaf in flat.batch],
    'ends': [leaf._asdict() for leaf in flat.ends],
    'state_bytes': nbytes,
    'arena_bytes': size,
    'constant_bytes': tables.bytes,
    'macs': {part: f.macs for part, f in functions.items()},
    'copies': {part: f.copies for part, f in functions.items() if f.copies},
  }  # fmt: skip
  files = {
    f'{name}.c': text,
    f'{name}.h': '\n'.join(header) + '\n',
    f'{name}_main.c': '\n'.join(main) + '\n',
  }
  return Program(files, manifest)


def _offset(base: int | None, plus: str | None, constant: str | None) -> str:
  """The text of an offset in the arena, constants added up."""
  assert base is not None
  if constant is not None:
    return str(base + int(constant))
  return (str(base) if base or not plus else '') + ((plus or '') if base else '')


def _size(leaf: Leaf) -> int:
  n = 1
  for d in leaf.shape:
    n *= d
  return n
