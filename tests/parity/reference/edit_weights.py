"""ROME, MEMIT, AlphaEdit and PMET given the targets of the edits (shared; see `editing.py`).

W [ffn, d] is a layer's down/w, b its bias, C [ffn, ffn] a second moment of keys. A key k [ffn] is what
down reads at the subject's last token. What a list is of runs over the layers that are written, in order.

rome       Meng et al. 2022 eq. 2 in row vectors: k the mean over all P contexts, u = C^-1 k,
           W <- W + outer(u, v - (k @ W + b)) / (k . u). (kmeng01/rome takes the plain prompt's key for
           the value and the mean for u, which it scales to length 1.)
memit      Meng et al. 2023 eq. 14 and alg. 1: K [ffn, N], R = (z - h) / (layers left, this one counted),
           A = (lam C + K K^T)^-1 K, W <- W + A R^T. K of the network as written so far, averaged as in
           compute_ks (half the plain prompt); h [d, N] is the block output of the LAST layer in the plain
           prompt, also of the network as written so far.
pmet       Li et al. 2024: the same with R = (z - m) / sqrt(layers left), m the feedforward output of
           the last layer. Only feedforward weights are written.
alphaedit  Fang et al. 2025: A = (P (K K^T + Kp) + ridge I)^-1 P K; Kp, 0 at first, gains
           K K^T of the batch once all its layers are written, with keys of that network.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from editing_model import FFN, Net, Request, Tensor, at_subject, averaged_key, written


class Rome(NamedTuple):
  k: Tensor  # [ffn]
  u: Tensor  # [ffn]
  m: Tensor  # [d], k @ W + b before the edit
  w: Tensor  # [ffn, d] after it


class Step(NamedTuple):
  """One layer of a batch; `residual` is R, `w` is after the write."""

  keys: Tensor  # [ffn, N]
  current: Tensor  # [d, N], h or m
  residual: Tensor  # [d, N]
  a: Tensor  # [ffn, N]
  w: Tensor  # [ffn, d]


def down(net: Net, layer: int) -> Tensor:
  return net.params['layers/down/w'][layer]


def rome(net: Net, request: Request, layer: int, target: Tensor, c: Tensor) -> tuple[Net, Rome]:
  w = down(net, layer)
  k = at_subject(net, request, 'key', layer).mean(0)
  m = k @ w + (net.params['layers/down/b'][layer] if net.name == 'gpt2' else 0.0)
  u = torch.linalg.solve(c, k)
  new = w + torch.outer(u, target - m) / (k @ u)
  return written(net, layer, new), Rome(k, u, m, new)


def batch_keys(net: Net, asked: list[Request], layer: int) -> Tensor:
  return torch.stack([averaged_key(net, r, layer) for r in asked], 1)


def spread(
  net: Net, asked: list[Request], layers: tuple[int, ...], z: Tensor, site: str, power: float, solve
) -> tuple[Net, list[Step]]:
  """A batch of edits over layers; `z` [N, d] of `site` in the last one, `solve(layer, K)` gives A."""
  steps = []
  for done, layer in enumerate(layers):
    keys = batch_keys(net, asked, layer)
    current = torch.stack([at_subject(net, r, site, layers[-1])[0] for r in asked], 1)
    residual = (z.T - current) / (len(layers) - done) ** power
    a = solve(layer, keys)
    w = down(net, layer) + a @ residual.T
    net = written(net, layer, w)
    steps.append(Step(keys, current, residual, a, w))
  return net, steps


def ridge(c: Tensor, lam: float):
  return lambda layer, keys: torch.linalg.solve(lam * c[layer] + keys @ keys.T, keys)


def memit(net, asked, layers, z, c, lam) -> tuple[Net, list[Step]]:
  return spread(net, asked, layers, z, 'block', 1.0, ridge(c, lam))


def pmet(net, asked, layers, z, c, lam) -> tuple[Net, list[Step]]:
  return spread(net, asked, layers, z, 'feedforward', 0.5, ridge(c, lam))


def null_space(c: Tensor, threshold: float) -> Tensor:
  """P: the projection onto eigenvectors of `c` with eigenvalues below the threshold."""
  values, vectors = torch.linalg.eigh(c)
  kept = vectors[:, values < threshold]
  return kept @ kept.T


def alphaedit(
  net: Net,
  asked: list[Request],
  layers: tuple[int, ...],
  z: Tensor,
  p: Tensor,
  past: Tensor,
  l2: float,
) -> tuple[Net, list[Step], Tensor]:
  """One batch; `p` and `past` (Kp) are [depth, ffn, ffn]. Returns the new Kp too."""

  def solve(layer: int, keys: Tensor) -> Tensor:
    left = p[layer] @ (keys @ keys.T + past[layer]) + l2 * torch.eye(FFN)
    return torch.linalg.solve(left, p[layer] @ keys)

  net, steps = spread(net, asked, layers, z, 'block', 1.0, solve)
  past = past.clone()
  for layer in layers:
    keys = batch_keys(net, asked, layer)
    past[layer] += keys @ keys.T
  return net, steps, past
