"""The pre-norm Vision Transformer of adapter and ease in PyTorch float64, and its parameters.

Dosovitskiy et al. 2021. Images [B, 4, 4, 1] are cut row by row into patches of 2 x 2 pixels (a patch row by
row too), h = patch @ w + b, a class token goes before, positions are added to all five; per layer
  h <- h + A(attention(norm1(h)));  h <- h + F(down(gelu(up(norm2(h)))), h)
with two heads, the scores divided by sqrt(d / heads), the exact GELU (erf) and F, A what an adapter makes
of the output (of the second, with the residual stream `h` that enters the block); then a last norm. The
features are those of the class token. Norms divide by sqrt(variance + 1e-12), the variance with 1/d.
Everything is x @ w + b, w [in, out]; 'layers' have a leading axis [depth].
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

torch.set_default_dtype(torch.float64)

Tensors = dict[str, torch.Tensor]
IMAGE, PATCH, D, DEPTH, HEADS, FFN, EPS = 4, 2, 8, 2, 2, 12, 1e-12
SHAPES = {'q': (D, D), 'k': (D, D), 'v': (D, D), 'o': (D, D), 'up': (D, FFN), 'down': (FFN, D)}


def init(rng: np.random.Generator, classes: int) -> Tensors:
  """'backbone/...' and 'head/w', 'head/b'; neither biases nor norms are trivial."""
  weight = lambda *s: rng.normal(size=s) / np.sqrt(s[-2])  # noqa: E731
  bias = lambda *s: 0.2 * rng.normal(size=s)  # noqa: E731
  out = {'backbone/patch/w': weight(PATCH**2, D), 'backbone/patch/b': bias(D)}
  out |= {'backbone/cls': rng.normal(size=D), 'backbone/positions': 0.5 * rng.normal(size=(5, D))}
  for name, shape in SHAPES.items():
    out[f'backbone/layers/{name}/w'] = weight(DEPTH, *shape)
    out[f'backbone/layers/{name}/b'] = bias(DEPTH, shape[1])
  for name, lead in (('layers/norm1', (DEPTH,)), ('layers/norm2', (DEPTH,)), ('norm', ())):
    out[f'backbone/{name}/scale'] = 1 + bias(*lead, D)
    out[f'backbone/{name}/bias'] = bias(*lead, D)
  out |= {'head/w': weight(D, classes), 'head/b': bias(classes)}
  return {k: torch.from_numpy(np.asarray(v)) for k, v in out.items()}


def images(
  rng: np.random.Generator, classes_of_task: list[list[int]], steps: int, rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
  """xs [tasks, steps, rows, 4, 4, 1] and ys [tasks, steps, rows], a pattern per class with noise."""
  centres = rng.normal(size=(1 + max(map(max, classes_of_task)), IMAGE, IMAGE, 1))
  ys = np.zeros((len(classes_of_task), steps, rows), np.int64)
  for t, classes in enumerate(classes_of_task):
    for s in range(steps):
      ys[t, s] = rng.permutation(np.resize(classes, rows))
  xs = centres[ys] + 0.5 * rng.normal(size=(*ys.shape, IMAGE, IMAGE, 1))
  return torch.from_numpy(xs), torch.from_numpy(ys)


def norm(p: Tensors, name: str, x: torch.Tensor, i: int | None = None) -> torch.Tensor:
  scale, bias = p[f'backbone/{name}/scale'], p[f'backbone/{name}/bias']
  scale, bias = (scale, bias) if i is None else (scale[i], bias[i])
  x = x - x.mean(-1, keepdim=True)
  return x / torch.sqrt((x**2).mean(-1, keepdim=True) + EPS) * scale + bias


def gelu(x: torch.Tensor) -> torch.Tensor:
  return x * 0.5 * (1 + torch.erf(x / np.sqrt(2.0)))


def cut(x: torch.Tensor) -> torch.Tensor:
  """[B, 4, 4, 1] to [B, 4, 4]: four patches of four pixels."""
  parts = [
    x[:, r : r + PATCH, c : c + PATCH].reshape(len(x), -1)
    for r in range(0, IMAGE, PATCH)
    for c in range(0, IMAGE, PATCH)
  ]
  return torch.stack(parts, 1)


def features(
  p: Tensors,
  x: torch.Tensor,
  attention: Callable[[torch.Tensor, int], torch.Tensor] = lambda out, i: out,
  feedforward: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor] = lambda out, h, i: out,
) -> torch.Tensor:
  """[B, d]; `attention(output, layer)` and `feedforward(output, middle, layer)` are the adapters."""
  h = cut(x) @ p['backbone/patch/w'] + p['backbone/patch/b']
  cls = p['backbone/cls'].expand(len(x), 1, D)
  h = torch.cat([cls, h], 1) + p['backbone/positions']
  for i in range(DEPTH):
    dense = lambda name, a, i=i: (  # noqa: E731
      a @ p[f'backbone/layers/{name}/w'][i] + p[f'backbone/layers/{name}/b'][i]
    )
    n, parts = norm(p, 'layers/norm1', h, i), []
    q, k, v = dense('q', n), dense('k', n), dense('v', n)
    for c in torch.arange(D).split(D // HEADS):
      scores = q[..., c] @ k[..., c].transpose(1, 2) / np.sqrt(D // HEADS)
      parts.append(torch.softmax(scores, -1) @ v[..., c])
    h = h + attention(dense('o', torch.cat(parts, -1)), i)
    out = dense('down', gelu(dense('up', norm(p, 'layers/norm2', h, i))))
    h = h + feedforward(out, h, i)
  return norm(p, 'norm', h)[:, 0]


def logits(p: Tensors, f: torch.Tensor) -> torch.Tensor:
  return f @ p['head/w'] + p['head/b']


def bottleneck(rng: np.random.Generator, m: int, *lead: int) -> Tensors:
  """'down/w' [..., d, m], 'down/b', 'up/w' [..., m, d], 'up/b', with up = 0."""
  out = {'down/w': rng.normal(size=(*lead, D, m)) / np.sqrt(D)}
  out |= {'down/b': 0.2 * rng.normal(size=(*lead, m))}
  out |= {'up/w': np.zeros((*lead, m, D)), 'up/b': np.zeros((*lead, D))}
  return {k: torch.from_numpy(v) for k, v in out.items()}


def step(
  p: Tensors, trained: list[str], loss_of: Callable[[Tensors], torch.Tensor], lr: float
) -> tuple[float, Tensors]:
  """The loss before, and all parameters after a step of SGD on those of `trained`."""
  leaves = {k: p[k].detach().clone().requires_grad_() for k in trained}
  loss = loss_of(p | leaves)
  grads = torch.autograd.grad(loss, list(leaves.values()))
  new = {k: p[k] - lr * g for k, g in zip(trained, grads, strict=True)}
  return float(loss.detach()), p | new


def nearby(rng: np.random.Generator, p: Tensors) -> Tensors:
  noise = lambda v: torch.from_numpy(rng.uniform(-1, 1, size=tuple(v.shape)))  # noqa: E731
  return {k: v * (1 + 6e-8 * noise(v)) for k, v in p.items()}


def arrays(tensors: Tensors) -> dict[str, np.ndarray]:
  return {k: v.detach().numpy() for k, v in tensors.items()}
