"""Reference for pseudo-rehearsal by reinjection (Dream Net): golden/dreamnet.npz.

Mainsant, Solinas, Reyboz, Godin & Mermillod 2021 and Solinas et al. 2021 (combined replay, with noise
in the place of stored rows). An auto-hetero-associative network: one network gives the class and its
own input again. Inputs lie in (0, 1). The classifier is problem.py's, 4 outputs, features F = h1 [7]:

  recon(x) = sigmoid(relu(F A0 + a0) A1 + a1), A0 [7,5], A1 [5,6]

Two tasks, classes 0-1 and 2-3, all 4 outputs in every softmax. At the boundary a copy M of network and
decoder is saved. With CE(x, y) the mean over rows:

  now = CE(x, y) + rho * mean over rows and inputs of (recon(x) - x)^2
  first task  loss = now
  later       loss = now + coef * [mean over replayed rows of -sum_c softmax(z_M(p))_c log softmax(z(p))_c
                                   + rho * mean over replayed rows and inputs of (recon(p) - recon_M(p))^2]

The replayed rows of a step: from n stored noise rows x_0, uniform in (0, 1), x_r = recon_M(x_{r-1}) for
r = 1..R; p has the n R rows x_1, then x_2, ...; the noise is not replayed. p and the targets of M are
constants; with p = x_r, recon_M(p) is x_{r+1}. Then p <- p - lr gradient for network and decoder together,
of all terms at the values before the step.

No code of the authors was read: where the rows come from, that they are reinjected and that the saved
network gives their targets is the papers', the sizes, losses and weights above are choices.

Keys, Q over l0 [7,5], l1 [5,6] (A0 and A1 are the w, a0 and a1 the b). Inputs:
  init/<p>, dec/Q/{w,b}, lr, rho, coef, R, xs [2,5,5,6] and probe [12,6] within (0, 1), ys [2,5,5]
  dreamnet/noise [2,5,3,6]          x_0 of every step; not used in task 0
Outputs:
  dreamnet/params/<p>, dreamnet/dec/Q/{w,b} [2,5,...]   after every step
  dreamnet/loss [2,5]               the whole loss, before the step
  dreamnet/loss_now [2,5], dreamnet/loss_replay [2,5]   `now`, and the bracket without coef (0 in task 0)
  dreamnet/replayed [2,5,6,6]       p; 0 in task 0
  dreamnet/probe_logits [2,12,4]    after each task
  dreamnet/probe_recon [2,12,6]     recon of the probe after each task
"""

from __future__ import annotations

import numpy as np
import problem as pb
from dgr import nearby, sigmoid, stable
from ebll import backward

STEPS, ROWS, NOISE, REINJECTED, HIDDEN = 5, 5, 3, 2, 5
LR, RHO, COEF = 0.1, 4.0, 1.5
TASKS = [[0, 1], [2, 3]]


def init_classifier(rng: np.random.Generator) -> pb.Params:
  """Somewhat larger weights than elsewhere, so that little of the inputs' variation is lost."""
  params = pb.init_params(rng)
  return {k: 1.4 * p if k.endswith('w') else p for k, p in params.items()}


