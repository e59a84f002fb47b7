"""The multilayer perceptron against torch: the same weights, outputs, losses and gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cl_jax.models.mlp import mlp
from cl_jax.types import Batch

torch = pytest.importorskip('torch', reason='parity with torch needs torch')


def test_mlp_equals_torch():
  model = mlp((16, 12), 7, init='torch')
  x = np.random.default_rng(0).random((9, 5, 5), np.float32)
  y = np.arange(9, dtype=np.int32) % 7
  batch = Batch(jnp.asarray(x), jnp.asarray(y), jnp.ones(9), jnp.zeros(9, jnp.int32))
  params, _ = model.init(jax.random.key(0), batch)

  lines = []
  for name in ('l0', 'l1', 'head'):
    line = torch.nn.Linear(*params[name]['w'].shape)
    with torch.no_grad():
      line.weight.copy_(torch.tensor(np.asarray(params[name]['w']).T))
      line.bias.copy_(torch.tensor(np.asarray(params[name]['b'])))
    lines.append(line)
  l0, l1, head = lines
  net = torch.nn.Sequential(torch.nn.Flatten(), l0, torch.nn.ReLU(), l1, torch.nn.ReLU(), head)
  logits = net(torch.tensor(x))
  losses = torch.nn.functional.cross_entropy(
    logits, torch.tensor(y, dtype=torch.long), reduction='none'
  )
  losses.mean().backward()

  def loss(params):
    out = model.apply(params, batch)
    losses = model.loss(out, batch)
    return losses.mean(), (out, losses)

  grads, (out, got) = jax.jit(jax.grad(loss, has_aux=True))(params)
  np.testing.assert_allclose(out.logits, logits.detach().numpy(), atol=1e-5)
  np.testing.assert_allclose(got, losses.detach().numpy(), atol=1e-5)
  for name, line in zip(('l0', 'l1', 'head'), lines, strict=True):
    np.testing.assert_allclose(grads[name]['w'], line.weight.grad.numpy().T, atol=1e-5)
    np.testing.assert_allclose(grads[name]['b'], line.bias.grad.numpy(), atol=1e-5)
