"""A second derivation of editing_<net>.npz and edits_<net>.npz in NumPy, from the stored inputs alone.

The networks again, over padded batches; gradients by central differences, Adam by hand; ROME as a
constrained least-squares problem, MEMIT and PMET by their normal equations, AlphaEdit in coordinates of
the null space; traces with all runs in one batch. Nothing is shared with the generators but the files.
Run: ``python verify_editing.py``; it prints a line per part and ends with an AssertionError on the first
mismatch. Tolerances: 1e-10, and 1e-6 for what comes from differences.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).resolve().parent.parent / 'golden'
CASES = {
  'block': ('block',),
  'feedforward': ('feedforward',),
  'both': ('attention', 'feedforward'),
}
Edit = Callable[[str, int, np.ndarray], np.ndarray]


def same(ours, theirs, what: str, tol: float = 1e-10) -> None:
  assert np.shape(ours) == np.shape(theirs), (what, np.shape(ours), np.shape(theirs))
  np.testing.assert_allclose(ours, theirs, rtol=tol, atol=tol, err_msg=what)


def norm(z: dict, x: np.ndarray, name: str, layer: int | tuple = ()) -> np.ndarray:
  scale, bias = z[f'params/{name}/scale'][layer], z.get(f'params/{name}/bias')
  if bias is not None:
    x = x - x.mean(-1, keepdims=True)
  x = x / np.sqrt(np.einsum('...d,...d->...', x, x)[..., None] / x.shape[-1] + z['config/eps'])
  return x * scale + (0 if bias is None else bias[layer])


def turn(z: dict, x: np.ndarray) -> np.ndarray:
  """[B, L, heads, size] by a rotation matrix of every position."""
  size, length = x.shape[-1], x.shape[1]
  turns = np.zeros((length, size, size))
  for p in range(length):
    for i in range(size // 2):
      angle, j = p / float(z['config/theta']) ** (2 * i / size), i + size // 2
      turns[p, i, i] = turns[p, j, j] = np.cos(angle)
      turns[p, j, i], turns[p, i, j] = np.sin(angle), -np.sin(angle)
  return np.einsum('lij,blhj->blhi', turns, x)


def run(z: dict, tokens: np.ndarray, edit: Edit = lambda site, layer, x: x) -> np.ndarray:
  """Logits [B, L, V]; `z` holds the parameters, `tokens` [B, L] are padded on the right."""
  length, gated = tokens.shape[1], 'params/layers/gate/w' in z
  heads = int(z['config/heads'])

  def dense(x, name, i):
    b = z.get(f'params/layers/{name}/b')
    return x @ z[f'params/layers/{name}/w'][i] + (0 if b is None else b[i])

  h = edit('embed', 0, z['params/embed/tokens'][tokens])
  if 'params/embed/positions' in z:
    h = h + z['params/embed/positions'][:length]
  for i in range(4):
    n = norm(z, h, 'layers/norm1', i)
    q, k, v = (dense(n, name, i).reshape(*n.shape[:2], -1, 4) for name in 'qkv')
    if gated:
      q, k = turn(z, q), turn(z, k)
    groups = q.reshape(*q.shape[:2], k.shape[2], heads // k.shape[2], 4)
    scores = np.einsum('blgrc,bmgc->bgrlm', groups, k) / 2
    weight = np.where(np.tri(length, dtype=bool), np.exp(scores), 0)
    weight /= weight.sum(-1, keepdims=True)
    mixed = np.einsum('bgrlm,bmgc->blgrc', weight, v).reshape(n.shape)
    h = h + edit('attention', i, dense(mixed, 'o', i))
    n = norm(z, h, 'layers/norm2', i)
    up = dense(n, 'up', i)
    if gated:
      gate = dense(n, 'gate', i)
      key = gate / (1 + np.exp(-gate)) * up
    else:
      key = up / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
    h = h + edit('feedforward', i, dense(edit('key', i, key), 'down', i))
    h = edit('block', i, h)
  return norm(z, h, 'norm') @ z['params/embed/tokens'].T


def seen(z: dict, n: int, site: str, layer: int) -> np.ndarray:
  """[P, .] at the subject of request n."""
  found = []

  def edit(name, i, x):
    if (name, i) == (site, layer):
      found.append(x[np.arange(len(x)), z['subject'][n]])
    return x

  run(z, z['tokens'][n], edit)
  return found[0]


def log_softmax(x: np.ndarray) -> np.ndarray:
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


def objective(z: dict, n: int, case: str, layer: int, form: str, deltas: np.ndarray) -> float:
  """All contexts and the essence as one batch."""
  width = z['tokens'].shape[-1]
  essence = np.pad(z['essence'][n], (0, width - z['essence'].shape[1]))
  rows = np.concatenate([z['tokens'][n], essence[None]])
  at = np.append(z['subject'][n], z['essence_subject'][n])

  def edit(site, i, x):
    if i != layer or site not in CASES[case]:
      return x
    x = x.copy()
    x[np.arange(len(x)), at] += deltas[CASES[case].index(site)]
    return x

  logp, clean = log_softmax(run(z, rows, edit)), log_softmax(run(z, rows))
  nll = 0.0
  for p, (begin, end) in enumerate(zip(z['begin'][n], z['length'][n], strict=True)):
    nll -= np.mean([logp[p, i - 1, rows[p, i]] for i in range(begin, end)]) / 4
  where = at[-1] if form == 'code' else z['essence_length'][n] - 1
  pair = (clean[-1, where], logp[-1, where])
  first, second = pair if form == 'forward' else pair[::-1]
  total = nll + 0.0625 * np.sum(np.exp(first) * (first - second))
  for site, delta in zip(CASES[case], deltas, strict=True):
    total += 0.5 * np.linalg.norm(delta) / np.sum(seen(z, n, site, layer)[0] ** 2)
  return float(total)


def slope(f, x: np.ndarray, step: float = 1e-5) -> np.ndarray:
  """Central differences with Richardson's correction; x = 0 is where the norm has the slope 0 too."""
  out = np.zeros_like(x)
  for i in np.ndindex(x.shape):
    e = np.zeros_like(x)
    e[i] = step
    near, far = (f(x + e) - f(x - e)) / (2 * step), (f(x + 2 * e) - f(x - 2 * e)) / (4 * step)
    out[i] = (4 * near - far) / 3
  return out


