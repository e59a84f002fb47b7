"""The editing command on a tiny Llama: whole runs, resuming, refusals, one fact by hand."""

from __future__ import annotations

import json
import re
import shutil
import signal
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from cl_jax import checkpoint
from cl_jax.editing import evaluate, rows, target, write
from cl_jax.editing import kept as kept_arrays
from cl_jax.editing.rows import Edit
from cl_jax.errors import UserError
from cl_jax.models import causal, decoder
from cl_jax.streams import corpora
from experiments import (
  config,
  edit,
  edit_config,
  edit_exam,
  edit_file,
  edit_measures,
  edit_rounds,
  edit_run,
  edit_state,
  edit_subject,
  results,
  run,
  study,
  weights,
)
from tests.compiling import quick

pytestmark = pytest.mark.usefixtures('quickly')

SUBJECTS = ('Anna', 'Bert', 'Carla', 'Dirk', 'Emil', 'Frieda')
OTHERS = ('Gert', 'Hanna')  # whom no request is about
PLACES = ('Rome', 'Oslo', 'Lima')
WORDS = (
  'the',
  'city',
  'of',
  'is',
  'a',
  'lives',
  'in',
  'home',
  'person',
  '.',
  'The',
  'Therefore',
  'I',
  'You',
)
TINY = causal.Config(40, 16, 4, 4, 2, 24, 64)
FAST = (
  '--config.evaluate.blocks=2', '--config.evaluate.block=8', '--config.evaluate.written=2',
  '--config.evaluate.tokens=4', '--config.moments.tokens=64', '--config.moments.block=8',
  '--config.prefix_tokens=2', '--config.prefixes=1', '--config.length=24',
  '--config.memit.layers=(1,2)', '--config.memit.coef=1.0', '--config.memit.recipe.steps=4',
)  # fmt: skip

ENCODE = quick(causal.encode, static_argnums=0)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  """A data folder and, in it, a model of random weights."""
  folder = tmp_path_factory.mktemp('edit')
  words = [*dict.fromkeys(('<|endoftext|>', *SUBJECTS, *PLACES, *WORDS))]
  tokenizer = Tokenizer(
    models.WordLevel({w: i for i, w in enumerate((*words, *OTHERS))}, unk_token='<|endoftext|>')
  )
  tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
  tokenizer.save(str(folder / 'tokenizer.json'))
  backbone = causal.draw(jax.random.key(0), TINY, 0.3)
  decoder.save(folder / 'model', TINY, backbone, folder / 'tokenizer.json')
  (folder / 'edit').mkdir()
  records = []
  for i, subject in enumerate(SUBJECTS):
    new, true = PLACES[i % 3], PLACES[(i + 1) % 3]
    wanted = {'prompt': 'the home of {} is', 'subject': subject}
    wanted |= {'target_new': {'str': new}, 'target_true': {'str': true}}
    near = [f'the home of {s} is' for s in OTHERS]
    records.append({'case_id': i, 'requested_rewrite': wanted,
                    'paraphrase_prompts': [f'{subject} lives in'], 'neighborhood_prompts': near})  # fmt: skip
  records.append({'case_id': 6, 'paraphrase_prompts': []})
  text = '\n'.join(map(json.dumps, records))
  (folder / 'edit/counterfact_2000.jsonl').write_text(text)
  for name in ('wiki', 'math'):
    (folder / f'text/corpora/{name}').mkdir(parents=True)
    for split in ('train', 'test'):
      draw = np.random.default_rng(len(name) + len(split)).integers(0, len(words), 200)
      text = ' '.join(words[i] for i in draw if i)
      (folder / f'text/corpora/{name}/{split}.txt').write_text(text)
  return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
  monkeypatch.setenv('CL_JAX_CACHE', str(tmp_path / 'cache'))


def go(root, place, *words, config='configs/edit_counterfact.py:memit,4'):
  argv = [
    f'--config={config}',
    f'--workdir={place}',
    f'--data_dir={root}',
    f'--config.model={root}/model',
  ]
  return edit.main([*argv, *FAST, *words])


def says(subject, p, prompts) -> np.ndarray:
  """log p [n, V] of what follows, by `causal.encode`, which knows nothing of rows; 6 tokens at most."""
  ids = [subject.tokenizer.encode(text, add_special_tokens=False).ids for text in prompts]
  tokens = jnp.array([row + [0] * (6 - len(row)) for row in ids])
  mask = jnp.array([[True] * len(row) + [False] * (6 - len(row)) for row in ids])
  h, _ = ENCODE(subject.config, p, {'tokens': tokens, 'mask': mask})
  last = h[jnp.arange(len(ids)), jnp.array([len(row) - 1 for row in ids])]
  return np.asarray(jax.nn.log_softmax(causal.unembed(subject.config, p, last), -1))


