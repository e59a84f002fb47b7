"""The main job on a tiny BERT of our own: all methods, resumed, interrupted, and told what is wrong."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from cl_jax.report.lines import sections
from cl_jax.streams import builtin, text
from configs import demo as study
from experiments import config, demo, options, pool
from experiments.answer import QUICK, answer, sentences

ROOT = Path(demo.__file__).resolve().parents[1]
D, FFN, DEPTH, WORDS = 8, 12, 2, 300
# One of every kind; a process for each takes seconds. `naive` and `er` are in the test that interrupts.
METHODS = ('ncm', 'joint', 'ewc', 'lwf', 'lora')
ONLY = f'--only={",".join(METHODS)}'

pytestmark = pytest.mark.usefixtures('started_quickly')


@pytest.fixture(scope='module')
def tiny(tmp_path_factory) -> Path:
  """A directory with a BERT of random weights, and a tokenizer of CLINC150's most frequent words."""
  tokenizers = pytest.importorskip('tokenizers', reason='needs the extra text')
  numpy = pytest.importorskip('safetensors.numpy', reason='needs the extra text')
  folder, rng = tmp_path_factory.mktemp('tiny'), np.random.default_rng(0)
  shapes = {
    'embeddings.word_embeddings.weight': (WORDS, D),
    'embeddings.position_embeddings.weight': (32, D),
    'embeddings.token_type_embeddings.weight': (2, D),
    'embeddings.LayerNorm.weight': (D,),
    'embeddings.LayerNorm.bias': (D,),
  }
  dense = {f'attention.self.{n}': (D, D) for n in ('query', 'key', 'value')}
  dense |= {
    'attention.output.dense': (D, D),
    'intermediate.dense': (FFN, D),
    'output.dense': (D, FFN),
  }
  for i in range(DEPTH):
    at = f'encoder.layer.{i}.'
    for name, shape in dense.items():
      shapes |= {f'{at}{name}.weight': shape, f'{at}{name}.bias': shape[:1]}
    for name in ('attention.output.LayerNorm', 'output.LayerNorm'):
      shapes |= {f'{at}{name}.weight': (D,), f'{at}{name}.bias': (D,)}
  tensors = {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}
  numpy.save_file(tensors, folder / 'model.safetensors')
  sizes = dict(vocab_size=WORDS, hidden_size=D, num_hidden_layers=DEPTH, num_attention_heads=2)
  sizes |= dict(intermediate_size=FFN, max_position_embeddings=32, type_vocab_size=2)
  (folder / 'config.json').write_text(
    json.dumps({'model_type': 'bert', 'hidden_act': 'gelu'} | sizes)
  )
  model = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token='[UNK]'))
  model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  trainer = tokenizers.trainers.WordLevelTrainer(
    vocab_size=WORDS, special_tokens=['[PAD]', '[UNK]'], show_progress=False
  )
  sentences = text.read(builtin.file('clinc150_train.jsonl.gz')).texts
  model.train_from_iterator(sentences, trainer)
  model.save(str(folder / 'tokenizer.json'))
  return folder


def command(tiny: Path, folder: Path, *more: str) -> list[str]:
  words = ['--quick', f'--model={tiny}', f'--workdir={folder}', *more]
  return [sys.executable, '-m', 'experiments.demo', *words]


@pytest.fixture(scope='module')
def done(tiny, tmp_path_factory):
  """(the directory of a demo of METHODS, what it printed)."""
  folder = tmp_path_factory.mktemp('demo') / 'all'
  ran = subprocess.run(command(tiny, folder, ONLY), cwd=ROOT, capture_output=True, text=True)
  assert ran.returncode == 0, ran.stdout + ran.stderr
  return folder, ran.stdout


