"""The model that is edited, what it writes, and the editor with the statistics that it needs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cl_jax import checkpoint
from cl_jax.editing import encoding, evaluate, rows, statistics
from cl_jax.editing.rounds import Rounds, straight
from cl_jax.editing.write import Editor
from cl_jax.errors import UserError
from cl_jax.models import causal, decoder, pretrained
from cl_jax.streams import cache, corpora, load
from cl_jax.streams import tokenizer as tokenizers
from cl_jax.types import Tree
from experiments import edit_config, workdir


class Subject(NamedTuple):
  """The model that is edited.

  Attributes:
    config, backbone: of `models.decoder.load`.
    tokenizer: and its file.
  """

  config: causal.Config
  backbone: Tree
  tokenizer: Any
  file: Path


def opened(name: str) -> Subject:
  """A language model and its tokenizer."""
  files = pretrained.find(name)
  if files.tokenizer is None:
    raise UserError(f'{name} has no tokenizer, without which prompts cannot be read')
  shape, backbone = decoder.load(files.path)
  return Subject(shape, backbone, tokenizers.load(files.tokenizer), files.tokenizer)


def data_root(data_dir: str | None) -> Path:
  return load.root_of(data_dir, 'for edit/ and text/')


def begin_texts(chosen, subject: Subject, seed: int) -> list[str]:
  """Texts by the model itself that prompts are put behind, as in MEMIT: each goes on from a common word."""
  words = ('The', 'Therefore', 'Because', 'I', 'You')
  n, steps = chosen['prefixes'], chosen['prefix_tokens']
  if not n or not steps:
    return [words[i % len(words)] for i in range(n)]
  ids = [encoding.prompt(subject.tokenizer, words[i % len(words)])[0] for i in range(n)]
  found = []
  for i, row in enumerate(ids):
    tokens = jnp.asarray([row], jnp.int32)
    key = jax.random.fold_in(jax.random.key(seed), i)
    mask = jnp.ones(tokens.shape, bool)
    new = _continued(subject.config, subject.backbone, tokens, mask, steps, key)
    text = subject.tokenizer.decode([*row, *np.asarray(new[0]).tolist()])
    found.append(' '.join(text.replace('{', ' ').replace('}', ' ').split()))
  return found


def go_on(
  subject: Subject, backbone, prompts: Sequence[str], steps: int, key, state: Any = (), tap=None
) -> list[list[int]]:
  """The tokens that the model writes after each prompt, all at once; `tap` is an `Editor.tap`."""
  ids = [encoding.prompt(subject.tokenizer, p)[0] for p in prompts]
  if tap is not None:
    begun = rows.layout([(row, len(row) - 1, []) for row in ids])
    drawn = _tapped(subject.config, tap, steps, backbone, state, begun, key)
  else:
    width = max(map(len, ids))
    tokens = np.array([[0] * (width - len(row)) + row for row in ids], np.int32)
    mask = np.array([[False] * (width - len(row)) + [True] * len(row) for row in ids])
    drawn = _continued(subject.config, backbone, tokens, mask, steps, key)
  return np.asarray(drawn).tolist()


_continued = jax.jit(causal.generate, static_argnums=(0, 4))


_tapped = jax.jit(evaluate.written, static_argnums=(0, 1, 2))


def editor_of(
  chosen, subject: Subject, data: Path, tell, rounds: Rounds = straight, kept: Path | None = None
) -> Editor:
  """The editor, with the statistics (see `moments_of`) and the texts that it needs."""
  known: dict[str, Any] = {'config': subject.config, 'rounds': rounds}
  known['moments'] = moments_of(chosen, subject, data, tell, kept)
  if edit_config.needs(chosen, 'unrelated'):
    about = chosen['moments']
    text = data / 'text/corpora' / about['corpus'] / 'train.txt'
    starts = corpora.blocks(text, subject.file, about['block'])[:32, :12]
    known['unrelated'] = rows.layout([(row.tolist(), len(row) - 1, []) for row in starts])
  return edit_config.make(chosen, known)


def moments_of(
  chosen, subject: Subject, data: Path, tell, kept: Path | None = None
) -> dict[int, np.ndarray]:
  """E[k k^T] of the layers that the editor needs, or a sketch of it, measured once, by the process that comes
  first; kept in a folder of this text and network below CL_JAX_CACHE, if not in `kept`."""
  layers = edit_config.layers(chosen)
  if not layers:
    return {}
  blocks, sketch = moment_blocks(chosen, subject, data), chosen['moments']['sketch']
  # With the network as this version of the library describes it: another one measures again.
  of = hashlib.sha256(f'{checkpoint.digest(blocks)} {subject.config}'.encode()).hexdigest()[:8]
  words = (chosen['moments']['corpus'], blocks.size, of, *layers)
  name = '-'.join(map(str, (*words, *([f'sketch{sketch}'] if sketch else []))))
  place = kept or cache.directory() / 'editing' / checkpoint.digest(subject.backbone)[:16]
  config, backbone = subject.config, subject.backbone
  with workdir.in_turn(place / name, tell) as folder:
    found = statistics.moments(config, backbone, blocks, layers, folder, sketch=sketch, tell=tell)
  if sketch:
    off = max(
      b / np.linalg.norm(found.moment(i), 2) for i, b in zip(layers, found.bound(), strict=True)
    )
    tell(f'E[kk^T] of {sketch} rows: off by at most {off:.3f} of its largest eigenvalue')
  return found.moments()


def moment_blocks(chosen, subject: Subject, data: Path) -> np.ndarray:
  """The text that E[k k^T] is measured on, i32[n, L]."""
  about, length = chosen['moments'], chosen['moments']['block']
  text = data / 'text/corpora' / about['corpus'] / 'train.txt'
  blocks = corpora.blocks(text, subject.file, length)
  if about['tokens'] > blocks.size:
    raise UserError(
      f'config.moments.tokens={about["tokens"]}, and {text} has {blocks.size} in whole blocks'
    )
  return blocks[: -(-about['tokens'] // length)]
