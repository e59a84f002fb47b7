"""The same programs lowered for other platforms, from this machine: compile-checked, not run."""

from __future__ import annotations

from typing import Any

import jax
import jax.export

from cl_jax.edge.learner import Flat, shapes

PLATFORMS = ('cuda', 'tpu')


def checked(flat: Flat) -> dict[str, Any]:
  """What `jax.export` makes of each function for each platform.

  Returns:
    'bytes': by platform, bytes of the serialised module of each function; or 'refused', in the words of the
    lowering. 'note' says what was not done.
  """
  found: dict[str, Any] = {}
  for platform in PLATFORMS:
    sizes: dict[str, Any] = {}
    for part, f, rows in (
      ('step', flat.step, flat.batch),
      ('predict', flat.predict, flat.batch),
      ('boundary', flat.boundary, flat.ends),
    ):
      if f is None:
        continue
      try:
        exported = jax.export.export(jax.jit(f, keep_unused=True), platforms=[platform])
        sizes[part] = len(exported(shapes(flat.state), shapes(rows)).mlir_module_serialized)
      except (NotImplementedError, ValueError) as error:
        sizes = {'refused': f'{part}: {str(error).splitlines()[0][:200]}'}
        break
    found[platform] = sizes
  return {'note': 'compile-checked: lowered by jax.export here, not run', 'bytes': found}
