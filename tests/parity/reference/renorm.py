"""Reference for batch renormalisation: golden/renorm.npz.

Ioffe 2017, Algorithm 1, one layer on x [rows, H, W, C]; all statistics are per channel, over rows and
pixels. weight [rows] is 1 or 0: rows of weight 0 take no part in the statistics, but are normalised
with them like the others. n = (rows of weight 1) H W. A training call:
  mu_B = sum of x / n, var_B = sum of (x - mu_B)^2 / n, both over rows of weight 1
  sigma_B = sqrt(var_B + eps), sigma = sqrt(v + eps), mu and v the running ones BEFORE the call
  r = clip(sigma_B / sigma, 1 / rmax, rmax), d = clip((mu_B - mu) / sigma, -dmax, dmax)
  y = ((x - mu_B) / sigma_B r + d) scale + bias
  then mu <- mu + m (mu_B - mu), v <- v + m (n / (n - 1) var_B - v)
Inference: y = (x - mu) / sqrt(v + eps) scale + bias; changes no statistics.
Gradients of the sum of y g, r and d constants, mu_B and var_B NOT; rows of weight 0 have a g too, which
reaches scale, bias, their own x and, through mu_B and sigma_B, the x of the other rows. With
e = g scale r / sigma_B and x^ = (x - mu_B) / sigma_B:
  grad_x = e - weight / n (sum of e + x^ sum of (e x^)), sums over ALL rows
  grad_scale = sum of g (x^ r + d), grad_bias = sum of g
The paper keeps a running sigma, moved by m (sigma_B - sigma), eps and the biased variance inside of it;
here it is the unbiased variance as in PyTorch's batch norm, so that r = 1 and d = 0 give batch norm.
vlomonaco/ar1-pytorch moves sigma as the paper does and lets rmax and dmax grow with the calls.

Four calls in a row. rmax 1.25 and dmax 0.5 are clipped to at some channels and not at others in every
call, r at both ends and d at both signs; nothing is within 1e-3 of where clipping starts.
Variants:
  plain      weight 1 everywhere
  weighted   row 4 of call 0, rows 1 and 3 of call 2, row 0 of call 3 have weight 0

Keys, V in {plain, weighted}. Inputs:
  scale, bias, mean, var [4]: mean and var are mu and v before the first call
  rmax, dmax, momentum (m), eps, probe [3,3,3,4]
  V/x, V/g [4,5,3,3,4]       by call; V/weight [4,5]
Outputs:
  V/y [4,5,3,3,4]
  V/r, V/d [4,4]             by call and channel
  V/grad_x [4,5,3,3,4], V/grad_scale, V/grad_bias [4,4]   of the sum of y g, one call each
  V/mean, V/var [4,4]        mu and v after each call
  V/inference [4,3,3,3,4]    of the probe after each call
"""

from __future__ import annotations

import frozen
import numpy as np
import problem as pb

CALLS, ROWS, SIDE, CHANNELS = 4, 5, 3, 4
RMAX, DMAX, MOMENTUM, EPS = 1.25, 0.5, 0.1, 1e-5
AXES = (0, 1, 2)
LEFT_OUT = {'plain': [], 'weighted': [(0, 4), (2, 1), (2, 3), (3, 0)]}


def clip(value: pb.Array, low: float, high: float) -> pb.Array:
  for end in (low, high):
    assert np.abs(value - end).min() > 1e-3, value
  return np.clip(value, low, high)


