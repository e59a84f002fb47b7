"""GGUF files: k-quants as the gguf library undoes them, and headers that lie are refused, cheaply."""

from __future__ import annotations

import json
import math
import struct
import time
import tracemalloc

import numpy as np
import pytest

from cl_jax.errors import UserError
from cl_jax.models import causal, containers, decoder, gguf_file

gguf = pytest.importorskip('gguf', reason='the extra "text" reads GGUF')
KIND = gguf.GGMLQuantizationType
# Where the half-precision scales of a block are, in bytes; anything may stand in the rest of it.
SCALES = {
  'Q2_K': (80, 82), 'Q3_K': (108,), 'Q4_K': (0, 2), 'Q5_K': (0, 2), 'Q6_K': (208,), 'Q5_0': (0,),
  'Q5_1': (0, 2), 'Q8_0': (0,), 'IQ4_NL': (0,), 'IQ4_XS': (0,), 'TQ1_0': (52,), 'TQ2_0': (64,),
}  # fmt: skip
SHAPES = {
  'token_embd': (20, 256), 'output_norm': (256,), 'blk.0.attn_norm': (256,), 'blk.0.ffn_norm': (256,),
  'blk.0.attn_q': (256, 256), 'blk.0.attn_k': (128, 256), 'blk.0.attn_v': (128, 256),
  'blk.0.attn_output': (256, 256), 'blk.0.ffn_gate': (512, 256), 'blk.0.ffn_up': (512, 256),
  'blk.0.ffn_down': (256, 512),
}  # fmt: skip