def scored(subject, p, e: Edit) -> tuple[float, ...]:
  """(ES, PS, NS) of an edit in one model; targets and truths are words."""
  wanted, other = (subject.tokenizer.token_to_id(word) for word in (e.target, e.truth))
  found = says(subject, p, [e.text, *e.paraphrases, *e.neighbours])
  new, n = found[:, wanted] > found[:, other], 1 + len(e.paraphrases)
  return float(new[0]), float(new[1:n].mean()), float(1 - new[n:].mean())


def test_a_run_measures_what_it_says(root, tmp_path, capsys):
  assert go(root, tmp_path / 'run') == 0
  (line,) = results.read(tmp_path / 'run')
  assert (line['edits'], line['mode'], line['editor'], line['asked']) == (4, 'batch', 'memit', 4)
  assert line['es'] >= line['before']['es'] and len(line['log_p']) == 4
  for name in ('es', 'ps', 'ns'):  # a value for every edit, whose mean is the measure
    assert len(line['by_edit'][name]) == 4
    assert np.mean(line['by_edit'][name]) == pytest.approx(line[name], abs=1e-4)
  assert line['refused'] == [['6', "the record lacks 'requested_rewrite'"]]
  assert set(line['perplexity']) == {'wiki', 'math'} and line['ge'] is not None
  # Two layers of 4 keys of 24 units and residuals of 16 channels, f32.
  assert line['state_bytes'] == 2 * 4 * (24 + 16) * 4
  assert line['statistics_bytes'] == 2 * 8 * 24 * 25 // 2  # a triangle of f64 for each
  assert 'memit, 4 edits (batch), seed 0' in capsys.readouterr().out
  assert go(root, tmp_path / 'run') == 0  # nothing is left to do
  assert len(results.read(tmp_path / 'run')) == 1


def test_statistics_of_fewer_rows(root, tmp_path, capsys):
  """A sketch of as many rows as units loses nothing, one of fewer says how much; each is kept by itself."""
  lines = []
  for n in (0, 24, 4):
    place = tmp_path / str(n)
    assert go(root, place, f'--config.moments.sketch={n}', '--config.evaluate.written=0') == 0
    lines += results.read(place)
  whole, exact, few = lines
  np.testing.assert_allclose(exact['log_p'], whole['log_p'], atol=1e-5)
  assert few['state_sha256'] != whole['state_sha256']
  assert few['statistics_bytes'] == 2 * 4 * 24 * 6 < whole['statistics_bytes']
  said = capsys.readouterr().err
  assert (
    'E[kk^T] of 24 rows: off by at most 0.000' in said
    and 'of 4 rows: off by at most 0.0' not in said
  )


def test_statistics_of_a_network_that_is_described_otherwise_are_measured_again(root, tmp_path):
  """As by another version of the library, whose files lie in the same cache."""
  assert go(root, tmp_path / 'run', '--config.evaluate.written=0') == 0
  (line,) = results.read(tmp_path / 'run')
  subject = edit_subject.opened(f'{root}/model')
  other = subject._replace(config=subject.config._replace(positions=subject.config.positions + 1))
  first, again = (
    edit_subject.moments_of(line['config'], one, root, print) for one in (subject, other)
  )
  assert all(np.array_equal(first[i], again[i]) for i in first)
  (place,) = (tmp_path / 'cache/editing').iterdir()
  assert len([*place.glob('*/moments.npz')]) == 2


def test_sequence_has_a_matrix_and_single_none(root, tmp_path):
  sequence = 'configs/edit_counterfact.py:memit,4,sequential'
  assert go(root, tmp_path / 'a', config=sequence) == 0
  (line,) = results.read(tmp_path / 'a')
  R = np.array(line['R'])
  assert R.shape == (4, 4) and [c['edits'] for c in line['curve']] == [1, 2, 3, 4]
  assert line['forgetting'] == pytest.approx(np.mean(R[:-1, :-1].max(0) - R[-1, :-1]))
  assert go(root, tmp_path / 'b', config=sequence.replace('sequential', 'single')) == 0
  (alone,) = results.read(tmp_path / 'b')
  assert alone['R'] == [] and alone['mode'] == 'single' and alone['perplexity'] == {}
  assert alone['state_bytes'] == line['state_bytes'] / 4
  # What it says of every edit is what a model says that has this edit alone, and not the first model.
  subject, chosen = edit_subject.opened(f'{root}/model'), alone['config']
  exam = edit_exam.prepare(chosen, subject, root, 0, print)
  editor = edit_subject.editor_of(chosen, subject, root, print)
  before, after = [], []
  for i, e in enumerate(exam.edits):
    one = rows.take(exam.requests, [i])
    writes, _, _ = editor.edit(subject.backbone, (), one, jax.random.key(0))
    before.append(scored(subject, subject.backbone, e))
    after.append(scored(subject, write.apply(subject.backbone, writes), e))
  assert [*zip(*(alone['by_edit'][k] for k in ('es', 'ps', 'ns')), strict=True)] == after != before