def network(z: dict) -> None:
  for n, rows in enumerate(z['tokens']):
    logits = run(z, rows)
    for p, length in enumerate(z['length'][n]):
      same(logits[p, : length - 1], z['logits'][n, p, : length - 1], f'logits {n} {p}')
    end = z['essence_length'][n]
    same(run(z, z['essence'][n : n + 1])[0, :end], z['essence_logits'][n, :end], 'essence')
    for layer in range(4):
      for site in ('key', 'attention', 'feedforward', 'block'):
        same(seen(z, n, site, layer), z[site][layer, n], f'{site} {layer} {n}')


def targets(z: dict) -> None:
  for case in CASES:
    for j, layer in enumerate(z['target/layers']):
      for n, deltas in enumerate(z[f'target/{case}/deltas']):
        for form in ('forward', 'reverse', 'code'):
          stored = z[f'target/{case}/{form}/loss'][j, n]
          same([objective(z, n, case, layer, form, d) for d in deltas], stored, f'{case} {form}')
          grad = slope(partial(objective, z, n, case, layer, form), deltas[j])
          same(grad, z[f'target/{case}/{form}/grad'][j, n, j], f'{case} {form} gradient', 1e-6)


def adam(
  z: dict, n: int, case: str, group: str, form: str, enough: float
) -> tuple[np.ndarray, int]:
  """Deltas and steps taken; every step starts from the stored deltas, so that errors do not grow."""
  stored, layer = z[f'{group}/{case}/deltas'][n], int(z['optimise/layer'])
  z0 = z[f'optimise/{case}/z0'][n]
  first = second = np.zeros_like(z0)
  for t, (x, value) in enumerate(zip(stored, z[f'{group}/{case}/losses'][n], strict=True)):
    same(objective(z, n, case, layer, form, x), value, f'{case} loss {t}')
    if value < enough or t == len(stored) - 1:
      return x, t
    grad = slope(partial(objective, z, n, case, layer, form), x)
    first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad**2
    x = x - 0.5 * first / (1 - 0.9 ** (t + 1)) / (np.sqrt(second / (1 - 0.999 ** (t + 1))) + 1e-8)
    ratio = 0.75 * np.linalg.norm(z0, axis=-1) / np.linalg.norm(x, axis=-1)
    x = x * np.minimum(1, ratio)[:, None]
    same(x, stored[t + 1], f'{case} {n} delta {t}', 1e-6)
    if group == 'optimise':
      same(ratio < 1, z[f'optimise/{case}/clamped'][n, t].astype(bool), f'{case} clamped')
  raise AssertionError


