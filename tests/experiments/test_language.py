"""Perplexities and continuations by the command, on a language model that is known by hand."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest

from cl_jax.masks import nest
from cl_jax.models import causal, decoder
from experiments import weights

WORDS = ('a', 'b', 'c', 'd', 'e', 'f', 'g', '</s>')
CONFIG = causal.Config(len(WORDS), 8, 1, 2, 2, 4, 64, theta=1e4, eps=1e-9)
SHARP = math.sqrt(8)  # the logit of the likely token: a one-hot embedding, normed to this length


@pytest.fixture
def folder(tmp_path):
  """A Llama that finds each token's successor (a b c d ...) likely: its layer adds nothing."""
  from tokenizers import Tokenizer, models, pre_tokenizers

  made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token='a'))
  made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  made.save(str(tmp_path / 'words.json'))
  config = CONFIG._replace(tied=False)
  leaves = {}
  for path, shape in causal.shapes(config).items():
    stacked = (1, *shape) if path.startswith('layers/') else shape
    leaves[path] = jnp.ones(stacked) if path.endswith('scale') else jnp.zeros(stacked)
  leaves['embed/tokens'] = jnp.eye(8)
  leaves['unembed/w'] = jnp.roll(jnp.eye(8), 1, 1)
  decoder.save(tmp_path / 'model', config, nest(leaves), tmp_path / 'words.json')
  return tmp_path / 'model'


def test_perplexity_is_that_of_the_first_blocks_without_their_first_tokens(call, folder, tmp_path):
  for name, text in (('likely', 'a b c d\n' * 30), ('mixed', 'a b a b\n' * 3 + 'a b c d\n' * 9)):
    (tmp_path / 'data/text/corpora' / name).mkdir(parents=True)
    (tmp_path / 'data/text/corpora' / name / 'test.txt').write_text(text)
  options = ('--length=4', '--blocks=3', f'--data_dir={tmp_path / "data"}')
  done = call(weights.main, 'perplexity', folder, *options)
  assert done.code == 0
  assert all(line.startswith('preparing tokens of ') for line in done.err.splitlines())
  rows = {row.split()[-1]: row.split()[:-1] for row in done.out.splitlines()[1:]}
  all_of = math.exp(SHARP) + 7
  right = math.log(all_of / math.exp(SHARP))
  wrong = math.log(all_of)
  assert list(rows) == ['likely', 'mixed'] and {row[2] for row in rows.values()} == {'9'}
  for name, nats in (('likely', right), ('mixed', (2 * right + wrong) / 3)):
    shown = [float(n) for n in rows[name][:2]]
    np.testing.assert_allclose(shown, [math.exp(nats), nats], atol=0.006)
  done = call(weights.main, 'perplexity', folder, *options, '--texts=mixed', '--blocks=0')
  (row,) = done.out.splitlines()[1:]
  assert row.split()[2:] == ['36', 'mixed']
  nats = (3 * (2 * right + wrong) + 9 * 3 * right) / 36
  assert float(row.split()[1]) == pytest.approx(nats, abs=0.006)


def test_a_continuation_ends_with_the_text(call, folder):
  done = call(weights.main, 'write', folder, 'f a b')
  assert (done.code, done.err) == (0, '') and done.out == 'f a b c d e f g\n'
  assert call(weights.main, 'write', folder, 'a b', '--tokens=2').out == 'a b c d\n'
  drawn = [
    call(weights.main, 'write', folder, 'a', '--temperature=9', f'--seed={s}').out for s in (0, 1)
  ]
  assert drawn[0] != drawn[1]


@pytest.mark.parametrize(
  ('words', 'match'),
  [
    (('write', 'MODEL', ''), 'PROMPT has no token'),
    (('write', 'MODEL', 'a', '--tokens=0'), '--tokens must be at least 1'),
    (('write', 'MODEL', 'a', '--tokens=99'), '100 tokens exceed the 64 positions'),
    (('write', 'nothing', 'a'), "no pretrained model 'nothing'"),
    (('perplexity', 'MODEL', '--length=1'), '--length must be at least 2'),
    (('perplexity', 'MODEL', '--texts=wiki', '--data_dir=.'), 'there is no corpus at'),
    (('perplexity', 'MODEL', '--data_dir=.'), 'there is no NAME/test.txt in'),
  ],
)
def test_mistakes_are_one_line(call, folder, words, match):
  done = call(weights.main, *(folder if w == 'MODEL' else w for w in words))
  assert (done.code, done.out) == (2, '') and match in done.line
  assert len(done.err.strip().splitlines()) == 1
