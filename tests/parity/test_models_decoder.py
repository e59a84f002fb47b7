"""Causal transformers against transformers and llama.cpp's format: logits, gradients, real weights."""

from __future__ import annotations

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cl_jax.errors import UserError
from cl_jax.masks import paths
from cl_jax.models import causal, containers, decoder, language, pretrained
from cl_jax.streams import corpora, tokenizer
from cl_jax.types import Batch

pytestmark = pytest.mark.usefixtures('quickly')

torch = pytest.importorskip('torch', reason='parity with transformers needs torch')
transformers = pytest.importorskip('transformers', reason='parity needs transformers')

SMOL = 'SmolLM2-135M-Instruct'
LLAMA = {
  'vocab_size': 61,
  'hidden_size': 24,
  'num_hidden_layers': 3,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'intermediate_size': 40,
  'max_position_embeddings': 128,
}
STRETCHED = {
  'rope_type': 'llama3',
  'factor': 8.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 16,
}
CASES = {
  'llama': lambda: transformers.LlamaForCausalLM(
    transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True, rope_theta=500.0)
  ),
  'llama3': lambda: transformers.LlamaForCausalLM(
    transformers.LlamaConfig(**LLAMA, head_dim=8, rope_scaling=STRETCHED, rope_theta=1e4)
  ),
  'gpt2': lambda: transformers.GPT2LMHeadModel(
    transformers.GPT2Config(vocab_size=61, n_embd=24, n_layer=3, n_head=4, n_positions=32)
  ),
  'gptj': lambda: transformers.GPTJForCausalLM(
    transformers.GPTJConfig(
      vocab_size=61, n_embd=32, n_layer=3, n_head=2, n_positions=32, rotary_dim=8
    )
  ),
}


def disturbed(model):
  """Norms and biases begin at 1 and 0, which would hide an exchange of them."""
  torch.manual_seed(0)
  with torch.no_grad():
    for p in model.parameters():
      p.add_(0.2 * torch.randn_like(p))
  return model.eval()


def sentences(rows=4, length=20, vocabulary=61):
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, vocabulary, (rows, length)).astype(np.int32)
  mask = np.arange(length) < np.array([length, 11, 16, 5])[:rows, None]
  learn = mask & (rng.random(mask.shape) < 0.7)
  return {'tokens': tokens, 'mask': mask, 'learn': learn}


def batch(x):
  n = len(x['tokens'])
  return Batch(x, jnp.zeros(n, jnp.int32), jnp.ones(n), jnp.full(n, -1))


@pytest.mark.parametrize('family', CASES)
def test_logits_and_gradients_equal_transformers(tmp_path, family):
  theirs = disturbed(CASES[family]())
  theirs.save_pretrained(tmp_path, max_shard_size='20kB' if family == 'llama3' else '5GB')
  assert (tmp_path / containers.INDEX).exists() == (family == 'llama3')
  c, weights = decoder.load(tmp_path)
  assert {
    p: a.shape[p.startswith('layers/') :] for p, a in paths(weights).items()
  } == causal.shapes(c)
  x = sentences()
  model = decoder.decoder(c, 3, weights, output='tokens')

  def loss(p):
    out = model.apply({'backbone': p}, batch(x))
    return model.loss(out, batch(x)).sum(), out.logits

  grads, logits = jax.jit(jax.grad(loss, has_aux=True))(weights)
  tokens, mask = torch.tensor(x['tokens']).long(), torch.tensor(x['mask']).long()
  want = theirs(tokens, attention_mask=mask).logits
  learn = x['learn'].copy()
  learn[:, 0] = False
  before = np.pad(want.detach().numpy()[:, :-1], ((0, 0), (1, 0), (0, 0)))
  np.testing.assert_allclose(np.asarray(logits)[learn], before[learn], atol=1e-4)
  assert not np.asarray(logits)[~learn].any()
  logp = torch.log_softmax(want[:, :-1], -1).gather(-1, tokens[:, 1:, None])[..., 0]
  keep = torch.tensor(learn[:, 1:])
  (-(logp * keep).sum(1) / keep.sum(1)).sum().backward()
  # Their gradients, carried through a directory of their own, come back as a tree like ours.
  with torch.no_grad():
    for p in theirs.parameters():
      p.copy_(p.grad)
  theirs.save_pretrained(tmp_path / 'grads')
  _, expected = decoder.load(tmp_path / 'grads')
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), grads, expected)


