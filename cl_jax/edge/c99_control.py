"""Kernels of control: loops, branches, sorting."""

from __future__ import annotations

from cl_jax.edge.arena import Place
from cl_jax.edge.c99_block import Block
from cl_jax.edge.c99_expr import ctype
from cl_jax.edge.c99_scope import Scope, linear
from cl_jax.edge.c99_view import strides_of
from cl_jax.edge.stablehlo import Op, captured


def while_(b: Block, op: Op, root: Scope) -> None:
  """The carry is in one set of places: a turn writes over what it has read."""
  e, (cond, body) = b.e, op.regions
  inside = captured(op)
  places: list[Place] = []
  for k, (v, result) in enumerate(zip(op.operands, op.results, strict=True)):
    others = [u for j, u in enumerate(op.operands) if j != k]
    b.scope.items.remove(root)
    places.append(b.over(v, result, [*others, *inside]))
    b.scope.items.append(root)
  for region in (cond, body):
    e.places.update(zip(region.args, places, strict=True))
  turns = trips(op)
  e.arena.enter()
  loop = Scope(root, 'for (;;)', wall=True)
  for place in places:
    e.arena.touch(place)
  Block(e, cond, None, loop)
  test = Scope(loop, wall=True)
  loop.items.remove(test)
  go = e.at(cond.outs[0], [], test)
  loop.items.extend(test.items)
  loop.add(f'if (!{go}) break;')
  before, e.times = e.times, e.times * turns
  Block(e, body, places, loop)
  e.times = before
  e.arena.leave()


def trips(op: Op) -> int:
  """The turns of a counting loop; 1 where they are not written in the program."""
  cond, body = op.regions
  test = cond.outs[0].op
  if test is None or test.name != 'compare' or test.attrs['comparison_direction'] != 'LT':
    return 1
  i, end = test.operands
  if i not in cond.args or end.op is None or end.op.name != 'constant':
    return 1
  begin = op.operands[cond.args.index(i)].op
  if begin is None or begin.name != 'constant':
    return 1
  return max(int(end.op.attrs['value'].ravel()[0]) - int(begin.attrs['value'].ravel()[0]), 0)


def case(b: Block, op: Op, root: Scope) -> None:
  """One branch runs; an index that names none runs the last. The dearest one's multiply-adds count."""
  e, v = b.e, op.operands[0]
  index = e.at(v, [], root)
  places = [b.place(r) for r in op.results]
  branches = op.regions[::-1] if op.name == 'if' else op.regions
  choice = root.declare(e.name('n'), '')
  root.items[-1] = f'const int32_t {choice} = {index};'
  last = len(branches) - 1
  heads = [f'if ({choice} == {k})' for k in range(last)]
  heads = ['', f'if ({choice} < 0 || {choice} >= {last})', *heads] if last else ['', '']
  order = [branches[last], *branches[:last]]
  before, dearest = e.macs, e.macs
  for head, region in zip(heads[1:], order, strict=True):
    e.macs = before
    Block(e, region, places, Scope(root, head, wall=True))
    dearest = max(dearest, e.macs)
  e.macs = dearest


def sort(b: Block, op: Op, root: Scope) -> None:
  """Stable: merges runs of an order of indices, then moves the rows."""
  e, d = b.e, op.attrs['dimension']
  shape = op.operands[0].shape
  d, n = d % len(shape), shape[d]
  lead = [1 if k == d else m for k, m in enumerate(shape)]
  outer, index = root.loops(lead, 'i')
  order, spare = e.arena.new(n, 'i32'), e.arena.new(n, 'i32')
  o = lambda at: e.element(order, at)  # noqa: E731
  at = lambda i: [i if k == d else j for k, j in enumerate(index)]  # noqa: E731
  first, (i,) = Scope(outer).loops([n], 'a')
  first.add(f'{o(i)} = {i};')
  passes = Scope(outer, f'for (int32_t run = 1; run < {n}; run *= 2)')
  runs = Scope(passes, f'for (int32_t lo = 0; lo < {n}; lo += 2 * run)')
  runs.add(
    f'const int32_t mid = lo + run < {n} ? lo + run : {n}, hi = mid + run < {n} ? mid + run : {n};',
    'int32_t left = lo, right = mid;',
  )
  merge = Scope(runs, 'for (int32_t to = lo; to < hi; to++)', wall=True)
  merge.add('int32_t take = left >= mid;')
  compare = Scope(merge, 'if (left < mid && right < hi)', wall=True)
  compare.add(f'const int32_t acc_l = {o("left")}, acc_r = {o("right")};')
  args = []
  for v in op.operands:
    args += [e.at(v, at('acc_r'), compare), e.at(v, at('acc_l'), compare)]
  compare.add(f'take = {e.region(op.regions[0], args, compare)[0]};')
  merge.add(f'{e.element(spare, "to")} = take ? {o("right++")} : {o("left++")};')
  back, (i,) = Scope(passes).loops([n], 'a')
  back.add(f'{o(i)} = {e.element(spare, i)};')
  for v, result in zip(op.operands, op.results, strict=True):
    move, (i,) = Scope(outer).loops([n], 'a')
    source = e.name('acc')
    move.add(f'const int32_t {source} = {o(i)};')
    value = e.at(v, at(source), move)
    move.add(f'{e.element(b.place(result), linear(at(i), strides_of(shape)))} = {value};')


def top_k(b: Block, op: Op, root: Scope) -> None:
  """The k largest in order; of equal ones the first."""
  e, v, (values, order) = b.e, op.operands[0], op.results
  n, k = v.shape[-1], values.shape[-1]
  outer, index = root.loops(v.shape[:-1], 'i')
  pv, po = b.place(values), b.place(order)
  row = linear(index, strides_of(values.shape)[:-1])
  cell = lambda p, i: e.element(p, f'{row} + {i}' if row != '0' else i)  # noqa: E731
  key = (lambda x: f'm_order({x})') if v.dtype == 'f32' else (lambda x: x)
  outer.add('int32_t held = 0;')
  scan = Scope(outer, f'for (int32_t j = 0; j < {n}; j++)', wall=True)
  scan.add(
    f'const {ctype(v.dtype, op)} acc_x = {e.at(v, [*index, "j"], scan)};', 'int32_t to = held;'
  )
  shift = Scope(scan, f'for (; to > 0 && {key("acc_x")} > {key(cell(pv, "(to - 1)"))}; to--)')
  move = Scope(shift, f'if (to < {k})')
  move.add(*(f'{cell(p, "to")} = {cell(p, "(to - 1)")};' for p in (pv, po)))
  keep = Scope(scan, f'if (to < {k})')
  keep.add(f'{cell(pv, "to")} = acc_x;', f'{cell(po, "to")} = j;')
  Scope(scan, f'if (held < {k})').add('held++;')


KERNELS = {'while': while_, 'case': case, 'if': case, 'sort': sort, 'top_k': top_k}
