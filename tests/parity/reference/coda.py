"""Reference for CODA-Prompt on the tiny ViT: golden/coda.npz. PyTorch float64, gradients by autograd.

Smith et al., CVPR 2023, eq. 3-6 (code: GT-RIPL/CODA-Prompt, models/zoo.py). In layers 0 and 2 there are
M = 6 components P [M, 4, 8], keys K [M, 8] and attentions A [M, 8]; q is the frozen feature:

  weight_m = cos(q * A_m, K_m)      prompt = sum_m weight_m P_m  [4, 8]

Its first two rows go before the layer's keys, the other two before its values, after the projections.
Task t sees the components 0 .. 2t + 1. Those of earlier tasks are constants (they still contribute and
keep their values), later ones contribute nothing and keep theirs. The head trains in all tasks.

At the beginning of a task its two new components are made orthonormal, in every layer and for P
(flattened to 32), K and A each, from the values they hold: in order, what lies in the span of the
earlier components and of the new ones before is taken away, then the length is made 1. For task 0 this
happens before the first step, else at the boundary before the task.

  loss = CE + coef * sum over layers and over X in (P flat, K, A) of mean((X X^T - I)^2)

with X the seen components, the earlier ones constant.

Variants:
  plain      coef 0
  ortho      coef 1
  published  coef 0, the authors' Gram-Schmidt: from a new component its projections on each earlier one
             are taken away as if those were orthogonal, all from the component's first values. Trained
             components are not, so it leaves angles behind. For task 0 it is the same as `plain`.
Choices: new components start from init (the code draws them anew). `probe_logits` sees components
0 .. 2t + 1 as after the last step of task t. `probe_after` counts the boundary: the next task's
components, already made orthonormal, contribute too (after the last task there are none).
Deviations: the code masks old classes' logits; its penalty has a further factor of 1e-6.

Keys beside those of tiny_vit.py. Inputs: init/P [2,6,4,8], init/K [2,6,8], init/A [2,6,8] (as drawn,
the axis of 2 is `layers`), layers [2], ortho/coef (0 elsewhere).
Outputs: V/start/<P|K|A> [3,...]   when task t begins, its new components made orthonormal
  plain/params/<P|K|A|head/w|head/b> [3,4,...]; for the other variants [3,...], after each task
  V/loss, V/ce, V/probe_logits, V/probe_after
  V/penalty [3,4]           the sum without coef, before the step
  frozen_probe [8,8]        q of the probe; plain/probe_weights [3,2,8,6] by layer, 0 for unseen ones
"""

from __future__ import annotations

import numpy as np
import problem as pb
import tiny_vit as tv
import torch

LR, M, LENGTH, LAYERS = 0.4, 6, 4, (0, 2)
NEW = M // tv.TASKS
POOL = ['P', 'K', 'A']
TRAINED = [*POOL, 'head/w', 'head/b']
COEF = {'plain': 0.0, 'ortho': 1.0, 'published': 0.0}


def orthonormal(rows: pb.Array, old: int, exact: bool) -> pb.Array:
  """Rows [old + new, n] with the new ones made orthonormal; the old ones stay."""
  rows = rows.copy()
  base = list(np.linalg.qr(rows[:old].T)[0].T) if exact else list(rows[:old])
  for i in range(old, len(rows)):
    v = rows[i] - sum((rows[i] @ u) / (u @ u) * u for u in base)
    assert np.linalg.norm(v) > 0.2 * np.linalg.norm(rows[i])
    rows[i] = v / np.linalg.norm(v)
    base.append(rows[i])
  return rows


def begin(p: tv.Tensors, t: int, exact: bool) -> tv.Tensors:
  out = {}
  for name in POOL:
    x = p[name].numpy().copy()
    for layer in x:
      flat = layer[: NEW * (t + 1)].reshape(NEW * (t + 1), -1)
      layer[: NEW * (t + 1)] = orthonormal(flat, NEW * t, exact).reshape(-1, *layer.shape[1:])
    out[name] = torch.from_numpy(x)
  return p | out


