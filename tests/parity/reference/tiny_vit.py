"""The tiny problem of the prompt references: a pre-norm ViT in PyTorch float64, gradients by autograd.

Shared by l2p, dualprompt, coda, sprompts, prompt_tuning and prefix_tuning. Nothing here imports the
library under test; the network is that of Dosovitskiy et al. 2021 with the layout below, every matrix
[in, out] and applied as x @ w + b. `verify_pretrained_b.py` has the same network and its gradients by
hand in NumPy.

Network (images [B, 4, 4, 1], patch 2, d = 8, 3 layers, 2 heads, 12 hidden units, 6 outputs, eps 1e-12):
  rows     patches in row-major order, a patch's pixels in row-major order [B, 4, 4] @ patch/w + patch/b
  h        [cls, rows] + positions [B, 5, 8]; `embed` [B, n, 8] is put BEFORE it, without positions
  layer i  n = norm1(h); k = n @ k/w + k/b, v likewise; `prefix[i]` = (keys, values) [B, n, 8] are put
           before k and v (after the projections); q from n; both heads are consecutive halves of the 8
           channels; softmax(q k^T / sqrt(4)) v; h <- h + that @ o/w + o/b
           h <- h + gelu(norm2(h) @ up/w + up/b) @ down/w + down/b, gelu with the error function
  feature  norm(h) at the class token (row n of the sequence); logits = feature @ head/w + head/b
The frozen feature q is the feature without `embed` and `prefix`.

Every golden file of these methods has, besides its own keys, the inputs
  init/backbone/patch/w [4,8], patch/b [8], cls [8], positions [5,8], norm/scale [8], norm/bias [8]
  init/backbone/layers/<q|k|v|o>/<w|b> [3,8,8], [3,8]; layers/up/<w|b> [3,8,12], [3,12];
  init/backbone/layers/down/<w|b> [3,12,8], [3,8]; layers/<norm1|norm2>/<scale|bias> [3,8]
  init/head/w [8,6], init/head/b [6]     (the backbone never trains)
  xs [3,4,5,4,4,1], ys [3,4,5], ws [3,4,5]   [task, step, row]; task t has the classes 2t and 2t + 1
  probe [8,4,4,1], lr
In the second and fourth step of a task one row has ws = 0: its image is garbage and its label any; it
must not influence anything. Here such rows are cut out before anything is computed. All 6 outputs
compete in the cross-entropy CE, a mean over the rows with ws = 1. A step is p <- p - lr * gradient.

And the outputs, V the variant:
  V/params/<name> [3,4,...]   of everything that trains, AFTER every step
  V/loss, V/ce [3,4]          the whole loss and its CE part BEFORE the step
  V/probe_logits [3,8,6]      after each task's last step, BEFORE its boundary
  V/probe_after [3,8,6]       behind the boundary, where that makes a difference (see the method)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import problem as pb
import torch
import torch.nn.functional as F

torch.set_default_dtype(torch.float64)

IMAGE, PATCH, D, DEPTH, HEADS, FFN, CLASSES, EPS = 4, 2, 8, 3, 2, 12, 6, 1e-12
TASKS, STEPS, ROWS, PROBE = 3, 4, 5, 8
PATCHES = (IMAGE // PATCH) ** 2
BLOCK = {'q': (D, D), 'k': (D, D), 'v': (D, D), 'o': (D, D), 'up': (D, FFN), 'down': (FFN, D)}

Tensor = torch.Tensor
Tensors = dict[str, Tensor]
Prefix = dict[int, tuple[Tensor, Tensor]]


def init(rng: np.random.Generator) -> pb.Params:
  """Backbone and head; biases, scales and positions are random too, so that a mistake in them shows.

  The matrices are large: features of different images differ in direction, and prompts move visibly.
  """
  draw = lambda *shape, s=0.25: rng.normal(size=shape) * s  # noqa: E731
  p = {
    'patch/w': draw(PATCH * PATCH, D, s=0.8),
    'patch/b': draw(D),
    'cls': draw(D),
    'positions': draw(1 + PATCHES, D),
    'norm/scale': 1 + draw(D),
    'norm/bias': draw(D),
  }
  for name, (fan_in, fan_out) in BLOCK.items():
    p[f'layers/{name}/w'] = draw(DEPTH, fan_in, fan_out, s=0.6)
    p[f'layers/{name}/b'] = draw(DEPTH, fan_out)
  for name in ('norm1', 'norm2'):
    p[f'layers/{name}/scale'] = 1 + draw(DEPTH, D)
    p[f'layers/{name}/bias'] = draw(DEPTH, D)
  return pb.prefixed('backbone', p) | {'head/w': draw(D, CLASSES, s=0.8), 'head/b': draw(CLASSES)}


def tasks(rng: np.random.Generator) -> dict:
  """The stream and the probe: a Gaussian cloud of images per class."""
  shape = (IMAGE, IMAGE, 1)
  centres = rng.normal(size=(CLASSES, *shape)) * 1.5
  ys = np.stack(
    [
      [2 * t + rng.permutation([0, 1, *rng.integers(0, 2, size=ROWS - 2)]) for _ in range(STEPS)]
      for t in range(TASKS)
    ]
  )
  xs = centres[ys] + rng.normal(size=(*ys.shape, *shape)) * 0.7
  ws = np.ones(ys.shape)
  for t in range(TASKS):
    for s in range(1, STEPS, 2):
      row = rng.integers(ROWS)
      ws[t, s, row] = 0.0
      xs[t, s, row] = rng.normal(size=shape) * 20
      ys[t, s, row] = rng.integers(CLASSES)
  kinds = np.concatenate([np.arange(CLASSES), rng.integers(0, CLASSES, size=PROBE - CLASSES)])
  probe = centres[kinds] + rng.normal(size=(PROBE, *shape)) * 0.7
  return {'xs': xs, 'ys': ys, 'ws': ws, 'probe': probe}


def tensors(arrays: dict) -> Tensors:
  return {k: torch.from_numpy(np.array(v, dtype=np.float64)) for k, v in arrays.items()}


def arrays(p: Tensors) -> pb.Params:
  return {k: v.detach().numpy().copy() for k, v in p.items()}


def patches(x: Tensor) -> Tensor:
  n = IMAGE // PATCH
  rows = [
    x[:, i * PATCH : (i + 1) * PATCH, j * PATCH : (j + 1) * PATCH].reshape(len(x), -1)
    for i in range(n)
    for j in range(n)
  ]
  return torch.stack(rows, 1)


def features(
  p: Tensors, x: Tensor, embed: Tensor | None = None, prefix: Prefix | None = None
) -> Tensor:
  """The feature [B, d] of images [B, 4, 4, 1]; see the top for `embed` and `prefix`."""

  def norm(h: Tensor, name: str, at: int | None = None) -> Tensor:
    scale, bias = (p[f'backbone/{name}/{k}'] for k in ('scale', 'bias'))
    return F.layer_norm(
      h, (D,), scale if at is None else scale[at], bias if at is None else bias[at], EPS
    )

  def dense(h: Tensor, name: str, at: int) -> Tensor:
    return h @ p[f'backbone/layers/{name}/w'][at] + p[f'backbone/layers/{name}/b'][at]

  def split(h: Tensor) -> Tensor:
    return h.unflatten(2, (HEADS, D // HEADS)).transpose(1, 2)

  rows = patches(x) @ p['backbone/patch/w'] + p['backbone/patch/b']
  h = torch.cat([p['backbone/cls'].expand(len(x), 1, D), rows], 1) + p['backbone/positions']
  before = 0 if embed is None else embed.shape[1]
  h = h if embed is None else torch.cat([embed, h], 1)
  for i in range(DEPTH):
    n = norm(h, 'layers/norm1', i)
    q, k, v = (dense(n, name, i) for name in 'qkv')
    if prefix is not None and i in prefix:
      k, v = (torch.cat([b, a], 1) for a, b in zip((k, v), prefix[i], strict=True))
    q, k, v = split(q), split(k), split(v)
    share = torch.softmax(q @ k.transpose(2, 3) / (D // HEADS) ** 0.5, -1)
    h = h + dense((share @ v).transpose(1, 2).flatten(2), 'o', i)
    hidden = F.gelu(dense(norm(h, 'layers/norm2', i), 'up', i))
    h = h + dense(hidden, 'down', i)
  return norm(h, 'norm')[:, before]


def head(p: Tensors, f: Tensor) -> Tensor:
  return f @ p['head/w'] + p['head/b']


def cosine(a: Tensor, b: Tensor) -> Tensor:
  """cos of the last axes; no epsilon, lengths here are far from 0."""
  return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


def spread(first: Tensor, batch: int) -> Tensor:
  """The same [n, d] for every row: [B, n, d]."""
  return first.expand(batch, *first.shape)


def batches(z: dict, t: int) -> Iterator[tuple[Tensor, Tensor]]:
  """Images and labels of every step of task t, without the rows of weight 0."""
  for x, y, w in zip(z['xs'][t], z['ys'][t], z['ws'][t], strict=True):
    yield torch.from_numpy(x[w > 0]), torch.from_numpy(y[w > 0])


def step(
  p: Tensors, trained: list[str], objective: Callable[[Tensors], tuple[Tensor, Tensor]], lr: float
) -> tuple[Tensors, float, float]:
  """The parameters after one SGD step on `objective` = (loss, ce), and both values before it."""
  leaves = {k: p[k].detach().clone().requires_grad_() for k in trained}
  loss, ce = objective(p | leaves)
  grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
  moved = {
    k: (v - lr * (torch.zeros_like(v) if g is None else g)).detach()
    for (k, v), g in zip(leaves.items(), grads, strict=True)
  }
  return p | moved, float(loss.detach()), float(ce.detach())


def clear(first: Tensor, second: Tensor) -> None:
  """A choice of `first` over `second` that float32 cannot turn."""
  assert float((first - second).min()) > 1e-3, float((first - second).min())


def traced(rows: list[tuple[pb.Params, float, float]]) -> dict:
  """The keys params, loss and ce of a variant from its (trained parameters, loss, ce) per step."""
  params, loss, ce = zip(*rows, strict=True)
  out = pb.prefixed('params', pb.per_task(list(params), TASKS))
  return out | {'loss': np.reshape(loss, (TASKS, STEPS)), 'ce': np.reshape(ce, (TASKS, STEPS))}
