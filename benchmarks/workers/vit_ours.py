"""A training step of ViT-S/16 at 224 pixels: all weights, or LoRA of rank 8 on q and v."""

from __future__ import annotations

from benchmarks.workers.serve import options, serve

GIVEN = options()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402

from cl_jax.learner import learner  # noqa: E402
from cl_jax.methods.lowrank.lora import lora  # noqa: E402
from cl_jax.models.vit import Config, vit  # noqa: E402
from cl_jax.types import Batch, Method  # noqa: E402

SMALL = Config(d=384, heads=6, ffn=1536)


def prepare(kind: str, batch: int, classes: int = 100):
  network = vit(SMALL, classes)
  key = jax.random.key(0)
  x = jax.random.normal(key, (batch, 224, 224, 3))
  labels = jnp.arange(batch, dtype=jnp.int32) % classes
  given = Batch(x, labels, jnp.ones(batch), jnp.zeros(batch, jnp.int32))
  frozen = None
  method = Method()
  if kind == 'lora':
    params, _ = jax.jit(network.init)(key, given)
    frozen = {'backbone': params['backbone']}
    method = lora(8, 16.0, r'.*/(q|v)/w')

  def build(frozen):
    return learner(network, optax.sgd(0.01), method, frozen)

  state = jax.jit(lambda k, b, f: build(f).init(k, b))(key, given, frozen)
  step = jax.jit(lambda s, b, f: build(f).step(s, b), donate_argnums=0)
  step = step.lower(state, given, frozen).compile()
  held = [state]

  def repeat(i):
    held[0], loss = jax.block_until_ready(step(held[0], given, frozen))
    return {'loss': float(loss)}

  return repeat, {'trained': sum(a.size for a in jax.tree.leaves(state.params))}


serve(lambda: prepare(**GIVEN))
