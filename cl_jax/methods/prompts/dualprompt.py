"""DualPrompt."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cl_jax import prompts
from cl_jax.linalg import weighted_mean
from cl_jax.types import Method


def dualprompt(
  tasks: int,
  general: int = 5,
  expert: int = 20,
  coef: float = 1.0,
  general_layers: tuple[int, ...] = (0, 1),
  expert_layers: tuple[int, ...] = (2, 3, 4),
) -> Method:
  """Prefixes for all tasks in the lower layers, and those of one task in the layers above.

  Wang et al., ECCV 2022, eq. 2-6; official code google-research/l2p. G [layers, 2, general, d] are trained in
  every task; E [tasks, layers, 2, expert, d] (keys at index 0, values at 1) and a key K [tasks, D] in
  their own. With q the features of the frozen network without prompts, training in task t has

  L = L_task + coef * mean_x (1 - cos(q(x), K_t))

  and at test each input takes the prefixes of the task with the largest cos(q, K). Prefixes come after the
  projections. What belongs to other tasks keeps its value bit for bit, whatever the optimiser remembers.
  All start at U(0, 0.01). Freeze the backbone and let the current task's classes compete (`current_head`).

  Deviations: only tasks in which a step has been taken compete at test (official: all keys, also those that
  are not trained yet); a task's prefixes are not initialised with those of the task before.

  Args:
    tasks: slots; later tasks go on with the last one.
    general, expert: rows of a prefix.
    coef: lambda.
    general_layers, expert_layers: where the two kinds are.

  Raises:
    UserError: the network is no transformer, or lacks one of these layers.

  Needs the boundary. State: 8 bytes (parameters: 2 d (layers general + T layers expert) + T D for T tasks).
  One more forward pass.
  """

  def init(key, params, batch, fwd):
    net = prompts.network('dualprompt', params, batch, fwd)
    prompts.check_layers('dualprompt: general_layers', general_layers, net)
    prompts.check_layers('dualprompt: expert_layers', expert_layers, net)
    keys = jax.random.split(key, 3)
    added = {
      'general': prompts.uniform(keys[0], (len(general_layers), 2, general, net.key)),
      'expert': prompts.uniform(keys[1], (tasks, len(expert_layers), 2, expert, net.key)),
      'keys': prompts.uniform(keys[2], (tasks, net.features)),
    }
    return {'dualprompt': added}, prompts.first_task()

  def wrap(s, apply):
    def prefixed(variables, batch, tap, train):
      own = variables['dualprompt']
      cosine = prompts.unit(prompts.query(apply, variables, batch)) @ prompts.unit(own['keys']).T
      if train:
        rows = own['expert'][s.now]  # one for the batch: [layers, 2, expert, d]
      else:
        known = jnp.arange(tasks) < jnp.maximum(s.begun, 1)
        task = jnp.argmax(jnp.where(known, cosine, -jnp.inf), 1)
        rows = jnp.moveaxis(own['expert'][task], 0, 2)  # [layers, 2, B, expert, d]
      shared = own['general']
      tap = prompts.before_keys(tap, shared[:, 0], shared[:, 1], general_layers)
      tap = prompts.before_keys(tap, rows[:, 0], rows[:, 1], expert_layers)
      out = apply(variables, batch, tap, train)
      return out._replace(aux={**out.aux, 'dualprompt': cosine[:, s.now]})

    return prefixed

  def loss(s, params, batch, out, fwd):
    return coef * weighted_mean(1 - out.aux['dualprompt'], batch.w)

  def after(s, params, step, key):
    mine, old, new = jnp.arange(tasks) == s.now, step.params['dualprompt'], params['dualprompt']
    kept = {n: prompts.keep_others(old[n], new[n], mine) for n in ('expert', 'keys')}
    return {**params, 'dualprompt': {**new, **kept}}, prompts.step_taken(s)

  def boundary(s, params, batches, fwd, key):
    return params, prompts.next_task(s, tasks)

  return Method(
    init=init, wrap=wrap, loss=loss, after=after, boundary=boundary, needs=('boundary',)
  )
