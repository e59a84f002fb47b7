"""Second derivations for ebll, pnn, dreamnet and rehearsal: PyTorch autograd in float64.

Like `verify_regularisation.py`: each run is made anew from its stored inputs alone, with torch's
optimisers, and all stored arrays are compared to 1e-9. The columns of pnn are one network with block
triangular weights, whose gradient is masked; the memory of rehearsal is read off the definition of a
ring (the last row sent to each position). Every ReLU must be further than 1e-6 from flipping. Run:
``python verify_survey.py``; it ends with an AssertionError on the first mismatch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from verify import NAMES, load, same

TOL = 1e-9


def equal(a, b, what: str) -> None:
  same(a, b, what, TOL)


def relu(a: torch.Tensor) -> torch.Tensor:
  assert float(a.detach().abs().min()) > 1e-6
  return F.relu(a)


def features(p: dict, x: torch.Tensor) -> torch.Tensor:
  h = relu(F.linear(x, p['l0/w'].T, p['l0/b']))
  return relu(F.linear(h, p['l1/w'].T, p['l1/b']))


def logits(p: dict, f: torch.Tensor) -> torch.Tensor:
  return F.linear(f, p['l2/w'].T, p['l2/b'])


def leaves(z: dict, prefix: str, names=NAMES) -> dict:
  return {k: z[f'{prefix}/{k}'].clone().requires_grad_() for k in names}


def frozen(p: dict) -> dict:
  return {k: v.detach().clone() for k, v in p.items()}


def update(optimiser: torch.optim.Optimizer, loss: torch.Tensor) -> None:
  optimiser.zero_grad()
  loss.backward()
  optimiser.step()


def params_agree(z: dict, prefix: str, p: dict, at: tuple) -> None:
  for k in p:
    equal(p[k], z[f'{prefix}/{k}'][at], f'{prefix}/{k} at {at}')


def ebll() -> None:
  z = load('ebll')
  tasks, steps, _ = z['ys'].shape
  temperature = float(z['T'])
  p, saved, encoders = leaves(z, 'init'), {}, []
  sgd = torch.optim.SGD(p.values(), lr=float(z['lr']))
  for t in range(tasks):
    own = z['ys'][t] - 2 * t
    assert set(own.flatten().tolist()) == {0, 1}
    for s in range(steps):
      x = z['xs'][t, s]
      f = features(p, x)
      heads = logits(p, f).unflatten(1, (tasks, 2))
      others = torch.arange(6) // 2 != t
      ce = F.cross_entropy(logits(p, f).masked_fill(others, -torch.inf), z['ys'][t, s])
      kd = code = torch.zeros(())
      if t:
        f_saved = features(saved, x)
        q = F.softmax(logits(saved, f_saved).unflatten(1, (tasks, 2)) / temperature, dim=-1)
        log_q = F.log_softmax(heads / temperature, dim=-1)
        kd = -(q * log_q)[:, :t].sum() / len(x)
        for enc in encoders:
          now = torch.sigmoid(torch.addmm(enc['e'], f, enc['E']))
          then = torch.sigmoid(torch.addmm(enc['e'], f_saved, enc['E']))
          code = code + F.mse_loss(now, then)
      loss = ce + z['lam'] * temperature**2 * kd + z['beta'] * code
      for name, value in (('loss', loss), ('ce', ce), ('kd', kd), ('code', code)):
        equal(value, z[f'ebll/{name}'][t, s], f'ebll {name} task {t} step {s}')
      update(sgd, loss)
      params_agree(z, 'ebll/params', p, (t, s))
    saved = frozen(p)
    auto = {k: z[f'auto/{k}'][t].clone().requires_grad_() for k in 'EeDd'}
    adam = torch.optim.Adam(auto.values(), lr=float(z['lr_a']), betas=(0.9, 0.999), eps=1e-8)
    n = 0
    for _ in range(int(z['epochs'])):
      for s in range(steps):
        f = features(saved, z['xs'][t, s])
        u = torch.sigmoid(torch.addmm(auto['e'], f, auto['E']))
        r = torch.addmm(auto['d'], u, auto['D'])
        score = logits(saved, r)[:, 2 * t : 2 * t + 2]
        loss = z['alpha'] * F.mse_loss(r, f) + F.cross_entropy(score, own[s])
        equal(loss, z['ebll/auto_loss'][t, n], f'ebll autoencoder {t} step {n}')
        update(adam, loss)
        n += 1
    assert n == z['ebll/auto_loss'].shape[1]
    encoders.append({k: auto[k].detach() for k in 'Ee'})
    params_agree(z, 'ebll/auto', encoders[t], (t,))
    equal(logits(saved, features(saved, z['probe'])), z['ebll/probe_logits'][t], 'ebll probe')
  print('ebll agrees')


def pnn() -> None:
  """Three columns as one network: row block j and column block k hold what j sends to k."""
  z = load('pnn')
  tasks, steps, _ = z['ys'].shape
  sizes = {'l0': (6, 8), 'l1': (8, 7), 'l2': (7, 2)}

  def block(layer: str, j: int, k: int) -> tuple[slice, slice]:
    """Columns share the inputs, so l0 has one row block."""
    rows, cols = sizes[layer]
    j = 0 if layer == 'l0' else j
    return slice(j * rows, (j + 1) * rows), slice(k * cols, (k + 1) * cols)

  def places(k: int):
    """(name in the file, layer/w or layer/b, where it is) of all that column k owns."""
    for layer in sizes:
      where = block(layer, k, k)
      yield f'{layer}/w', f'{layer}/w', where
      yield f'{layer}/b', f'{layer}/b', where[1]
      for j in range(k if layer != 'l0' else 0):
        yield f'u{layer[1]}/{j}', f'{layer}/w', block(layer, j, k)

  whole = {}
  for layer, (rows, cols) in sizes.items():
    whole[f'{layer}/w'] = torch.zeros(rows * (1 if layer == 'l0' else tasks), cols * tasks)
    whole[f'{layer}/b'] = torch.zeros(cols * tasks)
  for k in range(tasks):
    for name, array, where in places(k):
      whole[array][where] = z[f'init/{k}/{name}']
  stored = {f'{k}/{name}' for k in range(tasks) for name, _, _ in places(k)}
  assert stored == {k.removeprefix('init/') for k in z if k.startswith('init/')}
  for v in whole.values():
    v.requires_grad_()
  for t in range(tasks):
    owned = {k: torch.zeros_like(v) for k, v in whole.items()}
    for _, array, where in places(t):
      owned[array][where] = 1.0
    for s in range(steps):
      out = logits(whole, features(whole, z['xs'][t, s]))
      loss = F.cross_entropy(out[:, 2 * t : 2 * t + 2], z['ys'][t, s] - 2 * t)
      equal(loss, z['pnn/loss'][t, s], f'pnn loss task {t} step {s}')
      grads = torch.autograd.grad(loss, list(whole.values()))
      with torch.no_grad():
        for (k, v), g in zip(whole.items(), grads, strict=True):
          v -= z['lr'] * owned[k] * g
      for k in range(tasks):
        for name, array, where in places(k):
          equal(whole[array][where], z[f'pnn/params/{k}/{name}'][t, s], f'pnn {k}/{name}')
    out = logits(whole, features(whole, z['probe']))
    equal(out, z['pnn/probe_logits'][t], 'pnn probe')
  print('pnn agrees')


def recon(dec: dict, f: torch.Tensor) -> torch.Tensor:
  h = relu(F.linear(f, dec['l0/w'].T, dec['l0/b']))
  return torch.sigmoid(F.linear(h, dec['l1/w'].T, dec['l1/b']))


def dreamnet() -> None:
  z = load('dreamnet')
  tasks, steps, _ = z['ys'].shape
  p, dec = leaves(z, 'init'), leaves(z, 'dec', NAMES[:4])
  assert all(0 < float(z[k].min()) and float(z[k].max()) < 1 for k in ('xs', 'probe'))
  sgd = torch.optim.SGD([*p.values(), *dec.values()], lr=float(z['lr']))
  saved = {}, {}
  for t in range(tasks):
    for s in range(steps):
      x, y = z['xs'][t, s], z['ys'][t, s]
      f = features(p, x)
      now = F.cross_entropy(logits(p, f), y) + z['rho'] * F.mse_loss(recon(dec, f), x)
      rows = torch.zeros_like(z['dreamnet/replayed'][t, s])
      old = torch.zeros(())
      if t:
        chain = [z['dreamnet/noise'][t, s]]
        for _ in range(int(z['R']) + 1):
          chain.append(recon(saved[1], features(saved[0], chain[-1])))
        rows = torch.cat(chain[1:-1])
        f = features(p, rows)
        target = logits(saved[0], features(saved[0], rows)).softmax(dim=1)
        # The saved network's output for x_r is x_{r+1}.
        error = F.mse_loss(recon(dec, f), torch.cat(chain[2:]))
        old = F.cross_entropy(logits(p, f), target) + z['rho'] * error
      equal(rows, z['dreamnet/replayed'][t, s], 'dreamnet rows')
      loss = now + z['coef'] * old
      for name, value in (('loss', loss), ('loss_now', now), ('loss_replay', old)):
        equal(value, z[f'dreamnet/{name}'][t, s], f'dreamnet {name} task {t} step {s}')
      update(sgd, loss)
      params_agree(z, 'dreamnet/params', p, (t, s))
      params_agree(z, 'dreamnet/dec', dec, (t, s))
    saved = frozen(p), frozen(dec)
    f = features(p, z['probe'])
    equal(logits(p, f), z['dreamnet/probe_logits'][t], 'dreamnet probe')
    equal(recon(dec, f), z['dreamnet/probe_recon'][t], 'dreamnet probe recon')
  print('dreamnet agrees')


def held(m: list[int], length: int, k: int, t: int, done: int) -> list[int]:
  """Stream positions that task k holds in task t, after `done` of its rows; a task has `length`.

  Position q has the last row whose number within its task is q modulo the slots it was written with.
  """
  sent = range(done if k == t else length)
  ring = [[i for i in sent if i % m[k] == q][-1:] for q in range(m[t])]
  return [k * length + i for of_position in ring for i in of_position]


def rehearsal() -> None:
  z = load('rehearsal')
  x, y = z['xs'].reshape(-1, 6), z['ys'].reshape(-1)
  tasks, steps, rows = z['ys'].shape
  capacity, drawn = int(z['K']), int(z['D'])
  for v in ('pm', 'fm'):
    m = [capacity // (t + 1 if v == 'fm' else tasks) for t in range(tasks)]
    assert m == z[f'{v}/m'].tolist()
    p = leaves(z, 'init')
    sgd = torch.optim.SGD(p.values(), lr=float(z['lr']))
    for t in range(tasks):
      earlier = {i for k in range(t) for i in held(m, steps * rows, k, t, 0)}
      for s in range(steps):
        picked = z[f'{v}/draw_stream'][t, s]
        out = logits(p, features(p, z['xs'][t, s]))
        batch, memory = F.cross_entropy(out, z['ys'][t, s]), torch.zeros(())
        there = torch.full((drawn,), t > 0)
        if t:
          assert len(set(picked.tolist())) == drawn and set(picked.tolist()) <= earlier
          memory = F.cross_entropy(logits(p, features(p, x[picked])), y[picked])
        else:
          assert bool((picked == -1).all())
        equal(z[f'{v}/draw_weight'][t, s], there.double(), f'{v} weight')
        equal(z[f'{v}/draw_x'][t, s], torch.where(there[:, None], x[picked], 0.0), f'{v} x')
        equal(z[f'{v}/draw_y'][t, s], torch.where(there, y[picked], -1), f'{v} y')
        loss = batch + z['coef'] * memory
        for name, value in (('loss', loss), ('loss_batch', batch), ('loss_memory', memory)):
          equal(value, z[f'{v}/{name}'][t, s], f'{v} {name} task {t} step {s}')
        update(sgd, loss)
        params_agree(z, f'{v}/params', p, (t, s))
        for k in range(tasks):
          content = held(m, steps * rows, k, t, (s + 1) * rows) if k <= t else []
          padded = content + [-1] * (capacity - len(content))
          assert z[f'{v}/memory_stream'][t, s, k].tolist() == padded, (v, t, s, k)
      equal(logits(p, features(p, z['probe'])), z[f'{v}/probe_logits'][t], f'{v} probe')
    print(f'rehearsal {v} agrees')


def main() -> None:
  for check in (ebll, pnn, dreamnet, rehearsal):
    check()


if __name__ == '__main__':
  main()
