"""A device that loses its power while it saves: on this machine, and on an emulated Cortex-M7."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cl_jax.edge import artefact, emulate, power, ram, slots, targets, toolchain
from cl_jax.edge.c99 import emit
from cl_jax.errors import Fault
from experiments import config, device, edge_calls, export
from tests.edge.agent import need

TINY = """
from configs.common import words

def get_config(arg='er'):
  fields, methods = words(arg, 'class')
  return {
    **fields,
    'name': 'tiny',
    'seeds': (3,),
    'data': {'examples_per_class': 4, 'test_per_task': 8, 'test_batch': 8},
    'batch': 2,
    'epochs': 7,
    'ends_batch': 8,
    'model': {'name': 'mlp', 'sizes': (12,)},
    'optimizer': {'lr': 0.1},
    'head': 'seen',
    'methods': methods,
    'er': {'capacity': 12, 'draw': 2},
  }
"""
M7, HOST = targets.TARGETS['cortex-m7'], targets.TARGETS['host']


@pytest.fixture(scope='module')
def tiny(tmp_path_factory) -> Path:
  path = tmp_path_factory.mktemp('device') / 'tiny.py'
  path.write_text(TINY)
  return path


@pytest.fixture(scope='module')
def told(tiny) -> tuple[Path, dict]:
  """What the command found, on this machine and with the whole stream."""
  need('host')
  out = tiny.parent / 'out'
  words = [f'--config={tiny}', f'--out={out}', '--target=host', '--steps=6', '--every=3', '--whole']
  assert device.main([*words, '--ram=128K', f'--write={tiny.parent / "found.jsonl"}']) == 0
  (line,) = (tiny.parent / 'found.jsonl').read_text().splitlines()
  return out, json.loads(line)


def test_every_cut_ends_with_the_state_of_the_run_without_one(told):
  _, found = told
  assert len(found['cuts']) == len(power.moments(100, 2)) + 1
  assert {cut['hash'] for cut in found['cuts']} == {found['hash']}
  assert [cut['slot'] for cut in found['cuts'][:6]] == [0, 1] * 3  # the older one, which is whole
  assert [cut['boots'] for cut in found['cuts']] == [2] * 6 + [3]
  assert found['cuts'][0]['position'] == 0 < found['cuts'][1]['position']


def test_the_whole_stream_is_what_jax_learns(told):
  """140 steps, five boundaries, and a power cut in the save after 100 calls."""
  _, found = told
  assert len(found['accuracy']) == len(found['accuracy_jax']) == 5
  assert found['calls'] == 5 * 28 + 5 and found['boots'] == 2
  assert found['float_error'] <= 1e-5 and found['float_error_end'] < 1e-3
  assert sum(found['accuracy']) / 5 > 0.15  # better than chance


def test_saves_and_position_survive_boots(told):
  """A finished device that is switched on again has nothing to do, and keeps its state."""
  out, _ = told
  read = artefact.read(out)
  made = export.subject(config.tuples(read.manifest['config']))
  stream = emulate.stream_of(edge_calls.calls_of(made, 6))
  image = toolchain.build(read, HOST, program='device', defines=('DEVICE_EVERY=3',))
  table = read.manifest['state']
  one = power.boot(image, HOST, slots.pack(table, read.leaves), stream)
  two = power.boot(image, HOST, one.flash, stream)
  assert two.flash == one.flash and two.hash == one.hash and two.out == b''
  assert (two.position, two.sequence) == (len(stream), 4)
  assert one.hash == emulate.play(
    toolchain.build(read, HOST), HOST, read.leaves, edge_calls.calls_of(made, 6), read.manifest['outputs']
  ).hash  # fmt: skip
  with pytest.raises(Fault, match='neither slot'):
    power.boot(image, HOST, bytes(len(one.flash)), stream)


def test_a_device_that_trusts_a_torn_slot_is_found(told, tmp_path):
  out, _ = told
  read = artefact.read(out)
  files = {name: (out / name).read_bytes() for name in read.manifest['files']}
  check = b'if (seal(&h[k], state) != h[k].crc) continue;'
  assert check in files['slots.c']
  files['slots.c'] = files['slots.c'].replace(check, b'')
  rest = {k: v for k, v in read.manifest.items() if k not in ('files', 'sha256', 'format')}
  artefact.write(tmp_path / 'bad', rest, files)
  bad = artefact.read(tmp_path / 'bad')
  made = export.subject(config.tuples(read.manifest['config']))
  with pytest.raises(Fault, match='did not go on from the slot|ended with'):
    device.cuts(bad, made, HOST, 6, 3)


def test_on_an_emulated_cortex_m7(told, tiny, capsys):
  """The same states as here, and the RAM that was planned, to the byte."""
  need('cortex-m7')
  out, found = told
  read = artefact.read(out)
  made = export.subject(config.tuples(read.manifest['config']))
  there = device.cuts(read, made, M7, 6, 3)
  assert there['hash'] == found['hash'] and there['cuts'] == found['cuts']
  assert there['ram_linked'] == there['ram_planned'] == found['ram_planned'] <= 128 << 10
  assert 100 < there['stack_used'] < ram.STACK


@pytest.mark.parametrize(
  'words, message',
  [
    (['--steps=3', '--every=2'], 'at least twice'),
    (['--target=host', '--ram=24K'], 'bytes of RAM'),
    (['--target=host,c99'], 'one target'),
    (['--target=host', "--config.sweep={'optimizer.lr': (0.1, 0.2)}"], 'a grid'),
  ],
)
def test_mistakes_are_one_line(words, message, tiny, tmp_path, capsys):
  need('host')
  code = device.main([f'--config={tiny}', f'--out={tmp_path / "out"}', *words])
  err = capsys.readouterr().err
  assert code == 2 and message in err and err.count('\n') == 1


def test_a_memory_of_bytes_is_changed_in_place(tiny):
  """Its rows travel as signed bytes; the casts around them are no copies of the whole memory."""
  raw = config.load(f'{tiny}:er')
  flat = export.subject(config.resolve({**raw, 'er': {'capacity': 400, 'draw': 2}})).flat
  manifest = emit(flat).manifest
  assert manifest['arena_bytes'] < 60_000 < 401 * 784
