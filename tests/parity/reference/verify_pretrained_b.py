"""Second derivations for l2p, dualprompt, coda, sprompts, prompt_tuning and prefix_tuning.

The ViT is written again in NumPy with its gradients by hand, and so are the losses. Every run is made
anew from the stored inputs alone, padding rows given the weight 0 instead of being cut out, and the
stored arrays are compared to 1e-9. Of the generators only the layout is shared. Then limiting cases,
finite differences, and how far a relative change of 6e-8 in the inputs moves the outputs.
Run: ``python verify_pretrained_b.py``; it prints one line per check and ends with an AssertionError on
the first mismatch.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import problem as pb

TOL = 1e-9
TASKS, STEPS = 3, 4
erf = np.vectorize(math.erf, otypes=[np.float64])
Golden = dict[str, pb.Array]


def load(family: str) -> Golden:
  with np.load(pb.GOLDEN / f'{family}.npz', allow_pickle=False) as f:
    return {k: np.array(f[k]) for k in f.files}


def same(a, b, what: str, tol: float = TOL) -> None:
  a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
  assert a.shape == b.shape, (what, a.shape, b.shape)
  assert np.allclose(a, b, rtol=tol, atol=tol), (what, np.abs(a - b).max())


# The network and its gradients.


def norm(h, scale, bias):
  c = h - h.mean(-1, keepdims=True)
  inv = 1 / np.sqrt((c * c).mean(-1, keepdims=True) + 1e-12)
  return c * inv * scale + bias, (c * inv, inv, scale)


def norm_back(d, cache):
  unit, inv, scale = cache
  d = d * scale
  return inv * (d - d.mean(-1, keepdims=True) - unit * (d * unit).mean(-1, keepdims=True))


class Net:
  """The frozen backbone of a golden file."""

  def __init__(self, z: Golden) -> None:
    start = 'init/backbone/'
    self.p = {k.removeprefix(start): v for k, v in z.items() if k.startswith(start)}
    self.depth = len(self.p['layers/q/b'])

  def forward(self, x, embed=None, prefix=None):
    """Features [B, 8] and what `backward` needs."""
    p, rows = self.p, []
    for r in (0, 2):
      for c in (0, 2):
        pixels = np.stack([x[:, r, c], x[:, r, c + 1], x[:, r + 1, c], x[:, r + 1, c + 1]], 1)[
          ..., 0
        ]
        rows.append(pixels @ p['patch/w'] + p['patch/b'])
    h = np.stack([np.tile(p['cls'], (len(x), 1)), *rows], 1) + p['positions']
    n = 0 if embed is None else embed.shape[1]
    if embed is not None:
      h = np.concatenate([embed, h], 1)
    prefix, caches = prefix or {}, []
    for i in range(self.depth):
      w = {k.removeprefix('layers/'): v[i] for k, v in p.items() if k.startswith('layers/')}
      a, norm1 = norm(h, w['norm1/scale'], w['norm1/bias'])
      q, k, v = (a @ w[f'{c}/w'] + w[f'{c}/b'] for c in 'qkv')
      before = 0
      if i in prefix:
        before = prefix[i][0].shape[1]
        k = np.concatenate([prefix[i][0], k], 1)
        v = np.concatenate([prefix[i][1], v], 1)
      mixed, shares = np.zeros_like(q), []
      for s in (slice(0, 4), slice(4, 8)):
        e = np.exp(np.einsum('bid,bjd->bij', q[..., s], k[..., s]) / 2)
        share = e / e.sum(-1, keepdims=True)
        mixed[..., s] = np.einsum('bij,bjd->bid', share, v[..., s])
        shares.append(share)
      h = h + mixed @ w['o/w'] + w['o/b']
      a, norm2 = norm(h, w['norm2/scale'], w['norm2/bias'])
      u = a @ w['up/w'] + w['up/b']
      cdf = (1 + erf(u / math.sqrt(2))) / 2
      h = h + (u * cdf) @ w['down/w'] + w['down/b']
      caches.append((w, norm1, q, k, v, shares, before, norm2, u, cdf))
    f, last = norm(h, p['norm/scale'], p['norm/bias'])
    return f[:, n], (n, f.shape, last, caches)

  def backward(self, cache, df):
    """Gradients by `embed` and by the prefixes, of what has the gradient df [B, 8] by the features."""
    n, shape, last, caches = cache
    d = np.zeros(shape)
    d[:, n] = df
    d, prefix = norm_back(d, last), {}
    for i in reversed(range(self.depth)):
      w, norm1, q, k, v, shares, before, norm2, u, cdf = caches[i]
      du = (d @ w['down/w'].T) * (cdf + u * np.exp(-u * u / 2) / math.sqrt(2 * math.pi))
      d = d + norm_back(du @ w['up/w'].T, norm2)
      dm = d @ w['o/w'].T
      dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
      for s, share in zip((slice(0, 4), slice(4, 8)), shares, strict=True):
        dv[..., s] = np.einsum('bij,bid->bjd', share, dm[..., s])
        ds = np.einsum('bid,bjd->bij', dm[..., s], v[..., s])
        ds = share * (ds - (ds * share).sum(-1, keepdims=True)) / 2
        dq[..., s] = np.einsum('bij,bjd->bid', ds, k[..., s])
        dk[..., s] = np.einsum('bij,bid->bjd', ds, q[..., s])
      prefix[i] = (dk[:, :before], dv[:, :before])
      da = dq @ w['q/w'].T + dk[:, before:] @ w['k/w'].T + dv[:, before:] @ w['v/w'].T
      d = d + norm_back(da, norm1)
    return d[:, :n], prefix


def softmax_loss(logits, y, w):
  """CE over rows of weight 1, and its gradient."""
  e = np.exp(logits - logits.max(1, keepdims=True))
  e /= e.sum(1, keepdims=True)
  rows = np.arange(len(y))
  loss = -(w * np.log(e[rows, y])).sum() / w.sum()
  e[rows, y] -= 1
  return loss, e * (w / w.sum())[:, None]


def cosines(a, b):
  """cos of the last axes, and its gradient by b."""
  la, lb = (np.linalg.norm(v, axis=-1, keepdims=True) for v in (a, b))
  cos = ((a / la) * (b / lb)).sum(-1)
  return cos, (a / la - cos[..., None] * b / lb) / lb


# A method: what a step's gradients are, and the logits of the probe.

Parts = tuple[float, float, dict[str, pb.Array]]


class Method:
  """Everything that trains is in `self.p`; `step` gives loss, ce and gradients at (x, y, w) in task t."""

  def __init__(self, z: Golden, names: tuple[str, ...], own: str = '') -> None:
    self.z, self.net, self.names = z, Net(z), names
    self.p = {k: z[f'{own}init/{k}' if f'{own}init/{k}' in z else f'init/{k}'] for k in names}
    self.lr = float(z['lr'])

  def linear(self, f, y, w):
    loss, dz = softmax_loss(f @ self.p['head/w'] + self.p['head/b'], y, w)
    return loss, {'head/w': f.T @ dz, 'head/b': dz.sum(0)}, dz @ self.p['head/w'].T

  def step(self, x, y, w, t) -> Parts:
    raise NotImplementedError

  def logits(self, x, t):
    raise NotImplementedError

  def begin(self, t) -> None:
    pass

  def end(self, t) -> None:
    pass


def scatter(into, index, values) -> None:
  for i, v in zip(index, values, strict=True):
    into[i] += v


class L2P(Method):
  def __init__(self, z, variant):
    super().__init__(z, ('P', 'K', 'head/w', 'head/b'))
    self.vote, self.top, self.coef = variant == 'vote', int(z['top']), float(z['coef'])

  def choose(self, x, w):
    q = self.net.forward(x)[0]
    cos = cosines(q[:, None], self.p['K'][None])[0]
    own = np.argsort(-cos, axis=1, kind='stable')[:, : self.top]
    if self.vote:
      votes = np.zeros(len(self.p['K']))
      for row, valid in zip(own, w, strict=True):
        votes[row] += valid
      own = np.tile(np.argsort(-votes, kind='stable')[: self.top], (len(x), 1))
    return q, own

  def run(self, x, own):
    e = self.p['P'][own]
    return self.net.forward(x, e.reshape(len(x), -1, 8))

  def step(self, x, y, w, t):
    q, own = self.choose(x, w)
    f, cache = self.run(x, own)
    ce, grads, df = self.linear(f, y, w)
    de = self.net.backward(cache, df)[0].reshape(*own.shape, -1, 8)
    grads |= {'P': np.zeros_like(self.p['P']), 'K': np.zeros_like(self.p['K'])}
    cos, dk = cosines(q[:, None], self.p['K'][own])
    pull = (cos.sum(1) * w).sum() / w.sum()
    dk = -self.coef * dk * (w / w.sum())[:, None, None]
    scatter(grads['P'], own.ravel(), de.reshape(-1, *de.shape[2:]))
    scatter(grads['K'], own.ravel(), dk.reshape(-1, 8))
    self.seen = {'pull': pull, 'chosen': np.where(w[:, None] > 0, own, -1)}
    return ce - self.coef * pull, ce, grads

  def logits(self, x, t):
    own = self.choose(x, np.ones(len(x)))[1]
    return self.run(x, own)[0] @ self.p['head/w'] + self.p['head/b']


class DualPrompt(Method):
  def __init__(self, z, variant):
    super().__init__(z, ('G', 'E', 'K', 'head/w', 'head/b'), f'{variant}/')
    self.coef = float(z['coef'])
    self.general, self.expert = (
      z[f'{variant}/{k}_layers'].astype(int).tolist() for k in ('general', 'expert')
    )

  def prefix(self, task):
    """General before expert here, the generator's order turned round where a layer has both."""
    out = {}
    for layer in {*self.general, *self.expert}:
      both = []
      for kind in (0, 1):
        parts = []
        if layer in self.general:
          parts.append(np.tile(self.p['G'][self.general.index(layer), kind], (len(task), 1, 1)))
        if layer in self.expert:
          parts.append(self.p['E'][task, self.expert.index(layer), kind])
        both.append(np.concatenate(parts, 1))
      out[layer] = tuple(both)
    return out

  def step(self, x, y, w, t):
    task = np.full(len(x), t)
    f, cache = self.net.forward(x, prefix=self.prefix(task))
    ce, grads, df = self.linear(f, y, w)
    back = self.net.backward(cache, df)[1]
    grads |= {k: np.zeros_like(self.p[k]) for k in 'GEK'}
    for kind in (0, 1):
      for at, layer in enumerate(self.general):
        grads['G'][at, kind] = back[layer][kind][:, : grads['G'].shape[2]].sum(0)
      for at, layer in enumerate(self.expert):
        n = grads['E'].shape[3]
        grads['E'][t, at, kind] = back[layer][kind][:, -n:].sum(0)
    cos, dk = cosines(self.net.forward(x)[0], self.p['K'][task])
    pull = 1 - (cos * w).sum() / w.sum()
    grads['K'][t] = -self.coef * (dk * (w / w.sum())[:, None]).sum(0)
    self.seen = {'pull': pull}
    return ce + self.coef * pull, ce, grads

  def route(self, x, begun):
    q = self.net.forward(x)[0]
    return cosines(q[:, None], self.p['K'][None, : begun + 1])[0].argmax(1)

  def logits(self, x, t):
    task = self.route(x, min(t, TASKS - 1))
    f = self.net.forward(x, prefix=self.prefix(task))[0]
    return f @ self.p['head/w'] + self.p['head/b']