def minimisation(z: dict) -> None:
  for case in CASES:
    for n, z0 in enumerate(z[f'optimise/{case}/z0']):
      for group, form in (('optimise', 'reverse'), ('code', 'code')):
        delta, _ = adam(z, n, case, group, form, 0.05)
        same(z0 + delta, z[f'{group}/{case}/z'][n], f'{case} z')
      delta, steps = adam(z, n, case, 'optimise', 'reverse', float(z[f'optimise/{case}/stop']))
      assert steps == z[f'optimise/{case}/stop_steps'][n]
      same(z0 + delta, z[f'optimise/{case}/stop_z'][n], f'{case} z of the early stop')


def put(z: dict, layer: int, w: np.ndarray) -> dict:
  down = z['params/layers/down/w'].copy()
  down[layer] = w
  return z | {'params/layers/down/w': down}


def answers(z: dict) -> np.ndarray:
  return np.stack([run(z, z['tokens'][n])[0, z['begin'][n, 0] - 1] for n in range(3)])


def rome(z: dict) -> None:
  """min tr(U^T C U) with k U = v - m: stationarity and constraint in one linear system."""
  layer, edited = int(z['rome/layer']), z
  for n, v in enumerate(z['rome/targets']):
    k = seen(edited, n, 'key', layer).mean(0)
    m = seen(edited, n, 'feedforward', layer).mean(0)
    same(k, z['rome/k'][n], 'rome k')
    same(m, z['rome/m'][n], 'rome m')
    system = np.block([[2 * z['c'][layer], k[:, None]], [k[None], np.zeros((1, 1))]])
    right = np.concatenate([np.zeros((len(k), len(v))), (v - m)[None]])
    w = edited['params/layers/down/w'][layer] + np.linalg.solve(system, right)[:-1]
    same(w, z['rome/w'][n], 'rome w')
    edited = put(edited, layer, w)
    same(seen(edited, n, 'feedforward', layer).mean(0), v, 'rome reaches its target')
  same(answers(edited), z['rome/answers'], 'rome answers')


def mean_keys(z: dict, batch: range, layer: int) -> np.ndarray:
  keys = [seen(z, n, 'key', layer) for n in batch]
  return np.stack([np.average(k, axis=0, weights=[3, 1, 1, 1]) for k in keys], 1)


def spread(z: dict, edited: dict, m: str, batch: range, zs, site: str, root: bool, solve) -> dict:
  """`solve(layer, K, R)` returns what the write adds, [ffn, d]."""
  layers = z[f'{m}/layers']
  for i, layer in enumerate(layers):
    keys = mean_keys(edited, batch, layer)
    now = np.stack([seen(edited, n, site, layers[-1])[0] for n in batch], 1)
    left = layers[-1] - layer + 1
    residual = (zs.T - now) / (np.sqrt(left) if root else left)
    for key, value in (('keys', keys), ('current', now), ('residual', residual)):
      same(value, z[f'{m}/{key}'][i], f'{m} {key}')
    added = solve(layer, keys, residual)
    same(added, z[f'{m}/a'][i] @ residual.T, f'{m} update')
    same(edited['params/layers/down/w'][layer] + added, z[f'{m}/w'][i], f'{m} w')
    edited = put(edited, layer, z[f'{m}/w'][i])
  same(answers(edited), z[f'{m}/answers'], f'{m} answers')
  return edited


