"""Reference for DualPrompt on the tiny ViT: golden/dualprompt.npz. PyTorch float64, autograd.

Wang et al., ECCV 2022, eq. 2-6 (code: google-research/l2p). Prefixes stand before keys and values,
AFTER the projections: general ones G [general layers, 2, 2, 8] for every row, expert ones
E [3 tasks, expert layers, 2, 3, 8] of one task; on the axis of 2 first the keys', then the values'.
Every task has a key K [3, 8]; q is the frozen feature.

  training in task t: E[t], loss = CE + coef * mean over rows of (1 - cos(q, K[t]))
  probe: each row takes E[m] of the largest cos(q, K[m]) among the tasks 0 .. begun

q is a constant, so K[t] is moved by the second term alone. Trained: G, E, K, head; what the task does
not use keeps its value. E and K start as given, a task's are not copies of the task's before. Nothing
else happens at a boundary.

Variants: apart (G in layers 0 and 1, E in layer 2), overlap (G in 0 and 1, E in 1 and 2: in layer 1 both
stand before the keys; their order moves nothing).
Choice: `probe_logits` is with begun = t after the last step of task t. `probe_after` counts the
boundary: begun = min(t + 1, 2), so that an untrained key takes part; an implementation that counts a
task as begun with its first step has `probe_logits` behind the boundary too.
Deviations: the code masks old classes' logits and chooses one prompt for a whole batch.

Keys beside those of tiny_vit.py. Inputs: coef, V/general_layers, V/expert_layers,
  V/init/G, V/init/E, init/K [3,8].
Outputs: V/params/<G|E|K|head/w|head/b>, V/loss, V/ce, V/probe_logits, V/probe_after;
  V/pull [3,4]                       mean over rows of 1 - cos(q, K[t]), before the step
  V/probe_task, V/probe_task_after [3,8]   the chosen task
"""

from __future__ import annotations

import numpy as np
import problem as pb
import tiny_vit as tv
import torch

LR, COEF, GENERAL, EXPERT = 0.2, 0.5, 2, 3
TRAINED = ['G', 'E', 'K', 'head/w', 'head/b']
VARIANTS = {'apart': ((0, 1), (2,)), 'overlap': ((0, 1), (1, 2))}


def prefixes(p: tv.Tensors, variant: str, task: tv.Tensor) -> tv.Prefix:
  """What stands before keys and values of each layer where row b uses the prompts of task[b]."""
  general, expert = VARIANTS[variant]
  out = {}
  for layer in sorted({*general, *expert}):
    parts = []
    for kind in range(2):
      rows = []
      if layer in general:
        rows.append(tv.spread(p['G'][general.index(layer), kind], len(task)))
      if layer in expert:
        rows.append(p['E'][task, expert.index(layer), kind])
      parts.append(torch.cat(rows, 1))
    out[layer] = (parts[0], parts[1])
  return out


def choose(q: tv.Tensor, keys: tv.Tensor) -> tv.Tensor:
  """The task of every row among those whose keys are given."""
  values, order = tv.cosine(q[:, None], keys).sort(dim=1, descending=True)
  if len(keys) > 1:
    tv.clear(values[:, 0], values[:, 1])
  return order[:, 0]


def run(variant: str, z: dict, start: tv.Tensors) -> dict:
  p, probe = start, torch.from_numpy(z['probe'])
  rows, pulls, after = [], [], []
  for t in range(tv.TASKS):
    for x, y in tv.batches(z, t):
      q = tv.features(p, x)
      task = torch.full((len(x),), t)

      def pull(p: tv.Tensors, q=q, t=t) -> tv.Tensor:
        return (1 - tv.cosine(q, p['K'][t])).mean()

      def objective(p: tv.Tensors, x=x, y=y, task=task, pull=pull):
        logits = tv.head(p, tv.features(p, x, prefix=prefixes(p, variant, task)))
        ce = torch.nn.functional.cross_entropy(logits, y)
        return ce + COEF * pull(p), ce

      pulls.append(float(pull(p)))
      p, loss, ce = tv.step(p, TRAINED, objective, LR)
      rows.append((tv.arrays({k: p[k] for k in TRAINED}), loss, ce))
    entry = {}
    for suffix, begun in (('', t), ('_after', min(t + 1, tv.TASKS - 1))):
      task = choose(tv.features(p, probe), p['K'][: begun + 1])
      logits = tv.head(p, tv.features(p, probe, prefix=prefixes(p, variant, task)))
      entry |= {f'probe_task{suffix}': task.numpy(), f'probe_logits{suffix}': logits.numpy()}
    entry['probe_after'] = entry.pop('probe_logits_after')
    after.append(entry)
  out = tv.traced(rows) | pb.stack(after)
  return out | {'pull': np.reshape(pulls, (tv.TASKS, tv.STEPS))}


def main() -> None:
  rng = np.random.default_rng(2264)
  init = tv.init(rng)
  init['K'] = rng.normal(size=(tv.TASKS, tv.D))
  z = tv.tasks(rng)
  out = pb.prefixed('init', init) | z | {'lr': LR, 'coef': COEF}
  for variant, (general, expert) in VARIANTS.items():
    own = {
      'G': rng.normal(size=(len(general), 2, GENERAL, tv.D)),
      'E': rng.normal(size=(tv.TASKS, len(expert), 2, EXPERT, tv.D)),
    }
    got = run(variant, z, tv.tensors(init | own))
    got |= pb.prefixed('init', own) | {'general_layers': general, 'expert_layers': expert}
    out |= pb.prefixed(variant, got)
  pb.save('dualprompt', out)


if __name__ == '__main__':
  main()
