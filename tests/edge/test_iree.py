"""IREE: decompositions and indices written out, the lint, the planned memory, parity here and on aarch64."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cl_jax.edge import (
  artefact,
  iree_compile,
  iree_device,
  iree_host,
  iree_module,
  iree_safe,
  iree_solve,
  learner,
  lint,
  parity,
  platforms,
)
from cl_jax.edge.learner import Leaf
from cl_jax.errors import Fault, UserError
from experiments import config, edge_calls, export, export_iree, iree_rows, verify, verify_iree
from tests.edge.agent import run

TINY = """
from configs.common import words

def get_config(arg='er'):
  fields, methods = words(arg, 'class')
  return {
    **fields,
    'name': 'tiny',
    'seeds': (3,),
    'data': {'examples_per_class': 8, 'test_per_task': 12, 'test_batch': 12},
    'batch': 4,
    'ends_batch': 8,
    'model': {'name': 'mlp', 'sizes': (8,)},
    'optimizer': {'lr': 0.03},
    'head': 'seen',
    'methods': methods,
    **({'er': {'capacity': 10, 'draw': 2}} if 'er' in methods else {}),
  }
"""
HERE = importlib.util.find_spec('iree') is not None
needs_iree = pytest.mark.skipif(
  not HERE, reason='needs a cross compiler: IREE, of the extra "edge", is not installed'
)


@pytest.fixture(scope='module')
def tiny(tmp_path_factory) -> Path:
  path = tmp_path_factory.mktemp('iree') / 'tiny.py'
  path.write_text(TINY)
  return path


@pytest.fixture(scope='module')
def flat(tiny) -> learner.Flat:
  return export.subject(config.resolve(config.load(f'{tiny}:er'))).flat


@pytest.fixture(scope='module')
def er(tiny) -> Path:
  folder = tiny.parent / 'er'
  words = [f'--config={tiny}:er', '--backend=iree', f'--out={folder}', '--target=host']
  assert export.main(words) == 0
  return folder


def test_decompositions_are_those_of_jax():
  n, rng = 6, np.random.default_rng(0)
  a = rng.normal(size=(n, n)).astype(np.float32)
  b = rng.normal(size=(n, 3)).astype(np.float32)
  for got, want in zip(
    iree_solve.lu(jnp.asarray(a)), jax.lax.linalg.lu(jnp.asarray(a)), strict=True
  ):
    np.testing.assert_allclose(got, want, atol=1e-5)
  spd = a @ a.T + n * np.eye(n, dtype=np.float32)
  for lower in (True, False):
    want = np.linalg.cholesky(spd)
    got = iree_solve.cholesky(jnp.asarray(spd), lower)
    np.testing.assert_allclose(got, want if lower else want.T, atol=1e-5)
    for left, unit, turned in np.ndindex(2, 2, 2):
      half = (np.tril(spd) if lower else np.triu(spd)) / n
      half[np.diag_indices(n)] = 1.5
      flags = {'left_side': bool(left), 'lower': lower, 'unit_diagonal': bool(unit)}
      right = b if left else b.T
      want = jax.lax.linalg.triangular_solve(half, right, transpose_a=bool(turned), **flags)
      got = iree_solve.triangular(
        jnp.asarray(half), jnp.asarray(right), bool(left), lower, bool(unit), bool(turned)
      )
      np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)
  assert np.isnan(iree_solve.cholesky(-jnp.asarray(spd))).all()


def test_indices_out_of_range():
  index = jnp.array([[0, 0], [3, 1], [-1, 0], [1, 9]])
  last = np.array([2, 1])
  np.testing.assert_array_equal(iree_safe.clamped(index, last, 1), [[0, 0], [2, 1], [0, 0], [1, 1]])
  np.testing.assert_array_equal(
    iree_safe.wasted(index, last, np.array([3, 0]), 1), [[0, 0], [3, 0], [3, 0], [3, 0]]
  )
  np.testing.assert_array_equal(
    iree_safe.wasted(index[:, 0], last[:1], np.array([3]), 1), [0, 3, 3, 1]
  )


def test_the_module_is_in_the_subset(flat):
  """Signed state, nothing donated, no calls; the memory's own scatter is trusted, that of labels is not."""
  made = iree_module.module(flat)
  assert 'custom_call' not in made.text and 'aliasing' not in made.text
  held = [line for line in made.text.splitlines() if 'util.global private' in line]
  assert len(held) == len(flat.state) and not any('xui' in line for line in held)
  assert any('seen_head.py' in place for place in made.guarded['step'])
  assert not any('memory.py:85' in place for place in made.guarded['step'])


def test_lint_names_the_method(flat, tiny):
  found = lint.lint(flat)
  assert {f.rule for f in found} == {'while', 'scatter'}
  assert any('(method seen_head)' in f.place for f in found if f.rule == 'scatter')
  assert any('(method er)' in f.place for f in found if f.rule == 'while')
  lint.check(found)
  slca = export.subject(config.resolve(config.load(f'{tiny}:slca'))).flat
  with pytest.raises(UserError, match=r'a call of Eigh at .*slca\.py:\d+ \(method slca\)'):
    lint.check(lint.lint(slca))


