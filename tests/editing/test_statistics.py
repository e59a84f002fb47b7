"""E[k k^T]: its value, that nothing is lost when a process is killed, and what is refused."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest

from cl_jax.editing import frequent, kept, statistics
from cl_jax.errors import UserError
from cl_jax.models import causal
from cl_jax.models.causal import Config

LLAMA = Config(40, 16, 4, 4, 2, 24, 32)
GPT2 = Config(40, 16, 4, 4, 4, 24, 32, norm='layer', rope=False, gated=False)
LAYERS = (0, 2, 3)
BLOCKS = np.random.default_rng(0).integers(0, 40, (13, 9), dtype=np.int32)


@pytest.fixture(scope='module', params=[LLAMA, GPT2], ids=['llama', 'gpt2'])
def model(request):
  return request.param, causal.draw(jax.random.key(0), request.param, 0.3)


@pytest.fixture(scope='module')
def backbone():
  return causal.draw(jax.random.key(0), LLAMA, 0.3)


def keys(config, p, blocks):
  """{layer: f64[tokens, ffn]} by another way through the model: a tap of its usual forward pass."""
  found = {}

  def tap(name, h, layer):
    if name == 'mlp':
      jax.debug.callback(lambda h, i: found.__setitem__(int(i), np.asarray(h)), h, layer)
    return h

  mask = blocks >= 0
  jax.block_until_ready(
    causal.encode(config, p, {'tokens': np.maximum(blocks, 0), 'mask': mask}, tap)
  )
  jax.effects_barrier()
  return {i: h[mask].astype(np.float64) for i, h in found.items()}


def test_the_moments_are_those_of_numpy_whatever_the_batch(model):
  config, p = model
  blocks = BLOCKS.copy()
  blocks[4, 6:] = -1
  wanted = keys(config, p, blocks)
  for batch in (4, 1):
    found = statistics.moments(config, p, blocks, LAYERS[::-1], batch=batch)
    assert found.layers == LAYERS and found.tokens == 13 * 9 - 3
    for layer, moment in found.moments().items():
      exact = wanted[layer].T @ wanted[layer] / found.tokens
      assert np.linalg.norm(moment - exact) < 1e-6 * np.linalg.norm(exact)
      np.testing.assert_array_equal(moment, moment.T)


def test_convergence_is_told_at_every_doubling(backbone):
  lines = []
  found = statistics.moments(LLAMA, backbone, BLOCKS, LAYERS, tell=lines.append)
  assert found.points.tolist() == [9, 27, 54, 117] and len(lines) == 4
  wanted = keys(LLAMA, backbone, BLOCKS)
  for i, layer in enumerate(LAYERS):
    k = wanted[layer]
    half, full = (k[:n].T @ k[:n] / n for n in (54, 117))
    change = np.linalg.norm(full - half) / np.linalg.norm(full)
    np.testing.assert_allclose(found.change[-1, i], change, rtol=1e-4)
    values = np.linalg.eigvalsh(full)
    np.testing.assert_allclose(found.rank[-1, i], values.sum() ** 2 / (values**2).sum(), rtol=1e-4)
  assert np.isnan(found.change[0]).all()
  np.testing.assert_allclose(found.enough(0.1), 117 * (found.change[-1] / 0.1) ** 2)


class Killed(Exception):
  pass


@pytest.mark.parametrize('sketch', [0, 5])
def test_a_killed_call_goes_on_to_the_same_bytes(backbone, tmp_path, sketch):
  def collect(where, tell=lambda line: None):
    return statistics.moments(LLAMA, backbone, BLOCKS, LAYERS, where, 4, 0.0, sketch, tell)

  whole = collect(tmp_path / 'whole')
  calls = itertools.count()

  def kill(line):
    if next(calls) % 4 == 3:
      raise Killed(line)

  rounds = 0
  while True:
    try:
      found = collect(tmp_path / 'parts', kill)
      break
    except Killed:
      rounds += 1
      if rounds < 3:
        with pytest.raises(UserError, match='not finished'):
          statistics.read(tmp_path / 'parts', LLAMA, backbone)
  assert rounds > 1
  one, two = ((tmp_path / n / statistics.FILE).read_bytes() for n in ('whole', 'parts'))
  assert one == two
  read = statistics.read(tmp_path / 'whole', LLAMA, backbone)
  for layer in LAYERS:
    for other in (found, read):
      np.testing.assert_array_equal(whole.moment(layer), other.moment(layer))
  np.testing.assert_array_equal(whole.change, read.change)


def test_a_finished_file_is_only_read(backbone, tmp_path, monkeypatch):
  part = tmp_path / f'.{statistics.FILE}.1.part'  # of a process that was killed while it wrote
  part.write_bytes(b'half')
  first = statistics.moments(LLAMA, backbone, BLOCKS, LAYERS, tmp_path)
  assert not part.exists()
  monkeypatch.setattr(statistics, 'through', None)
  again = statistics.moments(LLAMA, backbone, BLOCKS, LAYERS, tmp_path)
  np.testing.assert_array_equal(first.moment(2), again.moment(2))


def test_what_belongs_to_something_else_is_refused(backbone, tmp_path):
  def collect(p=backbone, blocks=BLOCKS, layers=LAYERS, sketch=0):
    return statistics.moments(LLAMA, p, blocks, layers, tmp_path, sketch=sketch)

  collect()
  other = causal.draw(jax.random.key(1), LLAMA, 0.3)
  for name, call in {
    'model': lambda: collect(p=other),
    'text': lambda: collect(blocks=BLOCKS[:, ::-1]),
    'layers': lambda: collect(layers=(0, 2)),
    'sketch': lambda: collect(sketch=4),
  }.items():
    with pytest.raises(UserError, match=f'is of another {name}') as error:
      call()
    assert '\n' not in str(error.value)
  with pytest.raises(UserError, match='is of another model'):
    statistics.read(tmp_path, LLAMA, other)
  with pytest.raises(UserError, match='no moments'):
    statistics.read(tmp_path / 'none', LLAMA, backbone)


def test_a_damaged_file_is_refused(backbone, tmp_path):
  collect = lambda: statistics.moments(LLAMA, backbone, BLOCKS, LAYERS, tmp_path)  # noqa: E731
  collect()
  path = tmp_path / statistics.FILE
  good = path.read_bytes()
  about, arrays = kept.load(path)
  at = good.index(arrays['sums'][0, :4].tobytes())
  for bad in (
    good[: len(good) // 2],
    b'',
    good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :],
    good.replace(about['text'].encode(), about['model'].encode()),
  ):
    path.write_bytes(bad)
    with pytest.raises(UserError, match='is damaged') as error:
      collect()
    assert '\n' not in str(error.value)
  # The archive's own bytes, of which some (times, for instance) mean nothing, raise nothing else either.
  small = tmp_path / 'small.npz'
  kept.save(small, {'what': 'this'}, {'a': np.arange(3.0)})
  whole, caught = small.read_bytes(), 0
  for i in range(len(whole)):
    small.write_bytes(whole[:i] + bytes([whole[i] ^ 255]) + whole[i + 1 :])
    try:
      about_small, arrays_small = kept.load(small)
    except UserError:
      caught += 1
      continue
    assert about_small == {'what': 'this'} and arrays_small['a'].tolist() == [0, 1, 2]
  assert caught > len(whole) // 2
  kept.save(path, about, arrays | {'sums': arrays['sums'][:, :-1]})
  with pytest.raises(UserError, match='sums is'):
    collect()
  kept.save(path, about, {k: a for k, a in arrays.items() if k != 'next'})
  with pytest.raises(UserError, match='next is missing'):
    collect()


def test_wrong_arguments_are_refused(backbone):
  for blocks, layers, match in (
    (BLOCKS, (), 'layers'),
    (BLOCKS, (4,), 'layers'),
    (BLOCKS + 1, (0,), 'tokenizer'),
    (BLOCKS[0], (0,), 'blocks'),
    (0 * BLOCKS - 1, (0,), 'padding'),
    (BLOCKS[:0], (0,), 'blocks'),
    (BLOCKS * 0.5, (0,), 'blocks'),
  ):
    with pytest.raises(UserError, match=match):
      statistics.moments(LLAMA, backbone, blocks, layers)
  with pytest.raises(UserError, match='sketch'):
    statistics.moments(LLAMA, backbone, BLOCKS, (0,), sketch=25)
  with pytest.raises(UserError, match='layer 1'):
    statistics.moments(LLAMA, backbone, BLOCKS, (0,)).moment(1)


def test_frequent_directions_keeps_its_bounds():
  rng = np.random.default_rng(1)
  k = (rng.normal(size=(300, 24)) * 0.8 ** np.arange(24)).astype(np.float32)
  rows, lost, r = np.zeros((6, 24), np.float32), 0.0, 6
  for at in range(0, 300, 7):
    rows, one = frequent.merge(rows, k[at : at + 7])
    lost += one
  k, rows = k.astype(np.float64), rows.astype(np.float64)
  values = np.linalg.eigvalsh(k.T @ k - rows.T @ rows)
  assert -1e-4 < values[0] and values[-1] < lost + 1e-4
  # Every merge takes delta off r + 1 directions at least, which cutting them off would not.
  assert (k**2).sum() - (rows**2).sum() > (r + 1) * lost - 1e-3
  tails = np.cumsum(np.linalg.svd(k, compute_uv=False)[::-1] ** 2)[::-1]
  assert lost <= min(tails[j] / (r + 1 - j) for j in range(r + 1)) + 1e-4
  assert lost < 0.2 * np.linalg.norm(k, 2) ** 2  # or the bounds would say nothing


def test_a_block_of_padding_adds_nothing(backbone):
  blocks = np.concatenate([BLOCKS[:2], 0 * BLOCKS[:1] - 1, BLOCKS[2:3]])
  for sketch in (0, 5):
    one = statistics.moments(LLAMA, backbone, BLOCKS[:3], (2,), batch=1, sketch=sketch)
    two = statistics.moments(LLAMA, backbone, blocks, (2,), batch=1, sketch=sketch)
    np.testing.assert_allclose(one.moment(2), two.moment(2), rtol=1e-6, atol=1e-9)


def test_a_sketch_stands_for_the_moments(backbone):
  full = statistics.moments(LLAMA, backbone, BLOCKS, LAYERS)
  sketched = statistics.moments(LLAMA, backbone, BLOCKS, LAYERS, sketch=8)
  assert sketched.arrays['rows'].shape == (3, 8, 24) and (full.bound() == 0).all()
  for layer, bound in zip(LAYERS, sketched.bound(), strict=True):
    one, two = full.moment(layer), sketched.moment(layer)
    error = np.linalg.norm(one - two, 2)
    assert 1e-4 < error < bound < np.linalg.norm(one, 2)
    np.testing.assert_allclose(np.diag(one), np.diag(two), rtol=1e-5)
  exact = statistics.moments(LLAMA, backbone, BLOCKS, LAYERS, sketch=24)
  np.testing.assert_allclose(exact.moment(2), full.moment(2), atol=1e-5)
