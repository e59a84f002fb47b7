"""Dead code: what nothing uses, and what loops carry for nothing."""

from __future__ import annotations

from cl_jax.edge.stablehlo import Op, Region, Value, captured


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