def test_lint_refuses_unsigned_state_and_donation():
  table = (Leaf('count', (3,), 'uint32', 'uint32'), Leaf('w', (3,), 'float32', 'float32'))
  made = learner.Flat(
    lambda state, rows: ([state[0] + 1, state[1]], rows[0].sum()),
    lambda state, rows: state[1] * rows[0],
    None, table, table[1:], (), [],
  )  # fmt: skip
  (found,) = lint.lint(made)
  assert (found.part, found.rule, found.place) == ('step', 'unsigned', 'count')
  with pytest.raises(UserError, match='a leaf of the state of type uint32 at count'):
    lint.check([found])
  donated = jax.jit(lambda x: x + 1, donate_argnums=0).lower(jnp.zeros(3))
  (found,) = lint.donated('step', donated.as_text())
  with pytest.raises(UserError, match='a donated argument'):
    lint.check([found])


def test_other_platforms_are_compile_checked(flat):
  found = platforms.checked(flat)
  assert 'not run' in found['note']
  for platform in ('cuda', 'tpu'):
    assert found['bytes'][platform]['step'] > found['bytes'][platform]['predict'] > 1000


def test_without_iree(tiny, tmp_path, capsys, monkeypatch):
  for name in [n for n in sys.modules if n == 'iree' or n.startswith('iree.')]:
    monkeypatch.delitem(sys.modules, name)
  monkeypatch.setitem(sys.modules, 'iree', None)
  code, _, err = run(
    capsys, export.main, f'--config={tiny}:er', '--backend=iree', f'--out={tmp_path / "out"}'
  )
  assert code == 2 and 'pip install "cl_jax[edge]"' in err and err.count('\n') == 1


def test_mistakes_are_one_line(tiny, tmp_path, capsys):
  words = (f'--config={tiny}:er', '--backend=iree', f'--out={tmp_path / "out"}')
  code, _, err = run(capsys, export.main, *words, '--target=cortex-m7')
  assert code == 2 and "no target 'cortex-m7'" in err and err.count('\n') == 1
  code, _, err = run(capsys, export.main, *words, '--stack=8K')
  assert code == 2 and '--stack is of C99 sources' in err and err.count('\n') == 1


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (('--accuracy',), '--accuracy is of the C99 program'),
    (('--time', '--targets=cortex-a53'), '--time is of a module for this machine'),
  ],
)
def test_options_that_would_do_nothing(options, message, tmp_path, capsys):
  artefact.write(
    tmp_path, {'backend': 'iree', 'targets': ['cortex-a53'], 'state': []}, {artefact.STATE: b''}
  )
  code, _, err = run(capsys, verify.main, tmp_path, *options)
  assert code == 2 and message in err and err.count('\n') == 1


def test_a_module_without_an_end(monkeypatch):
  monkeypatch.setattr(iree_host, 'TIMEOUT', 0.05)
  with pytest.raises(Fault, match=r'host: the module did not end within 0.05 s'):
    iree_host.play(b'', None, [], [])


def test_a_machine_of_another_kind(monkeypatch):
  monkeypatch.setattr(iree_device.platform, 'machine', lambda: 'arm64')
  assert 'is for x86_64 and this machine is arm64' in iree_device.absent('host')
  monkeypatch.setattr(iree_device.platform, 'machine', lambda: 'AMD64')
  assert iree_device.absent('host') == ''


@needs_iree
def test_equals_jax_and_its_plan(er, tmp_path, capsys):
  """Integers bitwise, floats to 1e-5, and every call allocates what was planned, to the byte."""
  rows = tmp_path / 'rows.csv'
  code, out, err = run(capsys, verify.main, er, '--steps=6', '--time', f'--write={rows}')
  assert code == 0, err
  assert 'bitwise' in out and 'to the byte' in out
  with rows.open(newline='') as file:
    (row,) = csv.DictReader(file)
  assert tuple(row) == iree_rows.COLUMNS
  assert float(row['parity_float']) <= 1e-5 and float(row['iree_us']) > 0
  manifest = json.loads((er / 'manifest.json').read_text())
  peaks = manifest['planned']['host']
  assert peaks['peak'] == int(row['peak_bytes']) >= peaks['step'] > manifest['state_bytes']
  assert peaks['load'] == peaks['constants'] + manifest['state_bytes']
  assert manifest['macs']['predict'] == 4 * (784 * 8 + 8 * 10)


def another(flat: learner.Flat) -> iree_compile.Compiled:
  """A module with the functions and arguments of the learner's, which keep and compute nothing."""
  functions = [('load', flat.state), ('save', ()), ('step', flat.batch), ('predict', flat.batch)]
  lines = []
  for name, table in (*functions, ('boundary', flat.ends)):
    given = ', '.join(f'%a{k}: {iree_module.kind(leaf)}' for k, leaf in enumerate(table))
    lines.append(f' func.func public @{name}({given}) {{\n  return\n }}')
  return iree_compile.compile('module @learner {\n' + '\n'.join(lines) + '\n}\n', 'host')


