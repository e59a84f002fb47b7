"""The causal transformer of the Llama, GPT-2 and GPT-J families: its forward pass, and generation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cl_jax.errors import UserError
from cl_jax.masks import nest
from cl_jax.models import layers, transformer
from cl_jax.types import Array, Tree, no_tap


class Config(NamedTuple):
  """The shape of a causal transformer; the default is SmolLM2-135M.

  Attributes:
    head: channels of a head; 0 is d // heads.
    norm: 'rms' (Zhang & Sennrich 2019) or 'layer'.
    rope: whether positions rotate queries and keys (Su et al. 2021) or are learnt, `positions` of them.
    rotary: channels of a head that are rotated; 0 is all.
    interleaved: rotate channels 2i and 2i + 1 (GPT-J) instead of i and i + rotary / 2.
    scaling: () or Llama 3's (factor, low_freq_factor, high_freq_factor, original positions).
    gated: SwiGLU (Shazeer 2020), else GELU in its tanh form.
    parallel: attention and MLP read the same norm and are added together (GPT-J).
    tied: logits by the token embeddings.
    factors: what the frequencies are divided by, one number for each, as files give it in the place of
      `scaling`; None is 1. No field of a configuration.
  """

  vocabulary: int = 49152
  d: int = 576
  depth: int = 30
  heads: int = 9
  kv_heads: int = 3
  ffn: int = 1536
  positions: int = 8192
  head: int = 0
  norm: str = 'rms'
  eps: float = 1e-5
  rope: bool = True
  theta: float = 1e5
  rotary: int = 0
  interleaved: bool = False
  scaling: tuple[float, ...] = ()
  gated: bool = True
  parallel: bool = False
  tied: bool = True
  factors: Sequence[float] | None = None

  @property
  def size(self) -> int:
    return self.head or self.d // self.heads


def encode(
  config: Config,
  p: Tree,
  x: Tree,
  tap=no_tap,
  remat: bool = False,
  unroll: bool = False,
  dtype: jnp.dtype = jnp.float32,
) -> tuple[Array, Array]:
  """The last hidden states f32[B, L, d], after the final norm, and which of them are tokens, bool[B, L].

  L includes what the tap 'embed' puts before the first position, which is no token. Rotary places are counted
  from it on; learned positions are those of the tokens, and it has none.
  """
  tokens, mask = x['tokens'], x['mask'] > 0
  h = p['embed']['tokens'][tokens]
  if not config.rope:
    h = h + p['embed']['positions'][places_of(mask, config)]
  h = tap('embed', h, 0).astype(dtype)
  seen = transformer.extend(mask, h.shape[1])
  places = places_of(seen, config) if config.rope else None
  causal = jnp.tril(jnp.ones((h.shape[1],) * 2, bool)) & seen[:, None, :]

  def layer(p: Tree, h: Array, i: Array) -> Array:
    def attend(q, k, v):
      k, v = tap('k', k, i), tap('v', v, i)
      before = jnp.ones((*causal.shape[:2], k.shape[1] - h.shape[1]), bool)
      return attention(config, q, k, v, jnp.concatenate([before, causal], 2), tap, i)

    return block(config, transformer.cast(p, dtype), h, i, places, attend, tap)

  h = transformer.stack(layer, p['layers'], h, remat, unroll)
  h = norm(config, p['norm'], h.astype(jnp.float32))
  return h, transformer.extend(mask, h.shape[1], False)


def unembed(config: Config, p: Tree, h: Array) -> Array:
  """Logits f32[..., vocabulary] of last hidden states."""
  if config.tied:
    return h @ p['embed']['tokens'].T
  return layers.dense(p['unembed'], h)


def generate(
  config: Config,
  p: Tree,
  tokens: Array,
  mask: Array,
  steps: int,
  key=None,
  temperature: float = 1.0,
) -> Array:
  """Continues each row by `steps` tokens, one at a time with the keys and values of the others kept.

  Args:
    p: the 'backbone'.
    tokens, mask: i32[B, L], bool[B, L]; rows of different length are padded on the LEFT.
    key: draws from the softmax at `temperature`; None takes the most probable token.

  Returns:
    i32[B, steps].
  """
  b, length = tokens.shape
  total = checked(config, length + steps)
  empty = jnp.zeros((config.depth, b, total, config.kv_heads * config.size))
  seen = jnp.concatenate([mask > 0, jnp.zeros((b, steps), bool)], 1)

  def forward(tokens, seen, cache, at):
    """The logits after `tokens` i32[B, n], which stand at positions at, at + 1, ..."""
    n = tokens.shape[1]
    rows = at + jnp.arange(n)
    places = jnp.take_along_axis(places_of(seen, config), jnp.broadcast_to(rows, (b, n)), 1)
    visible = seen[:, None, :] & (jnp.arange(total) <= rows[:, None])
    h = p['embed']['tokens'][tokens]
    if not config.rope:
      h = h + p['embed']['positions'][places]

    def layer(h, inputs):
      weights, i, kept = inputs
      new: list[Array] = []

      def attend(q, k, v):
        write = lambda old, a: jax.lax.dynamic_update_slice(old, a, (0, at, 0))  # noqa: E731
        new.extend([write(kept[0], k), write(kept[1], v)])
        return attention(config, q, new[0], new[1], visible)

      h = block(config, weights, h, i, places, attend, no_tap)
      return h, tuple(new)

    h, cache = jax.lax.scan(layer, h, (p['layers'], jnp.arange(config.depth), cache))
    return unembed(config, p, norm(config, p['norm'], h[:, -1])), cache

  def choose(logits, i):
    if key is None:
      return logits.argmax(-1).astype(jnp.int32)
    drawn = jax.random.categorical(jax.random.fold_in(key, i), logits / temperature)
    return drawn.astype(jnp.int32)

  def step(carry, i):
    seen, cache, last = carry
    seen = seen.at[:, length + i].set(True)
    logits, cache = forward(last[:, None], seen, cache, length + i)
    new = choose(logits, i + 1)
    return (seen, cache, new), last

  logits, cache = forward(tokens, seen, (empty, empty), 0)
  _, out = jax.lax.scan(step, (seen, cache, choose(logits, 0)), jnp.arange(steps))
  return out.T


def checked(config: Config, tokens: int) -> int:
  """The number of tokens of a row.

  Raises:
    UserError: the model has fewer positions.
  """
  if tokens > config.positions:
    raise UserError(f'{tokens} tokens exceed the {config.positions} positions of this model')
  return tokens


def attention(
  config: Config, q: Array, k: Array, v: Array, seen: Array, tap=no_tap, layer: Array | int = 0
) -> Array:
  """Grouped-query attention (Ainslie et al. 2023), scores and softmax in f32.

  Args:
    q: [B, L, heads * size]. k, v: [B, M, kv_heads * size]; each of their heads serves heads / kv_heads.
    seen: bool[B, L, M].
    tap, layer: for the tap 'scores' [B, heads, L, M].
  """
  b, n, m, size = q.shape[0], q.shape[1], k.shape[1], config.size
  q = q.reshape(b, n, config.kv_heads, -1, size)
  k, v = (a.reshape(b, m, config.kv_heads, size) for a in (k, v))
  exact = jnp.promote_types(q.dtype, jnp.float32)  # of bfloat16, too, sums are not rounded
  scores = jnp.einsum('bqkgd,bmkd->bkgqm', q, k, preferred_element_type=exact)
  scores = scores.astype(jnp.float32) / math.sqrt(size)
  scores = jnp.where(seen[:, None, None], scores, jnp.finfo(jnp.float32).min)
  flat = scores.reshape(b, config.heads, n, m)
  scores = tap('scores', flat, layer).reshape(scores.shape)
  share = jax.nn.softmax(scores, -1).astype(v.dtype)
  return jnp.einsum('bkgqm,bmkd->bqkgd', share, v).reshape(b, n, -1)


def rotate(config: Config, x: Array, places: Array) -> Array:
  """Rotary position embedding of [B, L, heads * size] at places i32[B, L], in f32."""
  b, n, size = *x.shape[:2], config.size
  width = config.rotary or size
  angle = places[..., None, None] * frequencies(config)  # [B, L, 1, width / 2]
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  h = x.reshape(b, n, -1, size).astype(jnp.float32)
  turned, rest = h[..., :width], h[..., width:]
  if config.interleaved:
    one, two = turned[..., ::2], turned[..., 1::2]
  else:
    one, two = jnp.split(turned, 2, -1)
  pair = (one * cos - two * sin, two * cos + one * sin)
  turned = (
    jnp.stack(pair, -1).reshape(turned.shape) if config.interleaved else jnp.concatenate(pair, -1)
  )
  return jnp.concatenate([turned, rest], -1).reshape(x.shape).astype(x.dtype)


def frequencies(config: Config) -> Array:
  """f32[rotary / 2], radians per position; Llama 3 stretches the slow ones (`scaling` or `factors`)."""
  width = config.rotary or config.size
  f = config.theta ** -(jnp.arange(0, width, 2, dtype=jnp.float32) / width)
  if config.factors:
    return f / jnp.asarray(config.factors, jnp.float32)
  if not config.scaling:
    return f
  factor, low, high, original = config.scaling
  turns = original * f / (2 * math.pi)
  smooth = jnp.clip((turns - low) / (high - low), 0, 1)
  return (1 - smooth) * f / factor + smooth * f


def block(config: Config, p: Tree, h: Array, i: Array, places: Array | None, attend, tap) -> Array:
  """One layer: weights p, residual stream h [B, L, d], `attend(q, k, v)` -> [B, L, heads * size].

  `places` i32[B, L] are None where positions are learnt.
  """
  n = norm(config, p['norm1'], h)
  q, k, v = (layers.dense(p[name], n) for name in 'qkv')
  if config.rope:
    assert places is not None
    q, k = rotate(config, q, places), rotate(config, k, places)
  a = tap('attention', layers.dense(p['o'], attend(q, k, v)), i)
  middle = tap('middle', h if config.parallel else h + a, i)
  n = n if config.parallel else norm(config, p['norm2'], middle)
  up = layers.dense(p['up'], n)
  m = jax.nn.silu(layers.dense(p['gate'], n)) * up if config.gated else jax.nn.gelu(up)
  m = tap('feedforward', layers.dense(p['down'], tap('mlp', m, i)), i)
  return tap('block', middle + m + (a if config.parallel else 0), i)


def norm(config: Config, p: Tree, h: Array) -> Array:
  """The normalisation that the family has, over the last axis."""
  return (layers.rms_norm if config.norm == 'rms' else layers.layer_norm)(p, h, config.eps)


def places_of(mask: Array, config: Config) -> Array:
  """i32[B, L]: a token's position among its row's, whichever side is padded."""
  if mask.shape[1] > config.positions:
    raise UserError(
      f'sequences of {mask.shape[1]} tokens exceed the {config.positions} positions of this model: '
      'cut them when they are tokenised'
    )
  return jnp.maximum(jnp.cumsum(mask, 1, dtype=jnp.int32) - 1, 0)


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
  """{path in the backbone: shape} of every parameter; those of one layer without the leading axis."""
  c, kv = config, config.kv_heads * config.size
  wide = c.heads * c.size
  dense = {'q': (c.d, wide), 'k': (c.d, kv), 'v': (c.d, kv), 'o': (wide, c.d), 'up': (c.d, c.ffn)}
  dense |= {'down': (c.ffn, c.d)} | ({'gate': (c.d, c.ffn)} if c.gated else {})
  found = {'embed/tokens': (c.vocabulary, c.d)}
  if not c.rope:
    found['embed/positions'] = (c.positions, c.d)
  found |= {f'layers/{k}/w': shape for k, shape in dense.items()}
  biased = () if c.norm == 'rms' else ('up', 'down') if c.parallel else tuple(dense)
  found |= {f'layers/{k}/b': dense[k][1:] for k in biased}
  parts = ('scale',) if c.norm == 'rms' else ('scale', 'bias')
  for where in ('norm', 'layers/norm1', *(() if c.parallel else ('layers/norm2',))):
    found |= {f'{where}/{part}': (c.d,) for part in parts}
  if not c.tied:
    found['unembed/w'] = (c.d, c.vocabulary)
    if c.parallel:
      found['unembed/b'] = (c.vocabulary,)
  return found


def draw(key: Array, config: Config, init: str | float) -> Tree:
  """A backbone with weights by `layers.weight`, norms of 1 and biases of 0."""
  leaves = {}
  for path, shape in shapes(config).items():
    stacked = (config.depth, *shape) if path.startswith('layers/') else shape
    if path.endswith('scale'):
      leaves[path] = jnp.ones(stacked)
    elif path.endswith(('/b', 'bias')):
      leaves[path] = jnp.zeros(stacked)
    else:
      key, one = jax.random.split(key)
      new = lambda k, shape=shape: layers.weight(k, shape, init)  # noqa: E731
      leaves[path] = (
        jax.vmap(new)(jax.random.split(one, config.depth)) if stacked != shape else new(one)
      )
  return nest(leaves)
