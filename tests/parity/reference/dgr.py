"""Reference for deep generative replay: golden/dgr.npz.

Shin et al. 2017 (Continual Learning with Deep Generative Replay), in the form of van de Ven & Tolias
2018 and 2019. The solver is the MLP of problem.py with inputs in [0, 1]; the generator is a VAE:
  h0 = relu(e0 x), h1 = relu(e1 h0), mu and logvar are linear in h1, z = mu + exp(logvar / 2) eps
  decoder: h2 = relu(d0 z), h3 = relu(d1 h2), x_hat = sigmoid(out h3)
  L(x; eps) = mean over rows of (sum over the 6 inputs of BCE(x, x_hat) + KL) / 6
  BCE(x, x_hat) = -x log x_hat - (1 - x) log(1 - x_hat)
  KL = -1/2 sum over the 3 latents of (1 + logvar - mu^2 - exp(logvar))

A step in task t, counted from 1; CE is a mean over rows with all 4 outputs in the softmax:
  t = 1   solver CE(x, y), generator L(x; eps)
  t > 1   x_rep = decoder of the saved generator at z_rep: the means, nothing is sampled from them
          y_rep = argmax of the saved solver's logits at x_rep, over the classes of finished tasks
          solver 1/t CE(x, y) + (1 - 1/t) CE(x_rep, y_rep)
          generator 1/t L(x; eps) + (1 - 1/t) L(x_rep; eps_rep); x_rep is a constant
Both are stepped from their values before the step: the solver p <- p - lr g, the generator by Adam,
  m <- b1 m + (1 - b1) g, v <- b2 v + (1 - b2) g^2, k <- k + 1
  p <- p - lr_g (m / (1 - b1^k)) / (sqrt(v / (1 - b2^k)) + eps), b1 0.9, b2 0.999, eps 1e-8
whose state is kept over the tasks. Boundary: saved generator and solver are the current ones.
With two tasks both weights of task 2 are 1/2.

Variants: `dgr`, as said; `all`, y_rep is the argmax over all 4 outputs, the rest (generator, x_rep, noise) is
that of `dgr`; `heads`, three tasks of two classes with outputs of their own (6 in all, init6): CE(x, y) is
within the head of the task at hand, and CE(x_rep, y_rep) the mean over the heads of finished tasks, each
within the head, with y_rep the argmax of the saved solver in it.

Keys, P over e0 [6,5], e1 [5,4], mu [4,3], logvar [4,3], d0 [3,4], d1 [4,5], out [5,6] (shape of w).
Inputs:
  init/<p>, gen/P/{w,b}, lr, lr_g, xs [2,5,5,6] and probe [12,6] within (0, 1), ys [2,5,5]
  dgr/eps [2,5,5,3], dgr/z_rep [2,5,4,3], dgr/eps_rep [2,5,4,3]
                                standard normal draws; the last two are not used in task 1
Outputs:
  dgr/params/<p>, dgr/gen/P/{w,b} [2,5,...]   after every step
  dgr/loss, dgr/gen_loss [2,5]  the whole loss of solver and generator, before the step
  dgr/x_rep [2,5,4,6], dgr/y_rep [2,5,4]      0 and -1 in task 1
  dgr/probe_logits [2,12,4]     after each task
  all/params/<p>, all/loss, all/probe_logits   likewise; all/y_rep [2,5,4,1]
Of `heads`: heads/xs, ys, eps, z_rep, eps_rep, init6/<p>; heads/params/<p>, loss, x_rep, probe_logits, and
heads/y_rep [3,5,4,2], the label within each of the first two heads, -1 where its task is not finished.
"""

from __future__ import annotations

import numpy as np
import problem as pb

STEPS, ROWS, REPLAYED, LATENTS = 5, 5, 4, 3
LR, LR_G, B1, B2, EPS = 0.15, 0.01, 0.9, 0.999, 1e-8
TASKS = [[0, 1], [2, 3]]
LAYERS = {
  'e0': (6, 5), 'e1': (5, 4), 'mu': (4, 3), 'logvar': (4, 3), 'd0': (3, 4), 'd1': (4, 5), 'out': (5, 6),
}  # fmt: skip


def init_generator(rng: np.random.Generator) -> pb.Params:
  gen: pb.Params = {}
  for name, (fan_in, fan_out) in LAYERS.items():
    gen[f'{name}/w'] = rng.normal(size=(fan_in, fan_out)) * np.sqrt(2.0 / fan_in)
    gen[f'{name}/b'] = rng.normal(size=(fan_out,)) * 0.2
  return gen