def test_forgetting_counts_facts_and_not_intervals():
  R = np.array([[1.0, 0.0, 0.0], [0.5, 1.0, 0.0], [0.5, 0.8, 1.0]])
  facts = edit_measures.facts_between(np.array([0, 9, 10, 12, 14, 15, 18, 19, 25]), [10, 20, 30])
  assert facts.tolist() == [2, 6, 1]
  assert edit_measures.forgetting(R, facts) == pytest.approx((2 * 0.5 + 6 * 0.2) / 8)
  assert edit_measures.forgetting(R[:1, :1], facts[:1]) is None


def signalled(monkeypatch, owner, name, at):
  """A list that grows with the calls of a function; SIGTERM comes with one of them, counted from 1."""
  real, calls = getattr(owner, name), []

  def counted(*args):
    calls.append(1)
    if len(calls) == at:
      signal.raise_signal(signal.SIGTERM)
    return real(*args)

  monkeypatch.setattr(owner, name, counted)
  return calls


def test_stopped_and_repeated_gives_the_same_bits(root, tmp_path, monkeypatch):
  config = 'configs/edit_counterfact.py:memit,4,sequential'
  assert go(root, tmp_path / 'whole', config=config) == 0
  count = signalled(monkeypatch, edit_run, 'edited', 2)
  assert go(root, tmp_path / 'cut', config=config) == 128 + signal.SIGTERM
  assert go(root, tmp_path / 'cut', config=config) == 0
  assert len(count) == 4  # two before, two after
  (one,), (two,) = results.read(tmp_path / 'whole'), results.read(tmp_path / 'cut')
  for name in ('state_sha256', 'R', 'curve', 'log_p', 'es', 'perplexity'):
    assert one[name] == two[name], name


def test_nan_keeps_what_was_before(root, tmp_path, monkeypatch, capsys):
  config = 'configs/edit_counterfact.py:memit,4,sequential'
  real, calls = edit_run.finite, []
  monkeypatch.setattr(
    edit_run, 'finite', lambda *a: calls.append(1) or (len(calls) != 3 and real(*a))
  )
  assert go(root, tmp_path / 'cut', config=config) == 3
  assert 'an edit after number 2 gave NaN' in capsys.readouterr().err
  assert (tmp_path / 'cut/seed0' / edit_state.FILE).exists()
  assert go(root, tmp_path / 'cut', config=config) == 0
  assert len(calls) == 3 + 2, 'two edits were kept'


def test_seconds_are_those_of_all_processes(root, tmp_path, monkeypatch):
  config = 'configs/edit_counterfact.py:memit,4,sequential'
  signalled(monkeypatch, edit_run, 'edited', 2)
  assert go(root, tmp_path / 'cut', config=config) == 128 + signal.SIGTERM
  path = tmp_path / 'cut/seed0' / edit_state.FILE
  about, arrays = kept_arrays.load(path)
  kept_arrays.save(
    path, about | {'clock': {**about['clock'], 'wall_s': 1e6, 'started': 'then'}}, arrays
  )
  assert go(root, tmp_path / 'cut', config=config) == 0
  (line,) = results.read(tmp_path / 'cut')
  assert line['wall_s'] > 1e6 and line['started'] == 'then' and line['compile_s'] < line['wall_s']


def test_an_edit_that_was_cut_goes_on_within(root, tmp_path, monkeypatch, capsys):
  """Two batches of two requests, a request a round; the signal comes at the first of the second batch."""
  words = ('--config.batch=2', '--config.memit.width=1')
  assert go(root, tmp_path / 'whole', *words) == 0
  count = signalled(monkeypatch, target, '_group', 3)
  assert go(root, tmp_path / 'cut', *words) == 128 + signal.SIGTERM
  assert 'stopped after 1 of 2 targets' in capsys.readouterr().err
  saved = tmp_path / 'cut/seed0' / edit_rounds.FILE
  whole = saved.read_bytes()
  saved.write_bytes(whole[:-40])
  assert go(root, tmp_path / 'cut', *words) == 2
  assert 'rounds.npz is damaged' in capsys.readouterr().err
  saved.write_bytes(whole)
  assert go(root, tmp_path / 'cut', *words) == 0
  assert len(count) == 4  # three before, one after
  (one,), (two,) = results.read(tmp_path / 'whole'), results.read(tmp_path / 'cut')
  for name in ('state_sha256', 'log_p', 'es', 'perplexity'):
    assert one[name] == two[name], name
  # What was saved of one edit is not taken for another's.
  (tmp_path / 'other/seed0').mkdir(parents=True)
  (tmp_path / 'other/seed0' / edit_rounds.FILE).write_bytes(whole)
  assert go(root, tmp_path / 'other', *words, '--config.memit.coef=2.0') == 0
  assert len(count) == 8


