"""What a pretrained language model says: the perplexities of texts, and how it goes on from a prompt."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cl_jax.errors import UserError
from cl_jax.models import causal, decoder, language, pretrained
from cl_jax.streams import corpora, load, tokenizer
from cl_jax.types import Batch, Tree

LENGTH, BLOCKS, TOKENS = 256, 20, 32


def add_perplexity(add) -> None:
  """The command line of `perplexity`."""
  add('name', metavar='PATH_OR_NAME')
  add('--texts', default='', metavar='A,B', help='folders of text/corpora (all that are there)')
  add('--length', type=int, default=LENGTH, help=f'tokens of a block ({LENGTH})')
  add(
    '--blocks', type=int, default=BLOCKS, help=f'the first so many of test.txt ({BLOCKS}); 0 = all'
  )
  add('--data_dir', metavar='DIR', help='parent of text/ (default: CL_JAX_DATA)')


def add_write(add) -> None:
  """The command line of `write`."""
  add('name', metavar='PATH_OR_NAME')
  add('prompt', metavar='PROMPT')
  add('--tokens', type=int, default=TOKENS, help=f'to write at most ({TOKENS})')
  add('--temperature', type=float, default=0.0, help='0 takes the most probable token (0)')
  add('--seed', type=int, default=0, help='of the draws at other temperatures (0)')


def print_perplexity(options: argparse.Namespace) -> int:
  """A line for every text: e to the mean -log p of its tokens, in blocks that do not overlap."""
  if options.length < 2 or options.blocks < 0:
    raise UserError('--length must be at least 2 tokens, --blocks at least 0')
  root = load.root_of(options.data_dir, 'for text/corpora') / 'text/corpora'
  names = [n for n in options.texts.split(',') if n] or sorted(
    p.parent.name for p in root.glob('*/test.txt')
  )
  if not names:
    raise UserError(f'there is no NAME/test.txt in {root}')
  config, backbone, words = loaded(options.name)
  rows = {n: corpora.blocks(root / n / 'test.txt', words, options.length) for n in names}
  print(f'{"perplexity":>12} {"nats":>7} {"tokens":>8}  text', flush=True)
  for name, blocks in rows.items():
    nats = measured(config, backbone, blocks[: options.blocks or len(blocks)])
    print(f'{math.exp(nats.mean()):12.2f} {nats.mean():7.3f} {nats.size:8,}  {name}', flush=True)
  return 0


def print_continuation(options: argparse.Namespace) -> int:
  """The prompt and what the model writes after it, up to the token that ends a text."""
  if options.tokens < 1 or not 0 <= options.temperature < math.inf:
    raise UserError('--tokens must be at least 1, --temperature a number from 0 on')
  config, backbone, words = loaded(options.name)
  made = written(
    config, backbone, words, options.prompt, options.tokens, options.temperature, options.seed
  )
  print(options.prompt + made, flush=True)
  return 0


def loaded(name: str) -> tuple[causal.Config, Tree, Path]:
  """A language model and the file of its tokenizer.

  Raises:
    UserError: it is not there, is no language model, or has no tokenizer.
  """
  files = pretrained.find(name)
  config, backbone = decoder.load(files.path)
  if files.tokenizer is None:
    raise UserError(f'{name} has no tokenizer.json, which text needs')
  return config, backbone, files.tokenizer


def measured(config: causal.Config, backbone: Tree, blocks: np.ndarray) -> np.ndarray:
  """-log p f64[n, L - 1] in nats of blocks i32[n, L] without their first tokens; nothing stands before."""
  model = decoder.decoder(config, 1, output='tokens')

  @jax.jit
  def nats(backbone, block):
    learn = jnp.ones(block.shape, bool)
    x = {'tokens': block, 'mask': learn, 'learn': learn}
    one = jnp.zeros(len(block), jnp.int32)
    batch = Batch(x, one, one + 1.0, one)
    return language.token_loss(model.apply({'backbone': backbone}, batch), batch)[0][:, 1:]

  # One block at a time: the logits of 20 blocks of a vocabulary of 50,000 would be a gigabyte.
  found = [np.asarray(nats(backbone, jnp.asarray(block[None])), np.float64) for block in blocks]
  return np.concatenate(found)


def written(
  config: causal.Config,
  backbone: Tree,
  words: Path,
  prompt: str,
  tokens: int = TOKENS,
  temperature: float = 0.0,
  seed: int = 0,
) -> str:
  """What `causal.generate` writes after `prompt`, without it; `words` is the tokenizer's file."""
  model = tokenizer.load(words)
  start = model.encode(prompt, add_special_tokens=False).ids
  if not start:
    raise UserError('PROMPT has no token: give the model something to go on from')
  key = jax.random.key(seed) if temperature else None

  @jax.jit
  def go_on(backbone, row, temperature):
    mask = jnp.ones(row.shape, bool)
    return causal.generate(config, backbone, row, mask, tokens, key, temperature)

  row = np.asarray(go_on(backbone, jnp.asarray([start], jnp.int32), temperature or 1.0))[0]
  ends = [model.token_to_id(end) for end in tokenizer.ENDS]
  stop = np.flatnonzero(np.isin(row, [i for i in ends if i is not None]))
  made = row[: stop[0]] if len(stop) else row
  # With the prompt, since how a token is spelt depends on what stands before it.
  return model.decode([*start, *made]).removeprefix(model.decode(start))