def test_methods_run_and_are_reported(done):
  folder, out = done
  lines = [json.loads(line) for line in (folder / 'results.jsonl').read_text().splitlines()]
  runs = {(line['method'], line['scenario']) for line in lines}
  assert runs == {('naive', 'joint')} | {(m, 'class') for m in METHODS if m != 'joint'}
  assert len(lines) == len(METHODS) - 1 + len(study.CLOSED_SEEDS)
  assert all('task_test' not in line['needs'] for line in lines)  # no oracle anywhere
  first = out.splitlines()[1].split()[1]
  assert first in ('ncm:', 'joint-0:')  # what is started first; either may end first on this size
  for name in METHODS:
    assert f'({name})' in out and f'({name})' in (folder / 'table.md').read_text()
  assert (folder / 'report.html').stat().st_size > 50_000
  assert {p.name for p in (folder / 'figures').iterdir()} == {
    f'clinc150-class-{n}.png' for n in ('accuracy', 'bytes', 'matrices')
  }


def test_repeated_it_runs_nothing_again(done, tiny, capsys):
  folder, _ = done
  before = (folder / 'results.jsonl').read_bytes()
  begin = time.monotonic()
  assert demo.main(command(tiny, folder, ONLY)[3:]) == 0
  assert '0 of 5 runs to do' in capsys.readouterr().out and time.monotonic() - begin < 60
  assert demo.main(command(tiny, folder, '--only=ncm')[3:]) == 0
  assert (folder / 'results.jsonl').read_bytes() == before