def test_merged_terms_are_as_many_bytes_as_the_matrices(root, tmp_path):
  config = 'configs/edit_counterfact.py:memit,4,sequential'
  assert go(root, tmp_path / 'a', '--config.undo=False', config=config) == 0
  assert go(root, tmp_path / 'b', config=config) == 0
  (one,), (two,) = results.read(tmp_path / 'a'), results.read(tmp_path / 'b')
  assert one['state_bytes'] == 2 * 24 * 16 * 4 and one['R'] == two['R']


def test_a_full_codebook_refuses_and_says_so(root, tmp_path):
  config = 'configs/edit_counterfact.py:grace,4'
  own = ('--config.grace.layer=2', '--config.grace.capacity=2', '--config.grace.steps=2',
         '--config.grace.eps=1e-6')  # fmt: skip
  rest = [w for w in FAST if 'memit' not in w]
  argv = [
    f'--config={config}',
    f'--workdir={tmp_path}',
    f'--data_dir={root}',
    f'--config.model={root}/model',
  ]
  assert edit.main([*argv, *rest, *own]) == 0
  (line,) = results.read(tmp_path)
  assert line['refused_by_editor'] == 2 and line['ge'] is not None
  assert [why for _, why in line['refused']].count(edit_run.FULL) == 2


def test_saved_state_is_refused_when_tampered_with(root, tmp_path):
  state = {'a': np.ones(3, np.float32)}
  edit_state.save(tmp_path, edit_state.Saved({'config_sha256': 'x', 'done': 1}, [], state))
  of = {'config_sha256': 'x'}
  found = edit_state.restore(tmp_path, of, {'a': np.zeros(3, np.float32)})
  assert found is not None and found.about['done'] == 1 and found.state['a'].tolist() == [1, 1, 1]
  with pytest.raises(UserError, match='config_sha256'):
    edit_state.restore(tmp_path, {'config_sha256': 'y'}, state)
  with pytest.raises(UserError, match='another editor'):
    edit_state.restore(tmp_path, of, {'a': np.ones(4, np.float32)})
  path = tmp_path / edit_state.FILE
  content = bytearray(path.read_bytes())
  content[content.index(state['a'].tobytes())] ^= 1
  path.write_bytes(content)
  with pytest.raises(UserError, match='damaged'):
    edit_state.restore(tmp_path, of, state)


def test_terms_from_a_file_add_up_to_the_same_bits():
  """Of many ranks, whose products NumPy and XLA round in different ways."""
  draw = np.random.default_rng(0)
  first = {'layers': {'down': {'w': jnp.asarray(draw.normal(size=(2, 24, 16)), jnp.float32)}}}
  terms = [
    write.factors(draw.normal(size=(24, 40)), draw.normal(size=(40, 16)), 'layers/down/w', i, 'float32')
    for i in (0, 1, 0)
  ]  # fmt: skip
  again = edit_state.unpacked(*edit_state.packed(terms))
  one, two = (write.apply(first, t)['layers']['down']['w'] for t in (terms, again))
  assert np.array_equal(one, two)


def test_facts_or_a_model_that_have_changed_do_not_go_on(root, tmp_path, monkeypatch, capsys):
  """A configuration names them, and what it names may be another thing when the command is repeated."""
  facts, model = tmp_path / 'facts.jsonl', tmp_path / 'model'
  shutil.copytree(root / 'model', model)
  record = {'prompt': 'the home of {} is', 'target': 'Oslo', 'truth': 'Rome'}
  record |= {'portability': [['the city of Anna is', 'Lima']]}
  lines = [json.dumps(record | {'subject': s}) for s in ('Anna', 'Bert')]
  facts.write_text('\n'.join(lines))
  words = (f'--config.data={facts}', f'--config.model={model}', '--config.evaluate.texts=wiki')
  sequence = 'configs/edit_counterfact.py:memit,2,sequential'
  with monkeypatch.context() as patch:
    patch.setattr(edit_run, 'perplexities', lambda *args: 1 / 0)  # with all edits made and saved
    assert go(root, tmp_path / 'a', '--save_every=0', *words, config=sequence) == 3
  facts.write_text('\n'.join([lines[0], lines[1].replace('Bert', 'Emil')]))
  capsys.readouterr()
  assert go(root, tmp_path / 'a', *words, config=sequence) == 2
  assert 'is of another requests' in capsys.readouterr().err
  facts.write_text('\n'.join(lines))
  backbone = causal.draw(jax.random.key(1), TINY, 0.3)
  decoder.save(tmp_path / 'other', TINY, backbone, root / 'tokenizer.json')
  shutil.rmtree(model)
  (tmp_path / 'other').rename(model)
  assert go(root, tmp_path / 'a', *words, config=sequence) == 2
  assert 'is of another ' in capsys.readouterr().err
  shutil.rmtree(model)
  shutil.copytree(root / 'model', model)
  assert go(root, tmp_path / 'a', *words, config=sequence) == 0
  (line,) = results.read(tmp_path / 'a')
  assert line['cases'] == ['0', '1'] and len(line['by_edit']['es']) == 2
  assert line['portability'] is not None and line['ns'] is None


