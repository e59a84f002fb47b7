"""CLIP against transformers: random weights, both towers, logits and the gradient of the image tower."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cl_jax.models import clip
from cl_jax.types import Batch

torch = pytest.importorskip('torch', reason='parity with transformers needs torch')
transformers = pytest.importorskip('transformers', reason='parity needs transformers')

EOS = 49
# Two of them are shorter, one has the end twice: the first counts.
TOKENS = np.array([[1, 5, 7, 9, 3, EOS], [1, 8, EOS, 0, 0, 0], [1, EOS, 4, 2, EOS, 0]])
MASK = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 0]])


def saved(folder, eos: int = EOS, **changes):
  """A tiny CLIP of transformers, also as a directory."""
  torch.manual_seed(0)
  size = {'num_hidden_layers': 2, 'num_attention_heads': 2} | changes
  config = transformers.CLIPConfig(
    text_config={
      'vocab_size': 50,
      'hidden_size': 24,
      'intermediate_size': 40,
      'max_position_embeddings': 7,
      'eos_token_id': eos,
      **size,
    },
    vision_config={
      'hidden_size': 32,
      'intermediate_size': 48,
      'image_size': 12,
      'patch_size': 4,
      **size,
    },
    projection_dim=16,
  )
  theirs = transformers.CLIPModel(config).eval()
  with torch.no_grad():  # norms and biases begin at 1 and 0, which would hide an exchange of them
    for name, p in theirs.named_parameters():
      if name != 'logit_scale':
        p.add_(0.2 * torch.randn_like(p))
  theirs.save_pretrained(folder)
  return theirs


def batch(size: int = 12) -> Batch:
  x = np.random.default_rng(0).standard_normal((4, size, size, 3)).astype(np.float32)
  return Batch(jnp.asarray(x), jnp.arange(4) % 3, jnp.ones(4), jnp.zeros(4, jnp.int32))


def of(theirs, size: int = 12, mask: bool = True):
  with torch.no_grad():
    return theirs(
      input_ids=torch.tensor(TOKENS),
      attention_mask=torch.tensor(MASK) if mask else None,
      pixel_values=torch.tensor(np.asarray(batch(size).x).transpose(0, 3, 1, 2)),
      interpolate_pos_encoding=size != 12,
    )


@pytest.mark.parametrize(
  'eos, changes, size, mask',
  [
    (EOS, {}, 12, True),
    (EOS, {'hidden_act': 'gelu', 'layer_norm_eps': 1e-4}, 20, False),
    (2, {}, 12, False),
  ],
)
def test_zero_shot_equals_transformers(tmp_path, eos, changes, size, mask):
  theirs = saved(tmp_path, eos, **changes)
  want = of(theirs, size, mask)
  config, weights = clip.load(tmp_path)
  again, text = clip.load_text(tmp_path)
  assert config == again and config.eos == eos and config.text_d == 24 and config.image == 12

  @jax.jit
  def run(weights, text):
    names = clip.prototypes(config, text, jnp.asarray(TOKENS), jnp.asarray(MASK) if mask else None)
    head = clip.zero_shot(text, names)
    model = clip.clip(config, 3, weights, head, image=size)
    params, _ = model.init(jax.random.key(0), batch(size))
    out = model.apply(params, batch(size))
    return names, out.features, out.logits

  names, features, logits = run(weights, text)
  np.testing.assert_allclose(names, want.text_embeds, atol=1e-5)
  np.testing.assert_allclose(features, want.image_embeds, atol=1e-5)
  np.testing.assert_allclose(logits, want.logits_per_image, atol=1e-4)


def test_gradients_equal_transformers(tmp_path):
  theirs = saved(tmp_path)
  config, weights = clip.load(tmp_path)
  target = np.random.default_rng(1).standard_normal((4, 16)).astype(np.float32)
  hidden = theirs.get_image_features(torch.tensor(np.asarray(batch().x).transpose(0, 3, 1, 2)))
  hidden = getattr(hidden, 'pooler_output', hidden)
  hidden = hidden / hidden.norm(dim=-1, keepdim=True)
  (hidden * torch.tensor(target)).sum().backward()
  model = clip.clip(config, 3)
  head = {'w': jnp.zeros((16, 3)), 'b': jnp.zeros(3)}

  def loss(p):
    return (model.apply({'backbone': p, 'head': head}, batch()).features * target).sum()

  grads = jax.jit(jax.grad(loss))(weights)
  # Their gradients, carried through a directory of their own, come back as a tree like ours.
  with torch.no_grad():
    for p in theirs.parameters():
      p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
  theirs.save_pretrained(tmp_path)
  _, want = clip.load(tmp_path)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), grads, want)
