"""Second derivations for olora sdlora inflora fecam slca first_session adapter ease: PyTorch in float64.

Each run is made anew from its stored inputs alone and the stored arrays are compared to 1e-9: gradients by
autograd where the generator's are by hand, torch.optim's SGD, torch.cov, and for the Vision Transformer
torch's Conv2d, MultiheadAttention and LayerNorm. Projectors are compared, not bases. Limiting cases:
adapters with up = 0 are the frozen network; a huge g1 makes FeCAM's matrix the identity; SD-LoRA with
factors of unit length is the same (1e-6, for the eps); InfLoRA's W_eff descends the gradient projected by
A A^T, without any B. Of the generators only the layout is shared. Run by hand:
``python verify_pretrained_a.py``; it ends with an AssertionError on the first mismatch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from verify import load, same

TOL = 1e-9
LAYERS = ('l0', 'l1')
Tensors = dict[str, torch.Tensor]


def equal(a, b, what: str) -> None:
  assert torch.as_tensor(a).shape == b.shape, (what, torch.as_tensor(a).shape, b.shape)
  same(a, b, what, TOL)


def hidden(p: Tensors, update: Tensors, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
  """h0, h1 of the MLP with side branches: x @ w + x @ update + b."""
  h0 = (x @ p['l0/w'] + x @ update['l0'] + p['l0/b']).relu()
  return h0, (h0 @ p['l1/w'] + h0 @ update['l1'] + p['l1/b']).relu()


def head(p: Tensors, h: torch.Tensor) -> torch.Tensor:
  return h @ p['l2/w'] + p['l2/b']


def leaves(z: dict, *names: str, prefix: str = 'init') -> Tensors:
  return {k: z[f'{prefix}/{k}'].clone().requires_grad_() for k in names}


def agrees(p: Tensors, z: dict, key: str, at: tuple) -> None:
  for k, value in p.items():
    equal(value.detach(), z[f'{key}/{k}'][at], f'{key} {k} {at}')


PLAIN = ('l0/b', 'l1/b', 'l2/w', 'l2/b')


def olora() -> None:
  z = load('olora')
  frozen = {f'{n}/w': z[f'init/{n}/w'] for n in LAYERS}
  scale = z['alpha'] / z['r']
  for v in ('plain', 'both'):
    p = leaves(z, *PLAIN)
    a = {n: list(z[f'init/{n}/A'].clone().unbind()) for n in LAYERS}
    b = {n: list(z[f'init/{n}/B'].clone().unbind()) for n in LAYERS}
    for t in range(3):
      for n in LAYERS:
        a[n][t] = a[n][t].clone().requires_grad_()
        b[n][t] = b[n][t].clone().requires_grad_()
      new = [a[n][t] for n in LAYERS] + [b[n][t] for n in LAYERS]
      opt = torch.optim.SGD([*p.values(), *new], lr=float(z['lr']))
      # All slots: those to come are 0.
      update = lambda n, a=a, b=b: scale * torch.cat(a[n], 1) @ torch.cat(b[n], 0)  # noqa: E731
      for s in range(5):
        both = {n: update(n) for n in LAYERS}
        ce = F.cross_entropy(head(p, hidden(p | frozen, both, z['xs'][t, s])[1]), z['ys'][t, s])
        orth = sum((a[n][i].T @ a[n][t]).abs().sum() for n in LAYERS for i in range(t)) + 0 * ce
        squares = sum((w * w).sum() for w in new)
        loss = ce + z[f'{v}/lam1'] * orth + z[f'{v}/lam2'] * squares
        opt.zero_grad()
        loss.backward()
        opt.step()
        parts = {'loss': loss, 'ce': ce, 'orthogonal': orth, 'squares': squares}
        for k, value in parts.items():
          equal(value.detach(), z[f'{v}/{k}'][t, s], f'olora {v} {k}')
        now = {f'{n}/A': torch.stack(a[n]) for n in LAYERS}
        now |= {f'{n}/B': torch.stack(b[n]) for n in LAYERS}
        agrees(p | now, z, f'{v}/params', (t, s))
      both = {n: update(n).detach() for n in LAYERS}
      for n in LAYERS:
        equal(frozen[f'{n}/w'] + both[n], z[f'{v}/effective/{n}/w'][t], 'olora effective')
        a[n][t], b[n][t] = a[n][t].detach(), b[n][t].detach()
      logits = head(p, hidden(p | frozen, both, z['probe'])[1])
      equal(logits.detach(), z[f'{v}/probe_logits'][t], 'olora probe')
    print(f'olora {v} agrees')


def sdlora() -> None:
  z = load('sdlora')
  frozen = {f'{n}/w': z[f'init/{n}/w'] for n in LAYERS}
  for v in ('each', 'shared', 'wide'):
    start = 'wide_init' if v == 'wide' else 'init'
    p = leaves(z, *PLAIN, 'l0/A', 'l1/A', *(['m'] if v == 'shared' else ['l0/m', 'l1/m']))
    p |= leaves(z, 'l0/B', 'l1/B', prefix=start)
    for t in range(3):
      for s in range(5):
        update = {}
        for n in LAYERS:
          m = p['m'] if v == 'shared' else p[f'{n}/m']
          terms = []
          for i in range(t + 1):
            a, b = p[f'{n}/A'][i], p[f'{n}/B'][i]
            if i < t:
              a, b = a.detach(), b.detach()
            terms.append(m[i] * (a @ b) / (a.norm() * b.norm() + z['eps']))
          update[n] = torch.stack(terms).sum(0)
        loss = F.cross_entropy(head(p, hidden(p | frozen, update, z['xs'][t, s])[1]), z['ys'][t, s])
        equal(loss.detach(), z[f'{v}/loss'][t, s], f'sdlora {v} loss')
        grads = torch.autograd.grad(loss, list(p.values()))
        with torch.no_grad():
          for w, g in zip(p.values(), grads, strict=True):
            w -= z['lr'] * g
        agrees(p, z, f'{v}/params', (t, s))
      for n in LAYERS:
        m = p['m'] if v == 'shared' else p[f'{n}/m']
        a, b = p[f'{n}/A'][: t + 1].detach(), p[f'{n}/B'][: t + 1].detach()
        # Unit factors: the same up to the eps.
        unit = [m[i].detach() * (a[i] / a[i].norm()) @ (b[i] / b[i].norm()) for i in range(t + 1)]
        got = frozen[f'{n}/w'] + torch.stack(unit).sum(0)
        same(got, z[f'{v}/effective/{n}/w'][t], 'sdlora effective', 1e-6)
    print(f'sdlora {v} agrees')


def top(s: torch.Tensor, k: int) -> torch.Tensor:
  """Projector on the k leading eigenvectors of a symmetric matrix."""
  vectors = torch.linalg.eigh(s)[1].flip(1)[:, :k]
  return vectors @ vectors.T


def inflora() -> None:
  z = load('inflora')
  frozen = {f'{n}/w': z[f'init/{n}/w'] for n in LAYERS}
  warm, r, lr = int(z['warm']), int(z['r']), z['lr']
  for v in ('singular', 'code', 'inputs', 'paper', 'still'):
    p, old = leaves(z, *PLAIN), {n: torch.zeros_like(frozen[f'{n}/w']) for n in LAYERS}
    proj = {n: torch.zeros(len(w), len(w)) for n, w in ((n, frozen[f'{n}/w']) for n in LAYERS)}
    for t in range(3):
      # W_eff trained by lr times the gradient projected by A A^T is B trained with A fixed.
      extra = {n: torch.zeros_like(old[n]).requires_grad_() for n in LAYERS}
      aa: Tensors = {}
      seen: dict[str, list[torch.Tensor]] = {n: [] for n in LAYERS}
      for s in range(5):
        update = {n: old[n] + extra[n] for n in LAYERS}
        h0, h1 = hidden(p | frozen, update, z['xs'][t, s])
        if s < warm:
          seen['l0'].append(z['xs'][t, s])
          seen['l1'].append(h0.detach())
        loss = F.cross_entropy(head(p, h1), z['ys'][t, s])
        equal(loss.detach(), z[f'{v}/loss'][t, s], f'inflora {v} loss')
        names = [*p.values(), *extra.values()]
        grads = dict(zip([*p, *extra], torch.autograd.grad(loss, names), strict=True))
        with torch.no_grad():
          for k in p if v != 'still' or s >= warm else ():
            p[k] -= lr * grads[k]
          for n in LAYERS if s >= warm else ():
            extra[n] -= lr * aa[n] @ grads[n]
        if s == warm - 1:
          for n in LAYERS:
            x = torch.cat(seen[n])
            h = x.T @ x / len(x)
            equal(h, z[f'{v}/H_warm/{n}'][t], f'inflora {v} H')
            q = torch.eye(len(h)) - proj[n]
            aa[n] = top(q @ h @ q if v == 'paper' else q @ h @ h @ q, r)
        agrees(p, z, f'{v}/params', (t, s))
      old = {n: (old[n] + extra[n]).detach() for n in LAYERS}
      x = z['xs'][t].reshape(-1, 6)
      h0 = hidden(p | frozen, old, x)[0].detach()
      for n, rows in (('l0', x), ('l1', h0)):
        a = z[f'{v}/A/{n}'][t]
        equal(a @ a.T, aa[n], f'inflora {v} A')
        equal(extra[n].detach(), z[f'{v}/product/{n}'][t], f'inflora {v} product')
        equal(frozen[f'{n}/w'] + old[n], z[f'{v}/effective/{n}/w'][t], f'inflora {v} effective')
        h = rows.T @ rows / len(rows)
        q = torch.eye(len(h)) - proj[n]
        size = {'code': lambda m: (m**2).sum()}.get(v, lambda m: torch.linalg.matrix_norm(m, 'nuc'))
        s = q @ h @ q if v in ('inputs', 'paper') else q @ h @ h @ q
        k, before = 0, round(float(torch.trace(proj[n])))
        while True:  # what is left of the residual after k directions
          u = top(s, k)
          left = (torch.eye(len(h)) - u) @ q @ h
          left = left @ q @ (torch.eye(len(h)) - u) if v in ('inputs', 'paper') else left
          if 1 - size(left) / size(h) >= 0.95 + 0.05 * t / 3:
            break
          k += 1
        proj[n] = proj[n] + top(s, k)
        assert before + k == int(z[f'{v}/k/{n}'][t])
        equal(proj[n], z[f'{v}/P/{n}'][t], f'inflora {v} P')
        equal(proj[n] @ proj[n], proj[n], 'inflora projector')
        if v in ('inputs', 'paper'):  # GPM: the share of the inputs' squared norm
          share = ((rows @ proj[n]) ** 2).sum() / (rows**2).sum()
          assert share >= 0.95 + 0.05 * t / 3
      logits = head(p, hidden(p | frozen, old, z['probe'])[1])
      equal(logits.detach(), z[f'{v}/probe_logits'][t], 'inflora probe')
    print(f'inflora {v} agrees')


def fecam() -> None:
  z = load('fecam')
  x, y = z['x'], z['y']
  for v in ('per_class', 'weights', 'raw', 'twice', 'common', 'pooled'):
    g = lambda a, v=v: a.sign() * a.abs().pow(z[f'{v}/tukey'])  # noqa: E731
    rows = [g(x[y == c]) for c in range(6)]
    covs = torch.stack([r.T.cov() for r in rows])
    equal(covs, z[f'{v}/covariances'], f'fecam {v} covariances')
    equal(torch.stack([r.mean(0) for r in rows]), z[f'{v}/means'], f'fecam {v} means')
    off = ~torch.eye(5, dtype=torch.bool)
    for t in range(3):
      for c in range(2 * t + 2):
        s = covs[c]
        if v == 'common':
          s = covs[: 2 * t + 2].mean(0)
        if v == 'pooled':
          centred = torch.cat([r - r.mean(0) for r in rows[: 2 * t + 2]])
          s = centred.T @ centred / (len(centred) - 2 * t - 2)
        for _ in range(2 if v == 'twice' else 1):
          v1, v2 = s[~off].mean(), s[off].mean()
          s = torch.where(off, s + z[f'{v}/g2'] * v2, s + z[f'{v}/g1'] * v1)
        inverse_sd = torch.diag(s.diag().rsqrt())
        n = inverse_sd @ s @ inverse_sd
        equal(n, z[f'{v}/normalised'][t, c], f'fecam {v} normalised')
        gap = F.normalize(g(z['probe'])) - F.normalize(rows[c].mean(0), dim=0)
        d = torch.einsum('ni,ij,nj->n', gap, torch.linalg.pinv(n), gap)
        equal(-d, z[f'{v}/logits'][t, :, c], f'fecam {v} logits')
        if v == 'per_class':  # huge shrinkage: the identity
          wide = covs[c] + 1e9 * v1 * torch.eye(5)
          limit = torch.diag(wide.diag().rsqrt()) @ wide @ torch.diag(wide.diag().rsqrt())
          same(torch.linalg.inv(limit), torch.eye(5), 'fecam limit', 1e-6)
    print(f'fecam {v} agrees')


def slca() -> None:
  z = load('slca')
  frozen = {k: z[f'init/{k}'] for k in ('l0/w', 'l0/b', 'l1/w', 'l1/b')}
  none = {n: torch.zeros_like(frozen[f'{n}/w']) for n in LAYERS}
  f = lambda x: hidden(frozen, none, x)[1]  # noqa: E731
  normals = z['normals']
  epochs, per_class = normals.shape[1], normals.shape[3]
  for v in ('one', 'chunks', 'symmetric', 'later'):
    p, chunks = leaves(z, 'l2/w', 'l2/b'), int(z[f'{v}/chunks'])
    for t in range(3):
      opt = torch.optim.SGD(list(p.values()), lr=float(z['lr']))
      for s in range(z['ys'].shape[1]):
        loss = F.cross_entropy(head(p, f(z['xs'][t, s])), z['ys'][t, s])
        opt.zero_grad()
        loss.backward()
        opt.step()
        equal(loss.detach(), z[f'{v}/loss'][t, s], f'slca {v} loss')
        agrees(p, z, f'{v}/params', (t, s))
      rows, y, seen = f(z['xs'][t].flatten(0, 1)), z['ys'][t].flatten(), 2 * t + 2
      for c in (2 * t, 2 * t + 1):
        equal(rows[y == c].mean(0), z['means'][c], 'slca mean')
        equal(rows[y == c].T.cov(), z['covariances'][c], 'slca covariance')
      steps = epochs * chunks
      opt = torch.optim.SGD(
        list(p.values()), lr=float(z['lr_align']), momentum=float(z['momentum'])
      )
      schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=steps)
      for k in range(steps if v != 'later' or t else 0):
        xs, ys = [], []
        for c in range(seen):
          full = z['covariances'][c] + z['jitter'] * torch.eye(7)
          noise = normals[t, k // chunks, c].view(chunks, per_class // chunks, 7)[k % chunks]
          if v == 'symmetric':
            u, s, _ = torch.linalg.svd(full)
            xs.append(z['means'][c] + noise @ u @ torch.diag(s.sqrt()) @ u.T)
            same(u @ torch.diag(s) @ u.T, full, 'slca root', 1e-9)
          else:
            normal = torch.distributions.MultivariateNormal(z['means'][c], full)
            xs.append(normal.loc + noise @ normal.scale_tril.T)
          ys += [c] * len(noise)
        logits = F.normalize(head(p, torch.cat(xs))[:, :seen], dim=1) / z['tau']
        loss = F.cross_entropy(logits, torch.tensor(ys))
        opt.zero_grad()
        loss.backward()
        opt.step()
        schedule.step()
        equal(loss.detach(), z[f'{v}/align_loss'][t, k], f'slca {v} align loss')
        agrees(p, z, f'{v}/aligned', (t, k))
      equal(head(p, f(z['probe'])).detach(), z[f'{v}/probe_logits'][t], f'slca {v} probe')
    print(f'slca {v} agrees')


def first_session() -> None:
  z = load('first_session')
  for v in ('lora', 'full'):
    names = ['l2/w', 'l2/b']
    names += ['l0/A', 'l0/B', 'l1/A', 'l1/B'] if v == 'lora' else ['l0/w', 'l0/b', 'l1/w', 'l1/b']
    p = leaves(z, *names)
    rest = {k: z[f'init/{k}'] for k in ('l0/w', 'l0/b', 'l1/w', 'l1/b')} if v == 'lora' else {}
    more = (
      {} if v == 'lora' else {'momentum': float(z['momentum']), 'weight_decay': float(z['decay'])}
    )
    opt = torch.optim.SGD(list(p.values()), lr=float(z['lr']), **more)
    scale = z['alpha'] / z['r']

    begun = {k: value.detach().clone() for k, value in p.items()}

    def f(x: torch.Tensor, p=p, rest=rest, v=v, scale=scale) -> torch.Tensor:
      zero = {n: torch.zeros_like(z[f'init/{n}/w']) for n in LAYERS}
      side = {n: scale * p[f'{n}/A'] @ p[f'{n}/B'] for n in LAYERS} if v == 'lora' else zero
      return hidden(p | rest, side, x)[1]

    rows, labels = [], []
    for t in range(3):
      for s in range(8):
        loss = F.cross_entropy(head(p, f(z['xs'][t, s % 4])), z['ys'][t, s % 4])
        equal(loss.detach(), z[f'{v}/loss'][t, s], f'first_session {v} loss')
        if t == 0:
          opt.zero_grad()
          loss.backward()
          opt.step()
        agrees(p, z, f'{v}/params', (t, s))
      rows.append(z['xs'][t].flatten(0, 1))
      labels.append(z['ys'][t].flatten())
      # Parameters rest from the first boundary on: all rows so far give the same sums.
      y, seen = torch.cat(labels), 2 * t + 2
      h, q = f(torch.cat(rows)).detach(), f(z['probe']).detach()
      means = torch.stack([h[y == c].mean(0) for c in range(seen)])
      equal(torch.bincount(y, minlength=6), z[f'{v}/ncm/counts'][t], 'counts')
      equal(means, z[f'{v}/ncm/means'][t, :seen], 'means')
      equal(torch.cdist(q, means) ** 2, z[f'{v}/ncm/sq_distance'][t, :, :seen], 'distance')
      cosine = F.cosine_similarity(q[:, None], means[None], dim=2)
      equal(cosine, z[f'{v}/ncm/cosine'][t, :, :seen], 'cosine')
      equal(cosine.argmax(1), z[f'{v}/ncm/pred_cosine'][t], 'pred')
      both, asked = (
        torch.cat([f(x, begun).detach(), f(x).detach()], 1) for x in (torch.cat(rows), z['probe'])
      )
      means = torch.stack([both[y == c].mean(0) for c in range(seen)])
      equal(means, z[f'{v}/merged/means'][t, :seen], 'merged means')
      equal(torch.cdist(asked, means) ** 2, z[f'{v}/merged/sq_distance'][t, :, :seen], 'merged')
      cosine = F.cosine_similarity(asked[:, None], means[None], dim=2)
      equal(cosine, z[f'{v}/merged/cosine'][t, :, :seen], 'merged cosine')
      equal(cosine.argmax(1), z[f'{v}/merged/pred_cosine'][t], 'merged pred')
      g, onehot = (h @ z['W']).relu(), F.one_hot(y, 6).double()
      # The ridge head as a least-squares problem with lambda's rows below.
      big = torch.cat([g, z['lambda'].sqrt() * torch.eye(10)])
      w = torch.linalg.lstsq(big, torch.cat([onehot, torch.zeros(10, 6)])).solution
      equal(w, z[f'{v}/ranpac/head'][t], 'head')
      equal((q @ z['W']).relu() @ w, z[f'{v}/ranpac/logits'][t], 'ranpac logits')
      equal(g.T @ g, z[f'{v}/ranpac/G'][t], 'G')
      equal(g.T @ onehot, z[f'{v}/ranpac/C'][t], 'C')
    print(f'first_session {v} agrees')


class Vit(nn.Module):
  """The frozen network of torch's modules."""

  def __init__(self, z: dict) -> None:
    super().__init__()
    b = lambda k: z[f'init/backbone/{k}']  # noqa: E731
    d, eps, heads = int(z['d']), float(z['eps']), int(z['heads'])
    self.patch = nn.Conv2d(1, d, int(z['patch']), int(z['patch']))
    self.patch.weight.data = b('patch/w').T.reshape(d, 1, 2, 2)
    self.patch.bias.data = b('patch/b')
    self.cls, self.positions = b('cls'), b('positions')
    self.blocks = nn.ModuleList()
    for i in range(int(z['depth'])):
      at = nn.MultiheadAttention(d, heads, batch_first=True)
      part = lambda n, i=i: (b(f'layers/{n}/w')[i].T, b(f'layers/{n}/b')[i])  # noqa: E731
      at.in_proj_weight.data = torch.cat([part(n)[0] for n in 'qkv'])
      at.in_proj_bias.data = torch.cat([part(n)[1] for n in 'qkv'])
      at.out_proj.weight.data, at.out_proj.bias.data = part('o')
      up, down = nn.Linear(d, int(z['ffn'])), nn.Linear(int(z['ffn']), d)
      up.weight.data, up.bias.data = part('up')
      down.weight.data, down.bias.data = part('down')
      norms = [self.norm(b, f'layers/norm{j}', eps, i) for j in (1, 2)]
      self.blocks.append(
        nn.ModuleList([norms[0], at, norms[1], nn.Sequential(up, nn.GELU(), down)])
      )
    self.last = self.norm(b, 'norm', eps)
    self.requires_grad_(False)

  @staticmethod
  def norm(b, name: str, eps: float, i: int | None = None) -> nn.LayerNorm:
    at = ... if i is None else i
    out = nn.LayerNorm(8, eps=eps)
    out.weight.data, out.bias.data = b(f'{name}/scale')[at], b(f'{name}/bias')[at]
    return out

  def forward(self, x: torch.Tensor, after=(None, None, None)) -> torch.Tensor:
    """`after`: (serial at attention, serial at feed-forward, parallel) as functions of (a, layer)."""
    h = self.patch(x.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
    h = torch.cat([self.cls.expand(len(x), 1, -1), h], 1) + self.positions
    for i, (n1, at, n2, mlp) in enumerate(self.blocks):
      a = at(n1(h), n1(h), n1(h), need_weights=False)[0]
      h = h + (a if after[0] is None else a + after[0](a, i))
      m = mlp(n2(h))
      m = m if after[1] is None else m + after[1](m, i)
      h = h + (m if after[2] is None else m + after[2](h, i))
    return self.last(h)[:, 0]


def side(p: Tensors, key: str, act, scale=1.0, slot: int | None = None):
  """a -> scale up(act(down(a))) from the stored layout."""
  pick = lambda k: p[f'{key}/{k}'] if slot is None else p[f'{key}/{k}'][slot]  # noqa: E731

  def apply(a: torch.Tensor, i: int) -> torch.Tensor:
    m = act(F.linear(a, pick('down/w')[i].T, pick('down/b')[i]))
    return scale * F.linear(m, pick('up/w')[i].T, pick('up/b')[i])

  return apply


def train(p: Tensors, loss: torch.Tensor, lr: torch.Tensor) -> None:
  grads = torch.autograd.grad(loss, list(p.values()))
  with torch.no_grad():
    for w, g in zip(p.values(), grads, strict=True):
      w -= lr * g


def out(p: Tensors, f: torch.Tensor) -> torch.Tensor:
  return f @ p['head/w'] + p['head/b']


def adapter() -> None:
  z = load('adapter')
  vit, pieces = Vit(z), ('down/w', 'down/b', 'up/w', 'up/b')
  equal(vit(z['probe']), z['frozen/probe_features'], 'adapter frozen')
  places = {'both': ('attention', 'feedforward'), 'attention': ('attention',)}
  for v in ('both', 'attention', 'feedforward', 'parallel'):
    at = places.get(v, ('feedforward',))
    p = leaves(z, 'head/w', 'head/b', *(f'adapter/{a}/{k}' for a in at for k in pieces))
    if v == 'parallel':
      after = (None, None, side(p, 'adapter/feedforward', F.relu, z['scale']))
    else:
      of = lambda a, p=p, at=at: side(p, f'adapter/{a}', F.gelu) if a in at else None  # noqa: E731
      after = (of('attention'), of('feedforward'), None)
    equal(vit(z['probe'], after).detach(), z['frozen/probe_features'], 'adapter up = 0')
    for t in range(2):
      for s in range(4):
        loss = F.cross_entropy(out(p, vit(z['xs'][t, s], after)), z['ys'][t, s])
        equal(loss.detach(), z[f'{v}/loss'][t, s], f'adapter {v} loss')
        train(p, loss, z['lr'])
        agrees(p, z, f'{v}/params', (t, s))
      f = vit(z['probe'], after).detach()
      equal(f, z[f'{v}/probe_features'][t], f'adapter {v} features')
      equal(out(p, f).detach(), z[f'{v}/probe_logits'][t], f'adapter {v} logits')
    print(f'adapter {v} agrees')


def ease() -> None:
  z = load('ease')
  vit = Vit(z)
  p = leaves(z, 'head/w', 'head/b', *(f'adapter/{k}' for k in ('down/w', 'down/b', 'up/w', 'up/b')))
  f = lambda x, b: vit(x, (None, None, side(p, 'adapter', F.relu, z['scale'], b)))  # noqa: E731
  stored: dict[tuple[int, int], torch.Tensor] = {}
  for t in range(3):
    off = torch.full((6,), -torch.inf)
    off[2 * t : 2 * t + 2] = 0
    for s in range(4):
      loss = F.cross_entropy(out(p, f(z['xs'][t, s], t)) + off, z['ys'][t, s])
      equal(loss.detach(), z['loss'][t, s], 'ease loss')
      train(p, loss, z['lr'])
      agrees(p, z, 'params', (t, s))
    x, y = z['xs'][t].flatten(0, 1), z['ys'][t].flatten()
    for b in range(t + 1):
      for c in (2 * t, 2 * t + 1):
        stored[b, c] = torch.stack([f(r[None], b)[0] for r in x[y == c]]).mean(0).detach()
        equal(stored[b, c], z['prototypes'][t, b, c], 'ease prototype')
    for v in ('own', 'recalc'):
      full = dict(stored)
      for b in range(t + 1):
        for c in range(2 * b):
          o = c // 2
          js = [j for j in range(2 * t + 2) if j // 2 == b or (v == 'recalc' and j // 2 > b)]
          sims = torch.stack([F.cosine_similarity(stored[o, c], stored[o, j], 0) for j in js])
          full[b, c] = sum(w * stored[b, j] for w, j in zip(sims.softmax(0), js, strict=True))
      logits = torch.zeros(6, 6)
      for c in range(2 * t + 2):
        for b in range(t + 1):
          equal(full[b, c], z[f'{v}/prototypes'][t, b, c], f'ease {v} prototype')
          weight = 1.0 if c // 2 == b else float(z['alpha'])
          logits[:, c] += weight * F.cosine_similarity(f(z['probe'], b).detach(), full[b, c][None])
      equal(logits, z[f'{v}/logits'][t], f'ease {v} logits')
      equal(logits[:, : 2 * t + 2].argmax(1), z[f'{v}/pred'][t], f'ease {v} pred')
  print('ease agrees')


if __name__ == '__main__':
  for check in (olora, sdlora, inflora, fecam, slca, first_session, adapter, ease):
    check()
