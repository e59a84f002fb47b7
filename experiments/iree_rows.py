"""What a machine gave, as a row of results/edge_iree.csv and in a printed table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cl_jax.edge import parity
from experiments import edge_rows, results

COLUMNS = (
  'learner', 'target', 'parity_int', 'parity_float', 'module_bytes', 'state_bytes', 'step_bytes',
  'peak_bytes', 'planned', 'macs_per_step', 'jit_us', 'iree_us', 'iree_per_jit', 'jit_cpu_us',
  'iree_cpu_us', 'iree_per_jit_cpu', 'steps', 'device', 'versions', 'note',
)  # fmt: skip


class Verified(NamedTuple):
  """What a machine gave.

  Attributes:
    target: its name.
    parity: of the state, against JAX.
    logits: the largest difference of the prediction's.
    hash: of the state.
    apart: where the allocator and the plan differ; None where there is no plan.
    peak: bytes that the allocator had at most, with the arguments of the run on aarch64.
  """

  target: str
  parity: parity.Parity
  logits: float
  hash: str
  apart: tuple[str, ...] | None
  peak: int


def row(manifest: Mapping[str, Any], v: Verified, steps: int, times: Any) -> dict[str, Any]:
  """The line of results/edge_iree.csv."""
  plan = manifest['planned'].get(v.target, {})
  here = times if v.target == 'host' else None
  notes = [f'state {v.hash}']
  if reason := manifest['not_planned'].get(v.target):
    notes.append(reason)
  if v.target != 'host':
    notes.append('emulated: no time')
  known = manifest['versions']
  return {
    'learner': results.variant_name(manifest['config']),
    'target': v.target,
    'parity_int': 'bitwise' if not v.parity.differing else f'{len(v.parity.differing)} differ',
    'parity_float': f'{max(v.parity.error, v.logits):.1e}',
    'module_bytes': manifest['module_bytes'][v.target],
    'state_bytes': manifest['state_bytes'],
    'step_bytes': plan.get('step', ''),
    'peak_bytes': plan.get('peak', ''),
    'planned': 'no' if v.apart is None else 'differs' if v.apart else 'to the byte',
    'macs_per_step': manifest['macs']['step'],
    'jit_us': f'{here.jit:.0f}' if here else '',
    'iree_us': f'{here.iree:.0f}' if here else '',
    'iree_per_jit': f'{here.iree / here.jit:.2f}' if here else '',
    'jit_cpu_us': f'{here.jit_cpu:.0f}' if here else '',
    'iree_cpu_us': f'{here.iree_cpu:.0f}' if here else '',
    'iree_per_jit_cpu': f'{here.iree_cpu / here.jit_cpu:.2f}' if here else '',
    'steps': steps,
    'device': results.device() if v.target == 'host' else 'qemu-aarch64',
    'versions': f'jax {known["jax"]}, iree {known["iree-base-compiler"]}',
    'note': '; '.join(notes),
  }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """Aligned text; what is the same on all machines comes above."""
  if not rows:
    return 'nothing was verified'
  first = rows[0]
  number = lambda v: f'{v:,}' if isinstance(v, int) else str(v or '-')  # noqa: E731
  head = (
    f'{first["learner"]}: {first["steps"]} steps; state {number(first["state_bytes"])} bytes; '
    f'{number(first["macs_per_step"])} MACs a step; {first["versions"]}'
  )
  names = ('target', 'integers', 'floats', 'module', 'step', 'peak', 'as planned', 'jit us', 'iree us',
           'ratio', 'of cpu time')  # fmt: skip
  keys = ('target', 'parity_int', 'parity_float', 'module_bytes', 'step_bytes', 'peak_bytes', 'planned',
          'jit_us', 'iree_us', 'iree_per_jit', 'iree_per_jit_cpu')  # fmt: skip
  lines = [names, *(tuple(number(r[k]) for k in keys) for r in rows)]
  return '\n'.join([head, *edge_rows.aligned(lines)])
