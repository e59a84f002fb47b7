"""Training that ends with the first task."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cl_jax.errors import UserError
from cl_jax.masks import nest, paths
from cl_jax.types import Array, Method, Tree, no_tap, overlay


class FirstSessionState(NamedTuple):
  over: Array  # bool[], whether the first task has ended
  start: Tree  # parameters without the head, and norm statistics, before the first step; {} unless merged


def first_session(merge: bool = False) -> Method:
  """Trains in the first task; after its boundary every parameter keeps its value for ever.

  First-session adaptation: Panos et al., ICCV 2023; Zhou et al., "Revisiting class-incremental learning with
  pre-trained models: generalizability and adaptivity are all you need", IJCV 2024, section 4.2; official code
  zhoudw-zdw/RevisitingCIL. The old value is put back after every update, so that neither momentum nor decay
  moves anything; what the norm layers keep of the training data stands still as well.

  A classifier from statistics goes on learning with the adapted network:
  `chain(lora=lora(), first_session=first_session(), ranpac=ranpac(classes, when='boundary'))`. It must come
  AFTER methods that write parameters on every step, and a classifier after it. Adapt and merge of Zhou et al.
  (APER, formerly ADAM) is `merge=True` with `ncm`: its prototypes lie in the features of both networks.

  Deviations: later tasks still pay for their gradient, which nothing uses. The network before adaptation is
  the one that training starts from: the pretrained one for all that starts as zero functions (lora, adapter)
  and for fine-tuning, but of prompts the network with the prompts as drawn (official code: without them).

  Args:
    merge: features are those of the network before adaptation and of the adapted one, side by side,
      [B, 2 D]; the network's own head goes on reading the latter.

  Raises:
    UserError: `merge`, and no method before it adapts anything but the head.

  Needs the boundary. State: 1 byte, with `merge` 1 x parameters without the head and norm statistics besides.
  With `merge` one more forward pass per prediction, and at the boundary.
  """

  def init(key, params, batch, fwd):
    over = jnp.zeros((), bool)
    if not merge:
      return {}, FirstSessionState(over, {})
    adapted = {name: a for name, a in params.items() if name != 'head'}
    if not adapted:
      raise UserError(
        'first_session merge=True: nothing but the head is trained, so both networks are one; put it behind '
        'the method that adapts (lora, adapter), or train the backbone'
      )
    return {}, FirstSessionState(over, overlay(fwd.stats, adapted))

  def wrap(s, apply):
    def held(variables, batch, tap, train):
      out = apply(variables, batch, tap, train)
      if merge:
        start = jax.lax.stop_gradient(overlay(variables, s.start))
        before = apply(start, batch, no_tap, False).features
        out = out._replace(features=jnp.concatenate([before, out.features], -1))
      new = paths(out.stats)
      if not new:
        return out
      old = paths(variables)
      return out._replace(stats=nest({p: jnp.where(s.over, old[p], a) for p, a in new.items()}))

    return held

  def after(s, params, step, key):
    keep = lambda old, new: jnp.where(s.over, old, new)  # noqa: E731
    return jax.tree.map(keep, step.params, params), s

  def boundary(s, params, batches, fwd, key):
    return params, s._replace(over=jnp.ones_like(s.over))

  return Method(init=init, wrap=wrap, after=after, boundary=boundary, needs=('boundary',))
