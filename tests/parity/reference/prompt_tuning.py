"""Reference for prompt tuning on the tiny ViT: golden/prompt_tuning.npz. PyTorch float64, autograd.

Lester et al., EMNLP 2021: one prompt P [3, 8] stands before the embedded sequence of every row, without
positions; the class token is read. loss = CE; P and the head train, in all tasks alike, and nothing
happens at a boundary.

The text initialisations copy rows of the token embeddings: with 'labels' the given tokens in order,
from the first again when there are fewer than the length, cut when there are more.

Keys beside those of tiny_vit.py. Inputs: init/P [3,8]; labels/table [7,8], labels/tokens [2] and
labels/many [6] for a prompt of length 5.
Outputs: params/<P|head/w|head/b>, loss, ce (equal), probe_logits (no variant before them);
  labels/P [5,8] from labels/tokens, labels/P_many [5,8] from labels/many.
"""

from __future__ import annotations

import numpy as np
import problem as pb
import tiny_vit as tv
import torch

LR, LENGTH, TEXT = 0.3, 3, 5
TRAINED = ['P', 'head/w', 'head/b']


def logits(p: tv.Tensors, x: tv.Tensor) -> tv.Tensor:
  return tv.head(p, tv.features(p, x, embed=tv.spread(p['P'], len(x))))


def run(z: dict, start: tv.Tensors) -> dict:
  p, probe = start, torch.from_numpy(z['probe'])
  rows, probes = [], []
  for t in range(tv.TASKS):
    for x, y in tv.batches(z, t):

      def objective(p: tv.Tensors, x=x, y=y):
        ce = torch.nn.functional.cross_entropy(logits(p, x), y)
        return ce, ce

      p, loss, ce = tv.step(p, TRAINED, objective, LR)
      rows.append((tv.arrays({k: p[k] for k in TRAINED}), loss, ce))
    probes.append(logits(p, probe).numpy())
  return tv.traced(rows) | {'probe_logits': np.stack(probes)}


def main() -> None:
  rng = np.random.default_rng(2505)
  init = tv.init(rng) | {'P': rng.normal(size=(LENGTH, tv.D))}
  z = tv.tasks(rng)
  table, tokens, many = rng.normal(size=(7, tv.D)), [4, 1], [2, 6, 0, 5, 3, 1]
  out = pb.prefixed('init', init) | z | {'lr': LR}
  out |= pb.prefixed('labels', {'table': table, 'tokens': tokens, 'many': many})
  for name, ids in (('P', tokens), ('P_many', many)):
    out[f'labels/{name}'] = np.stack([table[ids[i % len(ids)]] for i in range(TEXT)])
  pb.save('prompt_tuning', out | run(z, tv.tensors(init)))


if __name__ == '__main__':
  main()
