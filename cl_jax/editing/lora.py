"""LoRA as an editor (Hu et al., ICLR 2022): low-rank terms trained on the requests of a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cl_jax.editing import inside
from cl_jax.editing.finetune import Terms, descend
from cl_jax.editing.rounds import Rounds, straight
from cl_jax.editing.rows import Requests, plain
from cl_jax.editing.write import Editor, Write
from cl_jax.errors import UserError
from cl_jax.models.causal import Config
from cl_jax.types import Array, Tree

PATHS = ('layers/q/w', 'layers/v/w', 'layers/down/w')


def lora_edit(
  config: Config,
  layers: Sequence[int] = (),
  paths: tuple[str, ...] = ('layers/q/w', 'layers/v/w'),
  rank: int = 8,
  alpha: float = 32.0,
  steps: int = 70,
  rate: float = 5e-3,
  batch: int = 0,
  stop: float = 1e-2,
  rounds: Rounds = straight,
) -> Editor:
  """W_l + alpha / rank A_l B_l, with A and B trained by Adam as `finetune` trains W (eq. 3; the LoRA
  baseline of github.com/zjunlp/EasyEdit). A starts uniform in +-1 / sqrt(d_in), drawn by the key, B at 0.
  After the batch the product is written, and the next batch starts with new factors.

  Args:
    layers: to train; none is all.
    paths: matrices, of 'layers/q/w', 'layers/v/w', 'layers/down/w'.
    rank, alpha, steps, rate: published in EasyEdit 8, 32, 70 and 5e-3.
    batch, stop, rounds: as `finetune`.

  State: none. Writes hold 4 rank (d_in + d_out) bytes a matrix and batch. Report: as `finetune`.
  Deviations: no dropout (EasyEdit 0.1), and the loss is on the target alone, over the plain prompt.
  """
  layers = inside.checked(config, layers or range(config.depth))
  unknown = [path for path in paths if path not in PATHS]
  if unknown or not paths:
    raise UserError(f'paths {tuple(unknown)} cannot be adapted: use some of {", ".join(PATHS)}')
  if rank < 1 or batch < 0 or steps < 1:
    raise UserError(f'rank and steps must be 1 or more, batch 0 or more: {rank}, {steps}, {batch}')
  scale = alpha / rank

  def edit(backbone: Tree, state: Any, requests: Requests, key: Array):
    terms: Terms = {}
    for path, one in zip(paths, jax.random.split(key, len(paths)), strict=True):
      w = backbone['layers'][path.split('/')[1]]['w']
      a, b = (len(layers), w.shape[1], rank), (len(layers), rank, w.shape[2])
      side = 1 / math.sqrt(w.shape[1])
      terms[path] = jax.random.uniform(one, a, w.dtype, -side, side), jnp.zeros(b, w.dtype)
    rows = plain(requests.rewrite)
    found, log_p = descend(
      config, layers, batch, backbone, rows, terms, scale, steps, rate, math.inf, stop, rounds
    )
    writes = [
      Write(path, layer, found[path][0][j], scale * found[path][1][j])
      for path in paths
      for j, layer in enumerate(layers)
    ]
    return writes, state, {'loss': -log_p, 'log_p': log_p}

  return Editor(lambda backbone: (), edit)