@pytest.mark.parametrize('family', CASES)
def test_greedy_text_equals_transformers(tmp_path, family):
  """Rows of different length, padded on the left; keys and values are kept between the steps."""
  theirs = disturbed(CASES[family]())
  theirs.save_pretrained(tmp_path)
  c, weights = decoder.load(tmp_path)
  x = sentences(3, 9)
  mask = np.arange(9) >= np.array([0, 4, 8])[:, None]
  got = jax.jit(lambda w: causal.generate(c, w, x['tokens'], mask, 12))(weights)
  for row in range(3):
    own = torch.tensor(x['tokens'][row][mask[row]]).long()[None]
    for _ in range(12):
      new = theirs(own).logits[:, -1].argmax(-1, keepdim=True)
      own = torch.cat([own, new], 1)
    np.testing.assert_array_equal(got[row], own[0, -12:].numpy())


def test_divisors_of_the_frequencies_are_written_for_transformers(tmp_path):
  from tokenizers import Tokenizer, models
  from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

  c = causal.Config(1, 16, 1, 2, 1, 8, 32, theta=1e4, factors=(1.0, 1.5, 4.0, 8.0))
  Tokenizer(models.WordLevel({'a': 0}, unk_token='a')).save(str(tmp_path / 'words.json'))
  weights = causal.draw(jax.random.key(0), c, 0.1)
  decoder.save(tmp_path / 'new', c, weights, tmp_path / 'words.json')
  theirs = LlamaRotaryEmbedding(transformers.AutoConfig.from_pretrained(tmp_path / 'new'))
  assert theirs.attention_scaling == 1
  np.testing.assert_allclose(theirs.inv_freq, causal.frequencies(c), rtol=1e-6)


def test_an_output_layer_of_its_own_in_gpt2(tmp_path):
  shape = {'vocab_size': 61, 'n_embd': 24, 'n_layer': 1, 'n_head': 4, 'n_positions': 32}
  own = transformers.GPT2Config(**shape, tie_word_embeddings=False)
  theirs = disturbed(transformers.GPT2LMHeadModel(own))
  theirs.save_pretrained(tmp_path)
  c, weights = decoder.load(tmp_path)
  x = sentences(1)
  h, _ = causal.encode(c, weights, x)
  want = theirs(torch.tensor(x['tokens']).long()).logits.detach().numpy()
  np.testing.assert_allclose(causal.unembed(c, weights, h), want, atol=1e-4)


