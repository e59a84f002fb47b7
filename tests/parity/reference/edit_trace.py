"""Causal tracing, Meng et al. 2022 section 2.1 and experiments/causal_trace.py (shared; see `editing.py`).

Noise [S, subject tokens, d] is added to the subject's rows of 'embed', S runs apart. In each, a site of
some layers is set back at one token to what it is without noise. The map holds the mean over the runs of
p(answer) behind the prompt. With window w around layer l: layers l - w // 2 up to, not including,
l + ceil(w / 2), as far as there are such layers.
"""

from __future__ import annotations

import torch
from editing_model import DEPTH, Net, Tensor, forward, states


def probability(
  net: Net, tokens: list[int], answer: int, begin: int, noise: Tensor, restored: dict
) -> Tensor:
  """One run; `restored` maps (site, layer) to (token, value)."""

  def tap(site: str, layer: int, x: Tensor) -> Tensor:
    x = x.clone()
    if site == 'embed':
      x[begin : begin + len(noise)] += noise
    if (site, layer) in restored:
      token, value = restored[site, layer]
      x[token] = value
    return x

  return forward(net, tokens, tap)[-1].softmax(-1)[answer]


def layers_of(layer: int, window: int) -> range:
  return range(max(0, layer - window // 2), min(DEPTH, layer + (window + 1) // 2))


def trace(
  net: Net, tokens: list[int], answer: int, begin: int, noise: Tensor, site: str, window: int
) -> Tensor:
  """[layers, tokens]."""
  clean = states(net, tokens)
  out = torch.zeros(DEPTH, len(tokens))
  for layer in range(DEPTH):
    for token in range(len(tokens)):
      restored = {(site, i): (token, clean[site, i][token]) for i in layers_of(layer, window)}
      runs = [probability(net, tokens, answer, begin, n, restored) for n in noise]
      out[layer, token] = torch.stack(runs).mean()
  return out


def corrupted(net: Net, tokens: list[int], answer: int, begin: int, noise: Tensor) -> Tensor:
  return torch.stack([probability(net, tokens, answer, begin, n, {}) for n in noise]).mean()