class Coda(Method):
  def __init__(self, z, variant):
    super().__init__(z, ('P', 'K', 'A', 'head/w', 'head/b'))
    self.coef = float(z['ortho/coef']) if variant == 'ortho' else 0.0
    self.exact, self.layers = variant != 'published', z['layers'].astype(int).tolist()

  def begin(self, t):
    """Least squares against all that must be orthogonal, or the authors' sum of projections."""
    for k in ('P', 'K', 'A'):
      x = self.p[k].copy().reshape(len(self.layers), 6, -1)
      for pool in x:
        first = pool.copy()
        for m in (2 * t, 2 * t + 1):
          old = pool[:m]
          if self.exact and m:
            pool[m] = first[m] - old.T @ np.linalg.lstsq(old.T, first[m], rcond=None)[0]
          elif m:
            pool[m] = first[m] - ((old @ first[m]) / (old * old).sum(1)) @ old
          pool[m] /= np.sqrt(pool[m] @ pool[m])
      self.p = self.p | {k: x.reshape(self.p[k].shape)}

  def run(self, x, t):
    q, end = self.net.forward(x)[0], 2 * t + 2
    prefix, kept = {}, {}
    for at, layer in enumerate(self.layers):
      keys, attn, comp = (self.p[k][at, :end] for k in ('K', 'A', 'P'))
      asked = q[:, None] * attn
      weight, by_key = cosines(asked, keys)
      by_asked = cosines(keys, asked)[1]
      prompt = np.tensordot(weight, comp, 1)
      prefix[layer] = (prompt[:, :2], prompt[:, 2:])
      kept[layer] = (weight, by_key, by_asked * q[:, None])
    f, cache = self.net.forward(x, prefix=prefix)
    return f, cache, kept

  def step(self, x, y, w, t):
    f, cache, kept = self.run(x, t)
    ce, grads, df = self.linear(f, y, w)
    back = self.net.backward(cache, df)[1]
    grads |= {k: np.zeros_like(self.p[k]) for k in 'PKA'}
    new, end = slice(2 * t, 2 * t + 2), 2 * t + 2
    penalty = 0.0
    for at, layer in enumerate(self.layers):
      weight, by_key, by_attn = kept[layer]
      dp = np.concatenate(back[layer], 1)
      dw = np.einsum('bld,mld->bm', dp, self.p['P'][at, :end])
      got = {
        'P': np.einsum('bm,bld->mld', weight, dp),
        'K': np.einsum('bm,bmd->md', dw, by_key),
        'A': np.einsum('bm,bmd->md', dw, by_attn),
      }
      for k, g in got.items():
        rows = self.p[k][at, :end].reshape(end, -1)
        gram = rows @ rows.T - np.eye(end)
        penalty += (gram**2).mean()
        g = g + self.coef * (4 / end**2 * gram @ rows).reshape(g.shape)
        grads[k][at, new] = g[new]
    self.seen = {'penalty': penalty}
    return ce + self.coef * penalty, ce, grads

  def logits(self, x, t):
    return self.run(x, min(t, TASKS - 1))[0] @ self.p['head/w'] + self.p['head/b']


