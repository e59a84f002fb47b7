"""Two tiny causal transformers and three edits of them, shared by the references of knowledge editing.

PyTorch float64 without padding or batches: one sequence at a time, gradients by autograd. Nothing here
imports the library under test. `editing.py` writes the files and lists every key;
`verify_editing.py` has the same networks in NumPy.

Networks (d = 16, 4 layers, 4 query heads of 4, 24 hidden units, vocabulary 40, eps 1e-5, matrices
[in, out] applied as x @ w + b; the token matrix is tied, logits = norm(h) @ embed/tokens^T):
  gpt2   layer norm with biases, learnt positions from 0 on, 4 key heads, GELU with tanh, biases
  llama  RMSNorm, 2 key heads (query heads 0, 1 read key head 0), no biases, SwiGLU
         silu(n @ gate/w) * (n @ up/w); q and k are rotated: channels (i, i + 2) of a head by the angle
         position * 1e4^(-2i/4)
  layer  h <- h + o(attention(norm1(h))); h <- h + down(hidden units of norm2(h))
Heads are consecutive channels; softmax(q k^T / sqrt(4)), causal.

Sites, by the names of `tap(site, layer, x)`: 'embed' (rows of the token matrix, before positions),
'attention' (what o returns, its bias included), 'key' (what down reads), 'feedforward' (what down
returns, its bias included), 'block' (the residual stream behind the layer).

A request has P = 4 contexts: the plain prompt and the same behind one of three prefixes that all
requests share. A prompt is [tokens, subject, tokens]. `sequences` hold context and target; the last
target token is never fed, target token j is predicted from the position before its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import problem as pb
import torch
import torch.nn.functional as F

torch.set_default_dtype(torch.float64)

D, DEPTH, HEADS, SIZE, FFN, VOCABULARY, POSITIONS, EPS = 16, 4, 4, 4, 24, 40, 32, 1e-5
THETA = 1e4
KV_HEADS = {'gpt2': 4, 'llama': 2}
# tokens before the subject, of the subject, behind it, of the target
SHAPES = ((1, 2, 2, 1), (0, 3, 1, 2), (2, 1, 0, 2))
PREFIXES = (2, 3, 2)

Tensor = torch.Tensor
Tensors = dict[str, Tensor]
Tap = Callable[[str, int, Tensor], Tensor]


class Net(NamedTuple):
  """Which of the two networks, and its parameters by the names of the file."""

  name: str
  params: Tensors


class Request(NamedTuple):
  sequences: list[list[int]]  # context and target, P of them
  subject: list[int]  # index of the subject's last token in each
  begin: list[int]  # index of the first target token in each
  essence: list[int]  # the subject and two tokens that all requests share
  essence_subject: int


def init(name: str, rng: np.random.Generator) -> pb.Params:
  kv = KV_HEADS[name] * SIZE
  sizes = {'q': (D, D), 'k': (D, kv), 'v': (D, kv), 'o': (D, D), 'up': (D, FFN), 'down': (FFN, D)}
  norms = {'layers/norm1': (DEPTH, D), 'layers/norm2': (DEPTH, D), 'norm': (D,)}
  if name == 'llama':
    sizes['gate'] = (D, FFN)
  out = {'embed/tokens': rng.normal(size=(VOCABULARY, D)) * 0.3}
  if name == 'gpt2':
    out['embed/positions'] = rng.normal(size=(POSITIONS, D)) * 0.3
  for layer, size in sizes.items():
    out[f'layers/{layer}/w'] = rng.normal(size=(DEPTH, *size)) * 0.3
    if name == 'gpt2':
      out[f'layers/{layer}/b'] = rng.normal(size=(DEPTH, size[1])) * 0.1
  for norm, size in norms.items():
    out[f'{norm}/scale'] = 1 + rng.normal(size=size) * 0.1
    if name == 'gpt2':
      out[f'{norm}/bias'] = rng.normal(size=size) * 0.1
  return out


def requests(rng: np.random.Generator) -> list[Request]:
  draw = lambda n: rng.integers(0, VOCABULARY, size=n).tolist()  # noqa: E731
  prefixes = [[]] + [draw(n) for n in PREFIXES]
  tail = draw(2)
  out = []
  for before, subject, behind, target in SHAPES:
    names = draw(subject)
    prompt, answer = draw(before) + names + draw(behind), draw(target)
    out.append(
      Request(
        sequences=[p + prompt + answer for p in prefixes],
        subject=[len(p) + before + subject - 1 for p in prefixes],
        begin=[len(p) + len(prompt) for p in prefixes],
        essence=names + tail,
        essence_subject=subject - 1,
      )
    )
  return out


def keep(site: str, layer: int, x: Tensor) -> Tensor:
  del site, layer
  return x


def normed(net: Net, x: Tensor, name: str, at: tuple = ()) -> Tensor:
  scale = net.params[f'{name}/scale'][at]
  if net.name == 'llama':
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + EPS) * scale
  return F.layer_norm(x, (D,), scale, net.params[f'{name}/bias'][at], EPS)


def linear(net: Net, x: Tensor, name: str, layer: int) -> Tensor:
  y = x @ net.params[f'layers/{name}/w'][layer]
  return y + net.params[f'layers/{name}/b'][layer] if net.name == 'gpt2' else y


def rotated(x: Tensor) -> Tensor:
  """[heads, positions, 4], each pair of channels (i, i + 2) as a complex number times e^(i angle)."""
  half = SIZE // 2
  angle = torch.outer(torch.arange(x.shape[1]).double(), THETA ** (-2 * torch.arange(half) / SIZE))
  turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
  return torch.cat([turned.real, turned.imag], -1)


def attention(net: Net, x: Tensor, layer: int) -> Tensor:
  heads = {}
  for name, count in (('q', HEADS), ('k', KV_HEADS[net.name]), ('v', KV_HEADS[net.name])):
    heads[name] = linear(net, x, name, layer).reshape(len(x), count, SIZE).transpose(0, 1)
    if net.name == 'llama' and name != 'v':
      heads[name] = rotated(heads[name])
    heads[name] = heads[name].repeat_interleave(HEADS // count, 0)
  scores = heads['q'] @ heads['k'].mT / math.sqrt(SIZE)
  scores = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -math.inf)
  mixed = (scores.softmax(-1) @ heads['v']).transpose(0, 1).reshape(len(x), D)
  return linear(net, mixed, 'o', layer)


def hidden(net: Net, x: Tensor, layer: int) -> Tensor:
  up = linear(net, x, 'up', layer)
  if net.name == 'llama':
    return F.silu(linear(net, x, 'gate', layer)) * up
  return F.gelu(up, approximate='tanh')


def forward(net: Net, tokens: list[int], tap: Tap = keep) -> Tensor:
  """Logits [positions, vocabulary] of one sequence."""
  h = tap('embed', 0, net.params['embed/tokens'][tokens])
  if net.name == 'gpt2':
    h = h + net.params['embed/positions'][: len(tokens)]
  for i in range(DEPTH):
    h = h + tap('attention', i, attention(net, normed(net, h, 'layers/norm1', (i,)), i))
    key = tap('key', i, hidden(net, normed(net, h, 'layers/norm2', (i,)), i))
    h = h + tap('feedforward', i, linear(net, key, 'down', i))
    h = tap('block', i, h)
  return normed(net, h, 'norm') @ net.params['embed/tokens'].T


def states(net: Net, tokens: list[int]) -> dict[tuple[str, int], Tensor]:
  """What every site of every layer holds, [positions, .]."""
  found = {}

  def tap(site: str, layer: int, x: Tensor) -> Tensor:
    found[site, layer] = x
    return x

  forward(net, tokens, tap)
  return found


def at_subject(net: Net, request: Request, site: str, layer: int) -> Tensor:
  """[P, .]: the site at the subject's last token in every context."""
  rows = zip(request.sequences, request.subject, strict=True)
  return torch.stack([states(net, tokens)[site, layer][at] for tokens, at in rows])


def averaged_key(net: Net, request: Request, layer: int) -> Tensor:
  """[ffn]: the plain prompt counts as much as all the prefixed ones together (MEMIT's compute_ks)."""
  keys = at_subject(net, request, 'key', layer)
  return (keys[0] + keys[1:].mean(0)) / 2


def written(net: Net, layer: int, w: Tensor) -> Net:
  """The network with another down/w in one layer."""
  down = net.params['layers/down/w'].clone()
  down[layer] = w
  return net._replace(params=net.params | {'layers/down/w': down})


def answers(net: Net, asked: list[Request]) -> Tensor:
  """[N, vocabulary]: logits behind every plain prompt, which predict the first target token."""
  rows = [forward(net, r.sequences[0][: r.begin[0]])[-1] for r in asked]
  return torch.stack(rows)
