"""Training that ends with the first task."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cl_jax.masks import nest, paths
from cl_jax.types import Method


def first_session() -> Method:
  """Trains in the first task; after its boundary every parameter keeps its value for ever.

  First-session adaptation: Panos et al., ICCV 2023; Zhou et al., "Revisiting class-incremental learning with
  pre-trained models" (APER), IJCV 2024, section 4.2; official code zhoudw-zdw/RevisitingCIL. The old value
  is put back after every update, so that neither momentum nor decay moves anything; what the norm layers
  keep of the training data stands still as well. Deviation: later tasks still pay for their gradient, which
  nothing uses.

  A classifier from statistics goes on learning with the adapted network:
  `chain(lora=lora(), first_session=first_session(), ranpac=ranpac(classes, when='boundary'))`. It must come
  AFTER methods that write parameters on every step.

  Needs the boundary. State: 1 byte.
  """

  def init(key, params, batch, fwd):
    return {}, jnp.zeros((), bool)

  def wrap(over, apply):
    def held(variables, batch, tap, train):
      out = apply(variables, batch, tap, train)
      new = paths(out.stats)
      if not new:
        return out
      old = paths(variables)
      return out._replace(stats=nest({p: jnp.where(over, old[p], a) for p, a in new.items()}))

    return held

  def after(over, params, step, key):
    keep = lambda old, new: jnp.where(over, old, new)  # noqa: E731
    return jax.tree.map(keep, step.params, params), over

  def boundary(over, params, batches, fwd, key):
    return params, jnp.ones_like(over)

  return Method(init=init, wrap=wrap, after=after, boundary=boundary, needs=('boundary',))
