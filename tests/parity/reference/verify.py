"""Checks the golden files against a second derivation: PyTorch autograd in float64.

For every stored step the method's objective is stated again from the stored inputs and state, its
gradient is taken by autograd at the stored parameters before the step, and the parameters after the
step must be those stored. Run: ``python verify.py``; it ends with an AssertionError on the first
mismatch. It shares no arithmetic with the generators, only the file layout.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

GOLDEN = Path(__file__).resolve().parent.parent / 'golden'
torch.set_default_dtype(torch.float64)
NAMES = ('l0/w', 'l0/b', 'l1/w', 'l1/b', 'l2/w', 'l2/b')


def load(family: str) -> dict[str, torch.Tensor]:
  with np.load(GOLDEN / f'{family}.npz', allow_pickle=False) as f:
    return {k: torch.from_numpy(np.array(f[k])) for k in f.files}


def net(p: dict, x: torch.Tensor) -> torch.Tensor:
  h = torch.relu(x @ p['l0/w'] + p['l0/b'])
  return torch.relu(h @ p['l1/w'] + p['l1/b']) @ p['l2/w'] + p['l2/b']


def at(z: dict, variant: str, t: int, s: int, init: str = 'init', names=NAMES) -> dict:
  """Leaf parameters before step s of task t."""
  if s == 0 and t == 0:
    src = {k: z[f'{init}/{k}'] for k in names}
  else:
    t, s = (t, s - 1) if s else (t - 1, -1)
    src = {k: z[f'{variant}/params/{k}'][t, s] for k in names}
  return {k: v.clone().requires_grad_() for k, v in src.items()}


def grad_of(loss: torch.Tensor, p: dict) -> dict:
  got = torch.autograd.grad(loss, list(p.values()), allow_unused=True)
  pairs = zip(p.items(), got, strict=True)
  return {k: torch.zeros_like(v) if g is None else g for (k, v), g in pairs}


def same(a, b, what: str, tol: float = 1e-10) -> None:
  a, b = (torch.as_tensor(v, dtype=torch.float64).detach() for v in (a, b))
  assert torch.allclose(a, b, rtol=tol, atol=tol), (what, (a - b).abs().max())


def check_step(z: dict, v: str, t: int, s: int, p: dict, g: dict, lr=None) -> None:
  for k in p:
    step = z['lr'] if lr is None else lr
    same(p[k] - step * g[k], z[f'{v}/params/{k}'][t, s], f'{v} {k} task {t} step {s}')


def ewc() -> None:
  z = load('ewc')
  for v in sorted({k.split('/')[0] for k in z if '_' in k.split('/')[0]}):
    kind, online = v.split('_')[0], v.endswith('online')
    tasks, steps = z[f'{v}/loss'].shape
    for t in range(tasks):
      for s in range(steps):
        p = at(z, v, t, s)
        loss = F.cross_entropy(net(p, z['xs'][t, s]), z['ys'][t, s])
        past = ([t - 1] if t else []) if online else range(t)
        for b in past:
          for k in NAMES:
            f = z[f'{v}/fisher/{k}' if online else f'{v}/fisher_new/{k}'][b]
            loss = loss + z['lam'] / 2 * (f * (p[k] - z[f'{v}/params/{k}'][b, -1]) ** 2).sum()
        same(loss, z[f'{v}/loss'][t, s], f'{v} loss')
        check_step(z, v, t, s, p, grad_of(loss, p))
      p = at(z, v, t, steps)
      x, y = z['xs'][t].reshape(-1, 6), z['ys'][t].reshape(-1)
      total = {k: torch.zeros_like(p[k]) for k in NAMES}
      for n in range(len(x)):
        logp = torch.log_softmax(net(p, x[n][None])[0], 0)
        if kind == 'exact':
          pairs = [(c, logp[c].exp().detach()) for c in range(4)]
        elif kind == 'predicted':
          pairs = [(int(logp.argmax()), 1.0)]
        else:
          pairs = [((y if kind == 'empirical' else z[f'{v}/sampled_labels'][t])[n], 1.0)]
        for c, w in pairs:
          g = torch.autograd.grad(logp[c], list(p.values()), retain_graph=True)
          for k, gk in zip(NAMES, g, strict=True):
            total[k] += w * gk**2 / len(x)
      for k in NAMES:
        same(total[k], z[f'{v}/fisher_new/{k}'][t], f'{v} fisher {k}')
        if online:
          old = z['gamma'] * z[f'{v}/fisher/{k}'][t - 1] if t else 0.0
          same(old + total[k], z[f'{v}/fisher/{k}'][t], f'{v} running fisher {k}')
      same(net(p, z['probe']), z[f'{v}/probe_logits'][t], f'{v} probe')


def lwf() -> None:
  z = load('lwf')
  temp, lam = z['T'], z['lam']

  def soft_ce(new, old):
    return -(torch.softmax(old / temp, 1) * torch.log_softmax(new / temp, 1)).sum(1).mean()

  for v in ('single', 'multihead', 'multihead3', 'ci', 'ci3', 'ci3_now', 'heads3_mean', 'ci3_mean'):
    init = 'init6' if '3' in v else 'init'
    data = 'single' if v == 'single' else 'split'
    tasks, steps = z[f'{v}/loss'].shape
    for t in range(tasks):
      for s in range(steps):
        p, x, y = at(z, v, t, s, init), z[f'xs_{data}'][t, s], z[f'ys_{data}'][t, s]
        new = net(p, x)
        snapshot = {k: z[f'{v}/params/{k}'][t - 1, -1] for k in NAMES}
        old = net(snapshot, x)  # unused in the first task
        if v == 'single':
          loss = F.cross_entropy(new, y)
          loss = loss + lam * temp**2 * soft_ce(new, old) if t else loss
        elif v.startswith('multi'):
          loss = F.cross_entropy(new[:, 2 * t : 2 * t + 2], y - 2 * t)
          for h in range(t):
            part = slice(2 * h, 2 * h + 2)
            loss = loss + lam * temp**2 * soft_ce(new[:, part], old[:, part])
        elif v == 'heads3_mean':
          loss = F.cross_entropy(new[:, 2 * t : 2 * t + 2], y - 2 * t) / (t + 1)
          pairs = [(a.view(5, 3, 2)[:, :t].flatten(0, 1) for a in (new, old))] if t else []
          for a, b in pairs:  # rows and heads alike, and two outputs
            loss = loss + t / (t + 1) * temp**2 * soft_ce(a, b) / 2
        else:
          ce = F.cross_entropy(new[:, : 2 * t + 2], y)
          kd = torch.zeros((), dtype=torch.float64)
          if t:  # minus infinity is the zero padding of the targets
            gone = torch.full((len(x), 2), -torch.inf, dtype=torch.float64)
            kd = soft_ce(new[:, : 2 * t + 2], torch.cat([old[:, : 2 * t], gone], 1))
          if v == 'ci3_now':
            loss = ce + kd
          else:
            outputs = 2 * t + 2 if v == 'ci3_mean' else 1
            loss = ce / (t + 1) + (1 - 1 / (t + 1)) * temp**2 * kd / outputs
        same(loss, z[f'{v}/loss'][t, s], f'{v} loss')
        check_step(z, v, t, s, p, grad_of(loss, p))


def agem() -> None:
  z = load('agem')
  init = {k: z[f'init/{k}'].clone().requires_grad_() for k in NAMES}

  def step_gradient(p, x, y, x_ref, y_ref):
    g = grad_of(F.cross_entropy(net(p, x), y), p)
    if x_ref is None:
      return g, 0.0
    r = grad_of(F.cross_entropy(net(p, x_ref), y_ref), p)
    dot = sum((g[k] * r[k]).sum() for k in NAMES)
    norm2 = sum((r[k] ** 2).sum() for k in NAMES)
    return {k: g[k] - torch.clamp(torch.as_tensor(dot / norm2), max=0) * r[k] for k in NAMES}, dot

  for i in range(len(z['single/x'])):
    g, dot = step_gradient(init, *(z[f'single/{k}'][i] for k in ('x', 'y', 'x_ref', 'y_ref')))
    same(dot, z['single/dot'][i], 'agem dot')
    for k in NAMES:
      same(g[k], z[f'single/projected/{k}'][i], f'agem projected {k}')
  for v in ('by_class', 'by_task'):
    flat_x, flat_y = z[f'{v}/xs'].reshape(-1, 6), z[f'{v}/ys'].reshape(-1)
    tasks, steps = z[f'{v}/loss'].shape
    for t in range(tasks):
      for s in range(steps):
        p, rows = at(z, v, t, s), z[f'{v}/draw_stream'][t, s]
        assert (t == 0) == bool((rows < 0).all()) and bool((rows < t * steps * 5).all())
        if t:
          assert torch.equal(z[f'{v}/memory_stream'][t - 1, -1][z[f'{v}/draw_slots'][t, s]], rows)
        ref = (flat_x[rows], flat_y[rows]) if t else (None, None)
        g, dot = step_gradient(p, z[f'{v}/xs'][t, s], z[f'{v}/ys'][t, s], *ref)
        same(dot, z[f'{v}/dot'][t, s], f'{v} dot')
        check_step(z, v, t, s, p, g)


def er() -> None:
  z = load('er')
  flat_x, flat_y = z['xs'].reshape(-1, 6), z['ys'].reshape(-1)
  for v in ('reservoir', 'ring'):
    before, n = torch.full_like(z[f'{v}/memory_stream'][0, 0], -1), 0
    for t in range(3):
      for s in range(5):
        p, slots = at(z, v, t, s), z[f'{v}/draw_slots'][t, s]
        rows = before[slots[slots >= 0]]
        x, y = torch.cat([z['xs'][t, s], flat_x[rows]]), torch.cat([z['ys'][t, s], flat_y[rows]])
        loss = F.cross_entropy(net(p, x), y)
        same(loss, z[f'{v}/loss'][t, s], f'{v} loss')
        check_step(z, v, t, s, p, grad_of(loss, p))
        n += 5
        before = z[f'{v}/memory_stream'][t, s]
        if v == 'ring':  # content by definition: the last m rows of every class
          for c in range(4):
            last = [i for i in range(n) if flat_y[i] == c][-int(z['m']) :]
            assert sorted(i for i in before[2 * c : 2 * c + 2].tolist() if i >= 0) == last
        else:  # content by definition: the last row sent to each slot
          sent = [i if i < 9 else int(z['reservoir/j'].flatten()[i]) for i in range(n)]
          for slot in range(9):
            assert int(before[slot]) == max((i for i in range(n) if sent[i] == slot), default=-1)


def hat() -> None:
  z = load('hat')
  names = (*NAMES, 'e0', 'e1')

  def out(p, t, s, x):
    g = [torch.sigmoid(s * p[k][t]) for k in ('e0', 'e1')]
    h = torch.relu(x @ p['l0/w'] + p['l0/b']) * g[0]
    h = torch.relu(h @ p['l1/w'] + p['l1/b']) * g[1]
    return F.linear(h, p['l2/w'].T[2 * t : 2 * t + 2], p['l2/b'][2 * t : 2 * t + 2]), g

  smax = z['smax']
  for v in ('paper', 'official'):
    m = [torch.zeros(8, dtype=torch.float64), torch.zeros(7, dtype=torch.float64)]
    for t in range(2):
      for i in range(6):
        p, s = at(z, v, t, i, names=names), z[f'{v}/s'][t, i]
        b = i % 3
        same(s, 1 / smax + (smax - 1 / smax) * b / (2 if v == 'paper' else 3), 's')
        logits, g = out(p, t, s, z['xs'][t, i])
        room = torch.cat([1 - u for u in m])
        reg = (torch.cat(g) * room).sum() / room.sum()
        loss = F.cross_entropy(logits, z['ys'][t, i] - 2 * t) + z['c'] * reg
        same(loss, z[f'{v}/loss'][t, i], f'{v} loss')
        grads = grad_of(loss, p)
        grads['l0/w'] = grads['l0/w'] * (1 - m[0])
        grads['l0/b'] = grads['l0/b'] * (1 - m[0])
        grads['l1/w'] = grads['l1/w'] * torch.maximum(1 - m[0][:, None], 1 - m[1][None])
        grads['l1/b'] = grads['l1/b'] * (1 - m[1])
        for k in ('e0', 'e1'):
          e = p[k].detach()
          num = torch.cosh(torch.clamp(s * e, -50, 50)) + 1
          grads[k] = grads[k] * smax / s * num / (torch.cosh(e) + 1)
          same(grads[k][t], z[f'{v}/grad_{k}'][t, i], f'{v} grad {k}')
          moved = torch.clamp(e - z['lr'] * grads[k], -6, 6)
          same(moved, z[f'{v}/params/{k}'][t, i], f'{v} {k}')
        check_step(z, v, t, i, {k: p[k] for k in NAMES}, grads)
      p = at(z, v, t, 6, names=names)
      now = [torch.sigmoid(smax * p[k][t]) for k in ('e0', 'e1')]
      m = [torch.maximum(u, w) for u, w in zip(m, now, strict=True)]
      for k, u in zip(('g0', 'g1'), m, strict=True):
        same(u, z[f'{v}/cumulative/{k}'][t], f'{v} cumulative {k}')
      for of in range(t + 1):
        same(out(p, of, smax, z['probe'])[0], z[f'{v}/probe_logits'][t, of], f'{v} probe')


def main() -> None:
  for check in (ewc, lwf, agem, er, hat):
    check()
    print(check.__name__, 'agrees')


if __name__ == '__main__':
  main()
