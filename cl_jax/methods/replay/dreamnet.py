"""Dream Net: data-free pseudo-rehearsal by reinjection."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cl_jax import distillation
from cl_jax.dreams import scaled, stored, unlabelled
from cl_jax.errors import UserError
from cl_jax.linalg import weighted_mean
from cl_jax.types import Array, Method, Tree


class DreamNetState(NamedTuple):
  past: distillation.Former  # the memory net, decoder included
  noise: Array  # [draw // rounds, ...], what the next step's dreams begin from


def dreamnet(
  draw: int = 100,
  rounds: int = 5,
  coef: float = 1.0,
  auto: float = 100.0,
  hidden: tuple[int, ...] = (256,),
  density: float = 1.0,
  outputs: str = 'all',
  task_classes: tuple[tuple[int, ...], ...] = (),
) -> Method:
  """Rehearses what the network of the last boundary makes of noise that is fed back into it.

  The network is auto-hetero-associative: a decoder on its features reconstructs the input. After the first
  boundary the network of before, the memory net M, dreams: x_0 is noise, x_{r+1} its reconstruction of x_r.
  The dreams x_1 .. x_R (the noise itself is left out) are rehearsed with what M says of them:

  L = L_task + auto * MSE(recon(x), x)
  + coef * (CE(softmax z_M(x_r), softmax z(x_r)) + auto * MSE(recon(x_r), recon_M(x_r)))

  No data are kept, and nothing is trained beside the network. Mainsant, Solinas, Reyboz, Godin & Mermillod,
  "Dream Net", 2021; Solinas, Galiez, Cohendet, Rousset, Reyboz & Mermillod 2021 (reinjection sampling);
  Ans & Rousset 1997 (self-refreshing memory). No official code. Deviations: every training step dreams its
  own rows, instead of a set that is dreamt once per task; with density < 1 each row of noise has a share of
  its inputs, drawn from [0, density], at 1 and the others at 0, which is nearer to images that are mostly
  empty; inputs must lie in [0, 1] or be uint8, which dreams are rounded to.

  Args:
    draw: dreams per step; a multiple of `rounds`.
    rounds: R, reinjections of each noise row. 5 in the paper.
    coef: weight of the dreams.
    auto: weight of the reconstruction; its error is the mean over inputs.
    hidden: widths of the decoder's layers between the features and the inputs.
    density: 1 for noise uniform on [0, 1]; less for sparse noise.
    outputs, task_classes: which outputs of M are rehearsed; see `cl_jax.distillation.distiller`.

  Needs the boundary. State: 1 x parameters and norm statistics, draw / rounds inputs as stored, 2 bytes per
  class, 4 bytes (and parameters: the decoder). On `draw` rows per step a forward pass to dream them, one to
  judge them, and a forward and backward pass to rehearse them.
  """
  if draw < rounds or draw % rounds:
    raise ValueError(f'dreamnet draw={draw} must be a multiple of rounds={rounds}')
  distil = distillation.distiller('dreamnet', outputs, task_classes, 1.0)

  def init(key, params, batch, fwd):
    if not hasattr(batch.x, 'shape'):
      raise UserError('dreamnet reconstructs images or features; this stream has text')
    k_decoder, k_noise = jax.random.split(key)
    features = jax.eval_shape(fwd, params, batch).features.shape[-1]
    new = {'decoder': decoder(k_decoder, (features, *hidden, math.prod(batch.x.shape[1:])))}
    noise = static(k_noise, batch.x)
    return new, DreamNetState(distillation.begin({**params, **new}, batch, fwd), noise)

  def static(key, x):
    """Noise like the inputs x."""
    k_noise, k_share = jax.random.split(key)
    flat = jax.random.uniform(k_noise, (draw // rounds, math.prod(x.shape[1:])))
    share = density * jax.random.uniform(k_share, (len(flat), 1))
    return stored(jnp.where(density < 1, (flat < share).astype(flat.dtype), flat), x)

  def dreams(s, fwd):
    """x_1 .. x_R one after the other."""

    def again(x, _):
      out = fwd(s.past.teacher, unlabelled(x))
      x = stored(reconstruction(s.past.teacher, out.features), x)
      return x, x

    xs = jax.lax.scan(again, s.noise, None, length=rounds)[1]
    return unlabelled(xs.reshape(draw, *xs.shape[2:]))

  def loss(s, params, batch, out, fwd):
    own = square(reconstruction(params, out.features), scaled(batch.x))
    rows = jax.lax.stop_gradient(dreams(s, fwd))
    then, now = jax.lax.stop_gradient(fwd(s.past.teacher, rows)), fwd(params, rows, train=True)
    target = jax.lax.stop_gradient(reconstruction(s.past.teacher, then.features))
    told = distil.loss(s.past, then, now)
    again = told + auto * square(reconstruction(params, now.features), target)
    return auto * weighted_mean(own, batch.w) + coef * (s.past.tasks > 0) * jnp.mean(again)

  def after(s, params, step, key):
    past = distillation.meet(s.past, step.batch)
    return params, DreamNetState(past, static(key, step.batch.x))

  def boundary(s, params, batches, fwd, key):
    return params, s._replace(past=distillation.settle(s.past, params, fwd))

  return Method(
    init=init,
    wrap=distil.wrap,
    loss=loss,
    after=after,
    boundary=boundary,
    needs=('boundary',),
  )


def decoder(key: Array, sizes: tuple[int, ...]) -> Tree:
  """{'d0': {'w', 'b'}, ...}; weights N(0, 2/fan_in), biases 0."""
  keys = jax.random.split(key, len(sizes) - 1)
  return {
    f'd{i}': {'w': (2 / a) ** 0.5 * jax.random.normal(k, (a, b)), 'b': jnp.zeros(b)}
    for i, (k, a, b) in enumerate(zip(keys, sizes[:-1], sizes[1:], strict=True))
  }


def reconstruction(params: Tree, features: Array) -> Array:
  """f32[B, inputs] in [0, 1]: ReLU layers, then a sigmoid."""
  p, h = params['decoder'], features
  for i in range(len(p)):
    h = (jax.nn.relu(h) if i else h) @ p[f'd{i}']['w'] + p[f'd{i}']['b']
  return jax.nn.sigmoid(h)


def square(a: Array, b: Array) -> Array:
  """f32[B]: the mean over the inputs of (a - b)^2."""
  return jnp.mean(jnp.square(a - b), axis=-1)
