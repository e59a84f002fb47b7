"""What a learner costs: bytes of state by role, exact FLOPs, passes per step."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend import core
from jax.interpreters import partial_eval

from cl_jax.learner import learner
from cl_jax.types import Batch, Learner, Model, State, Tree


def tree_bytes(tree: Tree) -> int:
  """Bytes of all leaves, arrays or `ShapeDtypeStruct`s; typed keys count their words."""
  total = 0
  for leaf in jax.tree.leaves(tree):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      leaf = jax.eval_shape(jax.random.key_data, leaf)
    total += math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
  return total


def state_bytes(state: State, frozen: Tree = None) -> dict[str, int]:
  """Every byte that is kept between steps, by role.

  Returns:
    'frozen' (weights that are not trained, one copy for any number of runs), 'trainable', 'statistics'
    (norm layers), 'optimiser', 'method/<name>' for each method of a chain, 'loop' (key and step), 'total'.
  """
  roles = {
    'frozen': tree_bytes(frozen),
    'trainable': tree_bytes(state.params),
    'statistics': tree_bytes(state.stats),
    'optimiser': tree_bytes(state.opt),
  }
  named = isinstance(state.method, dict)
  for name, s in (state.method if named else {'method': state.method}).items():
    roles[f'method/{name}' if named else name] = tree_bytes(s)
  roles['loop'] = tree_bytes((state.key, state.step))
  return {**roles, 'total': sum(roles.values())}


def flops(f: Callable, *args) -> int:
  """Floating-point operations of the matrix products and convolutions of f(*args): 2 per multiply-add.

  Exact for programs whose loops have a static length; the body of a `while` of unknown length counts once
  (see `count`). Elementwise work is left out, as in the literature's counts.
  """
  return sum(count(used(f, *args)).values())


def used(f: Callable, *args) -> core.Jaxpr:
  """The program f(*args) without what no output needs, which the compiler leaves out as well."""
  jaxpr = jax.make_jaxpr(f)(*args).jaxpr
  return partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]


def count(jaxpr: core.Jaxpr, where: str = '', times: int = 1) -> Counter:
  """FLOPs by what the equations belong to: 'forward' and 'backward' of a scope named 'model', 'other'."""
  total: Counter = Counter()
  for eqn in jaxpr.eqns:
    stack = f'{where}/{eqn.source_info.name_stack}'
    role = 'other'
    if 'model' in stack:
      role = 'backward' if 'transpose' in stack else 'forward'
    inner = times * eqn.params.get('length', 1) if eqn.primitive.name == 'scan' else times
    branches = [count(sub, stack, inner) for sub in subjaxprs(eqn)]
    if eqn.primitive.name == 'cond':  # one branch is taken: the dearest bounds it
      total += max(branches, key=lambda c: sum(c.values()), default=Counter())
    else:
      total += sum(branches, Counter())
    if eqn.primitive.name == 'dot_general':
      (contract, _), _ = eqn.params['dimension_numbers']
      k = math.prod(shape(eqn.invars[0])[i] for i in contract)
      total[role] += 2 * times * k * math.prod(shape(eqn.outvars[0]))
    elif eqn.primitive.name == 'conv_general_dilated':
      kernel, out = shape(eqn.invars[1]), shape(eqn.outvars[0])
      spec = eqn.params['dimension_numbers'].rhs_spec  # (out features, in features, *window)
      per_output = math.prod(kernel) // kernel[spec[0]]
      total[role] += 2 * times * per_output * math.prod(out)
  return total


def shape(var: Any) -> tuple[int, ...]:
  return var.aval.shape


def subjaxprs(eqn) -> list[core.Jaxpr]:
  """The programs inside an equation's parameters."""
  found = []
  for value in eqn.params.values():
    for item in value if isinstance(value, (tuple, list)) else (value,):
      if isinstance(item, core.ClosedJaxpr):
        found.append(item.jaxpr)
      elif isinstance(item, core.Jaxpr):
        found.append(item)
  return found


def scoped(model: Model) -> Model:
  """The model with its forward pass in a named scope, so that `count` can tell its FLOPs apart."""

  def apply(*args):
    with jax.named_scope('model'):
      return model.apply(*args)

  return model._replace(apply=apply)


def passes(
  build: Callable[[Model], Learner], model: Model, state: State, batch: Batch
) -> dict[str, float]:
  """Forward and backward passes of a training step and forward passes of a prediction.

  The unit is plain training of the WHOLE model on one stream batch: 2.0 forward passes are its FLOPs twice,
  whether by a second pass or by twice the rows; 0.5 backward passes are half of its gradient's, as
  where weights are frozen. Measured on the traced programs, not declared. All 0 for a model without
  matrix products, such as cached features.

  Args:
    build: model -> Learner, as in the run: its method, optimiser and frozen weights.
    model: the model of the run.
    state: a state of the run (arrays or shapes).
    batch: a stream batch (arrays or shapes).
  """
  own, naive = build(scoped(model)), learner(scoped(model), optax.identity())
  plain = jax.eval_shape(naive.init, jax.random.key(0), batch)

  def roles(f, *args) -> Counter:
    return count(used(f, *args))

  step, unit = roles(own.step, state, batch), roles(naive.step, plain, batch)
  once, again = roles(own.predict, state, batch), roles(naive.predict, plain, batch)
  ratio = lambda a, b: round(a / b, 3) if b else 0.0  # noqa: E731
  return {
    'train_forward': ratio(step['forward'], unit['forward']),
    'train_backward': ratio(step['backward'], unit['backward']),
    'predict_forward': ratio(once['forward'], again['forward']),
  }