def test_edits_apart_start_from_a_fresh_state(root, tmp_path, monkeypatch):
  seen = []

  def edit_none(backbone, state, requests, key):
    seen.append(int(state))
    return [], state + 1, {}

  made = write.Editor(lambda backbone: jnp.array(0), edit_none)
  monkeypatch.setattr(edit_run, 'editor_of', lambda *args: made)
  single = 'configs/edit_counterfact.py:none,3,{}'
  words = [w for w in FAST if 'memit' not in w]
  for how, wanted in (('single', [0, 0, 0]), ('sequential', [0, 1, 2])):
    asked = (f'--config={single.format(how)}', f'--workdir={tmp_path}/{how}', f'--data_dir={root}')
    assert edit.main([*asked, f'--config.model={root}/model', *words]) == 0
    assert seen == wanted
    seen.clear()


def test_points_are_as_many_as_asked_for():
  assert [sorted(edit_run.points(10, 3, n)) for n in (1, 2, 3, 9)] == [
    [10], [3, 10], [3, 9, 10], [3, 6, 9, 10]
  ]  # fmt: skip


def test_edited_model_can_be_edited_again(root, tmp_path):
  assert go(root, tmp_path / 'a', f'--save_model={tmp_path}/new') == 0
  asked = ('--config=configs/edit_counterfact.py:none,4', f'--config.model={tmp_path}/new')
  rest = [w for w in FAST if 'memit' not in w]
  assert edit.main([*asked, f'--workdir={tmp_path}/b', f'--data_dir={root}', *rest]) == 0
  (one,), (two,) = results.read(tmp_path / 'a'), results.read(tmp_path / 'b')
  assert two['es'] == one['es'] and two['ns'] == one['ns']


def test_edits_are_undone(root, tmp_path, capsys):
  """Without the last batch a model has the bits of a run that ended before it, and without all its own."""
  sequence = 'configs/edit_counterfact.py:memit,{},sequential'
  file = tmp_path / 'edits.npz'
  kept, model = f'--save_edits={file}', f'--save_model={tmp_path}/all'
  assert go(root, tmp_path / 'a', kept, model, config=sequence.format(3)) == 0
  assert go(root, tmp_path / 'b', f'--save_model={tmp_path}/two', config=sequence.format(2)) == 0

  def digest(words, out):
    assert weights.main(['edits', str(file), f'--out={out}', *words]) == 0
    return checkpoint.digest(decoder.load(out)[1])

  def loaded(name):
    return checkpoint.digest(decoder.load(tmp_path / name)[1])

  assert digest([], tmp_path / 'c') == loaded('all')
  assert digest(['--without=2'], tmp_path / 'd') == loaded('two') != loaded('all')
  assert digest(['--without=0,1,2'], tmp_path / 'e') == checkpoint.digest(
    decoder.load(root / 'model')[1]
  )
  # One in the middle: the terms of the others.
  about, arrays = kept_arrays.load(file)
  assert about['counts'] == [2, 2, 2]
  first = decoder.load(root / 'model')[1]
  terms = [
    (name, layer, arrays[f'left{i}'] @ arrays[f'right{i}'])
    for i, (name, layer) in enumerate(about['terms'])
    if i not in (2, 3)
  ]
  down = np.array(first['layers']['down']['w'])
  for name, layer, term in terms:
    assert name == 'layers/down/w'
    down[layer] += term
  assert digest(['--without=1'], tmp_path / 'f')
  found = decoder.load(tmp_path / 'f')[1]['layers']['down']['w']
  np.testing.assert_allclose(found, down, rtol=1e-6, atol=1e-7)
  assert len(terms) == 4 and '2 of 3 edits by memit' in capsys.readouterr().out
  for words, said in (
    (['--without=3'], 'has batches 0 to 2'),
    (['--without=x'], 'numbers of batches'),
    ([f'--model={tmp_path}/all'], 'another backbone'),
  ):
    assert weights.main(['edits', str(file), f'--out={tmp_path}/g', *words]) == 2
    assert said in capsys.readouterr().err
  assert weights.main(['edits', str(tmp_path / 'no'), f'--out={tmp_path}/g']) == 2
  assert '--save_edits' in capsys.readouterr().err
  assert go(root, tmp_path / 'a', kept, config=sequence.format(3)) == 2
  assert 'comes too late' in capsys.readouterr().err