class SPrompts(Method):
  def __init__(self, z, variant):
    super().__init__(z, ('P', 'w', 'b'))
    self.centroids: list = []
    self.counts: list = []

  def step(self, x, y, w, t):
    f, cache = self.net.forward(x, np.tile(self.p['P'][t], (len(x), 1, 1)))
    ce, dz = softmax_loss(f @ self.p['w'][t] + self.p['b'][t], y, w)
    grads = {k: np.zeros_like(self.p[k]) for k in self.names}
    grads['P'][t] = self.net.backward(cache, dz @ self.p['w'][t].T)[0].sum(0)
    grads['w'][t], grads['b'][t] = f.T @ dz, dz.sum(0)
    return ce, ce, grads

  def end(self, t):
    z = self.z
    x, w = z['xs'][t].reshape(-1, 4, 4, 1), z['ws'][t].reshape(-1)
    q = self.net.forward(x)[0]
    c = q[z['seeds'][t].astype(int)]
    far = np.where(w > 0, np.linalg.norm(q[:, None] - c[:2], axis=-1).min(1), -1).argmax()
    assert far == z['seeds'][t, 2] and w[0] > 0 and z['seeds'][t, 0] == 0
    for _ in range(int(z['iters'])):
      d = (q * q).sum(1)[:, None] - 2 * q @ c.T + (c * c).sum(1)
      mine = (d.argmin(1)[:, None] == np.arange(len(c))) * w[:, None]
      c = (mine.T @ q) / mine.sum(0)[:, None]
    self.centroids.append(c)
    self.counts.append(mine.sum(0))

  def logits(self, x, t):
    q, out = self.net.forward(x)[0], []
    stacked = np.concatenate(self.centroids) if self.centroids else np.zeros((1, 8))
    k = len(self.centroids[0]) if self.centroids else 1
    for i, row in enumerate(q):
      at = int(np.linalg.norm(stacked - row, axis=1).argmin()) // k
      f = self.net.forward(x[i : i + 1], self.p['P'][at][None])[0]
      out.append(f[0] @ self.p['w'][at] + self.p['b'][at])
    return np.stack(out)


