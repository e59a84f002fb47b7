"""Latent replay."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cl_jax import codecs, cut, memory, product, quantise
from cl_jax.errors import UserError
from cl_jax.types import Array, Batch, Method, Tree

ROUNDS = 25  # of k-means, as many as `remind`'s


class LatentState(NamedTuple):
  rows: Batch  # [capacity + 1, ...], (encoded) activations at the cut; the last row takes what is not kept
  draw: Batch  # [draw, ...], those of the next step
  below: Tree  # bool[] per parameter: whether it lies below the cut
  tasks: Array  # i32[], finished
  words: Array | None = None  # f32[M, K, D / M], codewords of 'pqMxK'


def latent(tap: str, capacity: int = 500, draw: int = 32, codec: str = '') -> Method:
  """Replays activations of a hidden layer, below which the network is fixed after the first task.

  At the end of task t, h = min(capacity // t, its examples) random ones are passed through the fixed part and
  replace as many random rows of the memory. A step takes the batch's rows and `draw` rows of the memory,
  which enter at the cut: one mean over all. Neither forward nor backward pass of the fixed part is spent on
  memory, and no backward pass of it on the batch.

  Pellegrini, Graffieti, Lomonaco & Maltoni, IROS 2020, algorithm 1; official code vlomonaco/ar1-pytorch.
  AR1* is this with `cwr` for the output layer, and with `si` for all but that layer and norms (`si.skip`),
  in a network with batch renormalisation (`config.methods=latent,si,cwr`, `config.model.renorm`). Deviations:
  the fixed part is trained in the first task (there: pretrained, and fixed from the start, which
  `config.freeze` does); rows are drawn uniformly in every step instead of passing through the memory once an
  epoch.

  Args:
    tap: the activation at which the network is cut; see the model's docstring.
    capacity: rows.
    draw: memory rows per step, drawn without replacement.
    codec: one of `codecs.ROWS` or 'pqMxK' (`product.form`), in which the memory keeps its activations; ''
      as they are. With 'uint8' that is the replay memory of Ravaglia et al., IEEE JETCAS 2021 (QLR-CL),
      section III, with a scale for each row in place of one for the layer; their fixed part in 8-bit
      integers is not there. The codewords of 'pqMxK' are fitted by k-means to the rows that the first task
      puts into the memory, once the part below the cut is fixed, as in `remind`, and stay.

  Needs the boundary. State: capacity + 1 + draw activations at the cut (in the bytes of `codec`), with 12
  bytes each for label, weight and task, 1 byte per parameter array, 4 bytes; with 'pqMxK' 4 bytes K times per
  number of an activation.
  """
  form = product.form(codec)

  def keep(words, h):
    if form is not None:
      return product.encode(form, words, h)
    return codecs.encode(codec, h) if codec else h

  def init(key, params, batch, fwd):
    h, below = cut.begin(fwd, params, batch, tap)
    try:
      words = None if form is None else product.blank(form, h.shape[1:])
    except UserError as error:
      raise UserError(f'latent at {tap!r} in {error}') from error
    if form is not None and capacity < form.words:
      raise UserError(
        f'latent in {codec}: {form.words} codewords need at least as many rows to be fitted to, capacity is '
        f'{capacity}'
      )
    h = jax.eval_shape(keep, words, h)

    def blank(n):
      return jax.tree.map(lambda a: jnp.zeros((n, *a.shape[1:]), a.dtype), batch._replace(x=h))

    return {}, LatentState(blank(capacity + 1), blank(draw), below, jnp.int32(0), words)

  def wrap(s, apply):
    def restore(held):
      if form is None or not isinstance(held, codecs.Rows):  # the stream's own rows are not encoded
        return codecs.decode_tree(held)
      return product.decode(s.words, held)

    return cut.cut(apply, 'latent', tap, s.tasks > 0, restore=restore)

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
    activation = lambda b: fwd(params, b).aux['latent']  # noqa: E731
    words = s.words
    if form is None:
      h = jax.lax.map(lambda b: keep(None, activation(b)), new)
    else:
      h = jax.lax.map(activation, new)
      fit = partial(fitted, form, k_rows, h, new.w, s.words)
      words = jax.lax.cond(s.tasks == 0, fit, lambda: s.words)
      h = jax.lax.map(partial(keep, words), h)
    new = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:most], new._replace(x=h))
    new = new._replace(w=(slots < capacity).astype(new.w.dtype))
    rows = jax.tree.map(lambda a, b: a.at[slots].set(b), s.rows, new)
    s = s._replace(rows=rows, tasks=s.tasks + 1, words=words)
    return params, s._replace(draw=drawn(s, k_draw))

  return Method(init=init, wrap=wrap, mix=mix, after=after, boundary=boundary, needs=('boundary',))


def fitted(form: product.Form, key: Array, h: Array, w: Array, words: Array) -> Array:
  """Codewords for the activations h [batches, B, ...] of a task, w f32[batches, B]; like `words`."""
  rows = h.reshape(w.size, -1)
  if len(rows) < form.words:
    raise UserError(
      f'latent in {form.name}: the first task has {len(rows)} examples, fewer than {form.words} codewords'
    )
  counts = (w.reshape(-1) > 0).astype(rows.dtype)
  key = jax.random.fold_in(key, 1)
  return quantise.fit(key, rows, counts, form.parts, form.words, ROUNDS).astype(words.dtype)
