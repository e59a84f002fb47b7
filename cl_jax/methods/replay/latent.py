"""Latent replay."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cl_jax import codecs, cut, memory
from cl_jax.types import Array, Batch, Method, Tree


class LatentState(NamedTuple):
  rows: Batch  # [capacity + 1, ...], (encoded) activations at the cut; the last row takes what is not kept
  draw: Batch  # [draw, ...], those of the next step
  below: Tree  # bool[] per parameter: whether it lies below the cut
  tasks: Array  # i32[], finished


def latent(tap: str, capacity: int = 500, draw: int = 32, codec: str = '') -> Method:
  """Replays activations of a hidden layer, below which the network is fixed after the first task.

  At the end of task t, h = min(capacity // t, its examples) random ones are passed through the fixed part and
  replace as many random rows of the memory. A step takes the batch's rows and `draw` rows of the memory,
  which enter at the cut: one mean over all. Neither forward nor backward pass of the fixed part is spent on
  memory, and no backward pass of it on the batch.

  Pellegrini, Graffieti, Lomonaco & Maltoni, IROS 2020, algorithm 1; official code vlomonaco/ar1-pytorch.
  AR1* is this with `si`, and `cwr` for the output layer, in a network with batch renormalisation
  (`config.methods=latent,si,cwr`, `config.model.renorm`). Deviations: the fixed part is trained in the first
  task (there: pretrained, and fixed from the start, which `config.freeze` does); rows are drawn uniformly
  in every step instead of passing through the memory once an epoch.

  Args:
    tap: the activation at which the network is cut; see the model's docstring.
    capacity: rows.
    draw: memory rows per step, drawn without replacement.
    codec: one of `codecs.ROWS`, in which the memory keeps its activations; '' as they are. With 'uint8' that
      is the replay memory of Ravaglia et al., IEEE JETCAS 2021 (QLR-CL), section III, with a scale for each
      row in place of one for the layer; their fixed part in 8-bit integers is not there.

  Needs the boundary. State: capacity + 1 + draw activations at the cut (in the bytes of `codec`), with 12
  bytes each for label, weight and task, 1 byte per parameter array, 4 bytes.
  """

  def keep(h):
    return codecs.encode(codec, h) if codec else h

  def init(key, params, batch, fwd):
    h, below = cut.begin(fwd, params, batch, tap)
    h = jax.eval_shape(keep, h)

    def blank(n):
      return jax.tree.map(lambda a: jnp.zeros((n, *a.shape[1:]), a.dtype), batch._replace(x=h))

    return {}, LatentState(blank(capacity + 1), blank(draw), below, jnp.int32(0))

  def wrap(s, apply):
    return cut.cut(apply, 'latent', tap, s.tasks > 0, restore=codecs.decode_tree)

  def mix(s, batch):
    return cut.join(batch, s.draw)

  def drawn(s, key):
    slots, w = memory.distinct_of(key, draw, s.rows.w[:capacity] > 0)
    return jax.tree.map(lambda a: a[slots], s.rows)._replace(w=w)

  def after(s, params, step, key):
    params = cut.hold(s.below, s.tasks > 0, step.params, params)
    return params, s._replace(draw=drawn(s, key))

  def boundary(s, params, batches, fwd, key):
    k_rows, k_slots, k_draw = jax.random.split(key, 3)
    flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), batches)
    n, size = batches.y.shape[1], flat.y.shape[0]
    most = min(capacity, size)
    some = memory.shuffled(k_rows, flat.w <= 0)  # padding last
    slots = memory.shuffled(k_slots, s.rows.w[:capacity] > 0)  # empty ones first
    count = jnp.minimum(capacity // (s.tasks + 1), (flat.w > 0).sum())
    slots = jnp.where(jnp.arange(most) < count, slots[:most], capacity)
    # In batches of the stream's size: all at once may not fit.
    chunks = jnp.resize(some[:most], (-(-most // n), n))
    new = jax.tree.map(lambda a: a[chunks], flat)
    h = jax.lax.map(lambda b: keep(fwd(params, b).aux['latent']), new)
    new = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:most], new._replace(x=h))
    new = new._replace(w=(slots < capacity).astype(new.w.dtype))
    rows = jax.tree.map(lambda a, b: a.at[slots].set(b), s.rows, new)
    s = s._replace(rows=rows, tasks=s.tasks + 1)
    return params, s._replace(draw=drawn(s, k_draw))

  return Method(init=init, wrap=wrap, mix=mix, after=after, boundary=boundary, needs=('boundary',))