class PromptTuning(Method):
  def __init__(self, z, variant):
    super().__init__(z, ('P', 'head/w', 'head/b'))

  def run(self, x):
    return self.net.forward(x, np.tile(self.p['P'], (len(x), 1, 1)))

  def step(self, x, y, w, t):
    f, cache = self.run(x)
    ce, grads, df = self.linear(f, y, w)
    return ce, ce, grads | {'P': self.net.backward(cache, df)[0].sum(0)}

  def logits(self, x, t):
    return self.run(x)[0] @ self.p['head/w'] + self.p['head/b']


class PrefixTuning(Method):
  def __init__(self, z, variant):
    super().__init__(z, ('K', 'V', 'head/w', 'head/b'))

  def run(self, x):
    tile = lambda a: np.tile(a, (len(x), 1, 1))  # noqa: E731
    return self.net.forward(
      x, prefix={i: (tile(self.p['K'][i]), tile(self.p['V'][i])) for i in range(3)}
    )

  def step(self, x, y, w, t):
    f, cache = self.run(x)
    ce, grads, df = self.linear(f, y, w)
    back = self.net.backward(cache, df)[1]
    for at, k in enumerate('KV'):
      grads[k] = np.stack([back[i][at].sum(0) for i in range(3)])
    return ce, ce, grads

  def logits(self, x, t):
    return self.run(x)[0] @ self.p['head/w'] + self.p['head/b']


