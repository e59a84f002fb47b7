"""Second derivations for si, mas, l2, rwalk and imm: PyTorch autograd in float64.

Unlike `verify.py`, which starts every step from the stored parameters, each run is made anew from its
stored inputs alone and all stored arrays are compared to 1e-9. Parameters are one flat vector, the
penalty is differentiated and not written out, the optimiser is torch's, single examples go through
vmap, and what a method accumulates is computed at the boundary from the recorded steps of the whole
task. Only the file layout and the network of `verify.py` are shared. Run:
``python verify_regularisation.py``; it ends with an AssertionError on the first mismatch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch.func import grad, vmap
from verify import NAMES, load, net, same

TOL = 1e-9
Vector = torch.Tensor


@dataclass
class Layout:
  """The places of the named arrays in a flat vector."""

  shapes: dict[str, torch.Size]

  def split(self, flat: Vector) -> dict[str, torch.Tensor]:
    sizes = [s.numel() for s in self.shapes.values()]
    parts = torch.split(flat, sizes, dim=-1)
    lead = flat.shape[:-1]
    pairs = zip(self.shapes.items(), parts, strict=True)
    return {k: part.reshape(*lead, *shape) for (k, shape), part in pairs}

  def logits(self, flat: Vector, x: torch.Tensor) -> torch.Tensor:
    return net(self.split(flat), x)

  def head(self) -> torch.Tensor:
    """1 at the output layer's places."""
    one = [torch.full((s.numel(),), k.startswith('l2/')) for k, s in self.shapes.items()]
    return torch.cat(one)


@dataclass
class Trace:
  """What was seen in the steps of one task."""

  before: list[Vector] = field(default_factory=list)
  after: list[Vector] = field(default_factory=list)
  g_task: list[Vector] = field(default_factory=list)
  g_total: list[Vector] = field(default_factory=list)
  ce: list[torch.Tensor] = field(default_factory=list)
  penalty: list[torch.Tensor] = field(default_factory=list)

  def __getattr__(self, name: str) -> torch.Tensor:
    if name.startswith('all_'):
      return torch.stack(getattr(self, name[4:]))
    raise AttributeError(name)


Penalty = Callable[[int, Vector], torch.Tensor]


def train(z: dict, layout: Layout, penalty: Penalty, momentum: float = 0.0) -> Iterator[Trace]:
  """Yields the trace of every task; `penalty` may rely on what the caller did with the last one."""
  theta = torch.cat([z[f'init/{k}'].flatten() for k in NAMES]).requires_grad_()
  optimiser = torch.optim.SGD([theta], lr=float(z['lr']), momentum=momentum)
  for t in range(len(z['xs'])):
    trace = Trace()
    for x, y in zip(z['xs'][t], z['ys'][t], strict=True):
      ce = F.cross_entropy(layout.logits(theta, x), y)
      extra = penalty(t, theta)
      (g_task,) = torch.autograd.grad(ce, theta, retain_graph=True)
      optimiser.zero_grad()
      (ce + extra).backward()
      trace.before.append(theta.detach().clone())
      trace.g_task.append(g_task)
      trace.g_total.append(theta.grad.clone())
      optimiser.step()
      trace.after.append(theta.detach().clone())
      trace.ce.append(ce.detach())
      trace.penalty.append(extra.detach() + torch.zeros(()))
    yield trace


def layout_of(z: dict) -> Layout:
  return Layout({k: z[f'init/{k}'].shape for k in NAMES})


def initial(z: dict) -> Vector:
  return torch.cat([z[f'init/{k}'].flatten() for k in NAMES])


def compare(z: dict, layout: Layout, key: str, got: list[Vector]) -> None:
  """Flat vectors by task (and step) against the stored arrays key/<p>."""
  for k, value in layout.split(torch.stack(got)).items():
    assert value.shape == z[f'{key}/{k}'].shape, (key, k)
    same(value, z[f'{key}/{k}'], f'{key} {k}', TOL)


def compare_run(z: dict, layout: Layout, v: str, traces: list[Trace], models: list[Vector]) -> None:
  compare(z, layout, f'{v}/params', [tr.all_after for tr in traces])
  ce = torch.stack([tr.all_ce for tr in traces])
  penalty = torch.stack([tr.all_penalty for tr in traces])
  same(ce, z[f'{v}/ce'], f'{v} ce', TOL)
  same(penalty, z[f'{v}/penalty'], f'{v} penalty', TOL)
  same(ce + penalty, z[f'{v}/loss'], f'{v} loss', TOL)
  probe = torch.stack([layout.logits(m, z['probe']) for m in models])
  same(probe, z[f'{v}/probe_logits'], f'{v} probe', TOL)


def check_keys(z: dict, expected: dict[str, str]) -> None:
  """No stored output was left out: `expected` names those checked, per variant."""
  for v, names in expected.items():
    base = {'params', 'loss', 'ce', 'penalty', 'probe_logits', *names.split()}
    assert {k.split('/')[1] for k in z if k.startswith(f'{v}/')} == base, v


def si() -> None:
  z = load('si')
  layout, variants = layout_of(z), ('task', 'total', 'unclipped', 'momentum')
  check_keys(z, dict.fromkeys(variants, 'omega importance'))
  for v in variants:
    anchors, terms = [initial(z)], []

    def penalty(t: int, theta: Vector, anchors=anchors, terms=terms) -> torch.Tensor:
      return z['c'] * sum((w * (theta - anchors[t]).square()).sum() for w in terms)

    traces, omegas = [], []
    for tr in train(z, layout, penalty, float(z['momentum']) if v == 'momentum' else 0.0):
      g = tr.all_g_total if v == 'total' else tr.all_g_task
      omegas.append(torch.cumsum(g * (tr.all_before - tr.all_after), 0))
      moved = tr.after[-1] - tr.before[0]
      term = omegas[-1][-1] / (moved**2 + z['xi'])
      terms.append(term if v == 'unclipped' else torch.relu(term))
      anchors.append(tr.after[-1])
      traces.append(tr)
    compare(z, layout, f'{v}/omega', omegas)
    compare(z, layout, f'{v}/importance', list(torch.cumsum(torch.stack(terms), 0)))
    compare_run(z, layout, v, traces, anchors[1:])
    print('si', v, 'agrees')


