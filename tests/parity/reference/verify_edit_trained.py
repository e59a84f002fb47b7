"""A second derivation of trained_<net>.npz in NumPy, from editing_<net>.npz and the stored inputs.

The networks are those of `verify_editing.py`; gradients by central differences, Adam by hand.
Checked: a gradient of each of the four losses; ft_l, ft_stop, grace and batch 1 of wise step by
step; what each editor answers; merges and routing. Nothing is shared with the generators but the
files. Run: ``python verify_edit_trained.py``, minutes; it prints a line per part and ends with an
AssertionError on the first mismatch. Tolerances: 1e-10, or 1e-6, of the largest entry.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from verify_editing import GOLDEN, Edit, answers, log_softmax, run, slope

Rows = tuple[np.ndarray, np.ndarray, np.ndarray]  # tokens [B,W], length [B], begin [B]


def near(ours, theirs, what: str, tol: float = 1e-10) -> None:
  ours, theirs = np.asarray(ours), np.asarray(theirs)
  assert ours.shape == theirs.shape, (what, ours.shape, theirs.shape)
  assert abs(ours - theirs).max() <= tol * max(abs(theirs).max(), 1e-6), what


def log_p(z: dict, rows: Rows, edit: Edit = lambda site, layer, x: x) -> np.ndarray:
  logp = log_softmax(run(z, rows[0], edit))
  spans = enumerate(zip(*rows, strict=True))
  return np.array([np.mean([logp[r, i - 1, t[i]] for i in range(b, e)]) for r, (t, e, b) in spans])


def plain(z: dict, which: range = range(3)) -> Rows:
  return tuple(z[k][list(which), 0] for k in ('tokens', 'length', 'begin'))


def put(z: dict, name: str, layers, term: np.ndarray) -> dict:
  w = z[f'params/layers/{name}/w'].copy()
  w[layers] += term
  return z | {f'params/layers/{name}/w': w}


class Adam:
  def __init__(self, rate: float):
    self.rate, self.t, self.first, self.second = rate, 0, 0.0, 0.0

  def step(self, x: np.ndarray, grad: np.ndarray) -> np.ndarray:
    self.t += 1
    self.first, self.second = 0.9 * self.first + 0.1 * grad, 0.999 * self.second + 0.001 * grad**2
    root = np.sqrt(self.second / (1 - 0.999**self.t)) + 1e-8
    return x - self.rate * self.first / (1 - 0.9**self.t) / root


def outcome(edited: dict, t: dict, f: str) -> None:
  near(log_p(edited, plain(edited)), t[f'{f}/log_p'], f'{f} log p')
  near(answers(edited), t[f'{f}/answers'], f'{f} answers')


def tuned(z: dict, t: dict) -> None:
  def loss(group: range, term: np.ndarray) -> float:
    return -log_p(put(z, 'down', t['ft/layers'], term), plain(z, group)).mean()

  for f in ('ft', 'ft_l', 'ft_stop'):
    terms, losses, stop = (t[f'{f}/{name}'] for name in ('terms', 'losses', 'stop'))
    outcome(put(z, 'down', t['ft/layers'], terms[-1]), t, f)
    near([loss(range(2), x) for x in terms[:-1]], losses[1 : len(terms), 0], f'{f} losses')
    adam, term, mean, norm = Adam(t[f'{f}/rate']), 0 * terms[0], np.inf, t[f'{f}/norm']
    for p, stored in enumerate(terms if f != 'ft' else ()):
      assert mean >= stop
      for g, group in enumerate((range(2), range(2, 3))):
        near(loss(group, term), losses[p, g], f'{f} loss {p} {g}', 1e-6)
        if losses[p, g] >= stop:
          term = adam.step(term, slope(partial(loss, group), term)).clip(-norm, norm)
      near(term, stored, f'{f} term {p}', 1e-6)
      term, mean = stored, (2 * losses[p, 0] + losses[p, 1]) / 3
  assert mean < stop and (losses[len(terms) :] == -1).all()
  near(slope(partial(loss, range(2)), terms[-1]), t['ft_stop/grad'], 'ft gradient', 1e-6)


def adapted(z: dict, t: dict, factors: dict) -> dict:
  for name in 'qv':
    ab = np.einsum('lir,lro->lio', factors[f'{name}/a'], factors[f'{name}/b'])
    z = put(z, name, slice(None), t['lora/alpha'] / t['lora/rank'] * ab)
  return z


def lora(z: dict, t: dict) -> None:
  names = ('q/a', 'q/b', 'v/a', 'v/b')
  factors = {name: t[f'lora/{name}'] for name in names}
  outcome(adapted(z, t, factors), t, 'lora')

  def loss(name: str, x: np.ndarray) -> float:
    return -log_p(adapted(z, t, factors | {name: x}), plain(z, range(2))).mean()

  for name in names:
    grad = slope(partial(loss, name), factors[name])
    near(grad, t[f'lora/grad/{name}'], f'lora gradient {name}', 1e-6)


def grace(z: dict, t: dict) -> None:
  """The whole run on arrays of fixed size; distances of empty slots are infinite."""
  layer, k, eps = int(t['grace/layer']), int(t['grace/capacity']), t['grace/eps']
  keys, values, radii, labels = np.full((k, 16), np.inf), np.zeros((k, 16)), np.zeros(k), [-1] * k

  def seen(row: Rows) -> tuple[np.ndarray, np.ndarray]:
    found, at = {}, (0, row[2][0] - 1)
    run(z, row[0], lambda site, i, x: found.setdefault((site, i), x))
    query = found['block', layer - 1][at] + found['attention', layer][at]
    return query, found['block', layer][at]

  def loss(row: Rows, value: np.ndarray) -> float:
    at = np.arange(row[0].shape[1])[:, None] == row[2][0] - 1
    site = 'block', layer
    return -log_p(z, row, lambda s, i, x: np.where(at, value, x) if (s, i) == site else x)[0]

  for b in '01':
    rows = [t[f'grace/{b}/{name}'] for name in ('tokens', 'length', 'begin')]
    batch = [tuple(x[n : n + 1] for x in rows) for n in range(len(rows[0]))]
    for n, row in enumerate(batch):
      query, warm = seen(row)
      apart, label = np.linalg.norm(keys - query, axis=1), row[0][0, row[2][0]]
      i = int(apart.argmin())
      far, inner, room = apart[i], apart[i] <= eps + radii[i], labels.count(-1)
      if inner and label == labels[i]:
        radii[i] = max(radii[i], far)
      elif room:
        radii[i], radii[k - room] = (far / 2 - 1e-5, far / 2) if inner else (radii[i], eps)
        i = k - room
        keys[i], values[i], labels[i] = query, warm, label
      else:
        i = -1
      assert i == t[f'grace/{b}/entry'][n]
      adam = Adam(t['grace/rate'])
      for _ in range(t['grace/steps'] if i >= 0 else 0):
        values[i] = adam.step(values[i], slope(partial(loss, row), values[i]))
    count = int(t[f'grace/{b}/count'])
    assert labels == [*t[f'grace/{b}/labels'][:count], *[-1] * (k - count)]
    for name, ours in (('keys', keys), ('values', values), ('radii', radii)):
      near(ours[:count], t[f'grace/{b}/{name}'][:count], f'grace {b} {name}', 1e-6)
    found = []
    for row in batch:
      apart = np.linalg.norm(keys - seen(row)[0], axis=1)
      i = int(apart.argmin())
      found.append(-loss(row, values[i]) if apart[i] <= radii[i] else log_p(z, row)[0])
    near(found, t[f'grace/{b}/log_p'], f'grace {b} log p', 1e-6)
  first = tuple(t[f'grace/0/{name}'][:1] for name in ('tokens', 'length', 'begin'))
  grad = slope(partial(loss, first), t['grace/0/values'][0])
  near(grad, t['grace/grad'], 'grace gradient', 1e-6)


def merge(tensors: np.ndarray, weights: list[float], density: float) -> np.ndarray:
  """TIES, entry by entry."""
  for x in tensors:
    x[abs(x) < np.sort(abs(x), axis=None)[-int(density * x.size)]] = 0
  merged = np.zeros_like(tensors[0])
  for at in np.ndindex(merged.shape):
    pairs = [(w, x[at]) for w, x in zip(weights, tensors, strict=True)]
    sign = 1 if sum(w * v for w, v in pairs) >= 0 else -1
    pairs = [(w, v) for w, v in pairs if v * sign > 0]
    merged[at] = sum(w * v for w, v in pairs) / sum(w for w, _ in pairs) if pairs else 0
  return merged


def wise(z: dict, t: dict) -> None:
  layer, keep = int(t['wise/layer']), t['wise/keep']
  alpha, beta, gamma = (t[f'wise/{name}'] for name in ('alpha', 'beta', 'gamma'))
  unrelated = t['wise/unrelated'], t['wise/unrelated_length']

  def distances(tokens: np.ndarray, begin: np.ndarray, side: np.ndarray) -> np.ndarray:
    found = {}
    run(z, tokens, lambda site, i, x: found.setdefault((site, i), x))
    rows = zip(found['key', layer], begin, strict=True)
    return np.array([np.sqrt(((a[:n] @ side) ** 2).sum(1)).mean() for a, n in rows])

  def scored(b: str, n: int, side: np.ndarray) -> list[float]:
    rows = tuple(t[f'wise/{b}/{name}'][n] for name in ('tokens', 'length', 'begin'))
    far = distances(*unrelated, side)[t[f'wise/{b}/others'][n]]
    close, logp = distances(rows[0], rows[2], side), log_p(put(z, 'down', layer, side), rows).mean()
    hinge = np.maximum(0, beta - close) + np.maximum(0, gamma - close + far) + max(0, far - alpha)
    return [hinge.mean() - logp, logp, close.min()]

  grad = lambda b, n, side: slope(lambda x: scored(b, n, x)[0], side)  # noqa: E731
  earlier, epsilon = np.zeros((24, 16)), np.inf
  for b, last in (('0', (1, 2)), ('1', (0,))):
    shards = t[f'wise/{b}/shards']
    for n, shard in zip(last, shards, strict=True):  # the request that a shard ends with
      stored = [t[f'wise/{b}/{name}'][n] for name in ('loss', 'log_p', 'distance')]
      near(scored(b, n, shard), stored, f'wise {b} {n}')
    weights = [(1 - keep) / len(shards)] * len(shards) + [keep]
    earlier = merge(np.stack([*shards, earlier]), weights, t['wise/density'])
    near(earlier, t[f'wise/{b}/side'], f'wise {b} merge')
    epsilon = min(epsilon, *t[f'wise/{b}/distance'])
    near(epsilon, t[f'wise/{b}/epsilon'], f'wise {b} epsilon')
  for name, (tokens, ends) in (('plain', plain(z)[::2]), ('other', unrelated)):
    far = distances(tokens, ends, earlier)
    near(far, t[f'wise/{name}/distance'], f'wise {name} distance')
    assert ((far > t['wise/reach'] * epsilon) == t[f'wise/{name}/routed']).all()
    nets = [put(z, 'down', layer, earlier * routed) for routed in t[f'wise/{name}/routed']]
    ours = [run(x, row[None])[0, n - 1] for x, row, n in zip(nets, tokens, ends, strict=True)]
    near(ours, t[f'wise/{name}/answers'], f'wise {name} answers')
  near(grad('0', 1, t['wise/0/shards'][0]), t['wise/grad'], 'wise gradient', 1e-6)
  # from 0, where the norms have the slope 0, as they have in differences about 0
  shard, bound, rate = np.zeros((24, 16)), t['wise/bound'], t['wise/rate'] * t['wise/1/masks'][0]
  for _ in range(t['wise/steps']):
    shard = np.clip(shard - rate * grad('1', 0, shard), -bound, bound)
  near(shard, t['wise/1/shards'][0], 'wise steps', 1e-6)


def main() -> None:
  for net in ('gpt2', 'llama'):
    z, t = (dict(np.load(GOLDEN / f'{family}_{net}.npz')) for family in ('editing', 'trained'))
    for part in (tuned, lora, grace, wise):
      part(z, t)
      print(f'{net}: {part.__name__} agrees', flush=True)


if __name__ == '__main__':
  main()