@pytest.mark.parametrize('words, said', [
  (('--save_model=m', '--config.editor=grace', '--config.grace.layer=2'), 'changes the forward pass'),
  (('--save_edits=m', '--config.apart=True', '--config.batch=1'), 'a model of its own'),
  (('--save_edits=m', '--config.undo=False'), 'config.undo=False'),
  (('--save_model=m', '--config.seeds=0,1'), 'take one'),
  (('--save_model=m', '--grid'), 'does not go with --grid'),
  (('--save_edits=m', '--trace=2'), 'does not go with --trace'),
])  # fmt: skip
def test_what_cannot_be_saved_is_refused_before(root, tmp_path, capsys, monkeypatch, words, said):
  monkeypatch.setattr(edit_exam, 'prepare', lambda *args: pytest.fail('something was computed'))
  own = [w for w in FAST if 'memit' not in w or '--config.editor=grace' not in words]
  argv = ['--config=configs/edit_counterfact.py:memit,4', f'--workdir={tmp_path}/x', *own, *words]
  argv += [f'--data_dir={root}', f'--config.model={root}/model']
  assert edit.main(argv) == 2
  assert said in capsys.readouterr().err


def test_other_families_are_refused_before(root, tmp_path, monkeypatch):
  """GPT-2 and GPT-J can be edited and not be written."""
  subject = edit_subject.opened(str(root / 'model'))
  subject = subject._replace(config=subject.config._replace(norm='layer'))
  chosen = edit.resolved('configs/edit_counterfact.py:memit,4', [])
  edit_file.writable(chosen, subject, None, tmp_path)
  with pytest.raises(UserError, match='Llama family'):
    edit_file.writable(chosen, subject, tmp_path, None)


def test_what_is_edited_is_no_neighbour_and_not_edited_twice():
  one = rows.Edit('the home of {} is', 'Anna', 'Rome', 'Oslo', case='1',
                  neighbours=('the home of Bert is', 'the home of Gert is'))  # fmt: skip
  two = rows.Edit('the home of {} is', 'Bert', 'Lima', answers=('Oslo', 'Rome'), case='2',
                  neighbours=('the home of Hanna is', 'the home of Anna is'))  # fmt: skip
  again = rows.Edit('the {} of Anna is', 'home', 'Lima', case='3')
  picked, refused = edit_exam.distinct([one, two, again])
  assert picked == [one, two]
  assert refused == [('3', "'the home of Anna is' is requested already, by 1")]
  found, left = edit_exam.left_alone(picked, picked)
  assert [e.neighbours for e in found] == [('the home of Gert is',), ('the home of Hanna is',)]
  assert [e.answers for e in found] == [(), ('Oslo',)]
  assert left == [('1', 'the home of Bert is'), ('2', 'the home of Anna is')]


def test_what_a_run_has_learnt_can_be_edited(root, tmp_path, capsys):
  """The merged model says of the test text what the run's matrix says of it."""
  stages = tmp_path / 'stages'
  words = {
    'dataset': 'corpora:wiki+math', 'order': 'fixed', 'data.length': 8, 'data.test_per_task': None,
    'iterations': 3,
    'batch': 2, 'ends_batch': 2, 'chunk': 3, 'model.pretrained': root / 'model', 'optimizer.lr': 0.05,
  }  # fmt: skip
  fields = [f'--config.{k}={v}' for k, v in words.items()]
  argv = [
    '--config=configs/study_lm.py:lora,naive',
    f'--workdir={stages}',
    f'--data_dir={root}',
    *fields,
  ]
  assert run.main(argv) == 0
  (line,) = results.read(stages)
  out = tmp_path / 'merged'
  assert weights.main(['merge', str(stages), f'--out={out}', f'--data_dir={root}']) == 0
  subject = edit_subject.opened(str(out))
  for task, name in enumerate(('wiki', 'math')):
    blocks = corpora.blocks(root / f'text/corpora/{name}/test.txt', subject.file, 8)
    found = evaluate.perplexity(subject.config, subject.backbone, blocks)
    assert np.log(found) == pytest.approx(-line['R'][-1][task], abs=2e-5)
  assert weights.main(['merge', str(tmp_path), f'--out={out}']) == 2
  assert 'not the --workdir of a run' in capsys.readouterr().err


