import gzip
import json

import numpy as np
import pytest

from cl_jax.errors import UserError
from cl_jax.streams import Plan, cache, corpora, split, text
from cl_jax.streams.check import check

LINES = [
  {'text': 'turn on the light', 'label': 'on', 'domain': 'home'},
  {'text': 'turn it off', 'label': 'off', 'domain': 'home'},
  {'text': 'fly', 'label': 'book', 'domain': 'away'},
]


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
  """A word-level tokenizer.json with [CLS] and [SEP]; it pads and truncates of its own accord."""
  tokenizers = pytest.importorskip('tokenizers')
  words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', 'turn', 'on', 'the', 'light', 'it', 'off', 'fly']
  model = tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token='[UNK]')
  made = tokenizers.Tokenizer(model)
  made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  made.post_processor = tokenizers.processors.TemplateProcessing(
    single='[CLS] $A [SEP]', special_tokens=[('[CLS]', 2), ('[SEP]', 3)]
  )
  made.enable_truncation(99)
  made.enable_padding(length=50)
  path = tmp_path_factory.mktemp('tokenizer') / 'tokenizer.json'
  made.save(str(path))
  return path


def write(path, lines, opener=open):
  with opener(path, 'wt', encoding='utf-8') as file:
    file.writelines(json.dumps(line, ensure_ascii=False) + '\n' for line in lines)
  return path


def test_tokens_masks_and_labels(tmp_path, tokenizer):
  data = text.load(write(tmp_path / 'a.jsonl', LINES), tokenizer, 5, cache_dir=tmp_path)
  assert data.x['tokens'].dtype == np.int32 and data.x['mask'].dtype == bool
  assert data.x['tokens'].tolist() == [[2, 4, 5, 6, 3], [2, 4, 8, 9, 3], [2, 10, 3, 0, 0]]
  assert data.x['mask'].sum(axis=1).tolist() == [5, 5, 3]
  assert data.names == ('book', 'off', 'on') and data.y.tolist() == [2, 1, 0]
  assert data.domain_names == ('away', 'home') and data.domain.tolist() == [1, 1, 0]


def test_gzip_and_blank_lines_and_no_domain(tmp_path, tokenizer):
  plain = [{k: line[k] for k in ('text', 'label')} for line in LINES]
  path = write(tmp_path / 'a.jsonl.gz', plain, gzip.open)
  data = text.load(path, tokenizer, 4, cache_dir=tmp_path)
  assert data.domain is None and data.domain_names == () and len(data.y) == 3
  spaced = tmp_path / 'b.jsonl'
  spaced.write_text('\n' + json.dumps(plain[0]) + '\n\n')
  assert text.read(spaced).texts == ('turn on the light',)


def test_a_stream_of_sentences(tmp_path, tokenizer):
  data = text.load(write(tmp_path / 'a.jsonl', LINES), tokenizer, 5, cache_dir=tmp_path)
  stream = check(split(data, data, 'class', by='domain', plan=Plan(2)))
  assert stream.task_names == ('away', 'home') and stream.task_classes == ((0,), (1, 2))
  assert stream.test.x['tokens'].shape == (2, 1, 256, 5)


def test_the_cache_depends_on_text_tokenizer_and_length(tmp_path, tokenizer, monkeypatch):
  calls = []
  encode = text.encode
  monkeypatch.setattr(text, 'encode', lambda *args: calls.append(args) or encode(*args))
  path = write(tmp_path / 'a.jsonl', LINES)
  load = lambda *args: text.load(*args, cache_dir=tmp_path / 'cache')  # noqa: E731
  first, second = load(path, tokenizer, 5), load(path, tokenizer, 5)
  assert len(calls) == 1 and np.array_equal(first.x['tokens'], second.x['tokens'])
  load(path, tokenizer, 6)
  assert len(calls) == 2
  other = tmp_path / 'tokenizer.json'
  other.write_text(tokenizer.read_text() + '\n')
  load(path, other, 5)
  assert len(calls) == 3
  write(path, LINES[:2])
  assert len(load(path, tokenizer, 5).y) == 2 and len(calls) == 4
  # the same text at another place is the same entry
  load(write(tmp_path / 'sub.a.jsonl', LINES[:2]).rename(tmp_path / 'a.txt'), tokenizer, 5)
  assert len(calls) == 4
  assert len(list((tmp_path / 'cache' / 'text').iterdir())) == 4
  assert cache.directory() != tmp_path / 'cache'


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    ('{"text": "a", "label": "b"', "not a line of JSON (Expecting ',' delimiter at column 27)"),
    ('["a", "b"]', 'expected an object with text and label'),
    ('{"label": "b"}', "'text' must be a text that is not empty; got None"),
    ('{"text": " ", "label": "b"}', "'text' must be a text that is not empty; got ' '"),
    ('{"text": "a", "label": 3}', "'label' must be a text that is not empty; got 3"),
    ('{"text": "a", "label": "b", "domain": null}', "'domain' must be a text"),
    ('{"text": "a", "label": "b"}', 'some lines have a domain and some do not'),
    (r'{"text": "a\ud83d", "label": "b"}', "'text' has half of a surrogate pair"),
    ('[' * 200_000, 'not a line of JSON that can be read'),
    ('{"text": ' + '9' * 5000 + '}', 'not a line of JSON that can be read'),
  ],
)
def test_malformed_lines_are_named(tmp_path, line, message):
  path = tmp_path / 'a.jsonl'
  path.write_text(json.dumps(LINES[0]) + '\n' + line + '\n')
  with pytest.raises(UserError) as error:
    text.read(path)
  assert str(error.value).startswith(f'{path}:2: ') and message in str(error.value)