def train(
  layer: dict, mu: pb.Array, v: pb.Array, x: pb.Array, g: pb.Array, weight: pb.Array
) -> dict:
  """One call: y, r, d, the three gradients, and mu and v after it."""
  w = np.broadcast_to(weight[:, None, None, None], x.shape)
  n = weight.sum() * SIDE * SIDE
  mu_b = (w * x).sum(AXES) / n
  var_b = (w * (x - mu_b) ** 2).sum(AXES) / n
  sigma_b, sigma = np.sqrt(var_b + EPS), np.sqrt(v + EPS)
  r = clip(sigma_b / sigma, 1 / RMAX, RMAX)
  d = clip((mu_b - mu) / sigma, -DMAX, DMAX)
  x_hat = (x - mu_b) / sigma_b
  e = g * layer['scale'] * r / sigma_b
  return {
    'y': (x_hat * r + d) * layer['scale'] + layer['bias'],
    'r': r,
    'd': d,
    'grad_x': e - w / n * (e.sum(AXES) + x_hat * (e * x_hat).sum(AXES)),
    'grad_scale': (g * (x_hat * r + d)).sum(AXES),
    'grad_bias': g.sum(AXES),
    'mean': mu + MOMENTUM * (mu_b - mu),
    'var': v + MOMENTUM * (n / (n - 1) * var_b - v),
  }


def infer(layer: dict, mu: pb.Array, v: pb.Array, x: pb.Array) -> pb.Array:
  return (x - mu) / np.sqrt(v + EPS) * layer['scale'] + layer['bias']


def run(layer: dict, inputs: dict) -> dict:
  mu, v = layer['mean'], layer['var']
  calls = []
  for x, g, weight in zip(inputs['x'], inputs['g'], inputs['weight'], strict=True):
    call = train(layer, mu, v, x, g, weight)
    mu, v = call['mean'], call['var']
    calls.append(call | {'inference': infer(layer, mu, v, layer['probe'])})
  return pb.stack(calls)


def main() -> None:
  rng = np.random.default_rng(1853)
  layer = {
    'scale': rng.uniform(0.4, 0.9, CHANNELS),
    'bias': rng.normal(size=CHANNELS) * 0.3,
    'mean': rng.normal(size=CHANNELS) * 0.1,
    'var': rng.uniform(0.8, 1.2, CHANNELS),
    'probe': rng.normal(size=(3, SIDE, SIDE, CHANNELS)),
  }
  out = layer | {'rmax': RMAX, 'dmax': DMAX, 'momentum': MOMENTUM, 'eps': EPS}
  # Channel 0 has a large spread, channel 1 a small one and a high mean, channel 2 a low mean.
  centre, spread = np.array([0.15, 1.4, -1.3, -0.1]), np.array([2.2, 0.5, 1.05, 0.95])
  for variant, left_out in LEFT_OUT.items():
    x, g = rng.normal(size=(2, CALLS, ROWS, SIDE, SIDE, CHANNELS))
    inputs = {'x': centre + spread * x, 'g': 0.3 * g, 'weight': np.ones((CALLS, ROWS))}
    for call, row in left_out:
      inputs['weight'][call, row] = 0.0
    got = run(layer, inputs)
    for _ in range(5):
      near = frozen.nearby(rng, {k: inputs[k] for k in ('x', 'g')})
      frozen.stable(got, run(frozen.nearby(rng, layer), inputs | near))
    for value, low, high in ((got['r'], 1 / RMAX, RMAX), (got['d'], -DMAX, DMAX)):
      inside = (low < value) & (value < high)
      assert np.all(inside.any(1)) and np.all((value == low).any(1) & (value == high).any(1))
    # The statistics and a row of weight 0 reach the gradients of other rows; r and d evolve.
    free = inputs['g'] * (layer['scale'] * got['r'])[:, None, None, None]
    assert np.abs(got['grad_x'] - free).max() > 0.1
    assert np.abs(np.diff(got['mean'], axis=0)).min(1).max() > 1e-3
    if left_out:
      others = run(layer, inputs | {'weight': np.ones((CALLS, ROWS))})
      assert np.abs(others['y'] - got['y']).max((1, 2, 3, 4))[0] > 1e-2
    out |= pb.prefixed(variant, inputs | got)
  pb.save('renorm', out)


if __name__ == '__main__':
  main()