def test_by_hand(root, capsys):
  """What the first model says, and below it what the edited one does."""
  argv = [
    f'--config.model={root}/model', f'--data_dir={root}', *FAST, '--config.memit.coef=0.01',
    '--config.memit.recipe.steps=20', '--config.memit.recipe.clamp=8.0',
    # The subject ends the prompt: a random model moves little of it to later tokens.
    '--subject=Anna', '--prompt=the home of {}', '--target=Oslo', '--paraphrase=home of Anna',
    '--neighbour=Bert lives in',
  ]  # fmt: skip
  assert edit.main(argv) == 0
  out = capsys.readouterr().out.splitlines()
  assert [line.split(':')[0] for line in out if not line.startswith(' ')] == [
    'prompt', 'paraphrase', 'neighbour', 'memit',
  ]  # fmt: skip
  before, after = (
    [re.findall(r"'(\S*)' (\S+)", line) for line in out if line.startswith(f'  {name} ')]
    for name in ('before', 'after')
  )
  subject = edit_subject.opened(f'{root}/model')
  texts = [line.split(': ')[1] for line in out if not line.startswith(' ')][:3]
  first = np.exp(says(subject, subject.backbone, texts))
  printed = [[float(p) for _, p in best] for best in before]
  np.testing.assert_allclose(printed, -np.sort(-first)[:, :5], atol=6e-4)
  oslo = subject.tokenizer.token_to_id('Oslo')
  for i in range(2):
    assert float(dict(after[i])['Oslo']) > first[i, oslo] + 0.1
  assert len(after) == 3


def test_facts_that_the_model_says_are_known(root, monkeypatch):
  """Those whose truth is what it says by itself, all of its words; of the others it is told why not."""
  subject, told = edit_subject.opened(f'{root}/model'), []
  facts = [
    Edit(prompt, s, 'Lima', case=f'{i}{s}')
    for i, prompt in enumerate(('the home of {} is', 'in {} the city is'))
    for s in SUBJECTS
  ]
  best = says(subject, subject.backbone, [e.text for e in facts]).argmax(-1)
  words = [subject.tokenizer.id_to_token(int(i)) for i in best]
  known = [replace(e, truth=word) for e, word in zip(facts, words, strict=True) if word]
  more = says(subject, subject.backbone, [f'{known[0].text} {known[0].truth}']).argmax()
  assert subject.tokenizer.token_to_id('Rome') not in (more, *best)
  false = [replace(known[0], truth=f'{known[0].truth} Rome', case='half')]
  false += [replace(e, truth='Rome', case=f'not {e.case}') for e in known[:2]]
  every = [*known[:3], *false, facts[0], *known[3:]]  # of that one there is no truth
  ask = evaluate.asker(subject.config)
  monkeypatch.setattr(evaluate, 'asker', lambda config: ask)

  def choose(n, seed=0):
    chosen = {'known': True, 'edits': n, 'length': 24, 'data': 'known'}
    return edit_exam.choose(chosen, subject, every, seed, told.append)

  picked, unknown = choose(len(known))
  assert len(picked) == len(known) > 5 and set(picked) == set(known)
  assert unknown == len(false)
  firsts = [every[i] for i in np.random.default_rng(0).permutation(len(every)) if every[i].truth]
  until = [e in known for e in firsts].index(True)
  assert choose(1) == ([firsts[until]], until), 'those before enough were found'
  told.pop()
  assert told == [f'{len(known)} of {len(known) + 3} facts are what the model says anyway']
  few = [choose(3, seed)[0] for seed in range(2)]
  assert few[0] == picked[:3] and few[1] != few[0] and set(few[1]) < set(known)
  every[:] = [replace(e, truth='') for e in every]
  with pytest.raises(UserError, match='config.known: known has no truths'):
    choose(1)
  every[:] = known
  n = len(known) + 1
  with pytest.raises(UserError, match=f'config.edits={n}, and there are {n - 1} in known'):
    choose(n)