def sigmoid(a: pb.Array) -> pb.Array:
  return 1 / (1 + np.exp(-a))


def linear(gen: pb.Params, name: str, x: pb.Array) -> pb.Array:
  return x @ gen[f'{name}/w'] + gen[f'{name}/b']


def decode(gen: pb.Params, z: pb.Array) -> tuple[pb.Array, pb.Array, pb.Array]:
  """x_hat, and the two hidden layers (positive exactly where ReLU lets a gradient through)."""
  h2 = np.maximum(linear(gen, 'd0', z), 0.0)
  h3 = np.maximum(linear(gen, 'd1', h2), 0.0)
  return sigmoid(linear(gen, 'out', h3)), h2, h3


def vae(gen: pb.Params, x: pb.Array, eps: pb.Array) -> tuple[float, pb.Params]:
  """L(x; eps) and its gradient."""
  h0 = np.maximum(linear(gen, 'e0', x), 0.0)
  h1 = np.maximum(linear(gen, 'e1', h0), 0.0)
  mu, logvar = linear(gen, 'mu', h1), linear(gen, 'logvar', h1)
  noise = np.exp(logvar / 2) * eps
  z = mu + noise
  x_hat, h2, h3 = decode(gen, z)
  bce = -(x * np.log(x_hat) + (1 - x) * np.log(1 - x_hat)).sum(1)
  kl = -0.5 * (1 + logvar - mu**2 - np.exp(logvar)).sum(1)
  loss = float((bce + kl).mean() / pb.INPUTS)
  scale = 1 / (len(x) * pb.INPUTS)
  dout = (x_hat - x) * scale
  da3 = (dout @ gen['out/w'].T) * (h3 > 0)
  da2 = (da3 @ gen['d1/w'].T) * (h2 > 0)
  dz = da2 @ gen['d0/w'].T
  dmu = dz + mu * scale
  dlogvar = dz * noise / 2 + (np.exp(logvar) - 1) / 2 * scale
  da1 = (dmu @ gen['mu/w'].T + dlogvar @ gen['logvar/w'].T) * (h1 > 0)
  da0 = (da1 @ gen['e1/w'].T) * (h0 > 0)
  inputs = {'e0': x, 'e1': h0, 'mu': h1, 'logvar': h1, 'd0': z, 'd1': h2, 'out': h3}
  deltas = {'e0': da0, 'e1': da1, 'mu': dmu, 'logvar': dlogvar, 'd0': da2, 'd1': da3, 'out': dout}
  grads: pb.Params = {}
  for name in LAYERS:
    grads[f'{name}/w'] = inputs[name].T @ deltas[name]
    grads[f'{name}/b'] = deltas[name].sum(0)
  return loss, grads


def within(
  params: pb.Params, x: pb.Array, parts: list[tuple[slice, np.ndarray]]
) -> tuple[float, pb.Params]:
  """The mean over parts of the cross-entropy within some outputs, and its gradient."""
  logits, cache = pb.forward(params, x)
  total, dlogits = 0.0, np.zeros_like(logits)
  for outputs, labels in parts:
    loss, d = pb.cross_entropy(logits[:, outputs], labels)
    total += loss / len(parts)
    dlogits[:, outputs] += d / len(parts)
  return total, pb.backward(params, cache, dlogits)


def labelled(
  kind: str, t: int, params: pb.Params, x: pb.Array
) -> tuple[list[tuple[slice, np.ndarray]], float]:
  """The outputs in which dreams are rehearsed in task t (from 0), with labels; the smallest margin."""
  logits = pb.forward(params, x)[0]
  heads = [slice(2 * h, 2 * h + 2) for h in range(t)] if kind == 'heads' else [slice(None)]
  parts = [(h, logits[:, h].argmax(1)) for h in heads]
  tops = [np.sort(logits[:, h], axis=1)[:, -2:] for h in heads]
  return parts, min(float((a[:, 1] - a[:, 0]).min()) for a in tops)


