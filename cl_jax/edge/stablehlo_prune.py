"""Dead code: what nothing uses, what loops carry for nothing, and signs that state only travels with."""

from __future__ import annotations

from collections.abc import Sequence

from cl_jax.edge.learner import Leaf
from cl_jax.edge.stablehlo import Op, Region, Value, captured


def unsigned(region: Region, table: Sequence[Leaf], returned: bool = True) -> None:
  """Gives leaves of the state that mean unsigned integers that type, in the place of the casts around them.

  `learner.flatten` carries them signed, for compilers that need it. To this one a cast would be a copy of the
  whole leaf on the way in and out, such as of a replay memory in bytes, instead of an update in place.

  Args:
    region: a program whose first arguments are the leaves.
    table: the leaves.
    returned: whether its first results are the new leaves.
  """
  new: dict[Value, Value] = {}
  for arg, leaf in zip(region.args, table, strict=False):
    if not leaf.meaning.startswith('uint'):
      continue
    signed, arg.dtype = arg.dtype, f'ui{leaf.meaning.removeprefix("uint")}'
    for op in region.ops:
      if arg in op.operands or arg in captured(op):
        cast = op.name == 'bitcast_convert' and op.results[0].dtype == arg.dtype
        assert cast, f'{op.name} reads the {signed} of {leaf.name}'
        new[op.results[0]] = arg
  substitute(region, new)
  region.ops = [op for op in region.ops if not any(r in new for r in op.results)]
  for k, leaf in enumerate(table if returned else ()):
    out = region.outs[k]
    if leaf.meaning.startswith('uint') and out.op is not None and out.dtype != region.args[k].dtype:
      assert out.op.name == 'bitcast_convert', f'{leaf.name} is returned by {out.op.name}'
      region.outs[k] = out.op.operands[0]


def prune(region: Region) -> None:
  """Drops what nothing uses: nothing in StableHLO that this backend takes has side effects."""
  live = set(region.outs)
  kept = []
  for op in reversed(region.ops):
    if not any(r in live for r in op.results):
      continue
    for inner in op.regions:
      prune(inner)
    if op.name == 'while':
      _prune_carry(op, live)
    live.update(op.operands)
    live.update(captured(op))
    kept.append(op)
  region.ops = kept[::-1]


def _prune_carry(op: Op, live: set[Value]) -> None:
  """Drops what a loop carries for itself alone, and reads what it never changes from outside."""
  cond, body = op.regions
  for k in reversed(range(len(op.results))):
    if body.outs[k] is body.args[k]:
      outer = op.operands[k]
      for region in op.regions:
        substitute(region, {region.args[k]: outer})
      if op.results[k] in live:  # a result that is the operand: leave the carry, without a use
        continue
      _drop(op, k)
  changed = True
  while changed:
    changed = False
    for k in reversed(range(len(op.results))):
      inside = uses(cond) | uses(body, skip=k)
      if op.results[k] not in live and cond.args[k] not in inside and body.args[k] not in inside:
        _drop(op, k)
        changed = True
    prune(body)


def _drop(op: Op, k: int) -> None:
  for place in (
    op.operands,
    op.results,
    op.regions[1].outs,
    op.regions[0].args,
    op.regions[1].args,
  ):
    del place[k]


def uses(region: Region, skip: int | None = None) -> set[Value]:
  """Every value that a region reads or returns, but for return `skip`."""
  found = {v for k, v in enumerate(region.outs) if k != skip}
  if skip is not None:  # what only that return needs does not count
    needed = set(found)
    for op in reversed(region.ops):
      if any(r in needed for r in op.results):
        needed.update(op.operands)
        needed.update(captured(op))
    return needed
  for op in region.ops:
    found.update(op.operands)
    for inner in op.regions:
      found |= uses(inner)
  return found


def substitute(region: Region, new: dict[Value, Value]) -> None:
  """Reads other values in their place, in the region and all inside it."""
  region.outs = [new.get(v, v) for v in region.outs]
  for op in region.ops:
    op.operands = [new.get(v, v) for v in op.operands]
    for inner in op.regions:
      substitute(inner, new)
