"""Reference for adapters in a Vision Transformer: golden/adapter.npz. PyTorch float64 with autograd.

Houlsby et al. 2019 (ICML), fig. 2, serial: at the output `a` of attention and at that of the feed-forward
block, before the residual sum (see adapter_vit.py),

  a + up(gelu(down(a)))      down [d,m], up [m,d] with biases, the exact GELU

AdaptFormer (Chen et al. 2022, eq. 3-4), parallel: with `middle` the residual stream that enters the
feed-forward block, before its norm, and `a` the block's output,

  a + scale up(relu(down(middle)))

Adapters and the head are trained by p <- p - lr gradient on the CE over all 4 outputs; all else, norms
included, is frozen. up and its bias start at 0, so the first step moves only them and the head. Two tasks
sharing 4 classes, nothing happens at the boundary. No input of a ReLU is near 0. Deviations: Houlsby et al.
train the norms too; AdaptFormer's authors may put a norm before the adapter (here: none).
Variants: both, attention, feedforward (serial, at these places), parallel.

Keys. Inputs:
  init/backbone/..., init/head/w [8,4], init/head/b  as the library's tree of parameters, see adapter_vit.py
  init/adapter/<place>/down/w [2,8,3], .../down/b [2,3], .../up/w [2,3,8], .../up/b [2,8], the first axis the
  layer; place: attention, feedforward (the latter is that of `parallel` too)
  xs [2,4,6,4,4,1] (task, step, row, image), ys [2,4,6], probe [6,4,4,1], lr, scale
  image, patch, d, depth, heads, ffn, eps
Outputs, V a variant:
  V/params/adapter/<place>/... [2,4,...], V/params/head/... [2,4,...]  after every step; places of V only
  V/loss [2,4]             CE at the parameters before the step
  V/probe_features [2,6,8], V/probe_logits [2,6,4]   after each task
  frozen/probe_features [6,8]   without any adapter
"""

from __future__ import annotations

import adapter_vit as tv
import numpy as np
import problem as pb
import torch
from frozen import clear, stable

TASKS, STEPS, ROWS, CLASSES, M = 2, 4, 6, 4, 3
LR, SCALE = 0.3, 0.5
VARIANTS = {
  'both': ('attention', 'feedforward'),
  'attention': ('attention',),
  'feedforward': ('feedforward',),
  'parallel': ('feedforward',),
}


def features(p: tv.Tensors, x: torch.Tensor, variant: str) -> torch.Tensor:
  def dense(name: str, a: torch.Tensor, i: int) -> torch.Tensor:
    return a @ p[f'adapter/{name}/w'][i] + p[f'adapter/{name}/b'][i]

  def serial(place: str, a: torch.Tensor, i: int) -> torch.Tensor:
    if place not in VARIANTS[variant]:
      return a
    return a + dense(f'{place}/up', tv.gelu(dense(f'{place}/down', a, i)), i)

  def after_mlp(a: torch.Tensor, middle: torch.Tensor, i: int) -> torch.Tensor:
    if variant != 'parallel':
      return serial('feedforward', a, i)
    z = dense('feedforward/down', middle, i)
    clear(z.detach().numpy())
    return a + SCALE * dense('feedforward/up', torch.relu(z), i)

  return tv.features(p, x, lambda a, i: serial('attention', a, i), after_mlp)


def run(
  variant: str, init: tv.Tensors, xs: torch.Tensor, ys: torch.Tensor, probe: torch.Tensor
) -> dict:
  places = tuple(f'adapter/{place}/' for place in VARIANTS[variant])
  trained = [k for k in init if k.startswith((*places, 'head/'))]
  p = dict(init)
  trace, losses, ends = [], [], []
  for t in range(TASKS):
    for s in range(STEPS):
      x, y = xs[t, s], ys[t, s]
      loss, p = tv.step(
        p,
        trained,
        lambda q, x=x, y=y: torch.nn.functional.cross_entropy(
          tv.logits(q, features(q, x, variant)), y
        ),
        LR,
      )
      trace.append(tv.arrays({k: p[k] for k in trained}))
      losses.append(loss)
    f = features(p, probe, variant)
    ends.append(tv.arrays({'probe_features': f, 'probe_logits': tv.logits(p, f)}))
  out = pb.prefixed('params', pb.per_task(trace, TASKS)) | pb.stack(ends)
  return out | {'loss': np.reshape(losses, (TASKS, STEPS))}


def main() -> None:
  rng = np.random.default_rng(1817)
  init = tv.init(rng, CLASSES)
  for place in ('attention', 'feedforward'):
    init |= pb.prefixed(f'adapter/{place}', tv.bottleneck(rng, M, tv.DEPTH))
  xs, ys = tv.images(rng, [[0, 1, 2, 3]] * TASKS, STEPS, ROWS)
  probe = xs[:, 0, :3].reshape(6, 4, 4, 1) + 0.3 * torch.from_numpy(rng.normal(size=(6, 4, 4, 1)))
  out = pb.prefixed('init', tv.arrays(init))
  out |= tv.arrays({'xs': xs, 'ys': ys, 'probe': probe}) | {'lr': LR, 'scale': SCALE}
  out |= {'image': tv.IMAGE, 'patch': tv.PATCH, 'd': tv.D, 'depth': tv.DEPTH, 'heads': tv.HEADS}
  out |= {'ffn': tv.FFN, 'eps': tv.EPS, 'frozen/probe_features': tv.features(init, probe).numpy()}
  for v in VARIANTS:
    arrays = run(v, init, xs, ys, probe)
    stable(arrays, run(v, tv.nearby(rng, init), xs, ys, probe))
    out |= pb.prefixed(v, arrays)
  pb.save('adapter', out)


if __name__ == '__main__':
  main()