@pytest.mark.long
def test_a_signal_stops_it_and_the_same_command_goes_on(tiny, tmp_path):
  words = command(tiny, tmp_path / 'cut', '--only=naive,er')
  # A suite that a shell started in the background ignores SIGINT, and its children would as well.
  heed = (
    'import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); '
    'os.execv(sys.argv[1], sys.argv[1:])'
  )
  process = subprocess.Popen(
    [sys.executable, '-c', heed, *words],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  limit, log = time.monotonic() + 300, None
  while log is None:  # whichever comes first: on one core they run one after the other
    assert process.poll() is None and time.monotonic() < limit
    time.sleep(0.05)
    logs = (tmp_path / 'cut').glob('*/log.txt')
    log = next((one for one in logs if 'leg 2/10' in one.read_text()), None)
  process.send_signal(signal.SIGINT)
  out, _ = process.communicate(timeout=300)
  assert process.returncode == 130 and 'the same command goes on' in out
  assert not list((tmp_path / 'cut').glob('*/results.jsonl'))
  ran = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
  assert ran.returncode == 0, ran.stdout + ran.stderr
  assert 'going on from' in log.read_text()


@pytest.fixture
def before(tiny, tmp_path, monkeypatch):
  """(command line of a demo whose results are there, its runs, those that are started, lines reported)."""
  words, started, reported = command(tiny, tmp_path, '--only=joint,naive')[3:], [], []
  work = planned(words)
  for w in work:
    resolved = options.parse([*w.argv], 'experiments.run', '').config
    line = {'config': resolved, 'config_sha256': config.sha256(resolved), 'seed': 0}
    w.folder.mkdir()
    (w.folder / 'results.jsonl').write_text(json.dumps(line) + '\n')
  monkeypatch.setattr(
    demo, 'processes', lambda todo, *rest: started.extend(todo) or contextlib.nullcontext(iter(()))
  )
  monkeypatch.setattr(demo, 'outcome', lambda w: '')
  monkeypatch.setattr(demo, 'finish', lambda lines, *rest: reported.extend(lines))
  return words, work, started, reported


def test_a_probe_that_was_cut_off_is_made_up_for(before):
  words, work, started, _ = before
  assert demo.main(words) == 0 and [w.name for w in started] == ['naive-0']
  (work[1].folder / 'probe.json').write_text('{"ncm": 0.5}\n')
  started.clear()
  assert demo.main(words) == 0 and not started


def test_what_was_not_asked_for_again_stays_in_the_report(before, capsys):
  words, _, started, reported = before
  assert demo.main([*words, '--only=joint']) == 0 and not started
  assert [line['config']['scenario'] for line in reported] == ['joint', 'class']
  reported.clear()
  assert demo.main([*words, '--only=ncm']) == 0 and [w.name for w in started] == ['ncm']
  assert len(reported) == 2
  words.remove('--quick')
  assert demo.main(words) == 2 and len(started) == 1
  error = capsys.readouterr().err
  assert error.count('\n') == 1 and 'joint-0 has results with another --quick or --model' in error


def test_a_run_that_fails_is_named_and_the_others_are_reported(done, tiny, tmp_path, capsys):
  folder = tmp_path / 'half'
  (folder / 'ncm').mkdir(parents=True)
  (folder / 'ncm' / 'config.json').write_text('{"not": "ours"}')
  (folder / 'ncm' / 'checkpoints').mkdir()  # something was computed there
  assert demo.main(command(tiny, folder, '--only=ncm,slda')[3:]) == 2
  out = capsys.readouterr().out
  assert 'ncm: failed' in out and 'another configuration' in out and '(slda)' in out


@pytest.mark.parametrize(
  ('words', 'said'),
  [
    (['--only=ncm,nothing'], "there is no 'nothing' here, but ncm, joint"),
    (['--seeds=0'], 'must be at least 1'),
    (['--model=no/such/model'], "no pretrained model 'no/such/model'"),
  ],
)
def test_mistakes_are_one_clear_line(words, said, capsys, tmp_path):
  assert demo.main([*words, f'--workdir={tmp_path}']) == 2
  error = capsys.readouterr().err
  assert error.count('\n') == 1 and said in error


def test_more_seeds_add_runs_and_keep_those_that_are_there(tiny, tmp_path):
  def names(*words):
    parser_words = command(tiny, tmp_path, *words)[3:]
    return [w.name for w in planned(parser_words)]

  once, twice = names(), names('--seeds=2')
  assert twice[: len(once)] == once and len(twice) == len(once) + len(study.TRAINED)
  assert once[:2] == ['ncm', 'joint-0']


def planned(words, monkey=pytest.MonkeyPatch):
  found = []
  with monkey.context() as m:
    m.setattr(demo, 'demo', lambda work, *rest: found.extend(work) or 0)
    assert demo.main(words) == 0
  return found


@pytest.mark.parametrize('name', study.METHODS)
def test_every_configuration_is_whole(name):
  whole = config.resolve(study.get_config(name))
  assert whole['data']['seed'] is None and whole['order'] == 'seed' and whole['by'] == 'domain'
  quick = config.resolve(study.get_config(f'quick,{name}'))
  assert quick['data']['examples_per_class'] < whole['data']['examples_per_class']
  if name in study.TRAINED and name != 'lora':
    assert whole['optimizer'] == config.resolve(study.get_config('naive'))['optimizer']


def test_the_sentences_follow_the_numbers(make, fade):
  forgets = [make('naive', R=fade(0, 0.2)), make('ncm', R=fade(0, 0.98)), make(scenario='joint')]
  said = sentences(sections(forgets)[0].groups)
  assert said[0].startswith('It forgets') and 'Trained on all at once' in said[0]
  assert 'Most is known at the end with nearest class mean' in said[1]
  keeps = sentences(sections([make('naive', R=fade(0, 0.99))])[0].groups)
  assert keeps[0].startswith('It hardly forgets') and len(keeps) == 1


def test_a_quick_run_claims_nothing(put, make):
  plain, markdown = answer(put(make()), quick=True)
  assert QUICK in plain and QUICK in markdown and 'It forgets' not in plain


def test_cores_are_dealt_out():
  assert pool.shares(frozenset(range(4)), 2) == [frozenset({0, 2}), frozenset({1, 3})]
  assert pool.shares(frozenset({3}), 2) == [frozenset({3})]
  assert len(pool.shares(frozenset(range(4)), 9)) == 4


def test_a_process_sees_its_own_cores_only(tmp_path):
  if not hasattr(os, 'sched_getaffinity'):
    pytest.skip('this machine cannot tie processes to cores')
  mine = pool.cores()
  one = frozenset({min(mine)})
  code = 'import os; print(sorted(os.sched_getaffinity(0)))'
  work = pool.Work('w', (0,), tmp_path, ('-c', code))
  assert pool.start(work, [sys.executable], one).wait() == 0
  assert work.last_words() == str(sorted(one)) and pool.cores() == mine
