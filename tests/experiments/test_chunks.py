"""Chunks of a run share one compiled program."""

from __future__ import annotations

import jax
import optax

from cl_jax.learner import learner
from cl_jax.loop import run_chunks
from cl_jax.methods.replay.er import er
from cl_jax.models.mlp import mlp


def test_no_chunk_compiles_the_program_again(toy_stream):
  """A weak type in the state of one chunk is another program for the next."""
  build = lambda hp, weights: learner(mlp((8,), 6), optax.adam(hp), er(20, 4))  # noqa: E731
  states = [
    p.state for p in run_chunks(build, jax.numpy.float32(0.01), jax.random.key(0), toy_stream)
  ]
  for state in states:
    for leaf in jax.tree.leaves(state._replace(key=0)):
      assert not getattr(leaf, 'weak_type', False)
  assert len({str(jax.tree.map(jax.typeof, s)) for s in states}) == 1