@pytest.mark.parametrize('kind', ['F32', 'F16', 'Q8_0', 'Q4_0', 'Q4_1'])
def test_gguf_files_are_read(tmp_path, kind):
  """A Llama written as llama.cpp does, its q and k rows permuted, in each way of storing weights."""
  gguf = pytest.importorskip('gguf')
  sizes = {**LLAMA, 'hidden_size': 64, 'intermediate_size': 96}
  theirs = disturbed(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)))
  file = tmp_path / 'tiny.gguf'
  write_gguf(gguf, file, theirs, kind)
  c, weights = decoder.load(file)
  assert (c.depth, c.kv_heads, c.tied, c.size) == (3, 2, False, 16)
  for name, path in (('q', 'self_attn.q_proj'), ('k', 'self_attn.k_proj'), ('up', 'mlp.up_proj')):
    want = theirs.get_parameter(f'model.layers.1.{path}.weight').detach().numpy().T
    loss = np.abs(weights['layers'][name]['w'][1] - want).max() / np.abs(want).max()
    assert loss < {'F32': 1e-7, 'F16': 1e-3, 'Q8_0': 0.01, 'Q4_0': 0.15, 'Q4_1': 0.15}[kind]
  x = sentences()
  h, _ = causal.encode(c, weights, x)
  logits = causal.unembed(c, weights, h)
  want = theirs(
    torch.tensor(x['tokens']).long(), attention_mask=torch.tensor(x['mask']).long()
  ).logits
  if kind == 'F32':
    np.testing.assert_allclose(
      np.asarray(logits)[x['mask']], want.detach().numpy()[x['mask']], atol=1e-4
    )
  whole = file.read_bytes()
  for cut in (4, len(whole) // 2, len(whole) - 200):
    file.write_bytes(whole[:cut])
    with pytest.raises(UserError, match=r'tiny\.gguf (cannot be read|is cut off)'):
      decoder.load(file)


def write_gguf(gguf, file, model, kind):
  c = model.config
  w = gguf.GGUFWriter(file, 'llama')
  w.add_block_count(c.num_hidden_layers)
  w.add_context_length(c.max_position_embeddings)
  w.add_embedding_length(c.hidden_size)
  w.add_feed_forward_length(c.intermediate_size)
  w.add_head_count(c.num_attention_heads)
  w.add_head_count_kv(c.num_key_value_heads)
  w.add_layer_norm_rms_eps(c.rms_norm_eps)
  w.add_rope_freq_base(c.rope_parameters['rope_theta'])
  w.add_token_list([f't{i}' for i in range(c.vocab_size)])
  names = {
    'model.embed_tokens': 'token_embd',
    'model.norm': 'output_norm',
    'lm_head': 'output',
    'self_attn.q_proj': 'attn_q',
    'self_attn.k_proj': 'attn_k',
    'self_attn.v_proj': 'attn_v',
    'self_attn.o_proj': 'attn_output',
    'mlp.gate_proj': 'ffn_gate',
    'mlp.up_proj': 'ffn_up',
    'mlp.down_proj': 'ffn_down',
    'input_layernorm': 'attn_norm',
    'post_attention_layernorm': 'ffn_norm',
    'model.layers.': 'blk.',
  }
  kinds = gguf.GGMLQuantizationType
  for name, p in model.named_parameters():
    a = p.detach().numpy()
    for heads, what in ((c.num_attention_heads, 'q_proj'), (c.num_key_value_heads, 'k_proj')):
      if what in name:
        rows, columns = a.shape
        a = a.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
    for theirs, ours in names.items():
      name = name.replace(theirs, ours)
    stored = kinds.F32 if a.ndim == 1 or a.shape[-1] % 32 else kinds[kind]
    data = gguf.quants.quantize(np.ascontiguousarray(a), stored)
    w.add_tensor(name, data, raw_dtype=stored)
  w.write_header_to_file()
  w.write_kv_data_to_file()
  w.write_tensors_to_file()
  w.close()


@pytest.mark.parametrize(
  ('change', 'match'),
  [
    ({'model_type': 'mistral'}, "model_type is 'mistral'"),
    ({'hidden_act': 'gelu'}, "hidden_act is 'gelu', only 'silu'"),
    ({'attention_bias': True}, 'attention_bias is True'),
    ({'num_hidden_layers': 4}, r'tensor model\.layers\.3\..* is missing'),
    ({'num_hidden_layers': 2}, r'tensor model\.layers\.2\..* has no place'),
    ({'intermediate_size': 48}, r'tensor model\.layers\.0\.mlp.* has the shape'),
    ({'rope_parameters': {'rope_type': 'yarn'}}, "rope scaling 'yarn' is not supported"),
    ({'vocab_size': 'many'}, 'vocab_size must be a positive integer'),
  ],
)
def test_another_architecture_is_refused_by_name(tmp_path, change, match):
  CASES['llama']().save_pretrained(tmp_path)
  file = tmp_path / 'config.json'
  file.write_text(json.dumps(json.loads(file.read_text()) | change))
  with pytest.raises(UserError, match=match):
    decoder.load(tmp_path)


def test_parts_that_do_not_fit_their_index_are_refused(tmp_path):
  CASES['llama']().save_pretrained(tmp_path, max_shard_size='20kB')
  index = tmp_path / containers.INDEX
  known = json.loads(index.read_text())
  placed = known['weight_map']
  some = sorted(placed)[0]
  for change, match in (
    ({**placed, some: '../model.safetensors'}, 'is not a file beside it'),
    ({**placed, some: 'model-9.safetensors'}, 'the download is not complete'),
    ({**placed, 'model.extra': placed[some]}, 'tensor model.extra is missing'),
    ({k: v for k, v in placed.items() if k != some}, f'tensor {some} is not in the index'),
  ):
    index.write_text(json.dumps({**known, 'weight_map': change}))
    with pytest.raises(UserError, match=match):
      decoder.load(tmp_path)
  for text in ('[]', '[' * 200_000):
    index.write_text(text)
    with pytest.raises(UserError, match='is not an index'):
      decoder.load(tmp_path)


@pytest.fixture(scope='module')
def smol():
  try:
    found = pretrained.find(SMOL)
  except UserError as error:
    if os.environ.get('CL_JAX_REQUIRE_DATA'):
      raise
    pytest.skip(str(error))
  return found, *decoder.load(found.path)


def test_smollm2_writes_sense(smol):
  files, c, weights = smol
  model = tokenizer.load(files.tokenizer)
  ids = [
    model.encode(s).ids for s in ('The capital of France is', 'Water freezes at a temperature of')
  ]
  longest = max(map(len, ids))
  tokens = np.array([[0] * (longest - len(i)) + i for i in ids], np.int32)
  mask = np.array([[False] * (longest - len(i)) + [True] * len(i) for i in ids])
  got = jax.jit(lambda w: causal.generate(c, w, tokens, mask, 6))(weights)
  text = [model.decode(list(map(int, row))) for row in got]
  assert text[0].startswith(' Paris'), text
  assert any(word in text[1] for word in ('0', '32')), text


def test_the_tokenizer_of_a_gguf_file(smol):
  """Digits stand alone, bytes come back, control tokens are single."""
  model = tokenizer.load(smol[0].tokenizer)
  text = 'Let x = 1234, naïve 日本 \n\n  indent'
  ids = model.encode(text).ids
  assert model.decode(ids, skip_special_tokens=False) == text
  assert {'1', '2', '3', '4'} <= {model.id_to_token(i) for i in ids}
  assert model.encode('<|endoftext|>').ids == [tokenizer.end_of_text(model, '')] == [0]


def test_smollm2_equals_transformers(smol, data_dir):
  """Real weights, read and dequantised by each: logits, and the perplexity of a block of text."""
  files, c, weights = smol
  rows = corpora.blocks(data_dir / 'text/corpora/math/test.txt', files.tokenizer, 64)[:2]
  x = {'tokens': rows, 'mask': np.ones_like(rows, bool), 'learn': np.ones_like(rows, bool)}
  model = decoder.decoder(c, 1, weights, output='tokens')
  out = jax.jit(lambda w: model.apply({'backbone': w}, batch(x)))(weights)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(
    files.path.parent, gguf_file=files.path.name, dtype=torch.float32
  ).eval()
  tokens = torch.tensor(rows).long()
  with torch.no_grad():
    found = theirs(tokens, labels=tokens)
  want = found.logits.numpy()
  got = np.asarray(out.logits)[:, 1:]
  np.testing.assert_allclose(got, want[:, :-1], atol=1e-4)
  value, count = np.asarray(language.likelihood(out, batch(x))).sum(0)
  assert count == 2 * 63
  np.testing.assert_allclose(np.exp(-value / count), np.exp(float(found.loss)), rtol=1e-4)
