"""REMIND: replay of quantised hidden activations."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cl_jax import cut, memory, quantise
from cl_jax.errors import UserError
from cl_jax.types import Array, Method, Tree
from cl_jax.writers import largest_class


class REMINDState(NamedTuple):
  memory: memory.Memory  # rows of codes
  books: Array  # f32[codebooks, codes, D / codebooks]
  below: Tree  # bool[] per parameter: whether it lies below the cut
  tasks: Array  # i32[], finished


def remind(
  tap: str,
  classes: int = 10,
  capacity: int = 5000,
  draw: int = 50,
  codebooks: int = 32,
  codes: int = 256,
  rounds: int = 25,
  most: int = 20_000,
) -> Method:
  """Replays hidden activations from a memory of a few bytes per pixel of a feature map.

  After the first task (base initialisation) the network below the cut is fixed, and a product quantiser is
  fitted to the activations of that task at all places of the feature map. From then on every
  activation, also at test, is what its codes stand for; a step takes the batch's rows and `draw` rows of the
  memory, one mean over all, and then stores the batch's codes. A full memory gives up a random row of the
  class that has most.

  Hayes, Kafle, Shrestha, Acharya & Kanan, ECCV 2020, section 3; official code tyler-hayes/REMIND.
  Deviations: no random crops and no mixup of feature maps; the row that arrives does not count for the
  largest class; Lloyd's algorithm leaves an empty codeword where it is (faiss splits another);
  the quantiser is fitted to at most `most` places.

  Args:
    tap: the activation at which the network is cut; see the model's docstring.
    classes: size of the output layer.
    capacity: rows.
    draw: memory rows per step, drawn without replacement. 50 in the paper.
    codebooks: parts that the channels are cut into, which it must divide. 32 in the paper.
    codes: codewords of each; at most 256, the paper's.
    rounds: of k-means.
    most: places of feature maps, drawn at random, that the quantiser is fitted to.

  Needs the boundary. State: capacity + 1 + draw rows of `codebooks` bytes per place, with 12 bytes each for
  label, weight and task, 4 bytes per slot and class, 4 D codes bytes of codewords for D channels at the cut,
  1 byte per parameter array, 4 bytes.
  """
  if not 1 < codes <= 256:
    raise ValueError(f'remind codes={codes}: a code is a byte, 2 to 256')
  write = largest_class(capacity, classes)

  def init(key, params, batch, fwd):
    h, below = cut.begin(fwd, params, batch, tap)
    if h.shape[-1] % codebooks:
      raise UserError(
        f'remind codebooks={codebooks} does not divide the {h.shape[-1]} channels of {tap!r}'
      )
    rows = batch._replace(x=jnp.zeros((*h.shape[:-1], codebooks), jnp.uint8))
    books = jnp.zeros((codebooks, codes, h.shape[-1] // codebooks))
    return {}, REMINDState(memory.create(write, rows, draw), books, below, jnp.int32(0))

  def wrap(s, apply):
    return cut.cut(
      apply,
      'remind',
      tap,
      s.tasks > 0,
      lambda h: quantise.encode(s.books, h),
      lambda kept: quantise.decode(s.books, kept),
    )

  def mix(s, batch):
    return cut.join(batch, s.memory.draw)

  def encoded(books, batch, h):
    return batch._replace(x=quantise.encode(books, h))

  def after(s, params, step, key):
    fixed = s.tasks > 0
    params = cut.hold(s.below, fixed, step.params, params)
    rows = encoded(s.books, step.batch, step.out.aux['remind'])
    rows = rows._replace(w=rows.w * fixed)  # the first task is stored at its end
    return params, s._replace(memory=memory.write_then_draw(write, s.memory, rows, key))

  def boundary(s, params, batches, fwd, key):
    def first():
      k_fit, k_some, k_write = jax.random.split(key, 3)
      h = jax.lax.map(lambda b: fwd(params, b).aux['remind'], batches)
      places = h.reshape(-1, h.shape[-1])
      w = jnp.broadcast_to(
        batches.w.reshape(*batches.w.shape, *[1] * (h.ndim - 3)), h.shape[:-1]
      ).reshape(-1)
      if len(w) > most:
        some = memory.shuffled(k_some, w <= 0)[:most]
        places, w = places[some], w[some]
      if len(w) < codes:
        raise UserError(
          f'remind codes={codes}: the first task has {len(w)} places at {tap!r} (most={most}) to fit '
          'them to: lower codes'
        )
      books = quantise.fit(k_fit, places, (w > 0).astype(h.dtype), codebooks, codes, rounds)

      def put(held, at):
        batch, h, k = at
        return memory.write_then_draw(write, held, encoded(books, batch, h), k), None

      keys = jax.random.split(k_write, len(h))
      return books, jax.lax.scan(put, s.memory, (batches, h, keys))[0]

    books, held = jax.lax.cond(s.tasks == 0, first, lambda: (s.books, s.memory))
    return params, s._replace(books=books, memory=held, tasks=s.tasks + 1)

  return Method(init=init, wrap=wrap, mix=mix, after=after, boundary=boundary, needs=('boundary',))