def run_other(kind: str, data: dict, init: pb.Params, gen: pb.Params) -> dict:
  """A run of `all` or `heads`."""
  xs, ys = data['xs'], data['ys']
  tasks = len(xs)
  params, gen, adam = dict(init), dict(gen), Adam(gen)
  saved, saved_gen = params, gen
  trace, losses, logits = [], [], []
  x_rep = np.zeros((tasks, STEPS, REPLAYED, pb.INPUTS))
  y_rep = np.full((tasks, STEPS, REPLAYED, max(tasks - 1, 1) if kind == 'heads' else 1), -1)
  for t in range(tasks):
    own = slice(2 * t, 2 * t + 2) if kind == 'heads' else slice(None)
    for s in range(STEPS):
      solver = within(params, xs[t, s], [(own, ys[t, s] - (own.start or 0))])
      generator = vae(gen, xs[t, s], data['eps'][t, s])
      if t:
        x = x_rep[t, s] = decode(saved_gen, data['z_rep'][t, s])[0]
        parts, margin = labelled(kind, t, saved, x)
        assert margin > 1e-4, margin
        y_rep[t, s, :, : len(parts)] = np.stack([labels for _, labels in parts], axis=-1)
        solver = mix(t + 1, solver, within(params, x, parts))
        generator = mix(t + 1, generator, vae(gen, x, data['eps_rep'][t, s]))
      params = pb.sgd(params, solver[1], LR)
      gen = adam.step(gen, generator[1])
      trace.append(params)
      losses.append(solver[0])
    saved, saved_gen = params, gen
    logits.append(pb.forward(params, data['probe'])[0])
  out = pb.prefixed('params', pb.per_task(trace, tasks))
  out |= {'loss': np.array(losses).reshape(tasks, STEPS), 'x_rep': x_rep, 'y_rep': y_rep}
  return out | {'probe_logits': np.stack(logits)}


def mix(
  t: int, now: tuple[float, pb.Params], old: tuple[float, pb.Params]
) -> tuple[float, pb.Params]:
  """1/t of the first pair of loss and gradient, 1 - 1/t of the second."""
  a, b = 1 / t, 1 - 1 / t
  return a * now[0] + b * old[0], {k: a * now[1][k] + b * old[1][k] for k in now[1]}


class Adam:
  def __init__(self, params: pb.Params) -> None:
    self.m = {k: np.zeros_like(p) for k, p in params.items()}
    self.v = {k: np.zeros_like(p) for k, p in params.items()}
    self.count = 0

  def step(self, params: pb.Params, grads: pb.Params) -> pb.Params:
    self.count += 1
    out: pb.Params = {}
    for k, g in grads.items():
      self.m[k] = B1 * self.m[k] + (1 - B1) * g
      self.v[k] = B2 * self.v[k] + (1 - B2) * g**2
      m, v = self.m[k] / (1 - B1**self.count), self.v[k] / (1 - B2**self.count)
      out[k] = params[k] - LR_G * m / (np.sqrt(v) + EPS)
    return out


def run(
  data: dict, init: pb.Params, gen: pb.Params, replay: bool = True, keep: bool = True
) -> dict:
  """`replay` off: both losses are those of task 1 in every task. `keep` off: Adam starts afresh."""
  xs, ys = data['xs'], data['ys']
  tasks = len(xs)
  params, gen, adam = dict(init), dict(gen), Adam(gen)
  saved_params, saved_gen, old = params, gen, []
  trace, gens, losses, logits = [], [], [], []
  x_rep = np.zeros((tasks, STEPS, REPLAYED, pb.INPUTS))
  y_rep = np.full((tasks, STEPS, REPLAYED), -1)
  margin = np.inf
  for t in range(tasks):
    for s in range(STEPS):
      solver = pb.loss_and_grad(params, xs[t, s], ys[t, s])
      generator = vae(gen, xs[t, s], data['dgr/eps'][t, s])
      if old:
        x_rep[t, s] = decode(saved_gen, data['dgr/z_rep'][t, s])[0]
        score = pb.forward(saved_params, x_rep[t, s])[0][:, old]
        y_rep[t, s] = np.array(old)[score.argmax(1)]
        best = np.sort(score, axis=1)
        margin = min(margin, (best[:, -1] - best[:, -2]).min())
        if replay:
          solver = mix(t + 1, solver, pb.loss_and_grad(params, x_rep[t, s], y_rep[t, s]))
          generator = mix(t + 1, generator, vae(gen, x_rep[t, s], data['dgr/eps_rep'][t, s]))
      params = pb.sgd(params, solver[1], LR)
      gen = adam.step(gen, generator[1])
      trace.append(params)
      gens.append(gen)
      losses.append((solver[0], generator[0]))
    saved_params, saved_gen, old = params, gen, old + TASKS[t]
    if not keep:
      adam = Adam(gen)
    logits.append(pb.forward(params, data['probe'])[0])
  assert margin > 1e-3, margin
  loss, gen_loss = np.array(losses).T.reshape(2, tasks, STEPS)
  out = pb.prefixed('params', pb.per_task(trace, tasks))
  out |= pb.prefixed('gen', pb.per_task(gens, tasks))
  out |= {'loss': loss, 'gen_loss': gen_loss, 'x_rep': x_rep, 'y_rep': y_rep}
  return out | {'probe_logits': np.stack(logits)}