METHODS: dict[str, tuple[Callable[..., Method], tuple[str, ...]]] = {
  'l2p': (L2P, ('row', 'vote')),
  'dualprompt': (DualPrompt, ('apart', 'overlap')),
  'coda': (Coda, ('plain', 'ortho', 'published')),
  'sprompts': (SPrompts, ('',)),
  'prompt_tuning': (PromptTuning, ('',)),
  'prefix_tuning': (PrefixTuning, ('',)),
}


def whole(make: Callable[..., Method], z: Golden, variant: str) -> Golden:
  """All of a run's outputs, from the inputs in z."""
  m, out = make(z, variant), {}
  note = lambda k, v: out.setdefault(k, []).append(np.array(v))  # noqa: E731
  m.begin(0)
  for t in range(TASKS):
    if isinstance(m, Coda):
      for k in 'PKA':
        note(f'start/{k}', m.p[k])
    for s in range(STEPS):
      x, y, w = z['xs'][t, s], z['ys'][t, s].astype(int), z['ws'][t, s]
      loss, ce, grads = m.step(x, y, w, t)
      m.p = {k: v - m.lr * grads[k] for k, v in m.p.items()}
      for k, v in {'loss': loss, 'ce': ce, **getattr(m, 'seen', {})}.items():
        note(f'steps/{k}', v)
      for k, v in m.p.items():
        note(f'steps/params/{k}', v)
    note('probe_logits', m.logits(z['probe'], t))
    m.end(t)
    if t + 1 < TASKS:
      m.begin(t + 1)
    note('probe_after', m.logits(z['probe'], t + 1))
  if isinstance(m, SPrompts):
    out |= {'centroids': m.centroids, 'counts': m.counts}
  stacked = {k: np.stack(v) for k, v in out.items()}
  return {
    k.removeprefix('steps/'): v.reshape(TASKS, STEPS, *v.shape[1:]) if k.startswith('steps/') else v
    for k, v in stacked.items()
  }


def runs(family: str) -> None:
  make, variants = METHODS[family]
  z = load(family)
  for variant in variants:
    got, prefix = whole(make, z, variant), f'{variant}/' if variant else ''
    checked = []
    for k, v in got.items():
      want = z.get(prefix + k)
      if want is None:
        assert k == 'probe_after', k
        want = z[f'{prefix}probe_logits']
      if k.startswith('params/') and want.ndim < v.ndim:
        v = v[:, -1]
      same(v, want, f'{family} {prefix}{k}')
      checked.append(k)
    print(f'{family} {variant}: {len(checked)} arrays')

    nudged = dict(z)
    rng = np.random.default_rng(0)
    for k, v in z.items():
      if (k.startswith('init/') or '/init/' in k or k in ('xs', 'probe')) and v.dtype.kind == 'f':
        nudged[k] = v * (1 + 6e-8 * rng.choice([-1.0, 1.0], size=v.shape))
    moved = max(np.abs(v - got[k]).max() for k, v in whole(make, nudged, variant).items())
    print(f'  inputs changed by 6e-8: outputs by {moved:.1e}')

    garbage = dict(z)
    garbage['xs'] = np.where(z['ws'][..., None, None, None] > 0, z['xs'], 7.0)
    garbage['ys'] = np.where(z['ws'] > 0, z['ys'], 5)
    for k, v in whole(make, garbage, variant).items():
      same(v, got[k], f'{family} {variant} {k}: other padding', 1e-13)