def mas() -> None:
  z = load('mas')
  layout = layout_of(z)
  check_keys(z, {'sum': 'importance importance_new'})
  anchors, terms, traces = [], [], []

  def penalty(t: int, theta: Vector) -> torch.Tensor:
    return z['lam'] * sum((w * (theta - anchors[-1]).square()).sum() for w in terms)

  slope = vmap(grad(lambda p, x: layout.logits(p, x[None]).square().sum()), in_dims=(None, 0))
  for t, tr in enumerate(train(z, layout, penalty)):
    anchors.append(tr.after[-1])
    terms.append(slope(anchors[-1], z['xs'][t].flatten(0, 1)).abs().mean(0))
    traces.append(tr)
  compare(z, layout, 'sum/importance_new', terms)
  compare(z, layout, 'sum/importance', list(torch.cumsum(torch.stack(terms), 0)))
  compare_run(z, layout, 'sum', traces, anchors)
  print('mas sum agrees')


def towards_last(z: dict, layout: Layout) -> tuple[list[Trace], list[Vector]]:
  anchors, traces = [], []

  def penalty(t: int, theta: Vector) -> torch.Tensor:
    return z['coef'] * F.mse_loss(theta, anchors[-1], reduction='sum') / 2 if t else torch.zeros(())

  for tr in train(z, layout, penalty):
    anchors.append(tr.after[-1])
    traces.append(tr)
  return traces, anchors


def l2() -> None:
  z = load('l2')
  layout = layout_of(z)
  check_keys(z, {'l2': ''})
  traces, anchors = towards_last(z, layout)
  compare_run(z, layout, 'l2', traces, anchors)
  print('l2 l2 agrees')


def rwalk() -> None:
  z = load('rwalk')
  layout, every = layout_of(z), int(z['every'])
  alpha, variants = z['alpha'], ('paper', 'code', 'ewcpp')
  check_keys(z, dict.fromkeys(variants, 'fisher score running_fisher score_all'))

  def unit(u: Vector) -> Vector:
    return (u - u.min()) / (u.max() - u.min() + z['eps'])

  for v in variants:
    zero = torch.zeros_like(initial(z))
    fishers, scores, anchors, traces = [], [], [], []

    def penalty(
      t: int, theta: Vector, fishers=fishers, scores=scores, anchors=anchors, v=v
    ) -> torch.Tensor:
      if t == 0:
        return torch.zeros(())
      weight = unit(fishers[-1]) + (0 if v == 'ewcpp' else unit(scores[-1]))
      return z['lam'] * (weight * (theta - anchors[-1]).square()).sum()

    for t, tr in enumerate(train(z, layout, penalty)):
      fisher, walked = fishers[-1] if t else zero, zero
      # A refresh covers `every` steps, the last one the remainder; nothing within a task reads the
      # state, so that a task can be cut into these pieces afterwards.
      steps = torch.arange(len(tr.after))
      for piece in torch.split(steps, every):
        g, start, end = tr.all_g_task[piece], tr.before[piece[0]], tr.after[piece[-1]]
        gained = (g * (tr.all_before - tr.all_after)[piece]).sum(0)
        walked = walked + torch.relu(gained / (z['xi'] + fisher * (end - start) ** 2))
        fisher = torch.lerp(fisher, g.square().mean(0), alpha)
      if t == 0:
        score = walked
      elif v != 'code':
        score = torch.stack([scores[-1], walked]).mean(0)
      else:
        score = 1.5 * scores[-1] + 0.5 * walked
      fishers.append(fisher)
      scores.append(score)
      anchors.append(tr.after[-1])
      traces.append(tr)
    compare(z, layout, f'{v}/running_fisher', fishers)
    compare(z, layout, f'{v}/score_all', scores)
    compare(z, layout, f'{v}/fisher', [unit(f) for f in fishers])
    compare(z, layout, f'{v}/score', [unit(s) for s in scores])
    compare_run(z, layout, v, traces, anchors)
    print('rwalk', v, 'agrees')


def imm() -> None:
  z = load('imm')
  layout = layout_of(z)
  check_keys(z, {'mean': 'merged', 'mode': 'merged fisher'})
  traces, ends = towards_last(z, layout)

  def surprise(p: Vector, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(layout.logits(p, x[None]), y[None])

  slope = vmap(grad(surprise), in_dims=(None, 0, 0))
  fishers = [
    slope(p, x.flatten(0, 1), y.flatten()).square().mean(0)
    for p, x, y in zip(ends, z['xs'], z['ys'], strict=True)
  ]
  compare(z, layout, 'mode/fisher', fishers)
  for v in ('mean', 'mode'):
    merged = []
    for t in range(len(ends)):
      stacked = torch.stack(ends[: t + 1])
      weight = torch.stack(fishers[: t + 1]) + z['eps'] if v == 'mode' else torch.ones_like(stacked)
      middle = ((weight / weight.sum(0)) * stacked).sum(0)
      merged.append(torch.where(layout.head(), ends[t], middle))
    compare(z, layout, f'{v}/merged', merged)
    compare_run(z, layout, v, traces, merged)
    print('imm', v, 'agrees')


def main() -> None:
  for check in (si, mas, l2, rwalk, imm):
    check()


if __name__ == '__main__':
  main()
