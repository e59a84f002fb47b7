"""Causal transformers as language models and as classifiers, for weights of Llama, GPT-2 and GPT-J."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cl_jax import durable
from cl_jax.errors import UserError
from cl_jax.masks import nest, paths
from cl_jax.models import causal, containers, gguf_llama, language, layers, pretrained, transformer
from cl_jax.models.causal import Config
from cl_jax.streams import tokenizer as tokenizers
from cl_jax.types import Array, Batch, Model, Out, Tree, no_tap


def decoder(
  config: Config,
  classes: int,
  weights: Tree = None,
  output: str = 'classes',
  measure: str = 'likelihood',
  pool: str = 'last',
  init: str | float = 0.02,
  remat: bool = False,
  unroll: bool = False,
  dtype: jnp.dtype = jnp.float32,
) -> Model:
  """A causal transformer over {'tokens': i32[B, L], 'mask': bool[B, L]}.

  Parameters: 'backbone' {'embed': {'tokens'[, 'positions']}, 'layers': 'q', 'k', 'v', 'o', 'norm1', 'up',
  'down'[, 'gate', 'norm2'], every leaf stacked [depth, ...], 'norm'[, 'unembed']}. Taps: 'embed', then per
  layer 'k' (after the rotation), 'v', 'scores', 'attention', 'middle', 'mlp' (the hidden units),
  'feedforward' and 'block', all [B, L, .]. What 'embed' puts before the first position is attended to and
  takes positions where they are rotary.

  With output='classes' it is a classifier as `bert` is: a 'head' {'w', 'b'} on `features` f32[B, d], the last
  hidden state of the last position of the mask, or the mean over it.

  With output='tokens' it is a language model: inputs have a third leaf 'learn' bool[B, L], the positions
  whose token is to be predicted from those before it; logits are f32[B, L, vocabulary], the ones at
  position i predict token i, and are 0 where there is nothing to learn. The loss of a row is the mean over
  its tokens to learn. Labels are not read; text may spell them (see `streams.text.answered`).

  Args:
    config: the shape; `load` returns the one of a file.
    classes: units of the output layer (of output='classes').
    weights: the 'backbone' that `init` returns instead of drawing one.
    output: 'classes' or 'tokens'.
    measure: what evaluation reports for 'tokens': the mean log-'likelihood' of a token in nats, or whether
      all tokens to learn of a row are 'exact'ly the most probable ones, which is what greedy decoding
      would write.
    pool: 'last' or 'mean', for 'classes'.
    init: of all weights that are drawn, see `layers.weight`.
    remat, unroll: see `transformer.stack`.
    dtype: of the activations between the layers; norms, softmax, features and logits are f32.

  Raises:
    UserError: unknown options, or sequences longer than `config.positions`.

  Deviation from the originals: no dropout.
  """
  for name, value, known in (
    ('output', output, ('classes', 'tokens')),
    ('measure', measure, tuple(language.MEASURES)),
    ('pool', pool, ('last', 'mean')),
    ('norm', config.norm, ('rms', 'layer')),
  ):
    if value not in known:
      raise UserError(f'{name}={value!r} is not known: use {" or ".join(map(repr, known))}')
  if config.heads % config.kv_heads:
    raise UserError(f'{config.kv_heads} key heads do not divide {config.heads} query heads')
  start = transformer.init_fn(
    lambda key: causal.draw(key, config, init), weights, config.d, classes, init
  )

  def begin(key: Array, batch: Batch) -> tuple[Tree, Tree]:
    params, stats = start(key, batch)
    return {'backbone': params['backbone']} if output == 'tokens' else params, stats

  def apply(variables: Tree, batch: Batch, tap=no_tap, train: bool = False) -> Out:
    del train
    p, x = variables['backbone'], batch.x
    if output == 'tokens' and not (isinstance(x, dict) and 'learn' in x):
      raise UserError(
        "a language model (output='tokens') learns from text whose tokens to learn are marked: use a "
        "dataset 'corpora:...' or config.data.template, or output='classes'"
      )
    h, mask = causal.encode(config, p, x, tap, remat, unroll, dtype)
    if pool == 'mean' and output == 'classes':
      f = jnp.einsum('bld,bl->bd', h, mask / jnp.maximum(mask.sum(-1, keepdims=True), 1))
    else:
      at = h.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
      f = jnp.take_along_axis(h, at[:, None, None], 1)[:, 0]
    if output == 'classes':
      return Out(layers.dense(variables['head'], f), f, {})
    h = h[:, h.shape[1] - x['tokens'].shape[1] :]
    return Out(language.shifted(causal.unembed(config, p, h), x['learn']), f, {})

  if output == 'classes':
    return Model(begin, apply, layers.softmax_cross_entropy, transformer.wires())
  return Model(begin, apply, language.loss, transformer.wires(), language.MEASURES[measure])


def load(path: str | Path) -> tuple[Config, Tree]:
  """Reads a causal transformer: a GGUF file of the Llama family, or a Hugging Face directory of model_type
  'llama', 'gpt2' or 'gptj' with model.safetensors, whole or in parts.

  Returns:
    Its shape, and the 'backbone' tree of f32 for `decoder(config, classes, weights=...)`.

  Raises:
    UserError: another architecture, or tensors that are missing, left over, damaged or of another shape.
  """
  path = Path(path)
  if containers.is_gguf(path):
    c, read = _from_gguf(path)
  else:
    c, read = _from_directory(path)
  leaves: dict[str, Any] = {}
  for ours in causal.shapes(c):
    if ours.startswith('layers/'):
      leaves[ours] = np.stack([read(ours, i) for i in range(c.depth)])
    else:
      leaves[ours] = read(ours, 0)
  return c, jax.tree.map(jnp.asarray, nest(leaves))


def writable(config: Config) -> None:
  """Refuses what `save` cannot write.

  Raises:
    UserError: a model that is not of the Llama family.
  """
  if config.norm != 'rms' or not config.rope or not config.gated or config.parallel:
    raise UserError('only models of the Llama family can be written')


def save(folder: str | Path, config: Config, backbone: Tree, tokenizer: str | Path) -> None:
  """Writes a backbone as a Hugging Face directory of model_type 'llama', which `load` reads again.

  Args:
    folder: is made; config.json, model.safetensors and tokenizer.json in it are replaced.
    config: of the Llama family.
    tokenizer: a tokenizer.json or GGUF file.

  Raises:
    UserError: another family, or a folder that cannot be written.
  """
  writable(config)
  tensors = {}
  for ours, a in paths(backbone).items():
    name, kind = _NAMES['llama'][ours]
    for i, one in enumerate(np.asarray(a)) if '{}' in name else [(0, np.asarray(a))]:
      tensors[name.format(i)] = one.T if kind == 'T' else one
  about = {
    'model_type': 'llama',
    'architectures': ['LlamaForCausalLM'],
    'vocab_size': config.vocabulary,
    'hidden_size': config.d,
    'num_hidden_layers': config.depth,
    'num_attention_heads': config.heads,
    'num_key_value_heads': config.kv_heads,
    'intermediate_size': config.ffn,
    'max_position_embeddings': config.positions,
    'head_dim': config.size,
    'rms_norm_eps': config.eps,
    'rope_theta': config.theta,
    'tie_word_embeddings': config.tied,
  }
  if config.scaling:
    keys = ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings')
    about['rope_scaling'] = {'rope_type': 'llama3', **dict(zip(keys, config.scaling, strict=True))}
  if config.factors:
    about['rope_scaling'] = {
      'rope_type': 'longrope',
      **dict.fromkeys(('short_factor', 'long_factor'), list(config.factors)),
      'attention_factor': 1.0,
      'factor': 1.0,
      'original_max_position_embeddings': config.positions,
    }
  folder = Path(folder)
  pretrained.write(folder, about, tensors)
  durable.write(folder / 'tokenizer.json', tokenizers.load(tokenizer).to_str() + '\n')


# Our path -> theirs, and how that is laid out: 'T' is [out, in]; 'q', 'k' and 'v' are thirds of a fused one.
_NAMES: dict[str, dict[str, tuple[str, str]]] = {
  'llama': {
    'embed/tokens': ('model.embed_tokens.weight', ''),
    **{f'layers/{n}/w': (f'model.layers.{{}}.self_attn.{n}_proj.weight', 'T') for n in 'qkvo'},
    **{
      f'layers/{n}/w': (f'model.layers.{{}}.mlp.{n}_proj.weight', 'T')
      for n in ('gate', 'up', 'down')
    },
    'layers/norm1/scale': ('model.layers.{}.input_layernorm.weight', ''),
    'layers/norm2/scale': ('model.layers.{}.post_attention_layernorm.weight', ''),
    'norm/scale': ('model.norm.weight', ''),
    'unembed/w': ('lm_head.weight', 'T'),
  },
  'gpt2': {
    'embed/tokens': ('wte.weight', ''),
    'embed/positions': ('wpe.weight', ''),
    **{
      f'layers/{n}/{ours}': (f'h.{{}}.attn.c_attn.{theirs}', n)
      for n in 'qkv'
      for ours, theirs in (('w', 'weight'), ('b', 'bias'))
    },
    **{
      f'layers/{n}/{ours}': (f'h.{{}}.{module}.{theirs}', '')
      for n, module in (('o', 'attn.c_proj'), ('up', 'mlp.c_fc'), ('down', 'mlp.c_proj'))
      for ours, theirs in (('w', 'weight'), ('b', 'bias'))
    },
    **{
      f'{n}/{ours}': (f'{module}.{theirs}', '')
      for n, module in (
        ('layers/norm1', 'h.{}.ln_1'),
        ('layers/norm2', 'h.{}.ln_2'),
        ('norm', 'ln_f'),
      )
      for ours, theirs in (('scale', 'weight'), ('bias', 'bias'))
    },
    'unembed/w': ('lm_head.weight', 'T'),
  },
  'gptj': {
    'embed/tokens': ('transformer.wte.weight', ''),
    **{f'layers/{n}/w': (f'transformer.h.{{}}.attn.{n}_proj.weight', 'T') for n in 'qkv'},
    'layers/o/w': ('transformer.h.{}.attn.out_proj.weight', 'T'),
    **{
      f'layers/{n}/{ours}': (f'transformer.h.{{}}.mlp.{module}.{theirs}', kind)
      for n, module in (('up', 'fc_in'), ('down', 'fc_out'))
      for ours, theirs, kind in (('w', 'weight', 'T'), ('b', 'bias', ''))
    },
    **{
      f'{n}/{ours}': (f'transformer.{module}.{theirs}', '')
      for n, module in (('layers/norm1', 'h.{}.ln_1'), ('norm', 'ln_f'))
      for ours, theirs in (('scale', 'weight'), ('bias', 'bias'))
    },
    'unembed/w': ('lm_head.weight', 'T'),
    'unembed/b': ('lm_head.bias', ''),
  },
  'gguf': {
    'embed/tokens': ('token_embd.weight', ''),
    **{f'layers/{n}/w': (f'blk.{{}}.attn_{n}.weight', 'T') for n in 'qkv'},
    'layers/o/w': ('blk.{}.attn_output.weight', 'T'),
    **{f'layers/{n}/w': (f'blk.{{}}.ffn_{n}.weight', 'T') for n in ('gate', 'up', 'down')},
    'layers/norm1/scale': ('blk.{}.attn_norm.weight', ''),
    'layers/norm2/scale': ('blk.{}.ffn_norm.weight', ''),
    'norm/scale': ('output_norm.weight', ''),
    'unembed/w': ('output.weight', 'T'),
  },
}


def _from_directory(path: Path) -> tuple[Config, Callable[[str, int], np.ndarray]]:
  known = pretrained.config(path, {})
  family = known.get('model_type')
  if family not in ('llama', 'gpt2', 'gptj'):
    raise UserError(
      f"{path}/config.json: model_type is {family!r}; a decoder reads 'llama', 'gpt2' and 'gptj'"
    )
  c = _CONFIGS[family](path, known)
  if c.rotary > c.size or c.rotary % 2:
    raise UserError(f'{path}/config.json: rotary_dim is {c.rotary}, a head has {c.size} channels')
  _heads(path, c)
  pretrained.layered(path, c.depth)
  wanted = _wanted(_NAMES[family], c)
  prefix = 'transformer.' if family == 'gpt2' else ''
  ignored = ('lm_head.',) if c.tied else ()
  ends = ('.attn.bias', '.attn.masked_bias', '.rotary_emb.inv_freq')
  t = pretrained.tensors(path, wanted, prefix, ignored, ends)
  return c, _reader(_NAMES[family], c, t)


def _from_gguf(file: Path) -> tuple[Config, Callable[[str, int], np.ndarray]]:
  source = containers.gguf(file)
  c = gguf_llama.config(source)
  if c.depth > len(source.shapes):  # before the names of billions of tensors are made up
    raise UserError(f'{file}: llama.block_count is {c.depth}, it has {len(source.shapes)} tensors')
  _heads(file, c)
  names = _NAMES['gguf']
  t = containers.exactly(source, _wanted(names, c) | gguf_llama.factors(source, c))
  c = gguf_llama.stretched(source, c, t)
  for n, heads in (('q', c.heads), ('k', c.kv_heads)):
    for i in range(c.depth):
      name = names[f'layers/{n}/w'][0].format(i)
      rows, columns = t[name].shape
      # llama.cpp keeps the two halves that are rotated together as neighbours.
      pairs = t[name].reshape(heads, rows // heads // 2, 2, columns)
      t[name] = pairs.swapaxes(1, 2).reshape(rows, columns)
  return c, _reader(names, c, t)


def _heads(place: Path, c: Config) -> None:
  """Refuses heads that cannot be shared out or rotated."""
  if c.heads % c.kv_heads:
    raise UserError(f'{place}: {c.kv_heads} key heads do not divide {c.heads} query heads')
  if c.rope and not c.rotary and c.size % 2:
    raise UserError(f'{place}: a head has {c.size} channels, which are rotated in pairs')


def _wanted(names: dict[str, tuple[str, str]], c: Config) -> dict[str, tuple[int, ...]]:
  wanted = {}
  for ours, shape in causal.shapes(c).items():
    name, kind = names[ours]
    theirs = shape[::-1] if kind == 'T' else (*shape[:-1], 3 * shape[-1]) if kind else shape
    for i in range(c.depth) if '{}' in name else (0,):
      wanted[name.format(i)] = theirs
  return wanted


def _reader(
  names: dict[str, tuple[str, str]], c: Config, t: dict[str, np.ndarray]
) -> Callable[[str, int], np.ndarray]:
  def read(ours: str, layer: int) -> np.ndarray:
    name, kind = names[ours]
    a = t[name.format(layer)]
    if kind == 'T':
      return a.T
    return np.split(a, 3, -1)['qkv'.index(kind)] if kind else a

  return read


def _only(path: Path, known: dict[str, Any], **computed: Any) -> None:
  """Refuses fields of another value than the one that is computed here, which is also what silence means."""
  for key, value in computed.items():
    if known.get(key, value) != value:
      raise UserError(
        f'{path}/config.json: {key} is {known[key]!r}, only {value!r} is supported here'
      )


def _llama(path: Path, known: dict[str, Any]) -> Config:
  _only(path, known, hidden_act='silu', attention_bias=False, mlp_bias=False)
  count = lambda key: pretrained.count(path, known, key)  # noqa: E731
  rope = pretrained.section(path, known, 'rope_parameters')
  rope = rope or pretrained.section(path, known, 'rope_scaling')
  kind = rope.get('rope_type', rope.get('type', 'default'))
  scaling, factors = (), None
  if kind == 'llama3':
    keys = ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings')
    scaling = tuple(pretrained.number(path, rope, k) for k in keys)
  elif kind == 'longrope':
    factors = _divisors(path, rope)
  elif kind != 'default':
    raise UserError(
      f"{path}/config.json: rope scaling {kind!r} is not supported here, 'default' and 'llama3' are"
    )
  heads = count('num_attention_heads')
  c = Config(
    count('vocab_size'),
    count('hidden_size'),
    count('num_hidden_layers'),
    heads,
    count('num_key_value_heads') if known.get('num_key_value_heads') is not None else heads,
    count('intermediate_size'),
    count('max_position_embeddings'),
    count('head_dim') if known.get('head_dim') is not None else 0,
    eps=pretrained.number(path, known, 'rms_norm_eps', 1e-6),
    theta=pretrained.number(path, known | rope, 'rope_theta', 1e4),
    scaling=scaling,
    tied=bool(known.get('tie_word_embeddings', False)),
    factors=factors,
  )
  if factors and len(factors) != c.size // 2:
    raise UserError(
      f'{path}/config.json: short_factor has {len(factors)} numbers, a head has {c.size} channels: it needs '
      'one for two of them'
    )
  return c


def _divisors(path: Path, rope: dict[str, Any]) -> tuple[float, ...]:
  """Of LongRoPE what `save` writes: the same divisors whatever the length, and no factor of the attention."""
  short = rope.get('short_factor')
  if (
    not isinstance(short, list)
    or not all(type(a) in (int, float) and 0 < a < pretrained.MOST for a in short)
    or short != rope.get('long_factor')
    or rope.get('attention_factor') != 1
  ):
    raise UserError(
      f"{path}/config.json: rope scaling 'longrope' is supported here only where short_factor and "
      'long_factor are the same positive numbers and attention_factor is 1'
    )
  return tuple(float(a) for a in short)


def _gpt2(path: Path, known: dict[str, Any]) -> Config:
  _only(path, known, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False)
  return _gpt(path, known)._replace(rope=False, tied=bool(known.get('tie_word_embeddings', True)))


def _gptj(path: Path, known: dict[str, Any]) -> Config:
  _only(path, known, tie_word_embeddings=False)  # its output layer has biases
  rotary = pretrained.count(path, known, 'rotary_dim')
  return _gpt(path, known)._replace(
    theta=1e4, rotary=rotary, interleaved=True, parallel=True, tied=False
  )


def _gpt(path: Path, known: dict[str, Any]) -> Config:
  """What GPT-2 and GPT-J call alike."""
  pretrained.config(path, {'activation_function': 'gelu_new'})
  count = lambda key: pretrained.count(path, known, key)  # noqa: E731
  d, heads = count('n_embd'), count('n_head')
  return Config(
    count('vocab_size'),
    d,
    count('n_layer'),
    heads,
    heads,
    count('n_inner') if known.get('n_inner') is not None else 4 * d,
    count('n_positions'),
    norm='layer',
    eps=pretrained.number(path, known, 'layer_norm_epsilon', 1e-5),
    gated=False,
  )


_CONFIGS = {'llama': _llama, 'gpt2': _gpt2, 'gptj': _gptj}
