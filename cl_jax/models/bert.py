"""The BERT encoder as a sentence classifier, for weights of sentence-transformers or our own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cl_jax.errors import UserError
from cl_jax.models import layers, pretrained, sidecar, transformer
from cl_jax.types import Array, Batch, Model, Out, Tree, no_tap


class Config(NamedTuple):
  """The shape of a BERT encoder (Devlin et al. 2019); the default is MiniLM-L6-H384."""

  vocabulary: int = 30522
  d: int = 384
  depth: int = 6
  heads: int = 12
  ffn: int = 1536
  positions: int = 512
  types: int = 2
  eps: float = 1e-12


def bert(
  config: Config,
  classes: int,
  weights: Tree = None,
  pool: str = 'mean',
  normalise: bool = False,
  init: str | float = 0.02,
  remat: bool = False,
  unroll: bool = False,
  dtype: jnp.dtype = jnp.float32,
) -> Model:
  """A BERT encoder and a linear head over {'tokens': i32[B, L], 'mask': bool[B, L]}.

  Parameters: 'backbone' {'embed': {'tokens', 'positions', 'types', 'norm'}, 'layers': every leaf
  stacked [depth, ...]} and 'head' {'w', 'b'}. `features` f32[B, d] are the pooled hidden states.
  Taps: 'embed', then per layer 'k', 'v', 'scores' (see `transformer.attention`), 'attention' (its output),
  'middle' (what the MLP reads), 'mlp' (its hidden units), 'feedforward' (its output) and 'block', all but
  'scores' [B, L, .]. What 'embed' puts before the first position is attended to and left out of pooling.

  Where `init` is traced, let `weights` be an argument of the program, as `cl_jax.loop.run` does:
  closed over, they would be copied into it as constants.

  Training the token embeddings with Adam touches all of their rows in every step (47 MB of weights
  in MiniLM, three times over with the moments): freeze 'backbone/embed' where that is acceptable.

  Args:
    config: the shape; `load` returns the one of a directory.
    classes: units of the output layer.
    weights: the 'backbone' that `init` returns instead of drawing one; the head is always drawn.
    pool: 'mean' over the mask, or 'cls', the first position.
    normalise: scale features to length 1, as sentence-transformers' Normalize does.
    init: of all weights that are drawn, see `layers.weight`.
    remat, unroll: see `transformer.stack`.
    dtype: of the activations between the layers; norms, softmax, features and logits are f32.

  Raises:
    UserError: an unknown `pool`, or sequences longer than `config.positions`.

  Deviations from the original: no dropout, no pooler layer, one segment.
  """
  if pool not in ('mean', 'cls'):
    raise UserError(f"pool={pool!r} is not known: use 'mean' or 'cls'")

  start = transformer.init_fn(
    lambda key: _draw(key, config, init), weights, config.d, classes, init
  )

  def apply(variables: Tree, batch: Batch, tap=no_tap, train: bool = False) -> Out:
    del train
    h, mask = encode(config, variables['backbone'], batch.x, tap, remat, unroll, dtype)
    if pool == 'mean':
      share = mask / jnp.maximum(mask.sum(-1, keepdims=True), 1)
      h = jnp.einsum('bld,bl->bd', h, share)
    else:
      h = h[:, h.shape[1] - batch.x['tokens'].shape[1]]
    if normalise:
      h = h * jax.lax.rsqrt(jnp.maximum(jnp.square(h).sum(-1, keepdims=True), 1e-24))
    return Out(layers.dense(variables['head'], h), h, {})

  return Model(start, apply, layers.softmax_cross_entropy, transformer.wires())


def encode(
  config: Config,
  p: Tree,
  x: Tree,
  tap=no_tap,
  remat: bool = False,
  unroll: bool = False,
  dtype: jnp.dtype = jnp.float32,
) -> tuple[Array, Array]:
  """The last hidden states f32[B, L, d] and the mask of the positions to pool over, bool[B, L]."""
  tokens, mask = x['tokens'], x['mask'] > 0
  if tokens.shape[1] > config.positions:
    raise UserError(
      f'sequences of {tokens.shape[1]} tokens exceed the {config.positions} positions of this '
      'BERT: cut them when they are tokenised'
    )
  e = p['embed']
  h = e['tokens'][tokens] + e['positions'][: tokens.shape[1]] + e['types'][0]
  h = tap('embed', layers.layer_norm(e['norm'], h, config.eps), 0).astype(dtype)
  seen = transformer.extend(mask, h.shape[1])

  def block(p: Tree, h: Array, i: Array) -> Array:
    p = transformer.cast(p, dtype)
    a = tap('attention', transformer.attention(p, h, seen, config.heads, tap, i), i)
    h = tap('middle', layers.layer_norm(p['norm1'], h + a, config.eps), i)
    m = tap('mlp', jax.nn.gelu(layers.dense(p['up'], h), approximate=False), i)
    m = tap('feedforward', layers.dense(p['down'], m), i)
    return tap('block', layers.layer_norm(p['norm2'], h + m, config.eps), i)

  h = transformer.stack(block, p['layers'], h, remat, unroll)
  return h.astype(jnp.float32), transformer.extend(mask, h.shape[1], False)


def _draw(key: Array, config: Config, init: str | float) -> Tree:
  keys = jax.random.split(key, 4)
  d = config.d
  embed = {
    'tokens': layers.weight(keys[0], (config.vocabulary, d), init),
    'positions': layers.weight(keys[1], (config.positions, d), init),
    'types': layers.weight(keys[2], (config.types, d), init),
    'norm': transformer.norm_init(d),
  }
  block = lambda k: transformer.block_init(k, d, config.ffn, init)  # noqa: E731
  return {'embed': embed, 'layers': jax.vmap(block)(jax.random.split(keys[3], config.depth))}


# Our name -> theirs, below 'encoder.layer.{i}.'.
_BLOCK = {
  'q': 'attention.self.query',
  'k': 'attention.self.key',
  'v': 'attention.self.value',
  'o': 'attention.output.dense',
  'norm1': 'attention.output.LayerNorm',
  'up': 'intermediate.dense',
  'down': 'output.dense',
  'norm2': 'output.LayerNorm',
}
_IGNORED = ('pooler.', 'cls.', 'embeddings.position_ids')


def load(path: str | Path) -> tuple[Config, Tree]:
  """Reads a directory with config.json and model.safetensors of a BERT encoder.

  Args:
    path: what `pretrained.find` calls `path`, or any Hugging Face or sentence-transformers one. How hidden
      states are pooled is none of its weights: see `arguments`.

  Returns:
    Its shape, and the 'backbone' tree of f32 for `bert(config, classes, weights=...)`.

  Raises:
    UserError: another architecture, or tensors that are missing, left over, damaged or of another
      shape, by name. The pooler and the heads of pretraining are left out.
  """
  known = pretrained.config(path, {'model_type': 'bert', 'hidden_act': 'gelu'})
  if known.get('position_embedding_type', 'absolute') != 'absolute':
    raise UserError(f'{path}/config.json: only absolute position embeddings are supported')
  c = Config(
    *(
      pretrained.count(path, known, name)
      for name in (
        'vocab_size',
        'hidden_size',
        'num_hidden_layers',
        'num_attention_heads',
        'intermediate_size',
        'max_position_embeddings',
        'type_vocab_size',
      )
    ),
    eps=pretrained.number(path, known, 'layer_norm_eps', 1e-12),
  )
  d = c.d
  pretrained.divided(path, d, c.heads)
  pretrained.layered(path, c.depth)
  tables = {  # ours -> theirs, rows
    'tokens': ('embeddings.word_embeddings.weight', c.vocabulary),
    'positions': ('embeddings.position_embeddings.weight', c.positions),
    'types': ('embeddings.token_type_embeddings.weight', c.types),
  }
  wanted = {name: (rows, d) for name, rows in tables.values()}
  wanted |= {f'embeddings.LayerNorm.{k}': (d,) for k in ('weight', 'bias')}
  wanted |= pretrained.stack_shapes('encoder.layer.{}.', _BLOCK, c.depth, d, c.ffn)
  t = pretrained.tensors(path, wanted, prefix='bert.', ignored=_IGNORED)
  norm = {'scale': t['embeddings.LayerNorm.weight'], 'bias': t['embeddings.LayerNorm.bias']}
  embed = {ours: t[name] for ours, (name, _) in tables.items()} | {'norm': norm}
  blocks = pretrained.stack(t, 'encoder.layer.{}.', _BLOCK, c.depth)
  return c, jax.tree.map(jnp.asarray, {'embed': embed, 'layers': blocks})


def arguments(path: str | Path) -> dict[str, Any]:
  """'pool' and 'normalise' of `bert` as the files beside the weights say it, {} where they do not."""
  return sidecar.pooling(path)
