"""Prompts and answers as tokens: pieces of words, a mark at the beginning, a token before all."""

from __future__ import annotations

import pytest
from tokenizers import (
  Tokenizer,
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
  trainers,
)

from cl_jax.editing import encoding, evaluate, rows, tracing
from cl_jax.editing.rows import Edit
from cl_jax.errors import UserError

TEXT = ['the tower is in the city of Rome and the home of Anna', 'a city is a city in Rome'] * 3
EDITS = [
  Edit('{} is in the city of', 'Eiffel Tower', 'Rome', 'Lima in Rome', ('In the city {} is',)),
  Edit('In {}, the city of', 'Curaçao 北京', 'Anna 🏠'),
  Edit('the home of {}', 'Joséphine', 'a'),
]
PREFIXES = ('The home', 'Is it 🏠')


@pytest.fixture(scope='module')
def bytewise() -> Tokenizer:
  """As GPT-2's: pieces of bytes, the space before a word in its first one."""
  made = Tokenizer(models.BPE())
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = decoders.ByteLevel()
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  made.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
  return made


@pytest.fixture(scope='module')
def marked() -> Tokenizer:
  """As Llama-2's: a mark for each space and one before the text, no words apart, <s> before all."""
  made = Tokenizer(models.BPE(unk_token='<unk>', byte_fallback=False))
  made.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
  made.pre_tokenizer = pre_tokenizers.Metaspace(replacement='▁', prepend_scheme='never')
  trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=['<unk>', '<s>'])
  made.train_from_iterator(TEXT, trainer)
  made.pre_tokenizer = None
  made.post_processor = processors.TemplateProcessing('<s> $A', special_tokens=[('<s>', 1)])
  return made


@pytest.mark.parametrize('name', ['bytewise', 'marked'])
def test_an_answer_is_what_it_is_in_a_running_text(name, request):
  made = request.getfixturevalue(name)
  for prompt, answer in (('the tower is in the city of', 'Rome'), ('a home', 'in the city')):
    whole = made.encode(f'{prompt} {answer}', add_special_tokens=True).ids
    for text in (prompt, f'{prompt} '):
      ids, spans = encoding.prompt(made, text)
      assert [*ids, *encoding.after(made, text, f' {answer}')] == whole
      assert len(spans) == len(ids)
    assert encoding.after(made, prompt, '') == []
  first = [1] if name == 'marked' else []
  assert encoding.prompt(made, 'a')[0][: len(first)] == first
  # Alone the answer is read in another way where the beginning of a text is marked.
  alone = made.encode(' Rome', add_special_tokens=False).ids
  assert (alone == encoding.after(made, 'the city of', 'Rome')) == (name == 'bytewise')


def test_a_prompt_that_an_answer_changes_is_refused():
  made = Tokenizer(models.WordLevel({'a': 0, 'b': 1, 'b c': 2}, unk_token='a'))
  with pytest.raises(UserError, match='changes the last token'):
    encoding.after(made, 'b', 'c')


@pytest.mark.parametrize('prefix', ['', *PREFIXES])
def test_the_last_token_of_a_subject_is_that_of_its_text(bytewise, prefix):
  """The tokens up to it are the shortest beginning of the row whose text has the whole subject."""
  for edit in EDITS:
    for subject in (edit.subject, f'{edit.subject} '):
      one = Edit(edit.prompt.replace('{} ', '{}') if subject[-1] == ' ' else edit.prompt,
                 subject, edit.target)  # fmt: skip
      ids, at, _ = rows.tokens_of(bytewise, rows.piece(one, prefix), 99)
      texts = [bytewise.decode(ids[:n]) for n in range(len(ids) + 1)]
      begun = f'{prefix}. ' if prefix else ''
      wanted = begun + one.prompt[: one.prompt.index('{}')] + edit.subject
      assert texts[at + 1].startswith(wanted) and not texts[at].startswith(wanted)


def test_what_is_trained_and_what_is_asked_have_the_same_tokens(marked):
  requests, kept, refused = rows.requests(marked, EDITS[:1], PREFIXES)
  asked, _ = evaluate.questions(marked, EDITS[:1])
  assert (kept, refused) == ([0], [])
  wanted = encoding.after(marked, EDITS[0].text, 'Rome')

  def real(a):
    return [int(i) for i in a if i >= 0]

  assert [real(row) for row in requests.rewrite.target[0]] == [wanted] * 3
  assert real(asked.rows.target[0]) == wanted
  for head, tail in zip(requests.rewrite.head[0], requests.rewrite.tail[0], strict=True):
    assert real([*head, *tail])[0] == 1, '<s> stands before every context'
  one = tracing.prompt(marked, EDITS[0].text, EDITS[0].subject, 'Rome')
  assert (one.answer, one.tokens[0]) == (wanted[0], 1) and one.lo == 1


def test_a_request_that_has_no_tokens_or_too_many_is_refused_alone(bytewise):
  made = Tokenizer(models.BPE())
  made.pre_tokenizer = pre_tokenizers.Whitespace()
  made.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=99))
  good = Edit('{} is in the city of', 'the tower', 'Rome')
  _, kept, refused = rows.requests(made, [Edit('{} is', '北', 'Rome'), good])
  assert kept == [1] and 'has no token' in refused[0][1]
  with pytest.raises(UserError, match='has no token'):
    tracing.prompt(made, '北 is', '北')
  # The row fits, '{subject} is a' does not.
  long = Edit('{}', ' '.join(['the'] * 20), 'a')
  length = len(encoding.prompt(bytewise, long.text)[0]) + 1
  _, kept, refused = rows.requests(bytewise, [long, Edit('{} is', 'a', 'a')], length=length)
  assert kept == [1] and 'is a' in refused[0][1]