@pytest.mark.parametrize(
  'words, said',
  [
    (('--config.memmit.coef=1',), 'memit'),
    (('--config.editor=rom',), 'did you mean rome'),
    (('--config.edits=9',), 'there are 6 in counterfact'),
    (('--config.data=facts',), 'counterfact'),
    (('--config.memit.layers=(3,9)',), 'layers 0 to 3'),
    (('--config.moments.tokens=100000',), 'tokens'),
    (('--config.batch=7',), 'more than config.edits'),
    (('--confg.batch=7',), 'not understood'),
    (('--subject=Anna',), 'needs all of'),
    (('--workers=2',), '--workers is of --grid'),
    (('--only=memit*',), '--only is of --grid'),
    (('--grid', '--workers=-1'), '--workers must be at least 1'),
    (('--paraphrase=who',), 'give --subject too'),
    (('--save_every=nan',), '--save_every must be'),
    (('--config=configs/edit_counterfact.py:alphedit,4',), "'alphedit' is no word"),
    (('--config.length=3',), 'none of 4 edits'),
    (('--config.moments.sketch=-1',), 'at least 0'),
    (('--config.moments.block=0',), 'config.moments.block must be at least 1; got 0'),
    (('--config.moments.tokens=0',), 'config.moments.tokens must be at least 1; got 0'),
    (('--config.evaluate.block=1',), 'config.evaluate.block must be at least 2; got 1'),
    (('--config.moments.sketch=25',), 'between 0 and 24'),
    (('--config.seeds=()',), 'config.seeds names no seed'),
    (('--config.memit.recipe.steps=0',), 'config.memit.recipe.steps must be at least 1; got 0'),
    (('--config.memit.coef=-5',), 'config.memit.coef must be above 0; got -5'),
    (('--config.memit.width=0',), 'config.memit.width must be at least 1'),
    (('--config.data=none.jsonl',), 'no edits at none.jsonl'),
  ],
)
def test_mistakes_get_one_line(root, tmp_path, capsys, words, said):
  assert go(root, tmp_path / 'x', *words) == 2
  (line,) = [r for r in capsys.readouterr().err.splitlines() if r.startswith('experiments.edit:')]
  assert said in line


def test_texts_are_looked_up_before_anything_is_edited(root, tmp_path, monkeypatch, capsys):
  """A mistake in their names is put right in the same place; where edits are apart, none is asked for."""
  with monkeypatch.context() as patch:
    patch.setattr(edit_run, 'prepare', lambda *args: pytest.fail('something was computed'))
    assert go(root, tmp_path, '--config.evaluate.texts=wiki,maths') == 2
  line = capsys.readouterr().err
  assert 'no corpus at' in line and 'maths' in line and 'there are math, wiki' in line
  assert go(root, tmp_path, '--config.evaluate.texts=wiki', '--config.evaluate.written=0') == 0
  (line,) = results.read(tmp_path)
  assert [*line['perplexity']] == ['wiki']
  chosen = {**line['config'], 'apart': True, 'evaluate': {'texts': ('maths',)}}
  assert edit_measures.texts(chosen, edit_subject.opened(f'{root}/model'), root) == {}


@pytest.mark.parametrize('prompt, subject, target, said', [
  ('the home of Anna is', 'Anna', 'Oslo', 'one {}'),
  ('the home of {} is', ' ', 'Oslo', 'subject is empty'),
  ('the home of {} is', 'Anna', '', 'target is empty'),
])  # fmt: skip
def test_one_bad_request_is_refused_alone(root, prompt, subject, target, said):
  from cl_jax.streams import tokenizer

  made = tokenizer.load(root / 'tokenizer.json')
  good = rows.Edit('the home of {} is', 'Bert', 'Rome')
  bad = rows.Edit(prompt, subject, target)
  _, kept, refused = rows.requests(made, [bad, good])
  assert kept == [1] and said in refused[0][1]


def test_no_data_is_said(tmp_path, capsys, monkeypatch):
  monkeypatch.delenv('CL_JAX_DATA', raising=False)
  assert edit.main(['--config=configs/edit_counterfact.py', f'--workdir={tmp_path}']) == 2
  assert '--data_dir' in capsys.readouterr().err


@pytest.mark.parametrize('name', ['edit_counterfact', 'edit_known', 'edit_zsre'])
def test_every_cell_of_a_grid_is_a_configuration(name):
  module, path, _ = study.found(f'configs/{name}.py')
  for cell in module.CELLS:
    resolved = edit_config.resolve(config.load(f'{path}:{cell}'))
    word = cell.split(',')[0]
    assert (resolved['label'], resolved['editor']) == (word, word.split('_')[0])
    assert resolved['editor'] in edit_config.names() and resolved['name'] == name
    assert edit_run.mode(resolved) in (*cell.split(','), 'batch')


def test_editors_are_found_by_module():
  assert {'rome', 'memit', 'pmet', 'alphaedit'} <= set(edit_config.names())


def test_the_same_editor_keeps_its_arguments():
  chosen = edit.resolved('configs/edit_counterfact.py:memit,10', [('editor', 'memit')])
  assert chosen == edit.resolved('configs/edit_counterfact.py:memit,10', [])


def test_another_editor_takes_the_label_with_it():
  chosen = edit.resolved('configs/edit_counterfact.py:finetune_l,10', [('editor', 'lora')])
  assert (chosen['editor'], chosen['label']) == ('lora', '') and 'finetune' not in chosen