def init_decoder(rng: np.random.Generator) -> pb.Params:
  dec: pb.Params = {}
  sizes = (pb.HIDDEN[1], HIDDEN, pb.INPUTS)
  for i, (fan_in, fan_out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
    dec[f'l{i}/w'] = rng.normal(size=(fan_in, fan_out)) * np.sqrt(4.0 / fan_in)
    dec[f'l{i}/b'] = rng.normal(size=(fan_out,)) * 0.2
  dec['l0/b'] += 0.5  # few dead units
  return dec


def decode(dec: pb.Params, f: pb.Array) -> tuple[pb.Array, pb.Array]:
  """recon, and the hidden layer."""
  hidden = np.maximum(f @ dec['l0/w'] + dec['l0/b'], 0.0)
  return sigmoid(hidden @ dec['l1/w'] + dec['l1/b']), hidden


def outputs(params: pb.Params, dec: pb.Params, x: pb.Array) -> tuple[pb.Array, pb.Array]:
  """Logits and recon."""
  z, cache = pb.forward(params, x)
  return z, decode(dec, cache[-1])[0]


def loss_and_grad(
  params: pb.Params, dec: pb.Params, x: pb.Array, classes: pb.Array, target: pb.Array
) -> tuple[float, pb.Params, pb.Params]:
  """CE against the rows of `classes`, plus rho times the squared error against `target`."""
  z, cache = pb.forward(params, x)
  f = cache[-1]
  recon, hidden = decode(dec, f)
  logp = pb.log_softmax(z)
  error = recon - target
  loss = float(-(classes * logp).sum() / len(x) + RHO * (error**2).mean())
  da1 = RHO * 2 * error / error.size * recon * (1 - recon)
  da0 = (da1 @ dec['l1/w'].T) * (hidden > 0)
  of_dec = {'l0/w': f.T @ da0, 'l0/b': da0.sum(0), 'l1/w': hidden.T @ da1, 'l1/b': da1.sum(0)}
  dz = (np.exp(logp) - classes) / len(x)
  return loss, backward(params, cache, dz, da0 @ dec['l0/w'].T), of_dec


def reinject(saved: tuple[pb.Params, pb.Params], noise: pb.Array, count: int) -> pb.Array:
  rows, x = [], noise
  for _ in range(count):
    x = outputs(*saved, x)[1]
    rows.append(x)
  return np.concatenate(rows)


def run(data: dict, init: pb.Params, dec: pb.Params, coef: float = COEF) -> dict:
  xs, ys = data['xs'], data['ys']
  tasks = len(xs)
  params, dec, saved = dict(init), dict(dec), None
  trace, decs, losses, logits, recons = [], [], [], [], []
  replayed = np.zeros((tasks, STEPS, NOISE * REINJECTED, pb.INPUTS))
  for t in range(tasks):
    for s in range(STEPS):
      onehot = np.eye(4)[ys[t, s]]
      now, g, g_dec = loss_and_grad(params, dec, xs[t, s], onehot, xs[t, s])
      old = 0.0
      if saved is not None:
        replayed[t, s] = p = reinject(saved, data['dreamnet/noise'][t, s], REINJECTED)
        z, recon = outputs(*saved, p)
        old, g_old, g_dec_old = loss_and_grad(params, dec, p, pb.softmax(z), recon)
        g = {k: g[k] + coef * g_old[k] for k in g}
        g_dec = {k: g_dec[k] + coef * g_dec_old[k] for k in g_dec}
      params, dec = pb.sgd(params, g, LR), pb.sgd(dec, g_dec, LR)
      trace.append(params)
      decs.append(dec)
      losses.append((now + coef * old, now, old))
    saved = (params, dec)
    z, recon = outputs(params, dec, data['probe'])
    logits.append(z)
    recons.append(recon)
  out = pb.prefixed('params', pb.per_task(trace, tasks))
  out |= pb.prefixed('dec', pb.per_task(decs, tasks))
  terms = np.array(losses).T.reshape(3, tasks, STEPS)
  out |= dict(zip(('loss', 'loss_now', 'loss_replay'), terms, strict=True))
  return out | {
    'replayed': replayed,
    'probe_logits': np.stack(logits),
    'probe_recon': np.stack(recons),
  }


def main() -> None:
  rng = np.random.default_rng(2147)
  init, dec = init_classifier(rng), init_decoder(rng)
  xs, ys = pb.make_tasks(rng, TASKS, STEPS, ROWS)
  data = {'xs': sigmoid(2 * xs), 'ys': ys, 'probe': sigmoid(2 * rng.normal(size=(12, pb.INPUTS)))}
  data['dreamnet/noise'] = rng.uniform(size=(len(TASKS), STEPS, NOISE, pb.INPUTS))
  got = run(data, init, dec)
  for _ in range(5):
    stable(got, run(data, nearby(rng, init), nearby(rng, dec)))
  # Replay matters to network and decoder; rows differ from each other and from round to round.
  without = run(data, init, dec, coef=0.0)
  for key in got:
    if key.startswith(('params/', 'dec/')):
      assert np.abs(got[key] - without[key])[-1, -1].max() > 5e-3, key
  rounds = got['replayed'][1].reshape(STEPS, REINJECTED, NOISE, pb.INPUTS)
  assert rounds.std((0, 2)).max(1).min() > 0.08
  assert np.abs(rounds[:, 0] - rounds[:, 1]).max(-1).min() > 0.05
  for k in ('l0', 'l1'):
    assert np.abs(got[f'dec/{k}/b'][-1, -1] - dec[f'{k}/b']).min() > 1e-3, k
  out = pb.prefixed('init', init) | pb.prefixed('dec', dec) | data
  out |= {'lr': LR, 'rho': RHO, 'coef': COEF, 'R': REINJECTED}
  pb.save('dreamnet', out | pb.prefixed('dreamnet', got))


if __name__ == '__main__':
  main()
