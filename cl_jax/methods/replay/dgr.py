"""Deep generative replay."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from cl_jax import distillation
from cl_jax.dreams import scaled, stored, unlabelled
from cl_jax.errors import UserError
from cl_jax.linalg import cross_entropy, weighted_mean
from cl_jax.methods.heads.task_head import MINUS_INF
from cl_jax.types import Array, Method, Tree


class DGRState(NamedTuple):
  generator: Tree
  opt: Tree  # of the generator
  former: Tree  # the generator at the last boundary
  past: distillation.Former  # the network at the last boundary
  replay: Array  # [draw, ...]: inputs of the next step, from the former generator


def dgr(
  draw: int = 128,
  hidden: tuple[int, ...] = (400, 400),
  latent: int = 100,
  lr: float = 1e-3,
  outputs: str = 'all',
  task_classes: tuple[tuple[int, ...], ...] = (),
) -> Method:
  """Rehearses what a generator dreams, labelled by the network of the last boundary: no data are kept.

  In the t-th task L = 1/t CE(new) + (1 - 1/t) CE(x', y'), with x' from the generator of the last boundary and
  y' the class that the network of the last boundary gives it. The generator is a variational autoencoder
  (Bernoulli outputs, Gaussian latent), trained by Adam beside the network on the same mixture.

  Shin et al., NeurIPS 2017; weights and autoencoder as van de Ven & Tolias 2018, 2019 (official code
  GMvandeVen/continual-learning, hard targets). Deviations: the generator's loss is divided by the number
  of inputs as there, which Adam does not see; inputs must lie in [0, 1] or be uint8, which dreams are
  rounded to. The loss of the run must be the cross-entropy.

  Args:
    draw: dreams per step; the size of the stream's batch in the papers.
    hidden: widths of the encoder's layers; the decoder's are the reverse.
    latent: size of the latent code.
    lr: of the generator.
    outputs: which outputs label a dream. 'all'; 'seen', the classes of finished tasks (class-incremental);
      'heads', every finished task's own outputs, the mean over them (task-incremental: a `task_head` must
      come AFTER this method in the chain).
    task_classes: the labels of each task, for 'heads'.

  Needs the boundary. State: 4 x generator, 1 x parameters and norm statistics, draw inputs as stored, 2 bytes
  per class, 8 bytes. One more forward pass of the network of before and one forward and backward pass on
  `draw` rows per step, beside the generator's.
  """
  if outputs == 'old':
    raise ValueError("dgr outputs 'old': one of ('all', 'seen', 'heads')")
  raw = distillation.distiller('dgr', outputs, task_classes).wrap
  tx = optax.adam(lr)

  def init(key, params, batch, fwd):
    if not hasattr(batch.x, 'shape'):
      raise UserError('dgr generates images or features; this stream has text')
    generator = vae(key, math.prod(batch.x.shape[1:]), hidden, latent)
    replay = jnp.zeros((draw, *batch.x.shape[1:]), batch.x.dtype)
    past = distillation.begin(params, batch, fwd)
    return {}, DGRState(generator, tx.init(generator), generator, past, replay)

  def share(s):
    """1 - 1/t in the t-th task."""
    done = s.past.tasks.astype(float)
    return done / (done + 1)

  def loss(s, params, batch, out, fwd):
    dreams = unlabelled(s.replay)
    then = jax.lax.stop_gradient(fwd(s.past.teacher, dreams))
    now = fwd(params, dreams, train=True)
    if outputs == 'heads':
      old, new = then.aux['dgr'], now.aux['dgr']
      each = [
        (s.past.tasks > t) * cross_entropy(new[:, list(c)], old[:, list(c)].argmax(-1))
        for t, c in enumerate(task_classes)
      ]
      replayed = jnp.mean(sum(each, jnp.zeros(()))) / jnp.maximum(s.past.tasks, 1)
    else:
      known = jnp.where(s.past.seen, then.logits, MINUS_INF) if outputs == 'seen' else then.logits
      replayed = jnp.mean(cross_entropy(now.logits, known.argmax(-1)))
    return share(s) * (replayed - weighted_mean(cross_entropy(out.logits, batch.y), batch.w))

  def after(s, params, step, key):
    k_new, k_old, k_next = jax.random.split(key, 3)
    x, dreams, w = scaled(step.batch.x), scaled(s.replay), step.batch.w

    def total(generator):
      new = weighted_mean(elbo(generator, x, noise(k_new, (len(x), latent))), w)
      old = jnp.mean(elbo(generator, dreams, noise(k_old, (draw, latent))))
      return (1 - share(s)) * new + share(s) * old

    updates, opt = tx.update(jax.grad(total)(s.generator), s.opt, s.generator)
    generator = optax.apply_updates(s.generator, updates)
    replay = dreamt(s.former, noise(k_next, (draw, latent)), s.replay)
    past = distillation.meet(s.past, step.batch)
    return params, s._replace(generator=generator, opt=opt, replay=replay, past=past)

  def boundary(s, params, batches, fwd, key):
    replay = dreamt(s.generator, noise(key, (draw, latent)), s.replay)
    past = distillation.settle(s.past, params, fwd)
    return params, s._replace(former=s.generator, past=past, replay=replay)

  return Method(init=init, wrap=raw, loss=loss, after=after, boundary=boundary, needs=('boundary',))


def noise(key: Array, shape: tuple[int, ...]) -> Array:
  return jax.random.normal(key, shape)


def vae(key: Array, inputs: int, hidden: tuple[int, ...], latent: int) -> Tree:
  """Weights {layer: {'w', 'b'}}; uniform in +-1/sqrt(fan-in), as PyTorch begins."""
  sizes, back = (inputs, *hidden), (latent, *reversed(hidden))
  layers = {f'e{i}': (a, b) for i, (a, b) in enumerate(zip(sizes, sizes[1:], strict=False))}
  layers |= {'mu': (sizes[-1], latent), 'logvar': (sizes[-1], latent)}
  layers |= {f'd{i}': (a, b) for i, (a, b) in enumerate(zip(back, back[1:], strict=False))}
  layers['out'] = (back[-1], inputs)
  made = {}
  for k, (name, (n_in, n_out)) in zip(
    jax.random.split(key, len(layers)), layers.items(), strict=True
  ):
    k_w, k_b = jax.random.split(k)
    bound = n_in**-0.5
    made[name] = {
      'w': jax.random.uniform(k_w, (n_in, n_out), minval=-bound, maxval=bound),
      'b': jax.random.uniform(k_b, (n_out,), minval=-bound, maxval=bound),
    }
  return made


def dense(p: Tree, h: Array) -> Array:
  return h @ p['w'] + p['b']


def stack(generator: Tree, prefix: str, h: Array) -> Array:
  """The layers prefix0, prefix1, ... with ReLU."""
  for i in range(sum(name[0] == prefix and name[1:].isdigit() for name in generator)):
    h = jax.nn.relu(dense(generator[f'{prefix}{i}'], h))
  return h


def decoded(generator: Tree, z: Array) -> Array:
  """f32[B, inputs]: logits of the inputs."""
  return dense(generator['out'], stack(generator, 'd', z))


def elbo(generator: Tree, x: Array, eps: Array) -> Array:
  """f32[B]: the negative evidence lower bound of flat inputs in [0, 1], divided by their number."""
  h = stack(generator, 'e', x)
  mu, logvar = dense(generator['mu'], h), dense(generator['logvar'], h)
  logits = decoded(generator, mu + jnp.exp(logvar / 2) * eps)
  reconstruction = jnp.sum(optax.sigmoid_binary_cross_entropy(logits, x), axis=-1)
  kl = -0.5 * jnp.sum(1 + logvar - jnp.square(mu) - jnp.exp(logvar), axis=-1)
  return (reconstruction + kl) / x.shape[-1]


def dreamt(generator: Tree, z: Array, like: Array) -> Array:
  """Inputs of the dtype and shape of `like`."""
  return stored(jax.nn.sigmoid(decoded(generator, z)), like)
