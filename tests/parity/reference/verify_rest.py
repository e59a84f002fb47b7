"""Second derivations for packnet, lora, closed_form and metrics; see `verify.py`."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from verify import NAMES, at, check_step, grad_of, load, net, same


def packnet() -> None:
  z = load('packnet')
  train, steps = int(z['train_steps']), int(z['train_steps'] + z['retrain_steps'])
  for v in (
    'simple_sgd',
    'simple_momentum',
    'simple_floor',
    'simple_round',
    'heads_sgd',
    'heads_momentum',
  ):
    heads = v.startswith('heads')
    mats = NAMES[0:4:2] if heads else NAMES[0::2]
    mu = float(z['momentum']) if v.endswith('momentum') else 0.0
    x, y = (z[f'{a}s_{v.split("_")[0]}'] for a in 'xy')
    params, owner = {k: z[f'init/{k}'] for k in NAMES}, {}
    for t in range(2):
      cols = slice(2 * t, 2 * t + 2) if heads else slice(0, 4)
      velocity = {}
      for s in range(steps):
        if s == train:
          for k in mats:
            now, w = z[f'{v}/owner/{k}'][t], params[k]
            gone, kept = (now == 0), (now == t + 1)
            was = torch.ones_like(gone) if t == 0 else z[f'{v}/owner/{k}'][0] == 0
            assert torch.equal(was, gone | kept)
            assert int(gone.sum()) == int(z[f'{v}/k/{k}'][t])
            assert w[gone].abs().max() < w[kept].abs().min()
            assert t == 0 or torch.equal(now == 1, z[f'{v}/owner/{k}'][0] == 1)
            params[k] = torch.where(gone, torch.zeros_like(w), w)
            same(params[k], z[f'{v}/pruned/{k}'][t], f'{v} pruned {k}')
        p = {k: w.clone().requires_grad_() for k, w in params.items()}
        target = y[t, s] - 2 * t * heads
        loss = F.cross_entropy(net(p, x[t, s])[:, cols], target)
        same(loss, z[f'{v}/loss'][t, s], f'{v} loss')
        if s in (0, train):
          velocity = {k: torch.zeros_like(w) for k, w in params.items()}
        for k, g in grad_of(loss, p).items():
          if k in mats and s >= train:
            moves = z[f'{v}/owner/{k}'][t] == t + 1
          elif k in mats:
            moves = torch.ones_like(g) if t == 0 else z[f'{v}/owner/{k}'][0] == 0
          elif heads and k.startswith('l2'):
            moves = torch.zeros_like(g)
            moves[..., cols] = 1
          else:
            moves = torch.full_like(g, t == 0)
          velocity[k] = mu * velocity[k] + g * moves
          lr = z['lr_retrain'] if s >= train else z['lr']
          params[k] = params[k] - lr * velocity[k]
          same(params[k], z[f'{v}/params/{k}'][t, s], f'{v} {k} {t} {s}')
      owner = {k: z[f'{v}/owner/{k}'][t] for k in mats}
      for of in range(t + 1):
        q = dict(params)
        for k in mats:
          q[k] = params[k] * ((owner[k] > 0) & (owner[k] <= of + 1))
        part = slice(2 * of, 2 * of + 2) if heads else slice(0, 4)
        same(net(q, z['probe'])[:, part], z[f'{v}/probe_logits'][t, of], f'{v} probe')


def lora() -> None:
  z = load('lora')
  adapters = ('l0/A', 'l0/B', 'l1/A', 'l1/B')
  for v in ('train_a', 'frozen_a'):
    for t in range(2):
      for s in range(5):
        p = at(z, v, t, s, names=(*adapters, 'l2/w', 'l2/b'))

        def out(x, p=p):
          for n in ('l0', 'l1'):
            w = z[f'init/{n}/w'] + z['alpha'] / z['r'] * (p[f'{n}/B'] @ p[f'{n}/A']).T
            x = torch.relu(x @ w + z[f'init/{n}/b'])
          return x @ p['l2/w'] + p['l2/b']

        loss = F.cross_entropy(out(z['xs'][t, s]), z['ys'][t, s])
        same(loss, z[f'{v}/loss'][t, s], f'{v} loss')
        g = grad_of(loss, p)
        if v == 'frozen_a':
          g |= {k: torch.zeros_like(g[k]) for k in ('l0/A', 'l1/A')}
        check_step(z, v, t, s, p, g)
      last = at(z, v, t, 5, names=(*adapters, 'l2/w', 'l2/b'))
      last |= {f'{n}/w': z[f'{v}/merged/{n}/w'][t] for n in ('l0', 'l1')}
      last |= {f'{n}/b': z[f'init/{n}/b'] for n in ('l0', 'l1')}
      same(net(last, z['probe']), z[f'{v}/probe_logits'][t], f'{v} probe')


def closed_form() -> None:
  z = load('closed_form')
  x, y, ends = z['x'], z['y'], z['task_start'][1:].tolist()
  hot = F.one_hot(y, 6).to(torch.float64)
  h = torch.relu(x @ z['W'])
  first_of_class = [int((y == k).nonzero()[0]) for k in range(6)]
  for t, end in enumerate(ends):
    start, count = int(z['task_start'][t]), hot[:end].sum(0)
    means = hot[:end].T @ x[:end] / count.clamp(min=1)[:, None]
    same(means, z['ncm/means'][t], 'ncm means')
    same(means, z['slda/means'][t], 'slda means')
    res = x[:end] - means[y[:end]]
    pooled = res.T @ res / end
    same(pooled, z['slda/pooled'][t], 'pooled')
    same(pooled, z['slda/sigma_welford'][end - 1], 'welford')
    # Unrolled recursion: S_N = 1/N sum_n n/(n+1) d_n d_n^T, d_n against the mean of earlier rows.
    total = torch.zeros(5, 5)
    for n in range(end):
      earlier = x[:n][y[:n] == y[n]]
      d = x[n] - (earlier.mean(0) if len(earlier) else 0)
      assert (len(earlier) == 0) == (n in first_of_class)
      total += n / (n + 1) * torch.outer(d, d)
    same(total / end, z['slda/sigma'][end - 1], 'slda sigma')
    s = (1 - z['eps']) * z['slda/sigma'][end - 1] + z['eps'] * torch.eye(5)
    seen = 2 * t + 2
    wk = torch.linalg.pinv(s) @ means.T
    score = z['probe'] @ wk - 0.5 * (means.T * wk).sum(0)
    same(score[:, :seen], z['slda/scores'][t][:, :seen], 'slda scores', 1e-8)
    same(score[:, :seen].argmax(1), z['slda/pred'][t], 'slda pred')
    cos = F.cosine_similarity(z['probe'][:, None], means[None, :seen], dim=2)
    same(cos, z['ncm/cosine'][t][:, :seen], 'ncm cosine')
    dist = torch.cdist(z['probe'], means[:seen])
    same(dist**2, z['ncm/sq_distance'][t][:, :seen], 'ncm distance')
    same(dist.argmin(1), z['ncm/pred_euclidean'][t], 'ncm pred')

    def solve(hh, yy, lam):  # ridge regression as least squares on extended rows
      wide = torch.cat([hh, lam.sqrt() * torch.eye(12)])
      return torch.linalg.lstsq(wide, torch.cat([yy, torch.zeros(12, 6)])).solution

    ht, yt = h[start:end], hot[start:end]
    cut = int(0.8 * len(ht))
    mse = torch.stack(
      [
        F.mse_loss(ht[cut:] @ solve(ht[:cut], yt[:cut], lam), yt[cut:])
        for lam in z['ranpac/lambdas']
      ]
    )
    same(mse, z['ranpac/val_mse'][t], 'ranpac mse', 1e-8)
    same(z['ranpac/lambdas'][mse.argmin()], z['ranpac/selected'][t], 'ranpac lambda')
    for name, lam in (('fixed', z['fixed_lambda']), ('selected', z['ranpac/selected'][t])):
      head = solve(h[:end], hot[:end], lam)
      same(head, z[f'ranpac/head_{name}'][t], 'ranpac head', 1e-9)
      logits = torch.relu(z['probe'] @ z['W']) @ head
      same(logits[:, :seen].argmax(1), z[f'ranpac/pred_{name}'][t], 'ranpac pred')


def metrics() -> None:
  z = {k: v.numpy() for k, v in load('metrics').items()}
  for v in sorted({k.split('/')[0] for k in z}):
    r, b = z[f'{v}/R'], z[f'{v}/b']
    n = len(r)
    lower = np.tril(np.ones_like(r))
    want = {
      'acc': r[-1].mean(),
      'learning_accuracy': np.diag(r).mean(),
      'average_incremental': ((r * lower).sum(1) / lower.sum(1)).mean(),
    }
    if n > 1:
      before = r[:-1, :-1]
      reach = np.where(np.tril(np.ones_like(before)) > 0, before, -np.inf)
      want |= {
        'bwt': (r[-1] - np.diag(r))[:-1].mean(),
        'fwt': (np.diag(r, 1) - b[1:]).mean(),
        'forgetting': (before.max(0) - r[-1, :-1]).mean(),
        'forgetting_from_i': (reach.max(0) - r[-1, :-1]).mean(),
      }
    for k, value in want.items():
      same(value, z[f'{v}/{k}'], f'{v} {k}')


def main() -> None:
  for check in (packnet, lora, closed_form, metrics):
    check()
    print(check.__name__, 'agrees')


if __name__ == '__main__':
  main()