def seen(p: tv.Tensors, t: int) -> tv.Tensors:
  """The pool [layers, 2t + 2, ...] in task t, its earlier components without gradient."""
  old, end = NEW * t, NEW * (t + 1)
  return {k: torch.cat([p[k][:, :old].detach(), p[k][:, old:end]], 1) for k in POOL}


def weights(pool: tv.Tensors, q: tv.Tensor, at: int) -> tv.Tensor:
  return tv.cosine(q[:, None] * pool['A'][at], pool['K'][at])


def logits(p: tv.Tensors, x: tv.Tensor, q: tv.Tensor, t: int) -> tv.Tensor:
  pool, prefix = seen(p, t), {}
  for at, layer in enumerate(LAYERS):
    prompt = torch.einsum('bm,mld->bld', weights(pool, q, at), pool['P'][at])
    prefix[layer] = (prompt[:, : LENGTH // 2], prompt[:, LENGTH // 2 :])
  return tv.head(p, tv.features(p, x, prefix=prefix))


def penalty(p: tv.Tensors, t: int) -> tv.Tensor:
  total = torch.zeros(())
  for x in seen(p, t).values():
    for layer in x.flatten(2):
      total = total + ((layer @ layer.T - torch.eye(len(layer))) ** 2).mean()
  return total


def run(variant: str, z: dict, start: tv.Tensors) -> dict:
  exact, probe = variant != 'published', torch.from_numpy(z['probe'])
  q_probe = tv.features(start, probe)
  p, rows, penalties, starts, after = begin(start, 0, exact), [], [], [], []
  for t in range(tv.TASKS):
    starts.append(tv.arrays({k: p[k] for k in POOL}))
    for x, y in tv.batches(z, t):
      q = tv.features(p, x)

      def objective(p: tv.Tensors, x=x, y=y, q=q, t=t):
        ce = torch.nn.functional.cross_entropy(logits(p, x, q, t), y)
        return ce + COEF[variant] * penalty(p, t), ce

      penalties.append(float(penalty(p, t)))
      p, loss, ce = tv.step(p, TRAINED, objective, LR)
      rows.append((tv.arrays({k: p[k] for k in TRAINED}), loss, ce))
    used = np.zeros((len(LAYERS), tv.PROBE, M))
    for at in range(len(LAYERS)):
      used[at, :, : NEW * (t + 1)] = weights(seen(p, t), q_probe, at).numpy()
    entry = {'probe_logits': logits(p, probe, q_probe, t).numpy(), 'probe_weights': used}
    if t + 1 < tv.TASKS:
      p = begin(p, t + 1, exact)
    entry['probe_after'] = logits(p, probe, q_probe, min(t + 1, tv.TASKS - 1)).numpy()
    after.append(entry)
  out = tv.traced(rows) | pb.stack(after) | pb.prefixed('start', pb.stack(starts))
  out['penalty'] = np.reshape(penalties, (tv.TASKS, tv.STEPS))
  if variant != 'plain':
    out = {k: v[:, -1] if k.startswith('params/') else v for k, v in out.items()}
    del out['probe_weights']
  return out


def main() -> None:
  rng = np.random.default_rng(2322)
  init = tv.init(rng)
  init['P'] = rng.normal(size=(len(LAYERS), M, LENGTH, tv.D))
  init['K'] = rng.normal(size=(len(LAYERS), M, tv.D))
  init['A'] = rng.normal(size=(len(LAYERS), M, tv.D))
  z = tv.tasks(rng)
  out = pb.prefixed('init', init) | z | {'lr': LR, 'layers': LAYERS, 'ortho/coef': COEF['ortho']}
  start = tv.tensors(init)
  out['frozen_probe'] = tv.features(start, torch.from_numpy(z['probe'])).numpy()
  for variant in COEF:
    out |= pb.prefixed(variant, run(variant, z, start))
  pb.save('coda', out)


if __name__ == '__main__':
  main()
