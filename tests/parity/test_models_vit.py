"""The Vision Transformer against transformers: random weights, outputs and gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cl_jax.errors import UserError
from cl_jax.models import vit

torch = pytest.importorskip('torch', reason='parity with transformers needs torch')
transformers = pytest.importorskip('transformers', reason='parity needs transformers')


def test_tiny_vit_equals_transformers(tmp_path):
  torch.manual_seed(0)
  config = transformers.ViTConfig(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=48,
    image_size=12,
    patch_size=4,
  )
  theirs = transformers.ViTModel(config, add_pooling_layer=False).eval()
  with torch.no_grad():  # norms and biases begin at 1 and 0, which would hide an exchange of them
    for p in theirs.parameters():
      p.add_(0.1 * torch.randn_like(p))
  theirs.save_pretrained(tmp_path)
  shape, weights = vit.load(tmp_path)
  assert shape == vit.Config(12, 4, 3, 32, 3, 4, 48, 1e-12)

  rng = np.random.default_rng(0)
  x = rng.random((5, 12, 12, 3), np.float32)
  target = rng.standard_normal((5, 10, 32)).astype(np.float32)
  hidden = theirs(torch.tensor(x.transpose(0, 3, 1, 2))).last_hidden_state
  (hidden * torch.tensor(target)).sum().backward()

  def loss(p):
    h = vit.encode(shape, p, jnp.asarray(x))
    return (h * target).sum(), h

  grads, h = jax.jit(jax.grad(loss, has_aux=True))(weights)
  np.testing.assert_allclose(h, hidden.detach().numpy(), atol=1e-5)
  # Their gradients, carried through a directory of their own, come back as a tree like ours.
  with torch.no_grad():
    for p in theirs.parameters():
      p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
  theirs.save_pretrained(tmp_path)
  _, want = vit.load(tmp_path)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=5e-5), grads, want)


def test_a_classifier_loads_without_its_head(tmp_path):
  config = transformers.ViTConfig(
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=12,
    image_size=8,
    patch_size=4,
  )
  transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
  _, weights = vit.load(tmp_path)
  assert weights['layers']['up']['w'].shape == (1, 8, 12)
  text = (tmp_path / 'config.json').read_text()
  (tmp_path / 'config.json').write_text(text.replace('"qkv_bias": true', '"qkv_bias": false'))
  with pytest.raises(UserError, match='qkv_bias'):
    vit.load(tmp_path)