def blocks(name: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
  """Random bytes u8[rows, bytes of a row] that are finite numbers in a quantisation."""
  rng = np.random.default_rng(seed)
  length, size = gguf.GGML_QUANT_SIZES[KIND[name]]
  a = rng.integers(0, 256, (rows * columns // length, size), np.uint8)
  for at in SCALES[name]:
    scale = rng.normal(0, 0.05, len(a)).astype(np.float16)
    a[:, at : at + 2] = scale.view(np.uint8).reshape(-1, 2)
  return a.reshape(rows, -1)


def write(file, tensors: dict, **fields):
  """{name: (bytes or f32, kind)} as a Llama of one layer."""
  w = gguf.GGUFWriter(file, 'llama')
  known = {'block_count': 1, 'context_length': 16, 'embedding_length': 256}
  known |= {'feed_forward_length': 512, 'attention.head_count': 4, 'attention.head_count_kv': 2}
  for key, value in (known | fields).items():
    w.add_uint32(f'llama.{key}', value)
  w.add_layer_norm_rms_eps(1e-5)
  w.add_token_list([*'abcdefghijklmnopqrst'])
  w.add_array('test.scores', [0.5] * 20)
  for name, (data, kind) in tensors.items():
    w.add_tensor(name, data, raw_dtype=KIND[kind])
  w.write_header_to_file()
  w.write_kv_data_to_file()
  w.write_tensors_to_file()
  w.close()
  return file


def q4_k(block: np.ndarray) -> np.ndarray:
  """256 weights of block_q4_K, from the definition in ggml-common.h and get_scale_min_k4."""
  d, least = (float(h) for h in block[:4].view(np.float16))
  packed, levels, out = block[4:16].astype(int), block[16:], []
  for i in range(8):
    if i < 4:
      scale, low = packed[i] & 63, packed[i + 4] & 63
    else:
      scale = (packed[i + 4] & 15) | (packed[i - 4] >> 6) << 4
      low = (packed[i + 4] >> 4) | (packed[i] >> 6) << 4
    q = levels[32 * (i // 2) : 32 * (i // 2) + 32].astype(int)
    out += [d * scale * x - least * low for x in (q >> 4 if i % 2 else q & 15)]
  return np.array(out)


def q6_k(block: np.ndarray) -> np.ndarray:
  """256 weights of block_q6_K."""
  low, high, scales = (
    block[:128].astype(int),
    block[128:192].astype(int),
    block[192:208].view(np.int8),
  )
  d, out = float(block[208:210].view(np.float16)[0]), np.zeros(256)
  for half in range(2):
    for i in range(32):
      l0, l1, h = low[64 * half + i], low[64 * half + 32 + i], high[32 * half + i]
      for part, q in enumerate(((l0 & 15), (l1 & 15), (l0 >> 4), (l1 >> 4))):
        scale = scales[8 * half + 2 * part + i // 16]
        out[128 * half + 32 * part + i] = d * scale * ((q | ((h >> 2 * part) & 3) << 4) - 32)
  return out


def test_every_quantisation_is_undone_as_the_library_does(tmp_path):
  stored = {name: blocks(name, 6, 512, i) for i, name in enumerate(SCALES)}
  source = containers.gguf(
    write(tmp_path / 'all.gguf', {f't.{n}': (a, n) for n, a in stored.items()})
  )
  for name, a in stored.items():
    assert source.shapes[f't.{name}'] == (6, 512) and source.kinds[f't.{name}'] == name
    found = source.read(f't.{name}')
    assert found.shape == (6, 512) and found.dtype == np.float32 and found.std() > 0
    np.testing.assert_array_equal(found, gguf.quants.dequantize(a, KIND[name]))
  for name, by_hand in (('Q4_K', q4_k), ('Q6_K', q6_k)):
    wanted = np.concatenate([by_hand(b) for b in stored[name].reshape(12, -1)]).reshape(6, 512)
    np.testing.assert_allclose(source.read(f't.{name}'), wanted, rtol=1e-5, atol=1e-5)


def model(tmp_path, **fields):
  """A Llama as llama.cpp's Q4_K_M mixes them: most in Q4_K, some in Q6_K, norms as they are."""
  tensors = {}
  for i, (name, shape) in enumerate(SHAPES.items()):
    kind = 'Q6_K' if name in ('token_embd', 'blk.0.ffn_down', 'blk.0.attn_v') else 'Q4_K'
    one = (
      (blocks(kind, *shape, i), kind) if len(shape) == 2 else (np.ones(shape, np.float32), 'F32')
    )
    tensors[f'{name}.weight'] = one
  return write(tmp_path / 'model.gguf', tensors, **fields), tensors


def test_a_model_of_k_quants_is_loaded(tmp_path):
  file, tensors = model(tmp_path)
  config, w = decoder.load(file)
  assert (config.d, config.heads, config.kv_heads, config.ffn) == (256, 4, 2, 512)
  back = {n: gguf.quants.dequantize(a, KIND[k]) for n, (a, k) in tensors.items()}
  np.testing.assert_array_equal(w['embed']['tokens'], back['token_embd.weight'])
  np.testing.assert_array_equal(w['layers']['down']['w'][0], back['blk.0.ffn_down.weight'].T)
  q = back['blk.0.attn_q.weight'].reshape(4, 32, 2, 256).swapaxes(1, 2).reshape(256, 256)
  np.testing.assert_array_equal(w['layers']['q']['w'][0], q.T)


@pytest.mark.parametrize(
  ('fields', 'said'),
  [
    ({'attention.key_length': 5}, 'a head has 5 channels, which are rotated in pairs'),
    ({'attention.head_count_kv': 3}, '3 key heads do not divide 4 query heads'),
  ],
)
def test_heads_that_cannot_be_are_refused(tmp_path, fields, said):
  known = {name: shape for name, shape in SHAPES.items()}
  size, kv = fields.get('attention.key_length', 64), fields.get('attention.head_count_kv', 2)
  known |= {'blk.0.attn_q': (4 * size, 256), 'blk.0.attn_output': (256, 4 * size)}
  known |= dict.fromkeys(('blk.0.attn_k', 'blk.0.attn_v'), (kv * size, 256))
  tensors = {f'{n}.weight': (np.ones(shape, np.float32), 'F32') for n, shape in known.items()}
  with pytest.raises(UserError, match=said):
    decoder.load(write(tmp_path / 'model.gguf', tensors, **fields))


STRETCH = (8.0, 1.0, 4.0, 32.0)  # factor, low_freq_factor, high_freq_factor, original positions


def llama3(size: int = 64, theta: float = 1e4) -> np.ndarray:
  """Divisors as llama.cpp's converter computes them, a branch for every frequency."""
  factor, low, high, original = STRETCH
  found = []
  for f in theta ** -(np.arange(0, size, 2, dtype=np.float32) / size):
    wave = 2 * math.pi / f
    smooth = (original / wave - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    found.append(1 if wave < original / high else factor if wave > original / low else between)
  return np.array(found, np.float32)


def stretched(file, factors: np.ndarray | None):
  """Random weights in f32, the same every time, with these divisors in the file."""
  rng = np.random.default_rng(0)
  tensors = {f'{n}.weight': rng.standard_normal(s, np.float32) / 8 for n, s in SHAPES.items()}
  tensors |= {f'{n}.weight': np.ones(s, np.float32) for n, s in SHAPES.items() if len(s) == 1}
  if factors is not None:
    tensors['rope_freqs.weight'] = factors.astype(np.float32)
  return decoder.load(write(file, {n: (a, 'F32') for n, a in tensors.items()}))


def hidden(config, weights) -> np.ndarray:
  tokens = np.arange(16)[None] % 20
  return np.asarray(causal.encode(config, weights, {'tokens': tokens, 'mask': tokens >= 0})[0])


def test_llama_3_stretches_its_positions_by_a_tensor(tmp_path):
  """Divisors of 1 change no bit; Llama 3's give what the same weights do whose config.json says llama3."""
  plain, ones, own = (
    stretched(tmp_path / f'{i}.gguf', a) for i, a in enumerate((None, np.ones(32), llama3()))
  )
  assert plain[0].factors is None and len(set(own[0].factors)) > 3
  np.testing.assert_array_equal(hidden(*ones), hidden(*plain))
  found = hidden(*own)
  assert np.abs(found - hidden(*plain)).max() > 0.1
  words = tmp_path / 'tokenizer.json'
  tokenizers = pytest.importorskip('tokenizers')
  tokenizers.Tokenizer(tokenizers.models.WordLevel({'a': 0}, unk_token='a')).save(str(words))
  for name, config in (
    ('llama3', own[0]._replace(factors=None, scaling=STRETCH)),
    ('longrope', own[0]),
  ):
    decoder.save(tmp_path / name, config, own[1], words)
    about = json.loads((tmp_path / name / 'config.json').read_text())
    assert about['rope_scaling']['rope_type'] == name
    back = decoder.load(tmp_path / name)
    assert back[0] == config._replace(head=64)
    np.testing.assert_allclose(hidden(*back), found, atol=2e-5)


@pytest.mark.parametrize(
  ('factors', 'match'),
  [
    (np.ones(16), r'rope_freqs.weight has the shape \(16,\), the config says \(32,\)'),
    (np.zeros(32), 'rope_freqs.weight holds values that are not positive'),
    (np.full(32, np.nan), 'rope_freqs.weight holds values that are not finite'),
  ],
)
def test_divisors_that_cannot_be_are_refused(tmp_path, factors, match):
  with pytest.raises(UserError, match=match):
    stretched(tmp_path / 'tiny.gguf', factors)


def refused(file, data: bytes, match: str | None = None) -> None:
  """Within a second and a few megabytes, in one line."""
  file.write_bytes(data)
  tracemalloc.start()
  begin = time.process_time()
  try:
    with pytest.raises(UserError, match=match) as error:
      containers.gguf(file)
    assert tracemalloc.get_traced_memory()[1] < 4e6 and time.process_time() - begin < 1
  finally:
    tracemalloc.stop()
  assert file.name in str(error.value) and len(str(error.value)) < 500


HUGE = (2**31 - 1, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)


def test_counts_that_cannot_be_are_refused_by_name(tmp_path):
  file, _ = model(tmp_path)
  whole = file.read_bytes()

  def at(place: int, kind: str, value: int) -> bytes:
    new = struct.pack(f'<{kind}', value)
    return whole[:place] + new + whole[place + len(new) :]

  def after(text: bytes) -> int:
    return whole.index(struct.pack('<Q', len(text)) + text) + 8 + len(text)

  tokens, scores, tensor = (
    after(n) for n in (b'tokenizer.ggml.tokens', b'test.scores', b'blk.0.attn_q.weight')
  )
  for n in HUGE:
    refused(file, at(8, 'Q', n), 'the number of tensors says there are')
    refused(file, at(16, 'Q', n), 'the number of fields says there are')
    refused(file, at(24, 'Q', n), 'field 0 has a name of')
    refused(
      file, at(after(b'general.architecture') + 4, 'Q', n), 'field general.architecture takes'
    )
    refused(file, at(tokens + 8, 'Q', n), r'field tokenizer.ggml.tokens says there are \d+ strings')
    refused(file, at(tokens + 16, 'Q', n), 'field tokenizer.ggml.tokens takes')
    refused(file, at(scores + 8, 'Q', n), r'field test.scores says there are \d+ numbers')
    refused(file, at(tensor, 'I', n % 2**32), r'tensor blk.0.attn_q.weight has \d+ axes')
    for axis in (4, 12):
      refused(
        file, at(tensor + axis, 'Q', n), 'tensor blk.0.attn_q.weight .*of shape|has the shape'
      )
    refused(file, at(tensor + 20, 'I', n % 2**32 or 99), 'tensor blk.0.attn_q.weight is of type')
    aligned = n // 32 * 32
    refused(file, at(tensor + 24, 'Q', aligned), 'cut off: .* tensor blk.0.attn_q.weight ends at')
  refused(file, at(tensor + 24, 'Q', 0), 'begins at .*, inside of the one before')
  refused(file, at(tensor + 24, 'Q', 3), 'not a multiple of 32')
  refused(file, at(tensor + 4, 'Q', 0), 'has the shape')
  refused(file, at(tokens, 'I', 77), 'field tokenizer.ggml.tokens is of type|is an array of type')
  refused(file, at(tokens + 4, 'I', 9), 'is an array of type 9')
  refused(file, at(4, 'I', 1), 'says version 1')
  refused(file, at(4, 'I', 3 << 24), 'the bytes of every number in the other order')
  refused(file, b'', 'cannot be read as GGUF')
  refused(file, b'GGML' + whole[4:], 'is not GGUF')
  twice = whole.replace(b'llama.context_length', b'llama.\x00ontext_lengt\xff', 1)
  refused(file, twice, 'is not UTF-8')
  refused(
    file, whole.replace(b'blk.0.attn_k.w', b'blk.0.attn_q.w', 1), 'attn_q.weight is there twice'
  )


def test_a_long_array_of_small_numbers_is_not_taken_apart(tmp_path, monkeypatch):
  """It may fill the file; an object for each of its numbers would take fifty times as much."""
  monkeypatch.setattr(gguf_file, 'ELEMENTS', 1000)
  name = b'x'
  data = b'GGUF' + struct.pack('<IQQQ', 3, 0, 1, len(name)) + name
  for n, kind in ((1001, 0), (1001, 8)):
    body = struct.pack('<IIQ', 9, kind, n) + bytes(8 * n)
    refused(tmp_path / 'long.gguf', data + body, 'field x says there are 1001')
  (tmp_path / 'long.gguf').write_bytes(data + struct.pack('<IIQ', 9, 0, 1000) + bytes(1000))
  assert gguf_file.header(tmp_path / 'long.gguf').fields == {'x': [0] * 1000}


def test_cut_off_and_changed_files_are_read_or_refused(tmp_path):
  """No other error, whatever the header says; what is read is what its shapes say."""
  file, _ = model(tmp_path)
  whole = file.read_bytes()
  begin = min(t.offset for t in gguf_file.header(file).tensors.values())
  for size in [*range(0, begin, 41), begin, len(whole) // 2, len(whole) - 1]:
    refused(file, whole[:size])
  rng = np.random.default_rng(0)
  outcomes = set()
  tracemalloc.start()
  for _ in range(200):
    changed = bytearray(whole)
    for at in rng.integers(4, begin, rng.integers(1, 4)):
      changed[at] = rng.integers(256)
    file.write_bytes(changed)
    try:
      source = containers.gguf(file)
      outcomes.add('read')
      for name, shape in source.shapes.items():
        if np.prod(shape) > 2**17 or source.kinds[name] in ('F32', 'F16'):
          continue
        with np.errstate(all='ignore'):
          try:
            assert source.read(name).shape == shape
          except UserError:
            pass
        break
    except UserError as error:
      assert file.name in str(error)
      outcomes.add('refused')
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert outcomes == {'read', 'refused'} and peak < 3e7