@needs_iree
def test_what_differs_is_found(er, tmp_path, monkeypatch):
  """A module with another rate, and a plan that is not this module's."""
  read = artefact.read(er)
  made = export.subject(config.tuples(read.manifest['config']))
  calls = edge_calls.calls_of(made, 2)
  text = (er / 'learner.mlir').read_text()
  other = iree_compile.compile(text.replace('dense<-3.000000e-02>', 'dense<-3.100000e-02>'), 'host')
  played = iree_host.play(other.vmfb, other.vm, read.leaves, calls)
  want, logits = edge_calls.reference(made, calls)
  assert parity.compare(read.manifest['state'], played.leaves, want).error > 1e-5
  assert played.apart == ()
  manifest = read.manifest
  (tmp_path / 'learner-host.vmfb').write_bytes((er / 'learner-host.vmfb').read_bytes())
  (tmp_path / 'learner-host.vm').write_bytes(another(made.flat).vm)
  monkeypatch.setattr(export, 'subject', lambda *_: made)  # both are known
  monkeypatch.setattr(edge_calls, 'reference', lambda *_: (want, logits))
  with pytest.raises(Fault, match='host: the memory is not the planned one: after load '):
    verify_iree.run(read._replace(folder=tmp_path), ['host'], 2)
  with pytest.raises(UserError, match=r'1 too few \(largest: '):
    export_iree.check(manifest, {'ram': manifest['planned']['host']['peak'] - 1, 'flash': None})
  export_iree.check(manifest, {'ram': manifest['planned']['host']['peak'], 'flash': None})


@needs_iree
def test_the_driver_and_the_tool_of_iree(er):
  """What runs on aarch64, on this machine: another module that calls the learner's, and its planned peak."""
  read = artefact.read(er)
  made = export.subject(config.tuples(read.manifest['config']))
  calls = edge_calls.calls_of(made, 4)
  want, logits = edge_calls.reference(made, calls)
  f = made.flat
  compiled = iree_compile.Compiled(
    (er / 'learner-host.vmfb').read_bytes(), (er / 'learner-host.vm').read_bytes()
  )
  tables, shape = (f.state, f.batch, f.ends), tuple(read.manifest['logits'])
  ran = iree_device.play(compiled, 'host', tables, shape, read.leaves, calls)
  assert ran.apart == () and ran.peak > read.manifest['planned']['host']['step']
  found = parity.compare(read.manifest['state'], ran.leaves, want)
  assert not found.differing and found.error <= 1e-5
  assert parity.difference(ran.logits[0], logits[0]) <= 1e-5


@needs_iree
def test_gathers_and_scatters_out_of_range_are_those_of_jax(tmp_path):
  """IREE alone reads and writes beyond the arrays."""

  def f(x, i, u):
    x, i, u = x[0], i[0], u[0]
    return x.at[i].set(u), x.at[i, i].add(u[:, 0]), jnp.take(x, i, axis=0, mode='clip'), x[i]

  x = np.arange(12, dtype=np.float32).reshape(4, 3)
  i = np.array([1, 5, -9, 400], np.int32)
  u = np.arange(100, 112, dtype=np.float32).reshape(4, 3)
  leaves = [[Leaf('', a.shape, str(a.dtype), '')] for a in (x, i, u)]
  made = iree_safe.safe(learner.lower(f, *leaves), 'f_', set())
  assert len(made.guarded) == 1
  kinds = [iree_module.kind(leaf) for (leaf,) in leaves]
  outs = ', '.join([kinds[0]] * 4)
  given = ', '.join(f'%a{k}: {t}' for k, t in enumerate(kinds))
  text = (
    f'module @learner {{\n func.func public @go({given}) -> ({outs}) {{\n'
    f'  %r:4 = call @f_main(%a0, %a1, %a2) : ({", ".join(kinds)}) -> ({outs})\n'
    f'  return %r#0, %r#1, %r#2, %r#3 : {outs}\n }}\n{made.text}\n}}\n'
  )
  session = iree_host.Session(iree_compile.compile(text, 'host').vmfb)
  right = f(*([jnp.asarray(a)] for a in (x, i, u)))
  for got, want in zip(session.call('go', [x, i, u]), right, strict=True):
    np.testing.assert_array_equal(got, want)


@needs_iree
def test_on_aarch64(tiny, er, capsys):
  if reason := iree_device.absent('cortex-a53'):
    pytest.skip(f'needs a cross compiler and an emulator: cortex-a53: {reason}')
  folder = tiny.parent / 'naive'
  words = [f'--config={tiny}:naive', '--backend=iree', f'--out={folder}', '--target=cortex-a53']
  assert export.main(words) == 0
  code, out, err = run(capsys, verify.main, folder, '--steps=4', '--targets=cortex-a53')
  assert code == 0, err
  assert 'bitwise' in out and 'to the byte' in out
