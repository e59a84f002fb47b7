"""Encoder-based lifelong learning."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from cl_jax import distillation
from cl_jax.errors import UserError
from cl_jax.linalg import cross_entropy, weighted_mean
from cl_jax.methods.heads.task_head import MINUS_INF
from cl_jax.types import Array, Method, Tree


class EBLLState(NamedTuple):
  past: distillation.Former
  encoders: Tree  # {'w': f32[T - 1, D, K], 'b': f32[T - 1, K]} of finished tasks


def ebll(
  tasks: int,
  coef: float = 1.0,
  beta: float = 1.0,
  code: int = 100,
  alpha: float = 0.1,
  epochs: int = 50,
  lr: float = 0.01,
  temperature: float = 2.0,
  outputs: str = 'all',
  task_classes: tuple[tuple[int, ...], ...] = (),
) -> Method:
  """LwF, and features that stay where the codes of the finished tasks' autoencoders see them.

  L = L_task + coef * L_LwF + beta * sum over finished tasks k of
  mean over rows and code units of (code_k(F) - code_k(F*))^2, with code_k(F) = sigmoid(F W_k + b_k)

  F are the features, F* those of the network of the last boundary. After a task its own autoencoder, an
  encoder and a linear decoder r, is trained on that network: alpha * mean (r(F) - F)^2 + L_task(r(F)).

  Rannen Triki, Aljundi, Blaschko & Tuytelaars, ICCV 2017, eq. 6-8, with the means of the survey's code
  (Mattdl/CLsurvey). Deviations: the features are the input of the output layer (there: of the last
  convolution); the task loss of an autoencoder runs over the classes of its task; Adam, not Adadelta;
  a fixed number of epochs over the examples in the stream's order.

  Args:
    tasks: how many there will be.
    coef: of the distillation. The survey begins at 10.
    beta: of the codes. The survey begins at 1.
    code: K, units of a code. 100 or 300 in the survey.
    alpha: of the reconstruction. 0.1 or 0.01 in the survey.
    epochs: of an autoencoder.
    lr: of an autoencoder.
    temperature, outputs, task_classes: see `cl_jax.distillation.distiller`.

  Needs the boundary. State: 1 x parameters and norm statistics, 4 (T - 1) (D + 1) K bytes for T tasks, 2
  bytes per class, 4 bytes. One more forward pass per step.
  """
  distil = distillation.distiller('ebll', outputs, task_classes, temperature)
  tx, kept = optax.adam(lr), max(tasks - 1, 1)

  def init(key, params, batch, fwd):
    if set(params.get('head', {})) | set(fwd.frozen.get('head', {})) != {'w', 'b'}:
      raise UserError('ebll needs an output layer "head" of a weight w and a bias b')
    d = jax.eval_shape(fwd, params, batch).features.shape[-1]
    encoders = {'w': jnp.zeros((kept, d, code)), 'b': jnp.zeros((kept, code))}
    return {}, EBLLState(distillation.begin(params, batch, fwd), encoders)

  def codes(encoders, features):
    """f32[T - 1, B, K]."""
    inner = jnp.einsum('bd,tdk->tbk', features, encoders['w'])
    return jax.nn.sigmoid(inner + encoders['b'][:, None])

  def loss(s, params, batch, out, fwd):
    old = jax.lax.stop_gradient(fwd(s.past.teacher, batch))
    moved = codes(s.encoders, out.features) - codes(s.encoders, old.features)
    there = jnp.arange(kept) < s.past.tasks
    each = there @ jnp.mean(jnp.square(moved), axis=-1)
    kd = (s.past.tasks > 0) * distil.loss(s.past, old, out)
    return weighted_mean(coef * kd + beta * each, batch.w)

  def after(s, params, step, key):
    return params, s._replace(past=distillation.meet(s.past, step.batch))

  def boundary(s, params, batches, fwd, key):
    features = jax.lax.map(lambda b: fwd(params, b).features, batches)
    output = {**fwd.frozen.get('head', {}), **params.get('head', {})}
    start = autoencoder(key, features.shape[-1], code)
    encoder = fit(start, features, batches, output)['encoder']
    at = jnp.minimum(s.past.tasks, kept - 1)
    room = s.past.tasks < kept
    put = lambda kept, new: kept.at[at].set(jnp.where(room, new, kept[at]))  # noqa: E731
    return params, EBLLState(
      distillation.settle(s.past, params, fwd), jax.tree.map(put, s.encoders, encoder)
    )

  def fit(start, features, batches, output):
    """The autoencoder of the task's features f32[S, B, D] after `epochs` passes over them."""
    own = jnp.zeros(output['b'].shape, bool).at[batches.y].max(batches.w > 0)

    def total(p, f, batch):
      r = decoded(p, f)
      logits = jnp.where(own, r @ output['w'] + output['b'], MINUS_INF)
      each = alpha * jnp.mean(jnp.square(r - f), axis=-1) + cross_entropy(logits, batch.y)
      return weighted_mean(each, batch.w)

    def step(carry, at):
      p, opt = carry
      f, batch = at
      updates, opt = tx.update(jax.grad(total)(p, f, batch), opt, p)
      moved = optax.apply_updates(p, updates), opt
      some = (batch.w > 0).any()  # a batch of padding alone is no step
      return jax.tree.map(lambda a, b: jnp.where(some, a, b), moved, carry), None

    def epoch(i, carry):
      return jax.lax.scan(step, carry, (features, batches))[0]

    return jax.lax.fori_loop(0, epochs, epoch, (start, tx.init(start)))[0]

  return Method(
    init=init,
    wrap=distil.wrap,
    loss=loss,
    after=after,
    boundary=boundary,
    needs=('boundary',),
  )


def autoencoder(key: Array, features: int, code: int) -> Tree:
  """{'encoder', 'decoder'}, each {'w', 'b'}; uniform in +-1/sqrt(fan-in)."""
  keys = iter(jax.random.split(key, 4))

  def layer(n_in, n_out):
    bound = n_in**-0.5
    draw = lambda shape: jax.random.uniform(next(keys), shape, minval=-bound, maxval=bound)  # noqa: E731
    return {'w': draw((n_in, n_out)), 'b': draw((n_out,))}

  return {'encoder': layer(features, code), 'decoder': layer(code, features)}


def decoded(p: Tree, features: Array) -> Array:
  """The reconstruction, of the shape of the features."""
  hidden = jax.nn.sigmoid(features @ p['encoder']['w'] + p['encoder']['b'])
  return hidden @ p['decoder']['w'] + p['decoder']['b']