def memit_pmet(z: dict) -> None:
  """min lam tr(U^T C U) + |K^T U - R^T|^2 as one least-squares problem."""

  def solve(layer, keys, residual):
    root = np.linalg.cholesky(z['lam'] * z['c'][layer]).T
    right = np.concatenate([np.zeros((24, 16)), residual.T])
    return np.linalg.lstsq(np.concatenate([root, keys.T]), right, rcond=None)[0]

  for m, site in (('memit', 'block'), ('pmet', 'feedforward')):
    for kind in ('given', 'optimised'):
      zs = z[f'{m}/{kind}/z']
      spread(z, z, f'{m}/{kind}', range(3), zs, site, m == 'pmet', solve)
  spread(z, z, 'memit/single', range(1), z['memit/single/z'], 'block', False, solve)
  same(z['memit/single/w'][0], z['memit/single/closed_w'], 'closed form of one edit')
  same(z['memit/optimised/z'], z['optimise/block/z'][:, 0], 'memit z')
  same(z['pmet/optimised/z'], z['optimise/both/z'][:, 1], 'pmet z')


def alphaedit(z: dict) -> None:
  """In coordinates of the null space, where the system is symmetric."""
  bases = []
  for c, p in zip(z['alphaedit/c'], z['alphaedit/p'], strict=True):
    u, s, _ = np.linalg.svd(c)
    bases.append(u[:, s < z['alphaedit/threshold']])
    assert bases[-1].shape == (24, 10)
    same(bases[-1] @ bases[-1].T, p, 'P')
  for m in ('alphaedit/published', 'alphaedit/light'):
    past, edited = np.zeros((4, 24, 24)), z
    for b, batch in enumerate((range(2), range(2, 3))):

      def solve(layer, keys, residual, past=past, m=m):
        u = bases[layer]
        system = u.T @ (keys @ keys.T + past[layer]) @ u + z[f'{m}/l2'] * np.eye(10)
        return u @ np.linalg.solve(system, u.T @ keys @ residual.T)

      name = f'{m}/{b}'
      layers = {f'{name}/layers': z[f'{m}/layers']}
      edited = spread(z | layers, edited, name, batch, z[f'{m}/z'][batch], 'block', False, solve)
      for layer in z[f'{m}/layers']:
        keys = mean_keys(edited, batch, layer)
        past[layer] += keys @ keys.T
      same(past[1:], z[f'{name}/past'], f'{name} past')


def tracing(z: dict) -> None:
  tokens, noise, answer = z['trace/tokens'], z['trace/noise'], z['trace/answer']
  begin, end = int(z['trace/begin']), int(z['trace/end'])
  rows = np.tile(tokens, (len(noise) + 1, 1))  # the last run has no noise

  def probability(site: str, token: int, layers: list[int]) -> np.ndarray:
    def edit(name, i, x):
      x = x.copy()
      if name == 'embed':
        x[:-1, begin:end] += noise
      if name == site and i in layers:
        x[:-1, token] = x[-1, token]
      return x

    return np.exp(log_softmax(run(z, rows, edit)))[:, -1, answer]

  same(probability('', 0, [])[:-1].mean(), z['trace/corrupted'], 'corrupted')
  same(probability('', 0, [])[-1], z['trace/clean'], 'clean')
  kinds = [('block', 1)] + [(s, w) for s in ('feedforward', 'attention') for w in (1, 3)]
  for site, window in kinds:
    near = [[i for i in range(4) if abs(i - layer) <= window // 2] for layer in range(4)]
    ours = [
      [probability(site, t, layers)[:-1].mean() for t in range(len(tokens))] for layers in near
    ]
    same(ours, z[f'trace/{site}/{window}'], f'trace {site} {window}')


def main() -> None:
  for net in ('gpt2', 'llama'):
    z = {}
    for family in ('editing', 'edits'):
      with np.load(GOLDEN / f'{family}_{net}.npz', allow_pickle=False) as file:
        z |= dict(file)
    for part in (network, targets, minimisation, rome, memit_pmet, alphaedit, tracing):
      part(z)
      print(f'{net}: {part.__name__} agrees')


if __name__ == '__main__':
  main()
