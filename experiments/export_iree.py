"""An artefact for IREE: `experiments.export --backend=iree`; see `cl_jax.edge.iree_module`."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cl_jax import budget as cost
from cl_jax.edge import artefact, iree_compile, iree_host, iree_module, lint, platforms, ram
from cl_jax.edge.learner import Flat, Leaf, shapes
from cl_jax.errors import UserError
from experiments import config, export, results


def write(
  resolved: Mapping[str, Any],
  names: Sequence[str],
  budget: Mapping[str, int | None],
  folder: Path,
  data_dir: str | None = None,
) -> dict[str, Any]:
  """Writes the artefact and returns its manifest.

  Args:
    resolved, folder, data_dir: see `export.export`.
    names: machines of `iree_compile.MACHINES`.
    budget: {'ram', 'flash'} in bytes: of the planned peak, and of the module's file.

  Raises:
    UserError: IREE is not installed; an operation that it does not compile, or that the lint refuses; more
      bytes than the budget has.
  """
  for part in ('compiler', 'runtime'):
    iree_compile.extra(part)
  resolved = {**resolved, 'seeds': tuple(resolved['seeds'])[:1]}
  flat = export.subject(resolved, data_dir).flat
  findings = lint.lint(flat)
  lint.check(findings)
  made = iree_module.module(flat)
  logits = jax.eval_shape(flat.predict, flat.leaves, export.shapes_of(flat))
  manifest = {
    'learner': results.method_name(resolved),
    'backend': iree_compile.BACKEND,
    'targets': list(names),
    'config': resolved,
    'config_sha256': config.sha256(resolved),
    **described(flat),
    'outputs': int(np.prod(logits.shape)),
    'logits': list(logits.shape),
    'budget': {k: budget[k] for k in ('ram', 'flash')},
    'lint': [finding._asdict() for finding in findings],
    'guarded': made.guarded,
    'platforms': platforms.checked(flat),
    'versions': {'python': platform.python_version(), 'commit': results.commit()}
    | {name: results.version(name) for name in ('jax', 'jaxlib', 'numpy', 'optax')}
    | {name: results.version(name) for name in ('iree-base-compiler', 'iree-base-runtime')},
  }
  files: dict[str, str | bytes] = {'learner.mlir': made.text, **export.modules(flat)}
  planned, unplanned, sizes = {}, {}, {}
  for name in names:
    try:
      compiled = iree_compile.compile(made.text, name)
    except UserError as error:
      raise UserError(f'{manifest["learner"]}: {error}') from error
    files[f'learner-{name}.vmfb'], files[f'learner-{name}.vm'] = compiled
    sizes[name] = len(compiled.vmfb)
    try:
      planned[name] = iree_host.planned(compiled.vm, arguments(flat))
    except UserError as error:
      unplanned[name] = str(error)
  manifest |= {'module_bytes': sizes, 'planned': planned, 'not_planned': unplanned}
  check(manifest, budget)
  files[artefact.STATE] = artefact.pack(flat.leaves)
  return artefact.write(folder, manifest, files)


def described(flat: Flat) -> dict[str, Any]:
  """What the manifest says of the state, the batches and the work."""
  macs = {'step': flat.step, 'predict': flat.predict, 'boundary': flat.boundary}
  rows = {'step': flat.batch, 'predict': flat.batch, 'boundary': flat.ends}
  return {
    'name': iree_module.NAME,
    'state': [
      {**leaf._asdict(), 'shape': list(leaf.shape), 'bytes': nbytes(leaf)} for leaf in flat.state
    ],
    'batch': [leaf._asdict() for leaf in flat.batch],
    'ends': [leaf._asdict() for leaf in flat.ends],
    'state_bytes': sum(map(nbytes, flat.state)),
    'macs': {
      part: cost.macs(f, shapes(flat.state), shapes(rows[part]))['total']
      for part, f in macs.items()
      if f is not None
    },
  }


def nbytes(leaf: Leaf) -> int:
  return math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize


def arguments(flat: Flat) -> dict[str, list[int]]:
  """Bytes of the arguments of every function of the module."""
  tables = {'load': flat.state, 'step': flat.batch, 'predict': flat.batch, 'save': ()}
  if flat.boundary is not None:
    tables['boundary'] = flat.ends
  return {name: [nbytes(leaf) for leaf in table] for name, table in tables.items()}


def check(manifest: Mapping[str, Any], budget: Mapping[str, int | None]) -> None:
  """Raises UserError when it cannot fit, naming what takes most."""
  for name, peaks in manifest['planned'].items():
    most, over = peaks['peak'], budget['ram']
    if over is not None and most > over:
      parts = ram.roles(manifest['state']) | {'working memory': most - manifest['state_bytes']}
      largest = sorted(parts.items(), key=lambda item: -item[1])[:4]
      named = ', '.join(f'{part} {n:,}' for part, n in largest)
      raise UserError(
        f'{name}: the learner needs {most:,} bytes and --ram gives {over:,}, {most - over:,} too few '
        f'(largest: {named}): take a smaller memory, model or batch'
      )
  if budget['ram'] is not None and manifest['not_planned']:
    raise UserError(
      f'--ram: {next(iter(manifest["not_planned"].values()))}: export without a budget'
    )
  for name, n in manifest['module_bytes'].items():
    if budget['flash'] is not None and n > budget['flash']:
      raise UserError(f'{name}: the module has {n:,} bytes and --flash gives {budget["flash"]:,}')


def summary(manifest: Mapping[str, Any], folder: Path) -> str:
  """What was exported, in a few lines."""
  lines = [
    f'{manifest["learner"]}: {len(manifest["files"])} files in {folder}; state '
    f'{manifest["state_bytes"]:,} bytes; MACs: step {manifest["macs"]["step"]:,}, '
    f'predict {manifest["macs"]["predict"]:,}'
  ]
  for name in manifest['targets']:
    peaks = manifest['planned'].get(name)
    told = manifest['not_planned'].get(name) or ', '.join(f'{k} {n:,}' for k, n in peaks.items())
    lines.append(f'  {name}: module {manifest["module_bytes"][name]:,} bytes; memory: {told}')
  for f in manifest['lint']:
    what = 'guarded' if f['rule'] == 'scatter' else 'runs on the host'
    lines.append(f'  {f["part"]}: {f["detail"]} at {f["place"]}: {what}')
  for name, sizes in manifest['platforms']['bytes'].items():
    told = ', '.join(f'{k} {v:,}' if isinstance(v, int) else f'{k} {v}' for k, v in sizes.items())
    lines.append(f'  {name}: compile-checked, not run; StableHLO bytes: {told}')
  return '\n'.join(lines) + '\n'
