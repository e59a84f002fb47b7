"""E[k k^T]: the second moment of a layer's keys over a text, by which editors know what to leave alone.

ROME, MEMIT and their kin weigh every change of 'layers/down/w' by how often text uses the direction (ROME
sec. 3.1, MEMIT eq. 15: C = lambda E[k k^T]; github.com/kmeng01/memit, rome/layer_stats.py).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cl_jax.checkpoint import digest
from cl_jax.editing import inside, kept, running
from cl_jax.editing.rows import Rows
from cl_jax.errors import UserError
from cl_jax.models.causal import Config
from cl_jax.types import Array, Tree

FILE = 'moments.npz'


class Collected(NamedTuple):
  """What is known of the keys of some layers.

  Attributes:
    ffn: units of a key.
    layers: ascending.
    tokens: that were read.
    arrays: either 'sums' f64[layers, ffn (ffn + 1) / 2], upper triangles of sum k k^T, or a sketch: 'rows'
      f32[layers, r, ffn], 'diagonal' f64[layers, ffn] of sum k k^T, and 'lost' f64[layers].
    points: i64[D], tokens at every doubling; the last one is all of them.
    change: f64[D, layers], |C_n - C_n/2|_F / |C_n|_F there; NaN at the first.
    rank: f64[D, layers], the effective rank (tr C)^2 / |C|_F^2 there: as many equal eigenvalues would do.
  """

  ffn: int
  layers: tuple[int, ...]
  tokens: int
  arrays: dict[str, np.ndarray]
  points: np.ndarray
  change: np.ndarray
  rank: np.ndarray

  def moment(self, layer: int) -> np.ndarray:
    """E[k k^T] of one layer, f64[ffn, ffn]; for a sketch the dense matrix that it stands for."""
    if layer not in self.layers:
      raise UserError(f'there is no E[kk^T] of layer {layer}; there is of {list(self.layers)}')
    return running.dense(self.arrays, self.layers.index(layer), self.ffn) / self.tokens

  def moments(self, layers: Sequence[int] | None = None) -> dict[int, np.ndarray]:
    """{layer: E[k k^T]} as the editors take them; of all layers where none are named."""
    return {i: self.moment(i) for i in (self.layers if layers is None else layers)}

  def bound(self) -> np.ndarray:
    """f64[layers]: |E[k k^T] - moment|_2 is at most this; 0 without a sketch."""
    return self.arrays.get('lost', np.zeros(len(self.layers))) / self.tokens

  def enough(self, change: float = 0.05) -> np.ndarray:
    """f64[layers]: tokens after which twice as many would change C by this.

    For tokens that are drawn independently |C_n - C_n/2| falls as n^-1/2, which is what is assumed beyond the
    last doubling. Tokens of a text are not: take it for a lower limit.
    """
    return self.tokens * (self.change[-1] / change) ** 2


def moments(
  config: Config,
  backbone: Tree,
  blocks: np.ndarray,
  layers: Sequence[int],
  directory: str | Path | None = None,
  batch: int = 8,
  every: float = 120.0,
  sketch: int = 0,
  tell: Callable[[str], None] = lambda line: None,
) -> Collected:
  """Reads the text once, all layers in the same forward passes, none above the last.

  Every token counts, the first of a block too, as in the official code, whose texts are whole documents and
  not blocks. Sums over a batch are f32 on the device; they are added up in float64 on the host, since the
  thousandth batch would lose ten of f32's 24 bits. So the size of a batch does not matter beyond 1e-6.

  With `directory` the state is written to moments.npz there and a killed call goes on from it; the file is
  then the same bytes as without the interruption (with the same `batch`), and a repeated call only reads it.
  It has 8 ffn^2 bytes a layer while it grows, half of that at the end. One process may use it at a time.

  Args:
    blocks: i32[n, L] tokens, as of `corpora.blocks`; -1 is padding on the right.
    layers: in any order.
    batch: blocks at a time.
    every: seconds between writes; there is one at the end.
    sketch: r > 0 keeps a Frequent Directions sketch B of r rows instead (4 r ffn bytes a layer), so that
      sum k k^T ~ B^T B + the diagonal matrix that makes the diagonal exact; see `Collected.bound`.
    tell: gets a line of progress at doublings and writes.

  Raises:
    UserError: layers or tokens that the model does not have; or a file of another model, text, shape or
      precision, or one that is damaged.
  """
  blocks, layers = checked(config, blocks), inside.checked(config, {int(i) for i in layers})
  if batch < 1 or sketch < 0 or sketch > config.ffn:
    raise UserError(
      f'batch must be at least 1 and sketch between 0 and {config.ffn}, not {batch} and {sketch}'
    )
  about = {'what': 'moments', 'version': 1, 'model': digest(backbone), 'text': digest(blocks)}
  about |= {'config': config._asdict(), 'layers': list(layers), 'sketch': sketch}
  about = json.loads(json.dumps(about))
  path = None if directory is None else Path(directory) / FILE
  if path is not None:
    kept.sweep_up(path)
  if path is not None and path.exists():
    state = found(path, about)
    if int(state['next']) < len(blocks):
      tell(f'{path}: goes on at {int(state["tokens"])} tokens')
  else:
    state = running.begun(config.ffn, len(layers), sketch)
  ends = {len(blocks) >> i for i in range(len(blocks).bit_length())}
  spans = jnp.asarray([(0, *(i + 1 for i in layers[:-1])), layers], jnp.int32).T
  saved = time.monotonic()
  while (at := int(state['next'])) < len(blocks):
    stop = min(at + batch, *(e for e in ends if e > at))
    rows = np.full((batch, blocks.shape[1]), -1, np.int32)
    rows[: stop - at] = blocks[at:stop]
    running.add(state, np.asarray(through(config, backbone, rows, spans, sketch > 0)), rows >= 0)
    state['next'] = np.asarray(stop, np.int64)
    if stop in ends:
      tell(running.doubled(state, config.ffn))
    if stop == len(blocks):  # nothing is compared with half of the text any more
      state = {k: a for k, a in state.items() if not k.startswith('half_')}
    if path is not None and (stop == len(blocks) or time.monotonic() - saved >= every):
      path.parent.mkdir(parents=True, exist_ok=True)
      kept.save(path, about, state)
      saved = time.monotonic()
      tell(f'{path}: {int(state["tokens"])} tokens, block {stop} of {len(blocks)}')
  return collected(config.ffn, layers, state)


def read(directory: str | Path, config: Config, backbone: Tree) -> Collected:
  """The finished moments in a directory, whatever the text and the layers.

  Raises:
    UserError: there are none, they are not finished, of another model, or damaged.
  """
  path = Path(directory) / FILE
  if not path.is_file():
    raise UserError(f'there are no moments in {directory}: collect them first')
  about, state = kept.load(path)
  wanted = {'what': 'moments', 'version': 1, 'model': digest(backbone)}
  kept.same(path, about, wanted)
  if any(name.startswith('half_') for name in state):
    raise UserError(f'{path} is not finished: repeat the call that collects it')
  kept.fit(path, state, running.specs(config.ffn, len(about['layers']), about['sketch'], False))
  return collected(config.ffn, tuple(about['layers']), state)


def found(path: Path, about: dict[str, Any]) -> dict[str, np.ndarray]:
  """The state in a file that a call with the same `about` has left, finished or not."""
  there, state = kept.load(path)
  kept.same(path, there, about)
  half = any(name.startswith('half_') for name in state)
  kept.fit(
    path, state, running.specs(about['config']['ffn'], len(about['layers']), about['sketch'], half)
  )
  return state


def checked(config: Config, blocks: np.ndarray) -> np.ndarray:
  """The blocks i32[n, L], which must be tokens of the model."""
  blocks = np.asarray(blocks)
  if blocks.ndim != 2 or not blocks.size or blocks.dtype.kind not in 'iu':
    raise UserError(
      f'blocks must be whole numbers [n, L] and at least one, not {blocks.dtype}{list(blocks.shape)}'
    )
  if blocks.max() < 0:
    raise UserError('blocks hold padding (-1) alone: there is no token to read')
  if blocks.min() < -1 or blocks.max() >= config.vocabulary:
    raise UserError(
      f'blocks hold tokens {blocks.min()} to {blocks.max()}, the model has 0 to {config.vocabulary - 1}: '
      'use its own tokenizer'
    )
  return blocks.astype(np.int32)


def collected(ffn: int, layers: tuple[int, ...], state: dict[str, np.ndarray]) -> Collected:
  arrays = {k: a for k, a in state.items() if k not in (*running.HISTORY, 'next', 'tokens')}
  points, change, rank = (state[k] for k in running.HISTORY)
  return Collected(ffn, layers, int(state['tokens']), arrays, points, change, rank)


@partial(jax.jit, static_argnums=(0, 4))
def through(config: Config, p: Tree, tokens: Array, spans: Array, whole: bool) -> Array:
  """f32[layers, ffn, ffn] sums of k k^T, or the keys themselves f32[layers, B, L, ffn], `whole`.

  `spans` i32[layers, 2] are (the first layer that has not run, the layer whose keys are read).
  """
  none = tokens[:, :0]
  h, place = inside.begin(config, p, Rows(none, tokens, none, none))

  def step(h: Array, span: Array):
    h = inside.between(config, p, h, place, span[0], span[1])
    h, found = inside.captured(config, p, h, span[1], place, ('mlp',), slice(None))
    keys = jnp.where(place.seen[..., None], found['mlp'], 0).astype(jnp.float32)
    return h, keys if whole else jnp.einsum('blf,blg->fg', keys, keys, precision='highest')

  return jax.lax.scan(step, h, spans)[1]
