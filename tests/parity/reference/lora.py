"""Reference for LoRA on an MLP: golden/lora.npz.

Hu et al. 2022, eq. 3: h = W0 x + (alpha / r) B A x, on l0 and l1, with r = 2 and alpha = 4. In the
row-vector layout of these files: x @ (w + (alpha / r) (B A)^T) + b. A [r, in] is given, B [out, r]
starts at 0. Trained: A, B and the head (l2/w, l2/b); frozen: l0 and l1 with their biases. One lr
for all, plain SGD, no dropout. Two tasks sharing 4 classes, nothing happens at the boundary.
Nothing moves A in the first step, because B is 0 then.

Keys. Inputs:
  init/<p>, init/l0/A [2,6], init/l0/B [8,2], init/l1/A [2,8], init/l1/B [7,2]
  xs [2,5,5,6], ys [2,5,5], lr, r, alpha, probe [12,6]
Outputs, V in {train_a, frozen_a} (the second keeps A as given, as InfLoRA and LoRA-FA do):
  V/params/<q> [2,5,...]    after every step, <q> the trained l0/A l0/B l1/A l1/B l2/w l2/b
  V/loss [2,5]              CE at the parameters before the step
  V/merged/l0/w, V/merged/l1/w [2,...]   w + (alpha / r) (B A)^T after each task
  V/probe_logits [2,12,4]   after each task, by the two-branch form
"""

from __future__ import annotations

import numpy as np
import problem as pb

TASKS, STEPS, ROWS = 2, 5, 5
LR, R, ALPHA = 0.3, 2, 4.0
LAYERS = ('l0', 'l1')


def merged(params: pb.Params) -> pb.Params:
  """A plain MLP whose first two matrices hold the low-rank update."""
  out = {k: v for k, v in params.items() if k[-1] in 'wb'}
  for name in LAYERS:
    update = ALPHA / R * (params[f'{name}/B'] @ params[f'{name}/A']).T
    out[f'{name}/w'] = params[f'{name}/w'] + update
  return out


def branches(params: pb.Params, x: pb.Array) -> pb.Array:
  """Logits with the update as a side branch, never merged."""
  h = x
  for name in LAYERS:
    side = (h @ params[f'{name}/A'].T) @ params[f'{name}/B'].T
    h = np.maximum(h @ params[f'{name}/w'] + params[f'{name}/b'] + ALPHA / R * side, 0.0)
  return h @ params['l2/w'] + params['l2/b']


def run(train_a: bool, init: pb.Params, xs: pb.Array, ys: np.ndarray, probe: pb.Array) -> dict:
  trained = ['l0/B', 'l1/B', 'l2/w', 'l2/b'] + (['l0/A', 'l1/A'] if train_a else [])
  params = dict(init)
  trace, losses, merges, logits = [], [], [], []
  for t in range(TASKS):
    for s in range(STEPS):
      loss, full = pb.loss_and_grad(merged(params), xs[t, s], ys[t, s])
      grads = {'l2/w': full['l2/w'], 'l2/b': full['l2/b']}
      for name in LAYERS:  # with D the gradient by the merged [in, out] matrix
        d = ALPHA / R * full[f'{name}/w']
        grads[f'{name}/B'] = d.T @ params[f'{name}/A'].T
        grads[f'{name}/A'] = params[f'{name}/B'].T @ d.T
      params = params | {k: params[k] - LR * grads[k] for k in trained}
      trace.append({k: params[k] for k in trained} | {f'{n}/A': params[f'{n}/A'] for n in LAYERS})
      losses.append(loss)
    plain = merged(params)
    merges.append({f'{n}/w': plain[f'{n}/w'] for n in LAYERS})
    logits.append(branches(params, probe))
    assert np.allclose(pb.forward(plain, probe)[0], logits[-1], rtol=1e-12, atol=1e-12)
  out = pb.prefixed('params', pb.per_task(trace, TASKS)) | pb.prefixed('merged', pb.stack(merges))
  return out | {'loss': np.reshape(losses, (TASKS, STEPS)), 'probe_logits': np.stack(logits)}


def main() -> None:
  rng = np.random.default_rng(1708)
  init = pb.init_params(rng)
  for name in LAYERS:
    fan_in, fan_out = init[f'{name}/w'].shape
    init[f'{name}/A'] = rng.uniform(-1, 1, size=(R, fan_in)) / np.sqrt(fan_in)
    init[f'{name}/B'] = np.zeros((fan_out, R))
  xs, ys = pb.make_tasks(rng, [[0, 1, 2, 3]] * TASKS, STEPS, ROWS)
  probe = rng.normal(size=(12, pb.INPUTS))
  out = pb.prefixed('init', init)
  out |= {'xs': xs, 'ys': ys, 'lr': LR, 'r': R, 'alpha': ALPHA, 'probe': probe}
  out |= pb.prefixed('train_a', run(True, init, xs, ys, probe))
  out |= pb.prefixed('frozen_a', run(False, init, xs, ys, probe))
  pb.save('lora', out)


if __name__ == '__main__':
  main()