def stable(out: dict, again: dict) -> None:
  """A run from nearly the same parameters: equal labels, and values that moved little."""
  for key, value in out.items():
    tolerance = 0 if value.dtype.kind == 'i' else 4e-7
    assert np.abs(value - again[key]).max() <= tolerance, (key, np.abs(value - again[key]).max())


def nearby(rng: np.random.Generator, params: pb.Params) -> pb.Params:
  return {k: p * (1 + 6e-8 * rng.uniform(-1, 1, p.shape)) for k, p in params.items()}


def moved(a: dict, b: dict, prefix: str) -> float:
  """The largest difference of two runs in parameters after the last step."""
  return max(np.abs(a[k] - b[k])[-1, -1].max() for k in a if k.startswith(prefix))


def main() -> None:
  rng = np.random.default_rng(1801)
  init, gen = pb.init_params(rng), init_generator(rng)
  xs, ys = pb.make_tasks(rng, TASKS, STEPS, ROWS)
  data = {'xs': sigmoid(xs), 'ys': ys, 'probe': sigmoid(rng.normal(size=(12, pb.INPUTS)))}
  data['dgr/eps'] = rng.normal(size=(len(TASKS), STEPS, ROWS, LATENTS))
  for key in ('z_rep', 'eps_rep'):
    data[f'dgr/{key}'] = rng.normal(size=(len(TASKS), STEPS, REPLAYED, LATENTS))
  got = run(data, init, gen)
  for _ in range(5):
    stable(got, run(data, nearby(rng, init), nearby(rng, gen)))
  # Replay matters to both, Adam's state to the generator; both labels occur; nothing is dead.
  without, fresh = run(data, init, gen, replay=False), run(data, init, gen, keep=False)
  assert moved(got, without, 'params/') > 1e-2 and moved(got, without, 'gen/') > 1e-2
  assert moved(got, fresh, 'gen/') > 1e-3
  assert set(got['y_rep'][1].flatten().tolist()) == {0, 1}
  assert got['x_rep'][1].std((0, 1)).max() > 0.05
  last = {k: got[f'params/{k}'][0, -1] for k in init}
  free = pb.forward(last, got['x_rep'][1].reshape(-1, pb.INPUTS))[0].argmax(1)
  assert np.any(free != got['y_rep'][1].flatten())  # the restriction to finished tasks matters
  for k in LAYERS:
    assert np.abs(got[f'gen/{k}/b'][-1, -1] - gen[f'{k}/b']).min() > 1e-3, k
  out = pb.prefixed('init', init) | pb.prefixed('gen', gen) | {'lr': LR, 'lr_g': LR_G} | data
  out |= pb.prefixed('dgr', got)
  noise = {n: data[f'dgr/{n}'] for n in ('eps', 'z_rep', 'eps_rep')}
  every = run_other('all', {**data, **noise}, init, gen)
  assert np.array_equal(every['x_rep'], got['x_rep']) and moved(every, got, 'params/') > 1e-3
  out |= pb.prefixed('all', {k: v for k, v in every.items() if k != 'x_rep'})
  init6 = pb.init_params(rng, 6)
  xs, ys = pb.make_tasks(rng, [[0, 1], [2, 3], [4, 5]], STEPS, ROWS)
  own = {'xs': sigmoid(xs), 'ys': ys, 'eps': rng.normal(size=(3, STEPS, ROWS, LATENTS))}
  own |= {n: rng.normal(size=(3, STEPS, REPLAYED, LATENTS)) for n in ('z_rep', 'eps_rep')}
  heads = run_other('heads', {**own, 'probe': data['probe']}, init6, gen)
  assert set(np.unique(heads['y_rep'])) == {-1, 0, 1}
  out |= pb.prefixed('init6', init6) | pb.prefixed('heads', own | heads)
  pb.save('dgr', out)


if __name__ == '__main__':
  main()
