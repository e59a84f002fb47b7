"""Continual learning in JAX: methods are pure hooks, a whole run is one compiled program.

The words are in `cl_jax.types`; methods are in `cl_jax.methods`, models in `cl_jax.models`, data and
task sequences in `cl_jax.streams`, each imported by name. This module needs jax, flax and optax only.
"""

from __future__ import annotations

from cl_jax.compose import chain, gated
from cl_jax.errors import Fault, UserError
from cl_jax.learner import learner
from cl_jax.loop import Progress, Record, confusion, evaluate, host_feed, run, run_chunks
from cl_jax.types import (
  Batch,
  Forward,
  Learner,
  Method,
  Model,
  Out,
  State,
  Stream,
  Transition,
  no_tap,
  overlay,
)

__version__ = '0.1.0'

__all__ = [
  'Batch',
  'Fault',
  'Forward',
  'Learner',
  'Method',
  'Model',
  'Out',
  'Progress',
  'Record',
  'State',
  'Stream',
  'Transition',
  'UserError',
  'chain',
  'confusion',
  'evaluate',
  'gated',
  'host_feed',
  'learner',
  'no_tap',
  'overlay',
  'run',
  'run_chunks',
]