def test_unusable_files_are_named(tmp_path, tokenizer):
  path = write(tmp_path / 'a.jsonl', LINES)
  (tmp_path / 'empty.jsonl').write_text('\n')
  (tmp_path / 'latin.jsonl').write_bytes(b'{"text": "caf\xe9"}\n')
  (tmp_path / 'cut.jsonl.gz').write_bytes(gzip.compress(b'{"text": "a", "label": "b"}\n' * 99)[:-9])
  packed = bytearray((tmp_path / 'cut.jsonl.gz').read_bytes())
  packed[10] = 7  # a block of a kind that deflate does not have
  (tmp_path / 'flipped.jsonl.gz').write_bytes(packed)
  (tmp_path / 'not.json').write_text('{}')
  for make, message in (
    (lambda: text.read(tmp_path / 'no.jsonl'), 'no.jsonl cannot be read'),
    (lambda: text.read(tmp_path / 'empty.jsonl'), 'has no sentences'),
    (lambda: text.read(tmp_path / 'latin.jsonl'), 'it must be UTF-8'),
    (lambda: text.read(tmp_path / 'cut.jsonl.gz'), 'cut.jsonl.gz cannot be read'),
    (lambda: text.read(tmp_path / 'flipped.jsonl.gz'), 'flipped.jsonl.gz cannot be read'),
    (lambda: text.load(path, tokenizer, 2, cache_dir=tmp_path), 'adds 2 special tokens to a text'),
    (lambda: text.load(path, tmp_path / 'no.json', 5), 'there is no tokenizer at'),
    (lambda: text.load(path, tmp_path / 'not.json', 5, cache_dir=tmp_path), 'not a tokenizer.json'),
    (lambda: text.load(path, tokenizer, 0), 'length must be a whole number of tokens'),
    (lambda: text.load(path, tokenizer, 5, names=('on', 'off'), cache_dir=tmp_path),
     "label 'book' does not occur in the training data"),
  ):  # fmt: skip
    with pytest.raises(UserError) as error:
      make()
    assert message in str(error.value) and '\n' not in str(error.value)


def test_labels_are_spelt_out_and_marked_to_be_learnt(tmp_path, tokenizer):
  """The text gives way where it is too long; the template, the label and the end never do."""
  lines = [{'text': 'turn on the light it', 'label': 'the_light'}, {'text': 'fly', 'label': 'fly'}]
  path = write(tmp_path / 'a.jsonl', lines)
  data = text.load(path, tokenizer, 8, template='it {text} off {label}', cache_dir=tmp_path)
  tokens, mask, learn = (data.x[k].tolist() for k in ('tokens', 'mask', 'learn'))
  assert tokens == [[8, 4, 5, 6, 9, 6, 7, 3], [8, 10, 9, 10, 3, 0, 0, 0]]
  assert mask == [[True] * 8, [True] * 5 + [False] * 3]
  assert learn == [[False] * 5 + [True] * 3, [False] * 3 + [True] * 2 + [False] * 3]
  assert data.y.tolist() == [1, 0]
  twice = '{text} {label} {label}'
  for template in ('{text}', '{label} {text}', '{text} {label}!', 'no fields', twice):
    with pytest.raises(
      UserError, match='must have {text} in it, end with {label}, and have both once'
    ):
      text.load(path, tokenizer, 8, template=template, cache_dir=tmp_path)
  with pytest.raises(UserError, match='leaves no room for a text'):
    text.load(path, tokenizer, 5, template='it {text} off {label}', cache_dir=tmp_path)


