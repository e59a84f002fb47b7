"""Edits on a tiny Llama: among stages of learning, and with statistics of ever more text."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from cl_jax.editing import evaluate, statistics
from cl_jax.errors import UserError
from cl_jax.streams import cache, corpora
from experiments import (
  config,
  edit,
  edit_exam,
  edit_moments,
  edit_stages,
  edit_subject,
  results,
  run,
)
from tests.experiments.conftest import language_model
from tools import edit_stages as tables

pytestmark = pytest.mark.usefixtures('quickly')

SUBJECTS = ('Anna', 'Bert', 'Carla', 'Dirk')
PLACES = ('Rome', 'Oslo', 'Lima')
WORDS = (*SUBJECTS, *PLACES, *'the home of is lives in a city . The I You Therefore'.split())
DOMAIN = 'medical'
FIELDS = {
  'chains': 'edit-lora,lora-edit', 'edits': 3, 'batch': 3, 'prefixes': 1, 'prefix_tokens': 2, 'length': 24,
  'moments.tokens': 64, 'moments.block': 8, 'memit.layers': '(0,1)', 'memit.coef': 0.01,
  'memit.recipe.steps': 20, 'memit.recipe.clamp': 8.0, 'evaluate.blocks': 2, 'evaluate.block': 8,
  'evaluate.texts': f'wiki,{DOMAIN}', 'learn.domains': DOMAIN, 'learn.steps': 4,
  'learn.batch': 2, 'learn.length': 8,
}  # fmt: skip


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  """A data folder and, in it, a model of random weights."""
  folder = tmp_path_factory.mktemp('stages') / 'data'
  language_model(folder, WORDS)
  records = []
  # The subject ends the prompt: a random model moves little of it to later tokens.
  for i, subject in enumerate(SUBJECTS):
    wanted = {'prompt': 'the home of {}', 'subject': subject}
    wanted |= {'target_new': {'str': PLACES[i % 3]}, 'target_true': {'str': PLACES[(i + 1) % 3]}}
    near = [f'the home of {s}' for s in SUBJECTS if s != subject][:2]
    records.append({'case_id': i, 'requested_rewrite': wanted,
                    'paraphrase_prompts': [f'home of {subject}'], 'neighborhood_prompts': near})  # fmt: skip
  (folder / 'edit').mkdir()
  (folder / 'edit/counterfact_2000.jsonl').write_text('\n'.join(map(json.dumps, records)))
  for seed, name in enumerate(('wiki', DOMAIN)):
    (folder / f'text/corpora/{name}').mkdir(parents=True)
    for split in ('train', 'test'):
      draw = np.random.default_rng([seed, len(split)]).choice(WORDS, 200)
      (folder / f'text/corpora/{name}/{split}.txt').write_text(' '.join(draw))
  return folder


@pytest.fixture(scope='module', autouse=True)
def own_cache(tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('CL_JAX_CACHE', str(tmp_path_factory.mktemp('cache')))
    yield


def go(root, place, *words):
  argv = [f'--workdir={place}', f'--data_dir={root}', f'--config.model={root}/model']
  fields = [f'--config.{k}={v}' for k, v in FIELDS.items()]
  return edit_stages.main([*argv, *fields, *words])


def test_stages_that_chains_share_come_once():
  found = edit_stages.prefixes(['edit-lora', 'edit-full'], ['a', 'b'])
  assert ['-'.join(p) for p in found] == [
    '', 'edit', 'edit-lora.a', 'edit-lora.a-lora.b', 'edit-full.a', 'edit-full.a-full.b',
  ]  # fmt: skip


@pytest.mark.long
def test_every_stage_is_measured_and_a_stopped_command_goes_on(root, tmp_path, monkeypatch, capsys):
  place, real, count = tmp_path / 'run', run.run, []

  def interrupt(*args):
    count.append(1)
    if len(count) == 1:
      raise KeyboardInterrupt
    return real(*args)

  monkeypatch.setattr(edit_stages.run, 'run', interrupt)
  assert go(root, place) == 130
  assert [line['stages'] for line in results.read(place)] == [[], ['edit']]
  assert [p.parent.name for p in place.glob('seed0/*/model')] == [
    'edit'
  ]  # what comes next needs it
  assert go(root, place) == 0 and len(count) == 3
  found = {'-'.join(line['stages']): line for line in results.read(place)}
  chains = ['edit', 'edit-lora.medical', 'lora.medical', 'lora.medical-edit']
  assert [*found] == ['', *chains]
  # Edits write facts, wherever they stand, and learning moves what was there before it.
  for name, before in (('edit', ''), ('lora.medical-edit', 'lora.medical')):
    line = found[name]
    assert line['es'] == 1 and line['log_p_new'] > found[before]['log_p_new'] + 1
    assert line['rewrites'] == [1, 1, 1] and len(line['log_p_target']) == 3
  texts = {name: tuple(line['perplexity'].values()) for name, line in found.items()}
  assert len(set(texts.values())) == 5
  assert found['edit-lora.medical']['log_p_new'] == pytest.approx(
    found['edit']['log_p_new'], abs=0.5
  )
  assert found['lora.medical']['steps'] == 4
  # What the first line says is what is known of the model that all start from.
  subject = edit_subject.opened(f'{root}/model')
  blocks = corpora.blocks(root / 'text/corpora/wiki/test.txt', subject.file, 8)[:2]
  wiki = evaluate.perplexity(subject.config, subject.backbone, blocks)
  assert found['']['perplexity']['wiki'] == pytest.approx(wiki, rel=1e-4)
  monkeypatch.setattr(tables, 'STAGES', place / results.FILE)
  text = tables.staged()
  assert (
    '| the model as it was |' in text
    and '| LoRA medical → edits |' in text
    and '4 steps of 2 x 8' in text
  )
  # No model is left, and nothing is done again.
  assert {p.name for p in place.glob('seed0/*/*')} == {edit_stages.LINE}
  # The statistics of the first model stay for other commands, those of a model in between went with it.
  assert len([*(cache.directory() / 'editing').iterdir()]) == 1
  capsys.readouterr()
  assert go(root, place) == 0 and len(count) == 3
  assert 'edit-lora.medical, seed 0: s ' in capsys.readouterr().out


def bench_at(place, *fields):
  chosen = edit_stages.resolved('configs/edit_stages.py', [('learn.domains', 'a'), *fields])
  told: Any = SimpleNamespace(say=lambda line: None)
  return edit_stages.Bench(chosen, 0, place, place, 300.0, '', told)


def test_what_a_model_is_made_of_stays_until_it_is_there(tmp_path, monkeypatch):
  bench, prefix, none = bench_at(tmp_path), ('lora.a',), cast('edit_exam.Exam', None)
  folder = bench.folder(prefix)

  def learnt(*given):
    for name in ('run', edit_stages.MODEL):
      (folder / name).mkdir(parents=True, exist_ok=True)
    return {}

  monkeypatch.setattr(edit_stages, 'learnt', learnt)
  with monkeypatch.context() as patch:
    # As far as a kill there lets it come.
    patch.setattr(edit_stages.durable, 'write', lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      edit_stages.model_of(bench, none, prefix)
  assert (folder / 'run').exists()
  for _ in range(2):
    edit_stages.model_of(bench, none, prefix)
    assert [p.name for p in folder.iterdir()] == [edit_stages.MODEL]
    monkeypatch.setattr(edit_stages, 'learnt', lambda *given: 1 / 0)
    (folder / 'run').mkdir()


def test_a_kill_after_the_last_line_leaves_no_line_out_and_no_model(tmp_path):
  bench = bench_at(tmp_path, ('chains', 'lora'), ('editor', 'rome'), ('rome.layer', '2'))
  assert bench.chosen['editor'] == 'rome'
  sha = config.sha256(bench.chosen)
  for n, prefix in enumerate(((), ('lora.a',))):
    (bench.folder(prefix) / edit_stages.MODEL).mkdir(parents=True)
    line = json.dumps({'config_sha256': sha, 'n': n}) + '\n'
    (bench.folder(prefix) / edit_stages.LINE).write_text(line)
  edit_stages.whole(bench, ['lora'])
  assert [line['n'] for line in results.read(tmp_path)] == [0, 1]
  assert not [*tmp_path.glob('seed0/*/model')]
  with pytest.raises(UserError, match='another configuration'):
    edit_stages.whole(bench_at(tmp_path, ('chains', 'lora'), ('edits', '11')), ['lora'])


@pytest.mark.parametrize('words, said', [
  (('--config.chains=edit-prompt',), "'prompt' in 'edit-prompt' is no stage"),
  (('--only=full-*',), 'there are edit-lora lora-edit'),
  (('--config.apart=True',), 'all into one model'),
  (('--config.learn.steps=0',), 'learn.steps must be at least 1'),
  (('--config.learn.domain=law',), 'did you mean config.learn.domains'),
  (('--config.learn.domains=()',), "config.learn.domains is empty, and 'edit-lora'"),
  (('--config.learn.domains=law',), 'corpora/law/train.txt'),
  (('--config.learn.source=configs/study_ml.py',), 'config.learn.source: there is no file'),
])  # fmt: skip
def test_mistakes_get_one_line(root, tmp_path, capsys, words, said):
  assert go(root, tmp_path / 'x', *words) == 2
  assert said in capsys.readouterr().err


def test_moments_of_ever_more_text_and_what_is_written_with_them(
  root, tmp_path, monkeypatch, capsys
):
  own = {k: v for k, v in FIELDS.items() if k.split('.')[0] not in ('chains', 'learn')}
  fields = own | {
    'moments.tokens': 192,
    'moments.block': 3,
    'memit.coef': 0.5,
    'model': f'{root}/model',
  }
  argv = ['--config=configs/edit_counterfact.py:memit,3', '--moments', f'--data_dir={root}']
  argv += [f'--workdir={tmp_path}', *(f'--config.{k}={v}' for k, v in fields.items())]
  kept, real = [], edit_moments.beginnings
  monkeypatch.setattr(
    edit_moments, 'beginnings', lambda *args: kept.append(real(*args)) or kept[-1]
  )
  assert edit.main(argv) == 0
  about = json.loads((tmp_path / 'moments.json').read_text())
  points = about['points']
  assert [p['tokens'] for p in points] == [3, 6, 12, 24, 48, 96, 192]
  # The beginnings are those of the text, measured at once.
  subject = edit_subject.opened(f'{root}/model')
  blocks = edit_subject.moment_blocks(about['config'], subject, root)
  for found, n in ((kept[0][-1], 64), (kept[0][-2], 32), (kept[0][0], 1)):
    at_once = statistics.moments(subject.config, subject.backbone, blocks[:n], (0, 1))
    for layer in (0, 1):
      np.testing.assert_allclose(found.moment(layer), at_once.moment(layer), rtol=1e-5, atol=1e-8)
  half, whole = (kept[0][i].moment(1) for i in (-2, -1))
  wanted = np.linalg.norm(half - whole) / np.linalg.norm(whole)
  assert points[-2]['moment'][1] == pytest.approx(wanted, rel=1e-4)
  for name in ('moment', 'delta'):
    values = [np.mean(p[name]) for p in points if None not in p[name]]
    assert values[-1] == 0 < values[-2] < values[0]
  assert '192 tokens: E[kk^T] off by 0.000, what is written by 0.000' in capsys.readouterr().out
  monkeypatch.setattr(tables, 'MOMENTS', tmp_path / 'moments.json')
  assert f'| 96 | {points[-2]["moment"][0]:.3f} | {wanted:.3f} |' in tables.converged()
  with monkeypatch.context() as patch:  # what is finished is not read again
    patch.setattr(edit_subject, 'opened', lambda name: 1 / 0)
    assert edit.main(argv) == 0
  assert '192 tokens: E[kk^T] off by 0.000' in capsys.readouterr().out
  before = (tmp_path / 'moments.json').read_bytes()
  other = [*argv, '--config.memit.coef=0.25']
  assert edit.main(other) == 2
  assert 'another configuration (memit.coef: 0.5 / 0.25; there' in capsys.readouterr().err
  assert edit.main([w for w in other if w != '--moments']) == 2  # nor another command in its place
  (tmp_path / 'config.json').unlink()
  assert edit.main(other) == 2 and edit.main(argv) == 0
  assert (tmp_path / 'moments.json').read_bytes() == before
  assert edit.main([*argv, '--config.moments.tokens=96', f'--workdir={tmp_path}/short']) == 2
  assert 'fewer than the 64 that can be halved' in capsys.readouterr().err
  assert edit.main(['--moments', '--config=configs/edit_counterfact.py:rome,3', f'--workdir={tmp_path}/x',
                    f'--data_dir={root}', f'--config.model={root}/model']) == 2  # fmt: skip
  assert "what memit writes; config.editor is 'rome'" in capsys.readouterr().err
  assert edit.main(['--moments', '--grid']) == 2
  assert '--grid does not go with --moments' in capsys.readouterr().err
