"""Checks the golden files of the replay families as `verify.py` does: PyTorch autograd in float64.

Objectives are stated again from the stored inputs and parameters, memory contents from their
definition (the last row sent to each slot, the last m rows, the m closest rows, means of the rows
assigned, prefixes with the closest mean), and the QPs of GEM by their KKT conditions and by SciPy's
NNLS. Run: ``python verify_replay.py``; it prints one line per variant.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import nnls
from verify import NAMES, at, grad_of, load, net, same

TOL = 1e-9


def equal(a, b, what: str) -> None:
  same(a, b, what, TOL)


def step_agrees(z: dict, v: str, t: int, s: int, p: dict, g: dict) -> None:
  for k in NAMES:
    equal(p[k] - z['lr'] * g[k], z[f'{v}/params/{k}'][t, s], f'{v} {k} task {t} step {s}')


def probe_agrees(z: dict, v: str, t: int) -> None:
  p = {k: z[f'{v}/params/{k}'][t, -1] for k in NAMES}
  equal(net(p, z['probe']), z[f'{v}/probe_logits'][t], f'{v} probe')


def reservoir_agrees(z: dict, v: str, contents, n: int) -> None:
  """`contents` after n rows: slot by slot the last row that was sent there."""
  m, js = int(z['capacity']), z[f'{v}/j'].flatten().tolist()
  for i, j in enumerate(js[:n]):
    assert (j == -1) if i < m else (0 <= j <= i)
  sent = [i if i < m else js[i] for i in range(n)]
  for slot in range(m):
    assert int(contents[slot]) == max((i for i in range(n) if sent[i] == slot), default=-1)


def draw_agrees(z: dict, v: str, d: str, at_: tuple, before, x, y) -> torch.Tensor:
  """Positions drawn; they must be distinct filled slots, as many as there are, then padding."""
  slots = z[f'{v}/{d}_slots'][at_]
  n = min(len(slots), int((before >= 0).sum()))
  assert bool((slots[n:] == -1).all()) and len(set(slots[:n].tolist())) == n
  rows = before[slots[:n]]
  assert bool((rows >= 0).all()) and torch.equal(z[f'{v}/{d}_stream'][at_][:n], rows)
  assert bool((z[f'{v}/{d}_stream'][at_][n:] == -1).all())
  assert torch.equal(z[f'{v}/{d}_x'][at_][:n], x[rows])
  assert torch.equal(z[f'{v}/{d}_y'][at_][:n], y[rows])
  assert bool((z[f'{v}/{d}_x'][at_][n:] == 0).all() and (z[f'{v}/{d}_y'][at_][n:] == -1).all())
  weight = z[f'{v}/{d}_weight'][at_]
  assert bool((weight[:n] == 1).all() and (weight[n:] == 0).all())
  return rows


def memory_rows_agree(z: dict, v: str, at_: tuple, x, y) -> None:
  content = z[f'{v}/memory_stream'][at_]
  there = content >= 0
  equal(z[f'{v}/memory_x'][at_], torch.where(there[:, None], x[content], 0.0), 'memory x')
  equal(z[f'{v}/memory_y'][at_], torch.where(there, y[content], -1), 'memory y')


def der() -> None:
  z = load('der')
  x, y = z['xs'].reshape(-1, 6), z['ys'].reshape(-1)
  tasks, steps, rows = z['ys'].shape
  for v in ('der', 'derpp'):
    alpha, beta = z[f'{v}/alpha'], z[f'{v}/beta']
    kept = torch.zeros(len(x), 4)
    before, n = torch.full((int(z['capacity']),), -1), 0
    for t in range(tasks):
      for s in range(steps):
        p = at(z, v, t, s)
        out = net(p, z['xs'][t, s])
        loss = F.cross_entropy(out, z['ys'][t, s])
        first = draw_agrees(z, v, 'draw', (t, s), before, x, y)
        assert (len(first) == 0) == (n == 0)
        equal(z[f'{v}/draw_z'][t, s][: len(first)], kept[first], f'{v} z')
        assert v == 'derpp' or z['der/loss_y'][t, s] == 0
        if n:
          loss = loss + alpha * F.mse_loss(net(p, x[first]), kept[first])
          if v == 'derpp':
            second = draw_agrees(z, v, 'draw2', (t, s), before, x, y)
            loss = loss + beta * F.cross_entropy(net(p, x[second]), y[second])
        equal(loss, z[f'{v}/loss'][t, s], f'{v} loss')
        parts = (z[f'{v}/loss_{k}'][t, s] for k in ('batch', 'z', 'y'))
        equal(sum(w * part for w, part in zip((1, alpha, beta), parts, strict=True)), loss, 'parts')
        step_agrees(z, v, t, s, p, grad_of(loss, p))
        kept[n : n + rows] = out.detach()
        equal(out, z[f'{v}/logits'][t, s], f'{v} logits')
        n += rows
        before = z[f'{v}/memory_stream'][t, s]
        reservoir_agrees(z, v, before, n)
        memory_rows_agree(z, v, (t, s), x, y)
        held = torch.where(before[:, None] >= 0, kept[before], 0.0)
        equal(z[f'{v}/memory_z'][t, s], held, f'{v} memory z')
      probe_agrees(z, v, t)
    assert (beta == 0) == (v == 'der')
    print(f'der {v} agrees')


def er_ace() -> None:
  z = load('er_ace')
  for v in ('tasks', 'one_class'):
    xs, ys = z[f'{v}/xs'], z[f'{v}/ys']
    x, y = xs.reshape(-1, 6), ys.reshape(-1)
    tasks, steps, rows = ys.shape
    before, n = torch.full((int(z['capacity']),), -1), 0
    for t in range(tasks):
      for s in range(steps):
        p = at(z, v, t, s)
        absent = torch.ones(4, dtype=torch.bool)
        absent[ys[t, s]] = False
        assert torch.equal(~absent, z[f'{v}/present'][t, s].bool())
        loss = F.cross_entropy(net(p, xs[t, s]).masked_fill(absent, -torch.inf), ys[t, s])
        equal(loss, z[f'{v}/loss_batch'][t, s], f'{v} batch loss')
        equal(z[f'{v}/loss'][t, s] - loss, z[f'{v}/loss_memory'][t, s], f'{v} memory loss')
        drawn = draw_agrees(z, v, 'draw', (t, s), before, x, y)
        if n:
          loss = loss + F.cross_entropy(net(p, x[drawn]), y[drawn])
        equal(loss, z[f'{v}/loss'][t, s], f'{v} loss')
        step_agrees(z, v, t, s, p, grad_of(loss, p))
        n += rows
        before = z[f'{v}/memory_stream'][t, s]
        reservoir_agrees(z, v, before, n)
        memory_rows_agree(z, v, (t, s), x, y)
      probe_agrees(z, v, t)
    print(f'er_ace {v} agrees')


def mir() -> None:
  z = load('mir')
  x, y = z['xs'].reshape(-1, 6), z['ys'].reshape(-1)
  tasks, steps, rows = z['ys'].shape
  for v in ('mir', 'few'):
    k_ = int(z[f'{v}/k'])
    before, n = torch.full((int(z['capacity']),), -1), 0
    for t in range(tasks):
      for s in range(steps):
        p = at(z, v, t, s)
        drawn = draw_agrees(z, v, 'draw', (t, s), before, x, y)
        loss = F.cross_entropy(net(p, z['xs'][t, s]), z['ys'][t, s])
        equal(loss, z[f'{v}/loss_batch'][t, s], f'{v} batch loss')
        equal(z[f'{v}/loss'][t, s] - loss, z[f'{v}/loss_memory'][t, s], f'{v} memory loss')
        g = grad_of(loss, p)
        chosen, scores = z[f'{v}/chosen'][t, s], z[f'{v}/scores'][t, s]
        assert bool((scores[len(drawn) :] == 0).all())
        if n:
          loss = F.cross_entropy(net(p, z['xs'][t, s]), z['ys'][t, s])
          ahead = {k: p[k] - z['lr_v'] * g[k] for k in NAMES}
          score = F.cross_entropy(net(ahead, x[drawn]), y[drawn], reduction='none')
          score = score - F.cross_entropy(net(p, x[drawn]), y[drawn], reduction='none')
          equal(score, scores[: len(drawn)], f'{v} scores')
          top = torch.topk(score, min(k_, len(drawn))).indices
          assert torch.equal(top, chosen[: len(top)]) and bool((chosen[len(top) :] == -1).all())
          assert torch.equal(drawn[top], z[f'{v}/chosen_stream'][t, s][: len(top)])
          loss = loss + F.cross_entropy(net(p, x[drawn[top]]), y[drawn[top]])
          g = grad_of(loss, p)
        else:
          assert bool((chosen == -1).all())
        equal(loss, z[f'{v}/loss'][t, s], f'{v} loss')
        step_agrees(z, v, t, s, p, g)
        n += rows
        before = z[f'{v}/memory_stream'][t, s]
        reservoir_agrees(z, v, before, n)
        memory_rows_agree(z, v, (t, s), x, y)
      probe_agrees(z, v, t)
    print(f'mir {v} agrees')


def qp_agrees(rows: np.ndarray, g: np.ndarray, eps: float, margin: float, v: np.ndarray) -> None:
  """KKT conditions of the stored v, and NNLS in u = v - margin, scaled to a unit diagonal."""
  a = rows @ rows.T + eps * np.eye(len(rows))
  d = 1 / np.sqrt(np.diag(a))
  mu = a @ v + rows @ g
  size = np.linalg.norm(g)
  assert np.all(v >= margin) and np.all(d * mu >= -TOL * size)
  assert np.all(np.abs(mu * (v - margin)) <= TOL * size**2)
  # 1/2 w^T U w + c^T w over w >= 0 with u = d w, U = d a d; U = L L^T: |L^T w + L^-1 c|^2 / 2.
  low = np.linalg.cholesky(d[:, None] * a * d)
  c = d * (rows @ g + a @ np.full(len(v), margin))
  w = nnls(low.T, -np.linalg.solve(low, c))[0]
  assert np.allclose(margin + d * w, v, rtol=1e-8, atol=TOL), (margin + d * w, v)
  # <g~, G[k]> as the signs say: -eps v for the free ones, at least -eps margin for the others.
  after = rows @ (rows.T @ v + g)
  bound = -eps * v
  assert np.all((after - bound) * d >= -TOL * size)
  assert np.all(np.abs((after - bound) * d)[v > margin] <= TOL * size)


def gem() -> None:
  z = load('gem')
  for i in range(len(z['single/g'])):
    n = int(z['single/count'][i])
    rows, g, v = z['single/G'][i, :n], z['single/g'][i], z['single/v'][i, :n]
    assert bool((z['single/G'][i, n:] == 0).all() and (z['single/v'][i, n:] == 0).all())
    equal(rows @ g, z['single/dot'][i, :n], 'dot')
    violated = bool((rows @ g < 0).any())
    assert violated == bool(z['single/violated'][i])
    if violated:
      eps, margin = float(z['single/eps'][i]), float(z['single/margin'][i])
      qp_agrees(rows.numpy(), g.numpy(), eps, margin, v.numpy())
    else:
      assert bool((v == 0).all())
    equal(v @ rows + g, z['single/projected'][i], 'projected')
  print('gem single agrees')
  x, y = z['xs'].reshape(-1, 6), z['ys'].reshape(-1)
  tasks, steps, rows_of = z['ys'].shape
  m = int(z['m'])
  for name in ('margin0', 'margin'):
    eps, margin, n = float(z['eps']), float(z[f'{name}/margin']), 0
    for t in range(tasks):
      for s in range(steps):
        p = at(z, name, t, s)
        loss = F.cross_entropy(net(p, z['xs'][t, s]), z['ys'][t, s])
        equal(loss, z[f'{name}/loss'][t, s], f'{name} loss')
        g = grad_of(loss, p)
        flat = torch.cat([g[k].flatten() for k in NAMES])
        v, dots = z[f'{name}/v'][t, s], z[f'{name}/dot'][t, s]
        assert bool((v[t:] == 0).all() and (dots[t:] == 0).all())
        G = []
        for k in range(t):
          end = (k + 1) * steps * rows_of
          past = F.cross_entropy(net(p, x[end - m : end]), y[end - m : end])
          equal(past, z[f'{name}/loss_past'][t, s, k], f'{name} loss of task {k}')
          r = grad_of(past, p)
          G.append(torch.cat([r[q].flatten() for q in NAMES]))
        if t:
          G = torch.stack(G)
          equal(G @ flat, dots[:t], f'{name} dot')
          violated = bool((G @ flat < 0).any())
          assert violated == bool(z[f'{name}/violated'][t, s])
          if violated:
            qp_agrees(G.numpy(), flat.numpy(), eps, margin, v[:t].numpy())
          else:
            assert bool((v == 0).all())
          flat = flat + v[:t] @ G
          equal(G @ flat, z[f'{name}/dot_after'][t, s, :t], f'{name} dot after')
        sizes = [p[k].numel() for k in NAMES]
        parts = zip(NAMES, torch.split(flat, sizes), strict=True)
        step_agrees(z, name, t, s, p, {k: part.reshape(p[k].shape) for k, part in parts})
        n += rows_of
        content = z[f'{name}/memory_stream'][t, s].reshape(tasks, m)
        for k in range(tasks):
          done = min(max(n - k * steps * rows_of, 0), steps * rows_of)
          of_task = [k * steps * rows_of + i for i in range(done)]
          assert sorted(i for i in content[k].tolist() if i >= 0) == of_task[-m:]
          assert all((i - k * steps * rows_of) % m == slot or i < 0
                     for slot, i in enumerate(content[k].tolist()))  # fmt: skip
      probe_agrees(z, name, t)
    print(f'gem {name} agrees')


def gdumb() -> None:
  z = {k: v.numpy() for k, v in load('gdumb').items()}
  for i, labels in enumerate(z['labels']):
    held: dict[int, int] = {}  # slot -> position
    for n, c in enumerate(labels.tolist()):
      of = {q: sorted(s for s in held if labels[held[s]] == q) for q in range(int(z['classes']))}
      distinct = len(set(labels[: n + 1].tolist()))
      slot, victim = -1, -1
      if c not in labels[:n] or len(of[c]) * distinct < int(z['K']):
        if len(held) < z['K']:
          slot = len(held)
        else:
          victim = min(of, key=lambda q: (-len(of[q]), q))
          slot = of[victim][int(z['u'][i, n] * len(of[victim]))]
        held[slot] = n
      assert (slot, victim) == (z['written'][i, n], z['victim'][i, n])
      assert z['slots'][i, n].tolist() == [held.get(s, -1) for s in range(int(z['K']))]
    print(f'gdumb stream {i} agrees')


def writers() -> None:
  z = load('writers')
  m = int(z['m'])
  for i, (phi, y) in enumerate(zip(z['features'], z['labels'], strict=True)):
    d = torch.stack([
      (phi[n] - phi[: n + 1][y[: n + 1] == y[n]].mean(0)).norm() for n in range(len(y))
    ])  # fmt: skip
    last = [-1] * (3 * m)
    for n in range(len(y)):
      slots = z['mof/slots'][i, n].tolist()
      for c in range(3):
        rows = [r for r in range(n + 1) if y[r] == c]
        mean = phi[rows].mean(0) if rows else torch.zeros(7)
        equal(mean, z['mof/mean'][i, n, c], 'mof mean')
        # A row enters only for a farther one, so the class's m closest rows are what is held.
        closest = sorted(sorted(rows, key=lambda r: float(d[r]))[:m])
        assert sorted(r for r in slots[m * c : m * c + m] if r >= 0) == closest
      changed = [s for s in range(3 * m) if slots[s] != last[s]]
      written = int(z['mof/written'][i, n])
      assert changed == ([written] if written >= 0 else [])
      assert written < 0 or (slots[written] == n and written // m == y[n])
      held = torch.tensor([float(d[r]) if r >= 0 else 0.0 for r in slots])
      equal(held, z['mof/distance'][i, n], 'mof distance')
      last = slots
    print(f'writers mof stream {i} agrees')
    rows_of: dict[int, list[int]] = {}  # centroid -> rows assigned to it
    kept: dict[int, int] = {}
    for n in range(len(y)):
      own = [s for s in range(int(y[n]) * m, int(y[n]) * m + m) if s in rows_of]
      if len(own) < m:
        near = written = int(y[n]) * m + len(own)
        rows_of[near], kept[near] = [n], n
      else:
        far = torch.stack([(phi[n] - phi[rows_of[s]].mean(0)).norm() for s in own])
        near = own[int(far.argmin())]
        rows_of[near].append(n)
        centre, old = phi[rows_of[near]].mean(0), kept[near]
        closer = (phi[n] - centre).norm() < (phi[old] - centre).norm()
        written = near if closer else -1
        kept[near] = n if closer else old
      assert int(z['kmeans/nearest'][i, n]) == near and int(z['kmeans/written'][i, n]) == written
      assert z['kmeans/slots'][i, n].tolist() == [kept.get(s, -1) for s in range(3 * m)]
      for s in range(3 * m):
        rows = rows_of.get(s, [])
        assert int(z['kmeans/count'][i, n, s]) == len(rows)
        centre = phi[rows].mean(0) if rows else torch.zeros(7)
        equal(centre, z['kmeans/centroid'][i, n, s], 'kmeans centroid')
    print(f'writers kmeans stream {i} agrees')


def mer() -> None:
  z = load('mer')
  x, y = z['xs'].reshape(-1, 6), z['ys'].reshape(-1)
  tasks, steps, rows = z['ys'].shape
  for v, batches, beta in (('mer', int(z['s']), float(z['beta'])), ('alg6', 1, 1.0)):
    before, n = torch.full((int(z['capacity']),), -1), 0
    for t in range(tasks):
      for b in range(steps):
        p = at(z, v, t, b)
        loss = F.cross_entropy(net(p, z['xs'][t, b]), z['ys'][t, b])
        equal(loss, z[f'{v}/loss'][t, b], f'{v} loss')
        for r in range(rows):
          across = {k: p[k].detach() for k in NAMES}
          loss = F.cross_entropy(net(across, x[n : n + 1]), y[n : n + 1])
          equal(loss, z[f'{v}/loss_row'][t, b, r], f'{v} loss of a row')
          theta = across
          for i in range(batches):
            drawn = draw_agrees(z, v, 'draw', (t, b, r, i), before, x, y)
            assert len(drawn) == int(z[f'{v}/count'][t, b, r]) == min(int(z['k']) - 1, n)
            walk = theta
            for row in [*drawn.tolist(), n]:
              leaf = {k: w.clone().requires_grad_() for k, w in walk.items()}
              g = grad_of(F.cross_entropy(net(leaf, x[row : row + 1]), y[row : row + 1]), leaf)
              walk = {k: leaf[k].detach() - z['lr'] * g[k] for k in NAMES}
            theta = {k: torch.lerp(theta[k], walk[k], beta) for k in NAMES}
          p = {k: torch.lerp(across[k], theta[k], z['gamma']) for k in NAMES}
          n += 1
          before = z[f'{v}/memory_stream'][t, b, r]
          reservoir_agrees(z, v, before, n)
        for k in NAMES:
          equal(p[k], z[f'{v}/params/{k}'][t, b], f'{v} {k} task {t} batch {b}')
      probe_agrees(z, v, t)
    print(f'mer {v} agrees')


def unit_features(p: dict, x: torch.Tensor) -> torch.Tensor:
  h = torch.relu(x @ p['l0/w'] + p['l0/b'])
  return F.normalize(torch.relu(h @ p['l1/w'] + p['l1/b']), dim=1, eps=0.0)


def herding_agrees(phi: torch.Tensor, order: list[int]) -> None:
  """Every prefix of `order` must have the closest mean of all that differ in its last row."""
  mu = phi.mean(0)
  for k in range(len(order)):
    rest = [r for r in range(len(phi)) if r not in order[:k]]
    means = torch.stack([phi[[*order[:k], r]].mean(0) for r in rest])
    d = torch.cdist(means, mu[None], compute_mode='donot_use_mm_for_euclid_dist')[:, 0]
    best = d.sort()
    assert rest[int(best.indices[0])] == order[k]
    assert len(rest) == 1 or best.values[1] - best.values[0] > 1e-6


def icarl() -> None:
  z = load('icarl')
  x, y = z['xs'].reshape(-1, 6), z['ys'].reshape(-1)
  tasks, steps, rows = z['ys'].shape
  size = int(z['K'])
  for v, coef in (('plain', 1.0), ('coef', 0.5), ('soft', 1.0)):
    assert z[f'{v}/coef'] == coef
    held: dict[int, list[int]] = {}
    slots, saved = torch.full((size,), -1), None
    for t in range(tasks):
      learnt = torch.tensor([c in held for c in range(6)])
      for s in range(steps):
        p = at(z, v, t, s)
        picked = z[f'{v}/draw_slots'][t, s]
        positions = z[f'{v}/draw_stream'][t, s]
        if t:
          assert len(set(picked.tolist())) == len(picked) == int(z['D'])
          assert bool((picked >= 0).all() and (positions >= 0).all())
          assert torch.equal(slots[picked], positions)
        else:
          assert bool((picked == -1).all() and (positions == -1).all())
        n = (t * steps + s) * rows
        used = torch.cat([torch.arange(n, n + rows), positions[positions >= 0]])
        target = F.one_hot(y[used], 6).double()
        if saved is not None:
          then = net(saved, x[used]) / (2 if v == 'soft' else 1)
          target = torch.where(learnt, torch.sigmoid(then), target)
        bce = F.binary_cross_entropy_with_logits(net(p, x[used]), target, reduction='none')
        of_old = coef * bce[:, learnt].sum(1).mean()
        loss = bce[:, ~learnt].sum(1).mean() + of_old
        equal(of_old, z[f'{v}/loss_old'][t, s], f'{v} loss of old classes')
        equal(loss, z[f'{v}/loss'][t, s], f'{v} loss')
        step_agrees(z, v, t, s, p, grad_of(loss, p))
      saved = {k: z[f'{v}/params/{k}'][t, -1] for k in NAMES}
      m = size // (2 * (t + 1))
      assert m == int(z[f'{v}/m'][t])
      slots = z[f'{v}/slots'][t]
      now = {c: [r for r in slots[c * m : c * m + m].tolist() if r >= 0] for c in range(2 * t + 2)}
      used_slots = [c * m + i for c in now for i in range(len(now[c]))]
      assert torch.nonzero(slots >= 0)[:, 0].tolist() == used_slots  # no gaps, nothing behind
      for c in now:
        if c in held:
          assert now[c] == held[c][:m]
          continue
        own = [r for r in range(t * steps * rows, (t + 1) * steps * rows) if y[r] == c]
        assert len(now[c]) == min(m, len(own))
        herding_agrees(unit_features(saved, x[own]), [own.index(r) for r in now[c]])
      held = now
      mean = torch.zeros(6, 7)
      score = torch.zeros(12, 6)
      for c in held:
        mean[c] = F.normalize(unit_features(saved, x[held[c]]).sum(0), dim=0)
        score[:, c] = -F.mse_loss(
          unit_features(saved, z['probe']), mean[c].expand(12, 7), reduction='none'
        ).sum(1)
      equal(mean, z[f'{v}/means'][t], f'{v} means')
      equal(score, z[f'{v}/probe_scores'][t], f'{v} scores')
    print(f'icarl {v} agrees')


def decoder(gen: dict, z: torch.Tensor) -> torch.Tensor:
  """Logits of x_hat."""
  h = F.linear(z, gen['d0/w'].T, gen['d0/b']).relu()
  h = F.linear(h, gen['d1/w'].T, gen['d1/b']).relu()
  return F.linear(h, gen['out/w'].T, gen['out/b'])


def vae_loss(gen: dict, x: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
  h = F.linear(x, gen['e0/w'].T, gen['e0/b']).relu()
  h = F.linear(h, gen['e1/w'].T, gen['e1/b']).relu()
  mu = F.linear(h, gen['mu/w'].T, gen['mu/b'])
  scale = (F.linear(h, gen['logvar/w'].T, gen['logvar/b']) / 2).exp()
  bce = F.binary_cross_entropy_with_logits(decoder(gen, mu + scale * eps), x)  # a mean over inputs
  normal = torch.distributions.Normal
  kl = torch.distributions.kl_divergence(normal(mu, scale), normal(0.0, 1.0))
  return bce + kl.sum() / x.numel()


def dgr_outputs() -> None:
  """The solver where a dream is labelled by other outputs; dreams are the stored ones."""
  z = load('dgr')
  for v, data, init in (('all', '', 'init'), ('heads', 'heads/', 'init6')):
    xs, ys = z[f'{data}xs'], z[f'{data}ys']
    tasks, steps, _ = ys.shape
    for t in range(tasks):
      own = slice(2 * t, 2 * t + 2) if v == 'heads' else slice(None)
      for s in range(steps):
        p = at(z, v, t, s, init)
        loss = F.cross_entropy(net(p, xs[t, s])[:, own], ys[t, s] - (own.start or 0)) / (t + 1)
        if t:
          x = z['dgr/x_rep' if v == 'all' else 'heads/x_rep'][t, s]
          old = net({k: z[f'{v}/params/{k}'][t - 1, -1] for k in NAMES}, x)
          parts = range(t) if v == 'heads' else [None]
          for h in parts:
            part = slice(None) if h is None else slice(2 * h, 2 * h + 2)
            label = old[:, part].argmax(1)
            assert torch.equal(label, z[f'{v}/y_rep'][t, s, :, h or 0])
            loss = loss + t / (t + 1) * F.cross_entropy(net(p, x)[:, part], label) / len(parts)
        equal(loss, z[f'{v}/loss'][t, s], f'dgr {v} loss')
        step_agrees(z, v, t, s, p, grad_of(loss, p))
      probe_agrees(z, v, t)
    print(f'dgr {v} agrees')


def dgr() -> None:
  """The solver step by step; the generator as a whole run, since Adam's state is not stored."""
  z = load('dgr')
  tasks, steps, _ = z['ys'].shape
  names = [f'{k}/{p}' for k in ('e0', 'e1', 'mu', 'logvar', 'd0', 'd1', 'out') for p in 'wb']
  gen = {k: z[f'gen/{k}'].clone().requires_grad_() for k in names}
  adam = torch.optim.Adam(gen.values(), lr=float(z['lr_g']), betas=(0.9, 0.999), eps=1e-8)
  for t in range(tasks):
    now = 1 / (t + 1)
    for s in range(steps):
      p = at(z, 'dgr', t, s)
      loss = now * F.cross_entropy(net(p, z['xs'][t, s]), z['ys'][t, s])
      gen_loss = now * vae_loss(gen, z['xs'][t, s], z['dgr/eps'][t, s])
      x, y = z['dgr/x_rep'][t, s], z['dgr/y_rep'][t, s]
      if t:
        saved = {k: z[f'dgr/params/{k}'][t - 1, -1] for k in NAMES}
        decoded = decoder({k: z[f'dgr/gen/{k}'][t - 1, -1] for k in names}, z['dgr/z_rep'][t, s])
        equal(decoded.sigmoid(), x, 'dgr x_rep')
        assert torch.equal(net(saved, x)[:, : 2 * t].argmax(1), y)
        loss = loss + (1 - now) * F.cross_entropy(net(p, x), y)
        gen_loss = gen_loss + (1 - now) * vae_loss(gen, x, z['dgr/eps_rep'][t, s])
      else:
        assert bool((x == 0).all() and (y == -1).all())
      equal(loss, z['dgr/loss'][t, s], 'dgr loss')
      equal(gen_loss, z['dgr/gen_loss'][t, s], 'dgr generator loss')
      step_agrees(z, 'dgr', t, s, p, grad_of(loss, p))
      adam.zero_grad()
      gen_loss.backward()
      adam.step()
      for k in names:
        equal(gen[k], z[f'dgr/gen/{k}'][t, s], f'dgr {k} task {t} step {s}')
    probe_agrees(z, 'dgr', t)
  print('dgr agrees')


def main() -> None:
  for check in (der, er_ace, mir, gem, gdumb, writers, mer, icarl, dgr, dgr_outputs):
    check()


if __name__ == '__main__':
  main()