def test_the_tokens_of_a_corpus_are_those_of_the_whole_text(tmp_path):
  """Newlines that a tokenizer merges are merged, and spaces stay with what they belong to."""
  tokenizers = pytest.importorskip('tokenizers')
  signs = ['a', '1', '.', 'Ġ', 'Ċ', 'ĊĊ', 'Ġa', 'ĊĠ', 'ĠĊ']
  merges = [('Ċ', 'Ċ'), ('Ġ', 'a'), ('Ċ', 'Ġ'), ('Ġ', 'Ċ')]
  made = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(signs)}, merges))
  made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.save(str(tmp_path / 'tokenizer.json'))
  words = ''.join(np.random.default_rng(0).choice([*'aa1. \n\n\n'], 4000))
  (tmp_path / 'a.txt').write_text(words)
  found = corpora.encode(tmp_path / 'a.txt', tmp_path / 'tokenizer.json').tolist()
  assert found == made.encode(words).ids
  lines = [i for line in words.splitlines(keepends=True) for i in made.encode(line).ids]
  assert found != lines and 5 in found


@pytest.mark.parametrize('rule', ['prepend', 'metaspace', 'byte level', 'strip', 'merge'])
def test_what_a_tokenizer_puts_before_a_text_comes_once(tmp_path, rule):
  """Llama 2's normaliser puts a sign at the start of whatever it is given, others a space or nothing."""
  tokenizers = pytest.importorskip('tokenizers')
  signs, merges = [*'ab\n▁ĠĊ', '.', '\na'], [('\n', 'a')] if rule == 'merge' else []
  made = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(signs)}, merges))
  normal, pre = tokenizers.normalizers, tokenizers.pre_tokenizers
  if rule == 'prepend':
    made.normalizer = normal.Sequence([normal.Prepend('▁'), normal.Replace(' ', '▁')])
  elif rule == 'strip':
    made.normalizer = normal.Strip()
  elif rule != 'merge':
    own = {'metaspace': pre.Metaspace(), 'byte level': pre.ByteLevel(add_prefix_space=True)}
    made.pre_tokenizer = own[rule]
  made.save(str(tmp_path / 'tokenizer.json'))
  words = 'ab a.\nb ba\n\nab.\na\nab\n' * 20
  (tmp_path / 'a.txt').write_text(words)
  found = corpora.encode(tmp_path / 'a.txt', tmp_path / 'tokenizer.json').tolist()
  assert found == made.encode(words).ids
  pieces = [i for piece in words.splitlines(keepends=True) for i in made.encode(piece).ids]
  assert found != pieces


def test_corpora_are_cut_into_blocks_a_domain_each(tmp_path, tokenizer):
  for name, words in (
    ('a', 'turn on the light\nturn it off\n'),
    ('b', 'fly on\n\n it on the light'),
  ):
    (tmp_path / name).mkdir()
    for split_name in corpora.SPLITS:
      (tmp_path / name / f'{split_name}.txt').write_text(words)
  train, test = corpora.load(tmp_path, ('b', 'a'), tokenizer, 3, tmp_path / 'cache')
  assert train.x['tokens'].tolist() == [[10, 5, 8], [5, 6, 7], [4, 5, 6], [7, 4, 8]]
  assert train.x['learn'].tolist() == [[False, True, True]] * 4 and train.x['mask'].all()
  assert train.domain.tolist() == test.domain.tolist() == [0, 0, 1, 1]
  assert train.domain_names == ('b', 'a') and not train.y.any()
  stream = split(train, test, 'domain', by='domain', plan=Plan(batch=2))
  check(stream)
  assert stream.tasks == 2 and stream.classes == 1
  with pytest.raises(UserError, match=r'no corpus at .*nowhere.*there are a, b, cache'):
    corpora.load(tmp_path, ('nowhere',), tokenizer, 3)
  with pytest.raises(UserError, match='has 7 tokens, not even one block of 9'):
    corpora.load(tmp_path, ('a',), tokenizer, 9, tmp_path / 'cache')
  with pytest.raises(UserError, match='length must be at least 2'):
    corpora.load(tmp_path, ('a',), tokenizer, 1)
  (tmp_path / 'a/train.txt').write_bytes(b'\xff\xfe')
  with pytest.raises(UserError, match='cannot be read as UTF-8'):
    corpora.load(tmp_path, ('a',), tokenizer, 3, tmp_path / 'cache')
