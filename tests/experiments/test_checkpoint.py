"""Checkpoints: whole, verified, and the one before where one is not."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cl_jax import checkpoint, durable
from cl_jax.errors import UserError
from cl_jax.loop import Progress, Record
from cl_jax.types import State


def progress(step: int) -> Progress:
  """Every kind of leaf that a run has: NamedTuples, typed keys, bf16, u8, bool, nothing, NaN, ints."""
  state = State(
    {'l0': {'w': jnp.arange(12.0).reshape(3, 4) + step, 'b': jnp.ones(4, jnp.bfloat16)}},
    {},
    (jnp.int32(step), ()),
    {'er': (jnp.zeros((3, 0)), jnp.arange(5, dtype=jnp.uint8), jnp.array([True, False]))},
    jax.random.split(jax.random.key(step), 2),
    jnp.int32(step),
  )
  nan = np.full((2, 2), np.nan, np.float32)
  return Progress(state, Record(nan[0], nan, nan, np.zeros((2, 0, 2), np.float32)), step, 3)


def like() -> Progress:
  return jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(np.shape(a), a.dtype) if hasattr(a, 'dtype') else a, progress(0)
  )


def restored(place: Path, sha256: str = 'sha', tell=lambda line: None) -> checkpoint.Restored:
  found = checkpoint.restore(place, like(), sha256, tell)
  assert found is not None
  return found


@pytest.fixture(scope='module')
def original(tmp_path_factory) -> Path:
  place = tmp_path_factory.mktemp('original')
  for step in (1, 2, 3):
    checkpoint.save(place, step, progress(step), 'sha', {'wall_s': 0.5})
  return place


@pytest.fixture
def saved(original, tmp_path) -> Path:
  return Path(shutil.copytree(original, tmp_path / 'saved'))


def test_what_is_restored_has_the_bits_that_were_saved(original):
  found = restored(original)
  assert found.step == 3 and found.extra == {'wall_s': 0.5}
  assert checkpoint.digest(found.tree) == checkpoint.digest(progress(3))
  assert jax.tree.structure(found.tree) == jax.tree.structure(progress(3))
  for a, b in zip(jax.tree.leaves(found.tree), jax.tree.leaves(progress(3)), strict=True):
    assert a.dtype == getattr(b, 'dtype', np.dtype(int))
  draws = [jax.random.bits(p.state.key[1]) for p in (found.tree, progress(3))]
  assert draws[0] == draws[1]


def test_the_latest_two_stay_and_a_step_is_saved_once(saved):
  assert checkpoint.steps(saved) == [2, 3]
  before = durable.sha256(saved / '0000000003' / checkpoint.SUMS)
  checkpoint.save(saved, 3, progress(7), 'sha')
  assert durable.sha256(saved / '0000000003' / checkpoint.SUMS) == before


def test_nothing_there_is_none(tmp_path):
  assert checkpoint.restore(tmp_path / 'absent', like()) is None
  assert checkpoint.restore(tmp_path, like()) is None


def test_a_flipped_bit_in_any_file_is_detected_and_the_step_before_is_used(saved):
  rng = np.random.default_rng(0)
  latest, tried = saved / '0000000003', 0
  for file in durable.files(latest):
    data = file.read_bytes()
    for at in rng.integers(len(data), size=3) if data else ():
      flipped = bytearray(data)
      flipped[at] ^= 1 << rng.integers(8)
      file.write_bytes(flipped)
      heard = []
      found = restored(saved, tell=heard.append)
      assert found.step == 2, (file, at)
      (saved / '0000000003.damaged').rename(latest)
      assert checkpoint.digest(found.tree) == checkpoint.digest(progress(2))
      assert len(heard) == 1 and 'IS DAMAGED' in heard[0] and 'step 2' in heard[0]
      tried += 1
    file.write_bytes(data)
  assert tried >= 20
  assert restored(saved).step == 3


def test_a_damaged_checkpoint_is_set_aside_and_saved_again(saved):
  (saved / '0000000003' / checkpoint.SUMS).write_text('{}')
  assert restored(saved).step == 2
  assert sorted(p.name for p in saved.iterdir()) == ['0000000002', '0000000003.damaged']
  checkpoint.save(saved, 3, progress(3), 'sha')
  heard = []
  found = restored(saved, tell=heard.append)
  assert found.step == 3 and not heard
  assert checkpoint.digest(found.tree) == checkpoint.digest(progress(3))
  (saved / '0000000003' / checkpoint.SUMS).write_text('{}')
  assert restored(saved).step == 2  # the one set aside before gives way


def test_arrays_that_load_but_are_not_the_saved_ones_are_detected(saved, monkeypatch):
  """The second digest: what a flipped byte does to orbax where no file was checked."""
  monkeypatch.setattr(checkpoint, '_check_files', lambda place: None)
  real = checkpoint.orbax()

  class Flipping:
    metadata = real.metadata

    @staticmethod
    def load(path, like):
      tree = dict(real.load(path, like))
      if '0000000003' in str(path):
        tree['state/params/l0/w'] = tree['state/params/l0/w'] + np.float32(2**-20)
      return tree

  monkeypatch.setattr(checkpoint, 'orbax', lambda: Flipping)
  assert restored(saved).step == 2


@pytest.mark.parametrize('harm', ['truncated', 'absent', 'more', 'empty folder'])
def test_other_harm_is_detected_too(saved, harm):
  latest = saved / '0000000003'
  victim = max(durable.files(latest), key=lambda p: p.stat().st_size)
  if harm == 'truncated':
    victim.write_bytes(victim.read_bytes()[:-1])
  elif harm == 'absent':
    victim.unlink()
  elif harm == 'more':
    (latest / 'stranger').write_text('x')
  else:
    shutil.rmtree(latest)
    latest.mkdir()
  heard = []
  assert restored(saved, tell=heard.append).step == 2
  assert len(heard) == 1


def test_when_none_is_whole_it_says_so(saved):
  for step in (2, 3):
    (saved / f'{step:010d}' / checkpoint.SUMS).unlink()
  for _ in range(2):  # nothing is set aside: the next try must not begin anew without a word
    with pytest.raises(UserError, match='none of the checkpoints'):
      restored(saved)


def test_another_config_is_refused(saved):
  with pytest.raises(UserError, match='another config'):
    restored(saved, 'other')


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'step': np.int16(0)}, r'state/step is int32.* where int16'),
    ({'opt': (np.zeros(3, np.int32), ())}, r'int32\[\] where int32\[3\]'),
    ({'stats': {'a': np.zeros(2)}}, 'lacks state/stats/a'),
    ({'opt': ()}, 'no place for'),
  ],
)
def test_another_program_is_refused_and_nothing_is_cast(saved, change, message):
  other = like()._replace(state=like().state._replace(**change))
  with pytest.raises(UserError, match=message):
    checkpoint.restore(saved, other, 'sha')


# When a write fails orbax closes its event loop while its other threads still report to it.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_a_full_disk_is_one_line_and_keeps_what_was_there(saved):
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  big = np.random.default_rng(0).normal(size=(200, 200))
  resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
  try:
    with pytest.raises(UserError, match='the disk is full') as caught:
      checkpoint.save(saved, 4, big, 'sha')
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert '\n' not in str(caught.value)
  assert sorted(p.name for p in saved.iterdir()) == ['0000000002', '0000000003']
  assert restored(saved).step == 3


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='no checkpoint could be written'):
    checkpoint.save(tmp_path / 'file' / 'below', 1, progress(1))


@pytest.fixture
def two(monkeypatch) -> Callable[..., None]:
  """Makes this process the first of two; what the other says is given, or what this one says."""
  answers: list[list[int]] = []

  def everywhere(values, shared):
    own = [int(v) for v in values]
    return np.array([own, answers.pop(0) if shared and answers else own], np.int32)

  monkeypatch.setattr(checkpoint, 'apart', lambda leaf: isinstance(leaf, jax.Array))
  monkeypatch.setattr(checkpoint, 'everywhere', everywhere)
  return lambda *said: answers.extend(said)


def test_a_directory_that_is_not_shared_is_refused(tmp_path, two):
  tree = {'w': jnp.arange(6.0)}
  two([0, 0], [0])  # nothing is there; the folder of this checkpoint is not seen
  with pytest.raises(UserError, match='not on a disk that all 2 processes share: process 1'):
    checkpoint.save(tmp_path, 1, tree)
  assert not list(tmp_path.iterdir())
  two([1, 0])  # an own one of that step: the first one's word counts
  checkpoint.save(tmp_path, 1, tree)
  assert checkpoint.steps(tmp_path) == [1]
  two([0, -1])
  with pytest.raises(UserError, match='do not see the same checkpoints'):
    checkpoint.restore(tmp_path, tree)
  two([1, 1], [1])  # the other finds it damaged
  with pytest.raises(UserError, match='none of the checkpoints'):
    checkpoint.restore(tmp_path, tree, tell=lambda line: None)
  found = checkpoint.restore(tmp_path, tree)
  assert found is not None and found.step == 1


def test_the_end_of_another_process_is_no_fault_of_the_disk(tmp_path, two, monkeypatch):
  def fails(error):
    def meet(name):
      raise error

    monkeypatch.setattr(checkpoint.multihost_utils, 'sync_global_devices', meet)
    checkpoint.save(tmp_path, 1, {'w': jnp.arange(6.0)})

  for error in (RuntimeError('Gloo: Connection closed by peer'), TimeoutError(), ConnectionError()):
    with pytest.raises(type(error)):
      fails(error)
  with pytest.raises(UserError, match='no checkpoint could be written.*No such device'):
    fails(OSError(19, 'No such device'))
  assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_swept_up(saved):
  (saved / '.0000000004.77.part' / 'tree').mkdir(parents=True)
  (saved / '.0000000001.77.old').mkdir()
  assert restored(saved).step == 3
  assert sorted(p.name for p in saved.iterdir()) == ['0000000002', '0000000003']


def test_the_digest_sees_every_bit_and_no_names():
  a = {'x': np.array([1.0, -0.0], np.float32)}
  assert checkpoint.digest(a) == checkpoint.digest({'y': np.array([1.0, -0.0], np.float32)})
  assert checkpoint.digest(a) != checkpoint.digest({'x': np.array([1.0, 0.0], np.float32)})
  assert checkpoint.digest(a) != checkpoint.digest({'x': a['x'][None]})
  assert checkpoint.digest(a) != checkpoint.digest({'x': a['x'].view(np.int32)})


def test_arrays_serve_as_the_structure(tmp_path):
  tree = {'w': jnp.arange(6.0), 'key': jax.random.key(0), 'n': 3}
  checkpoint.save(tmp_path, 1, tree)
  found = checkpoint.restore(tmp_path, like=tree)
  assert found is not None and checkpoint.digest(found.tree) == checkpoint.digest(tree)


def test_a_half_written_checkpoint_is_removed_though_threads_still_write(tmp_path, monkeypatch):
  """As orbax's threads do on a full disk: a file appears between the removal of files and of the folder."""
  part = tmp_path / '.0000000001.1.part'
  part.mkdir()
  real, tries = shutil.rmtree, []

  def outrun(path, ignore_errors=False):
    tries.append(path)
    real(path, ignore_errors)
    if len(tries) < 3:
      path.mkdir()
      (path / 'late').write_bytes(b'x')

  monkeypatch.setattr(shutil, 'rmtree', outrun)
  checkpoint.discard(part)
  assert not part.exists() and tries == [part] * 3
  tries[:] = []
  monkeypatch.setattr(shutil, 'rmtree', lambda path, ignore_errors=False: tries.append(path))
  part.mkdir()
  checkpoint.discard(part, patience=0.05)  # it gives up: the next save sweeps it up
  assert part.exists() and tries