def differences() -> None:
  """The hand-written gradients against central differences of the loss."""
  for family, (make, variants) in METHODS.items():
    z = load(family)
    for variant in variants:
      m, worst = make(z, variant), 0.0
      m.begin(0)
      x, y, w = z['xs'][0, 1], z['ys'][0, 1].astype(int), z['ws'][0, 1]
      grads = m.step(x, y, w, 0)[2]
      rng = np.random.default_rng(1)
      for k, g in grads.items():
        start = m.p[k]
        for _ in range(6):
          direction = rng.normal(size=start.shape) * (g != 0)
          ends = []
          for sign in (1, -1):
            m.p = m.p | {k: start + sign * 1e-5 * direction}
            ends.append(m.step(x, y, w, 0)[0])
          m.p = m.p | {k: start}
          worst = max(worst, abs((ends[0] - ends[1]) / 2e-5 - (g * direction).sum()))
      assert worst < 1e-7, (family, variant, worst)
  print('central differences agree')


def limits() -> None:
  """What must hold whatever the numbers."""
  z = load('l2p')
  net, x = Net(z), z['probe']
  f = net.forward(x)[0]
  same(f, z['frozen_probe'], 'frozen features')
  rng = np.random.default_rng(2)
  e = rng.normal(size=(8, 3, 8))
  same(net.forward(x, e)[0], net.forward(x, e[:, ::-1])[0], 'order of prompts')
  one = np.concatenate([net.forward(x[i : i + 1], e[i : i + 1])[0] for i in range(8)])
  same(net.forward(x, e)[0], one, 'rows alone')
  far = {0: (np.zeros((8, 1, 8)), np.zeros((8, 1, 8)))}
  assert np.abs(net.forward(x, prefix=far)[0] - f).max() > 1e-3, 'a prefix of 0 takes attention too'
  none = {0: (np.zeros((8, 0, 8)), np.zeros((8, 0, 8)))}
  same(net.forward(x, np.zeros((8, 0, 8)), none)[0], f, 'empty prompts')

  z = load('dualprompt')
  for v in ('apart', 'overlap'):
    trained = z[f'{v}/params/E']
    for t in range(TASKS):
      others = [u for u in range(TASKS) if u != t]
      before = trained[t - 1, -1] if t else z[f'{v}/init/E']
      same(trained[t, :, others], np.repeat(before[others][:, None], STEPS, 1), 'other experts', 0)

  z = load('coda')
  for t in range(TASKS):
    for k in 'PKA':
      start = z[f'plain/start/{k}'][t].reshape(2, 6, -1)
      new, old = start[:, 2 * t : 2 * t + 2], start[:, : 2 * t]
      same(new @ new.transpose(0, 2, 1), np.tile(np.eye(2), (2, 1, 1)), 'orthonormal', 1e-12)
      assert np.abs(new @ old.transpose(0, 2, 1)).max(initial=0.0) < 1e-12, 'orthogonal to the old'
      trace = z[f'plain/params/{k}'][t].reshape(STEPS, 2, 6, -1)
      rest = [m for m in range(6) if m // 2 != t]
      same(trace[:, :, rest], np.repeat(start[None][:, :, rest], STEPS, 0), 'frozen components', 0)
      assert np.abs(trace[-1][:, 2 * t : 2 * t + 2] - new).max() > 1e-3
  z = load('prompt_tuning')
  same(z['labels/P'], z['labels/table'][[4, 1, 4, 1, 4]], 'repeated tokens', 0)
  same(z['labels/P_many'], z['labels/table'][[2, 6, 0, 5, 3]], 'cut tokens', 0)
  print('limiting cases hold')


def main() -> None:
  for family in METHODS:
    runs(family)
  differences()
  limits()


if __name__ == '__main__':
  main()
