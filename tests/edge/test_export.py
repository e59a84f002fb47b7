"""Export and verify: parity on this machine and on emulated ones, budgets, digests, rows."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from cl_jax.edge import artefact, emulate, energy, parity, ram, targets, toolchain
from cl_jax.edge.c99_expr import literal
from cl_jax.errors import UserError
from experiments import edge, edge_rows, export, verify
from tests.edge.agent import need, run

TINY = """
from configs.common import words

CELLS = ('er', 'task')

def get_config(arg='er'):
  fields, methods = words(arg, 'class')
  return {
    **fields,
    'name': 'tiny',
    'seeds': (3, 4),
    'data': {'examples_per_class': 8, 'test_per_task': 12, 'test_batch': 12},
    'batch': 4,
    'epochs': 4,
    'ends_batch': 8,
    'model': {'name': 'mlp', 'sizes': (8,)},
    'optimizer': {'lr': 0.03},
    'head': 'task' if 'task' in arg else 'seen',
    'methods': methods,
    **({'er': {'capacity': 10, 'draw': 2}} if 'er' in methods else {}),
  }
"""
BARE = targets.TARGETS['cortex-m7']


@pytest.fixture(scope='module')
def tiny(tmp_path_factory) -> Path:
  path = tmp_path_factory.mktemp('edge') / 'tiny.py'
  path.write_text(TINY)
  return path


@pytest.fixture(scope='module')
def er(tiny) -> Path:
  """An exported learner; tests that change it take a copy."""
  need('host')
  folder = tiny.parent / 'er'
  assert export.main([f'--config={tiny}:er', f'--out={folder}', '--target=host,c99']) == 0
  return folder


@pytest.fixture
def copy(er, tmp_path) -> Path:
  return shutil.copytree(er, tmp_path / 'copy', ignore=shutil.ignore_patterns('build'))


def rewrite(folder: Path, files: dict[str, str], **changes) -> None:
  """The artefact with other files and entries of the manifest, and digests that fit."""
  manifest = json.loads((folder / 'manifest.json').read_text())
  old = {name: (folder / name).read_bytes() for name in manifest['files']}
  rest = {k: v for k, v in manifest.items() if k not in ('files', 'sha256', 'format')}
  artefact.write(folder, {**rest, **changes}, {**old, **files})


def test_two_learners_equal_jax_on_this_machine(tiny, capsys):
  """Also with another optimisation level; rows are written once, however often."""
  need('host')
  folder = tiny.parent / 'all'
  rows = folder / 'edge.csv'  # and not the committed file, unless that is asked for
  words = (f'--config={tiny}', f'--workdir={folder}', '--targets=host,c99')
  code, out, err = run(capsys, edge.main, *words, '--steps=8')
  assert code == 0, err
  assert out.count('bitwise') == 4
  code, _, err = run(
    capsys, verify.main, folder / 'er', '--steps=6', '--accuracy', f'--write={rows}'
  )
  assert code == 0, err
  with rows.open(newline='') as file:
    table = list(csv.DictReader(file))
  assert [(r['learner'], r['target'], r['steps']) for r in table] == [
    (f'{name} (tiny)', target, steps)
    for name, steps in (('er', '6'), ('naive', '8'))
    for target in ('host', 'c99')
  ]  # all but the learners of configs/edge.py say of which experiment they are
  for r in table:
    assert tuple(r) == edge_rows.COLUMNS
    assert float(r['parity_float']) <= 1e-5
    assert 0 <= float(r['accuracy']) <= 1
    assert int(r['peak_bytes']) > int(r['state_bytes']) > 0
    assert float(r['energy_uj_estimate']) > 0
    assert 'not counted' in r['note']


def test_accuracy_is_that_of_the_experiment(tiny, er):
  """The C99 program learns the whole stream and predicts what the run in JAX does."""
  import jax

  from cl_jax import loop
  from experiments import build, config

  read = artefact.read(er)
  resolved = config.tuples(read.manifest['config'])
  setup = build.prepare(resolved)[0]
  stream = setup.streams[0]
  hp = build.hyper(setup.config, stream)
  go = jax.jit(lambda key, stream: loop.run(setup.build, hp, key, stream, setup.weights))
  _, record = go(jax.random.key(3), jax.device_put(stream))
  made = export.subject(resolved)
  mine = verify.accuracy_of(read, made)
  assert mine == pytest.approx(float(np.mean(record.R[-1])), abs=1e-6)
  assert 0.15 < mine < 1  # better than chance


def test_manifest(er):
  manifest = json.loads((er / 'manifest.json').read_text())
  assert manifest['learner'] == 'er' and manifest['backend'] == 'c99'
  assert manifest['config']['seeds'] == [3] and len(manifest['config_sha256']) == 64
  assert manifest['logits'] == [4, 10] and manifest['outputs'] == 40
  names = {leaf['name'] for leaf in manifest['state']}
  assert {'params/l0/w', 'key', 'step'} <= names
  assert manifest['ram_bytes']['trainable'] == 4 * (784 * 8 + 8 + 8 * 10 + 10)
  assert manifest['ram_bytes']['batch'] == 4 * 784 + 3 * 16
  assert manifest['macs']['predict'] == 4 * (784 * 8 + 8 * 10)
  for part in ('step', 'predict', 'boundary'):
    assert 'stablehlo' in (er / f'{part}.mlir').read_text()
  blob = (er / 'state0.bin').read_bytes()
  assert len(blob) == manifest['state_bytes'] and artefact.fnv(blob) == manifest['state0_fnv']
  assert set(manifest['files']) == {p.name for p in er.iterdir()} - {'manifest.json', 'build'}


@pytest.mark.parametrize('name', ['state0.bin', 'learner.c', 'step.mlir', 'manifest.json'])
def test_a_tampered_artefact_is_refused(name, copy, capsys):
  data = bytearray((copy / name).read_bytes())
  at = data.index(b'"er"') + 1 if name == 'manifest.json' else len(data) // 2
  data[at] ^= 1
  (copy / name).write_bytes(data)
  code, _, err = run(capsys, verify.main, copy)
  assert code == 2
  assert name in err and 'sha256 differs' in err and err.count('\n') == 1


def test_a_missing_file_and_a_missing_artefact_are_refused(copy, tmp_path, capsys):
  (copy / 'agent.c').unlink()
  code, _, err = run(capsys, verify.main, copy)
  assert code == 2 and 'agent.c is missing' in err
  code, _, err = run(capsys, verify.main, tmp_path)
  assert code == 2 and 'run experiments.export' in err


def test_wrong_code_is_found(copy, capsys):
  """A learner whose C computes something else has another state, and the command fails."""
  need('host')
  source = copy / 'learner.c'
  text = source.read_text()
  rate, other = (literal(np.float32(v), 'f32') for v in (0.03, 0.031))
  changed = text.replace(rate, other)
  assert changed != text
  rewrite(copy, {'learner.c': changed})
  code, _, err = run(capsys, verify.main, copy, '--steps=4', '--targets=host')
  assert code == 3
  assert 'params/' in err and 'differs by' in err
  own = float(err.split('JAX moves by ')[1].split()[0])  # what rounding explains is less
  assert own < 1e-5


def test_one_byte_too_few_is_refused(tiny, er, tmp_path, capsys):
  """By arithmetic, which names what is large; what just fits is exported."""
  total = sum(json.loads((er / 'manifest.json').read_text())['ram_bytes'].values())
  words = (f'--config={tiny}:er', f'--out={tmp_path / "out"}', '--target=cortex-m7')
  ram.check(artefact.read(er).manifest, total, None, ram.STACK)
  code, _, err = run(capsys, export.main, *words, f'--ram={total - 1}')
  assert code == 2
  assert f'{total:,} bytes of RAM' in err and '1 too few' in err
  assert 'arena' in err and 'trainable' in err and err.count('\n') == 1


def test_the_linker_has_the_last_word(er):
  """It agrees with the arithmetic to the byte."""
  need('cortex-m7')
  read = artefact.read(er)
  total = sum(read.manifest['ram_bytes'].values())
  assert toolchain.build(read, BARE, ram=total).ram_bytes == total
  with pytest.raises(UserError, match='RAM overflowed by 1 bytes'):
    toolchain.build(read, BARE, ram=total - 1)
  with pytest.raises(UserError, match='FLASH overflowed'):
    toolchain.build(read, BARE, flash=4096)


def test_an_export_that_the_linker_refuses_is_none(tiny, tmp_path, capsys):
  need('cortex-m7')
  out = tmp_path / 'out'
  words = (f'--config={tiny}:naive', f'--out={out}', '--target=cortex-m7')
  code, _, err = run(capsys, export.main, *words, '--flash=2K')
  assert code == 2 and 'FLASH overflowed by' in err and err.count('\n') == 1
  code, _, err = run(capsys, verify.main, out)
  assert code == 2 and 'holds no exported learner' in err
  code, stdout, err = run(capsys, export.main, *words, '--flash=64K')
  assert code == 0 and 'linked' in stdout, err


@pytest.fixture(scope='module')
def verified(er) -> dict[str, edge_rows.Verified]:
  """What each target gave that has its tools here."""
  wanted = [t for t in targets.TARGETS.values() if not targets.absent(t)]
  return {v.target: v for v in verify.verify(artefact.read(er), wanted, 6)}


@pytest.mark.parametrize('name', [n for n in targets.TARGETS if n != 'host'])
def test_every_target(name, verified):
  """The state has the hash that it has here, on a machine with or without an operating system."""
  need('host', name)
  got, target = verified[name], targets.TARGETS[name]
  assert got.hash == verified['host'].hash
  assert not got.parity.differing and got.parity.error <= 1e-5 and got.logits <= 1e-5
  assert 1000 < got.image.code_bytes < 60_000
  program = targets.emulator(target)
  if program and emulate.counts(program):
    assert got.instructions is not None and 100_000 < got.instructions < 5_000_000
  if target.bare:
    assert got.stack is not None and 100 < got.stack <= ram.STACK


def test_too_small_a_stack_is_found(copy, capsys):
  need('cortex-m7')
  manifest = artefact.read(copy).manifest
  budget, parts = manifest['budget'] | {'stack': 136}, manifest['ram_bytes'] | {'stack': 136}
  rewrite(copy, {}, budget=budget, ram_bytes=parts)
  code, _, err = run(capsys, verify.main, copy, '--steps=2', '--targets=cortex-m7')
  assert code == 3 and 'stack' in err


def test_a_target_without_tools(er, capsys, monkeypatch):
  """Left out with its reason; a mistake only where it was named."""
  need('host')
  which = shutil.which
  monkeypatch.setattr(shutil, 'which', lambda name: None if 'riscv' in name else which(name))
  code, out, err = run(capsys, verify.main, er, '--steps=2', '--targets=host,riscv64')
  assert code == 2 and 'not verified: riscv64' in err
  assert 'riscv64: not verified: riscv64-linux-gnu-gcc and qemu-riscv64 are not installed' in out
  read = artefact.read(er)
  wanted = targets.find(['host', 'riscv64'])
  assert [v.target for v in verify.verify(read, wanted, 2)] == ['host']


@pytest.mark.parametrize(
  ('words', 'message'),
  [
    (('--target=cortex-m9',), "no target 'cortex-m9'"),
    (('--ram=lots',), '--ram must be a number of bytes'),
    (('--ram=',), '--ram must be a number of bytes'),
    (('--flash=',), '--flash must be a number of bytes'),
    (('--config.er.capasity=3',), 'config.er.capacity'),
    (('--speed=3',), '--speed=3'),
    (('--config.methods=slca',), r'Eigh at cl_jax/methods/heads/slca.py'),
  ],
)
def test_mistakes_are_one_line(words, message, tiny, tmp_path, capsys):
  code, _, err = run(
    capsys, export.main, f'--config={tiny}:er', f'--out={tmp_path / "out"}', *words
  )
  assert code == 2 and message in err and err.count('\n') == 1


@pytest.mark.parametrize('option', ['--time', '--install'])
def test_options_of_iree(option, tmp_path, capsys):
  artefact.write(
    tmp_path, {'backend': 'c99', 'targets': ['host'], 'state': []}, {artefact.STATE: b''}
  )
  code, _, err = run(capsys, verify.main, tmp_path, option)
  assert code == 2 and f'{option} is of IREE' in err and err.count('\n') == 1


def test_other_files_are_left_alone(tiny, tmp_path, capsys):
  (tmp_path / 'thesis.tex').write_text('x')
  code, _, err = run(capsys, export.main, f'--config={tiny}:er', f'--out={tmp_path}')
  assert code == 2 and 'holds other files' in err
  assert [p.name for p in tmp_path.iterdir()] == ['thesis.tex']
  outside = '{"format": 1, "sha256": "a", "files": {"../thesis.tex": {"sha256": "b"}}}'
  for foreign in (
    '{"name": "an extension of a browser"}',
    '{"format": 1, "files": {}}',
    'no JSON',
    outside,
  ):
    (tmp_path / artefact.MANIFEST).write_text(foreign)
    code, _, err = run(capsys, export.main, f'--config={tiny}:er', f'--out={tmp_path}')
    assert code == 2 and 'holds other files' in err
    assert (tmp_path / artefact.MANIFEST).read_text() == foreign


def test_nothing_of_an_older_artefact_is_left(tmp_path):
  about = {'backend': 'c99', 'targets': ['host'], 'state': []}
  artefact.write(tmp_path, about, {artefact.STATE: b'', 'old.c': 'int x;'})
  (tmp_path / '.new.c.7.part').touch()  # of an export that was killed
  artefact.write(tmp_path, about, {artefact.STATE: b'', 'new.c': 'int y;'})
  assert not (tmp_path / 'old.c').exists() and (tmp_path / 'new.c').exists()
  with pytest.raises(UserError, match='holds other files'):
    (tmp_path / 'mine.txt').touch()
    artefact.write(tmp_path, about, {artefact.STATE: b''})


def test_parity_measures():
  table = [{'name': 'n'}, {'name': 'w'}]
  n, w = np.array([1, 2], np.int32), np.array([1.0, 200.0, np.nan], np.float32)
  assert parity.compare(table, [n, w], [n, w]) == ((), 0.0, '')
  off = parity.compare(table, [n + 1, w + np.float32([0, 1, 0])], [n, w])
  assert off.differing == ('n',) and off.worst == 'w'
  assert off.error == pytest.approx(1 / 200, rel=1e-3)
  assert parity.difference(np.float32([1]), np.float32([np.nan])) == np.inf


def test_struct_and_energy():
  leaves = [('int8', 3), ('float32', 8), ('int8', 0)]
  assert ram.struct_bytes([{'dtype': d, 'bytes': n} for d, n in leaves]) == 16
  made = energy.estimate(1_000_000, 0)
  assert made.uj == pytest.approx(4.6) and made.low < made.uj < made.high
  assert energy.estimate(0, 8).uj == pytest.approx(10e-6)
  assert energy.estimate(1, 0, 'int8').uj is None
  assert energy.estimate(1, 1, level='dram').uj is None


def test_packages_are_named_where_they_cannot_be_installed(monkeypatch, capsys):
  which = shutil.which
  monkeypatch.setattr(shutil, 'which', lambda name: None if 'riscv' in name else which(name))
  monkeypatch.setattr('os.geteuid', lambda: 1000)
  edge.install(targets.find(['riscv64']))
  out = capsys.readouterr().out
  assert 'apt install gcc-riscv64-linux-gnu libc6-dev-riscv64-cross qemu-user' in out
  assert out.count('\n') == 1
