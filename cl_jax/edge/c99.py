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

from cl_jax.edge import c99_control, c99_conv, c99_linear, c99_ops, c99_window
from cl_jax.edge.arena import Place, plan
from cl_jax.edge.c99_block import Block
from cl_jax.edge.c99_emit import Emitter, Tables
from cl_jax.edge.c99_expr import ctype
from cl_jax.edge.c99_file import Function, Program, files, identifiers, source
from cl_jax.edge.c99_scope import Scope
from cl_jax.edge.learner import Flat, Leaf, lower
from cl_jax.edge.stablehlo import Region, Value, parse
from cl_jax.edge.stablehlo_prune import prune, unsigned
from cl_jax.errors import UserError

PARTS = (c99_ops, c99_linear, c99_conv, c99_window, c99_control)
KERNELS = {name: kernel for part in PARTS for name, kernel in part.KERNELS.items()}
FLAGS = ('-std=c99', '-Wall', '-Wextra', '-Werror', '-O2', '-ffp-contract=off')


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
    unsigned(region, flat.state, part != 'predict')
    state = [f's->{field}' for field in fields]
    constant = 'const ' if part == 'predict' else ''
    functions[part] = function(
      f'{name}_{part}', region, state, identifiers(rows), [out] if out else [], tables, helpers,
      written=part != 'predict', state_type=f'{constant}{name}_state',
    )  # fmt: skip
  return files(name, flat, fields, functions, tables, helpers)


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
  prune(region)
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


def _offset(base: int | None, plus: str | None, constant: str | None) -> str:
  """The text of an offset in the arena, constants added up."""
  assert base is not None
  if constant is not None:
    return str(base + int(constant))
  return (str(base) if base or not plus else '') + ((plus or '') if base else '')
