"""Reference for prefix tuning on the tiny ViT: golden/prefix_tuning.npz. PyTorch float64, autograd.

Li & Liang, ACL 2021, without the MLP that reparametrises the prefix in training: in every layer two
keys and two values stand before the projected ones, K [3, 2, 8] and V [3, 2, 8], the same for all rows.
They are not projected and have no positions. loss = CE; K, V and the head train, in all tasks alike,
and nothing happens at a boundary.

Keys beside those of tiny_vit.py. Inputs: init/K, init/V (the first axis are the layers).
Outputs: params/<K|V|head/w|head/b>, loss, ce (equal), probe_logits (no variant before them).
"""

from __future__ import annotations

import numpy as np
import problem as pb
import tiny_vit as tv
import torch

LR, LENGTH = 0.3, 2
TRAINED = ['K', 'V', 'head/w', 'head/b']


def logits(p: tv.Tensors, x: tv.Tensor) -> tv.Tensor:
  keys, values = (torch.stack([tv.spread(a, len(x)) for a in p[k]]) for k in 'KV')
  return tv.head(p, tv.features(p, x, prefix={i: (keys[i], values[i]) for i in range(tv.DEPTH)}))


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
  rng = np.random.default_rng(2608)
  shape = (tv.DEPTH, LENGTH, tv.D)
  init = tv.init(rng) | {'K': rng.normal(size=shape), 'V': rng.normal(size=shape)}
  z = tv.tasks(rng)
  out = pb.prefixed('init', init) | z | {'lr': LR}
  pb.save('prefix_tuning', out | run(z, tv.tensors(init)))


if __name__ == '__main__':
  main()
