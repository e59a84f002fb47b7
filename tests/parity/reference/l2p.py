"""Reference for L2P on the tiny ViT: golden/l2p.npz. PyTorch float64, gradients by autograd.

Wang et al., CVPR 2022, eq. 2-5 (code: google-research/l2p). A pool of M = 6 prompts P [M, 2, 8] with
keys K [M, 8]; q the frozen feature. A row takes the top = 2 prompts by cos(q, K_m), which stand in
descending order before its embedded sequence, without positions; the class token is read.

  loss = CE - coef * mean over rows of sum over the row's prompts of cos(q, K_m)

q is a constant, so K is moved by the second term alone. Trained: pool P, keys K, head. The choice takes
no gradient. Nothing happens at a boundary, and all prompts can be chosen in every task.

Variants:
  row    each row takes its own prompts, in training and for the probe.
  vote   the `top` prompts chosen most often by the batch's rows (those of weight 1) serve all rows, by
         the number of choices, ties to the lower index; the second term is over the voted prompts. The
         probe's 8 rows vote too.
Deviations: the code reads the mean of the prompts' outputs, masks old classes' logits, resets the
optimiser at a boundary; here none of it. The order of prompts before a sequence without positions moves
no class token, so only `chosen` tells it.

Keys beside those of tiny_vit.py. Inputs: init/P [6,2,8], init/K [6,8], coef, top.
Outputs, V in {row, vote}: V/params/<P|K|head/w|head/b>, V/loss, V/ce, V/probe_logits;
  V/pull [3,4]              mean over rows of the summed cosines, before the step
  V/chosen [3,4,5,2]        before the step, in order; -1 for rows of weight 0
  V/probe_chosen [3,8,2]
  frozen_probe [8,8]        q of the probe
"""

from __future__ import annotations

import numpy as np
import problem as pb
import tiny_vit as tv
import torch

LR, COEF, TOP, M, LENGTH = 0.2, 0.5, 2, 6, 2
TRAINED = ['P', 'K', 'head/w', 'head/b']


def choose(variant: str, q: tv.Tensor, keys: tv.Tensor) -> tv.Tensor:
  """The prompts of every row, [B, top]."""
  similar = tv.cosine(q[:, None], keys.detach())
  values, order = similar.sort(dim=1, descending=True, stable=True)
  for i in range(TOP):
    tv.clear(values[:, i], values[:, i + 1])
  own = order[:, :TOP]
  if variant == 'row':
    return own
  votes = [int((own == m).sum()) for m in range(M)]
  winners = sorted(range(M), key=lambda m: (-votes[m], m))[:TOP]
  return torch.tensor(winners).expand(len(q), TOP)


def logits(p: tv.Tensors, x: tv.Tensor, chosen: tv.Tensor) -> tv.Tensor:
  return tv.head(p, tv.features(p, x, embed=p['P'][chosen].flatten(1, 2)))


def run(variant: str, z: dict, start: tv.Tensors) -> dict:
  p, probe = start, torch.from_numpy(z['probe'])
  rows, picks, pulls, probes, probe_picks = [], [], [], [], []
  for t in range(tv.TASKS):
    for s, (x, y) in enumerate(tv.batches(z, t)):
      q = tv.features(p, x)
      chosen = choose(variant, q, p['K'])

      def pull(p: tv.Tensors, q=q, chosen=chosen) -> tv.Tensor:
        return tv.cosine(q[:, None], p['K'][chosen]).sum(1).mean()

      def objective(p: tv.Tensors, x=x, y=y, chosen=chosen, pull=pull):
        ce = torch.nn.functional.cross_entropy(logits(p, x, chosen), y)
        return ce - COEF * pull(p), ce

      pulls.append(float(pull(p)))
      padded = -np.ones((tv.ROWS, TOP), dtype=np.int64)
      padded[z['ws'][t, s] > 0] = chosen.numpy()
      picks.append(padded)
      p, loss, ce = tv.step(p, TRAINED, objective, LR)
      rows.append((tv.arrays({k: p[k] for k in TRAINED}), loss, ce))
    chosen = choose(variant, tv.features(p, probe), p['K'])
    probes.append(logits(p, probe, chosen).numpy())
    probe_picks.append(chosen.numpy())
  return tv.traced(rows) | {
    'pull': np.reshape(pulls, (tv.TASKS, tv.STEPS)),
    'chosen': np.reshape(picks, (tv.TASKS, tv.STEPS, tv.ROWS, TOP)),
    'probe_logits': np.stack(probes),
    'probe_chosen': np.stack(probe_picks),
  }


def main() -> None:
  rng = np.random.default_rng(2143)
  init = tv.init(rng)
  init |= {'P': rng.normal(size=(M, LENGTH, tv.D)), 'K': rng.normal(size=(M, tv.D))}
  z = tv.tasks(rng)
  out = pb.prefixed('init', init) | z | {'lr': LR, 'coef': COEF, 'top': TOP}
  start = tv.tensors(init)
  out['frozen_probe'] = tv.features(start, torch.from_numpy(z['probe'])).numpy()
  for variant in ('row', 'vote'):
    out |= pb.prefixed(variant, run(variant, z, start))
  pb.save('l2p', out)


if __name__ == '__main__':
  main()
