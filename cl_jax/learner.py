"""`learner` closes a model, an optimiser and a method into the four functions of a `Learner`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from cl_jax.compose import named_key
from cl_jax.linalg import weighted_mean
from cl_jax.masks import subtract
from cl_jax.micro import accumulated
from cl_jax.rng import plain, unrolled
from cl_jax.types import Batch, Forward, Learner, Method, Model, State, Transition, Tree, overlay


def learner(
  model: Model,
  tx: optax.GradientTransformation,
  method: Method = Method(),  # noqa: B008 (a NamedTuple of pure functions: immutable)
  frozen: Tree = None,
  micro_batches: int = 1,
) -> Learner:
  """A continual learner: `model` trained by `tx`, with `method` (naive fine-tuning by default).

  Build it INSIDE the traced function, so that hyperparameters may be tracers:
  `lambda hp: learner(mlp([256, 256], 10), optax.sgd(hp['lr']), ewc(hp['ewc']))`.

  Args:
    model: see `Model`.
    tx: an optax optimiser; it sees the trainable parameters only.
    method: one method, or several through `chain`.
    frozen: nested dict of weights that are not trained. They take the place of the model's own of
      the same path, are split off before the gradient is taken, and stay out of the state: one copy
      serves any number of mapped runs.
    micro_batches: parts that the gradient of a step is computed in; see `micro.accumulated`.

  Returns:
    The learner. Its functions are pure and jit, vmap and export as they are.
  """
  frozen = {} if frozen is None else frozen

  def forward(s: Tree, stats: Tree) -> Forward:
    return Forward(method.wrap(s, model.apply), frozen, stats)

  def init(key, batch: Batch) -> State:
    key = unrolled(key)
    params, stats = model.init(named_key(key, 'model'), batch)
    params = subtract(params, frozen)
    added, s = method.init(
      named_key(key, 'method'), params, batch, Forward(model.apply, frozen, stats)
    )
    params = {**params, **added}
    return State(params, stats, tx.init(params), s, plain(named_key(key, 'steps')), jnp.int32(0))

  def step(state: State, batch: Batch) -> tuple[State, jax.Array]:
    s, rows = state.method, batch.y.shape[0]
    fwd = forward(s, state.stats)
    mixed = method.mix(s, batch)

    def loss_fn(params, batch):
      out = fwd(params, batch, train=True)
      task_loss = weighted_mean(model.loss(out, batch), batch.w)
      return task_loss + method.loss(s, params, batch, out, fwd), out

    grad_fn = accumulated(jax.value_and_grad(loss_fn, has_aux=True), micro_batches)
    (loss, out), g = grad_fn(state.params, mixed)
    g, s = method.grads(s, g, state.params, mixed, grad_fn)
    updates, opt = tx.update(g, state.opt, state.params)
    params = optax.apply_updates(state.params, updates)
    own = jax.tree.map(lambda a: a[:rows], out._replace(stats={}))._replace(stats=out.stats)
    seen = Transition(state.params, g, batch, own)
    params, s = method.after(s, params, seen, jax.random.fold_in(unrolled(state.key), state.step))
    stats = overlay(state.stats, out.stats)
    return State(params, stats, opt, s, state.key, state.step + 1), loss

  def boundary(state: State, batches: Batch) -> State:
    fwd = forward(state.method, state.stats)
    key = named_key(jax.random.fold_in(unrolled(state.key), state.step), 'boundary')
    params, s = method.boundary(state.method, state.params, batches, fwd, key)
    return state._replace(params=params, method=s)

  def predict(state: State, batch: Batch) -> jax.Array:
    return forward(state.method, state.stats)(state.params, batch).logits

  found = model.measure
  if found is None:
    return Learner(init, step, boundary, predict, method.needs)

  def measure(state: State, batch: Batch) -> jax.Array:
    return found(forward(state.method, state.stats)(state.params, batch), batch)

  return Learner(init, step, boundary, predict, method.needs, measure)
