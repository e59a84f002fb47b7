import errno
import json
import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from cl_jax.streams import cache

KEY = ('kind', 'entry-1')


class Maker:
  """Makes the arrays and counts how often."""

  def __init__(self):
    self.calls = 0

  def __call__(self):
    self.calls += 1
    return {'x': (np.arange(1000) % 251).astype(np.uint8), 'y': np.array([[1.5, 2.5]], np.float32)}


def get(root, make):
  return cache.cached(KEY, make, 'the thing', root)


def equal(arrays):
  expected = Maker()()
  return arrays.keys() == expected.keys() and all(
    np.array_equal(arrays[k], v) and arrays[k].dtype == v.dtype for k, v in expected.items()
  )


def test_made_once_and_only_plain_npy(tmp_path):
  make = Maker()
  assert equal(get(tmp_path, make)) and equal(get(tmp_path, make))
  assert make.calls == 1
  place = tmp_path / 'kind' / 'entry-1'
  assert sorted(p.name for p in place.iterdir()) == ['entry.json', 'x.npy', 'y.npy']
  assert [p.name for p in (tmp_path / 'kind').iterdir()] == ['entry-1']  # nothing left beside it
  assert np.array_equal(np.load(place / 'x.npy', allow_pickle=False), Maker()()['x'])


def flip(path):
  content = bytearray(path.read_bytes())
  content[-5] ^= 1
  path.write_bytes(content)


def truncate(path):
  os.truncate(path, path.stat().st_size // 2)


def rename_in_manifest(path):
  path.write_text(path.read_text().replace('"x"', '"../x"'))


@pytest.mark.parametrize(
  ('name', 'damage', 'message'),
  [
    ('x.npy', flip, 'x.npy does not have its sha256'),
    ('x.npy', truncate, 'x.npy has 564 bytes instead of 1128'),
    ('y.npy', os.remove, 'No such file'),
    ('entry.json', os.remove, 'No such file'),
    ('entry.json', truncate, 'damaged'),
    ('entry.json', lambda p: p.write_text('[]'), 'damaged'),
    ('entry.json', lambda p: p.write_bytes(b'\xff\xfe'), 'damaged'),
    ('entry.json', rename_in_manifest, 'is not the name of an array'),
  ],
)
def test_damage_is_reported_and_repaired(tmp_path, caplog, name, damage, message):
  make = Maker()
  get(tmp_path, make)
  damage(tmp_path / 'kind' / 'entry-1' / name)
  assert equal(get(tmp_path, make)) and make.calls == 2
  assert message in caplog.text and 'the thing is damaged' in caplog.text
  caplog.clear()
  assert equal(get(tmp_path, make)) and make.calls == 2 and not caplog.text
  assert [p.name for p in (tmp_path / 'kind').iterdir()] == ['entry-1']


def test_a_file_in_the_way_is_replaced(tmp_path):
  (tmp_path / 'kind').mkdir()
  (tmp_path / 'kind' / 'entry-1').write_text('not a folder')
  make = Maker()
  assert equal(get(tmp_path, make)) and equal(get(tmp_path, make)) and make.calls == 1


def test_a_pickle_is_never_loaded(tmp_path):
  make = Maker()
  get(tmp_path, make)
  place = tmp_path / 'kind' / 'entry-1'
  np.save(place / 'x.npy', np.array([{'a': 1}], object), allow_pickle=True)
  entry = json.loads((place / 'entry.json').read_text())
  entry['files']['x'] = {
    'size': (place / 'x.npy').stat().st_size,
    'sha256': cache.hashlib.sha256((place / 'x.npy').read_bytes()).hexdigest(),
  }
  (place / 'entry.json').write_text(json.dumps(entry))
  assert equal(get(tmp_path, make)) and make.calls == 2


def test_objects_are_never_pickled(tmp_path):
  with pytest.raises(ValueError, match='allow_pickle'):
    cache.cached(KEY, lambda: {'x': np.array([{}], object)}, 'objects', tmp_path)
  assert list((tmp_path / 'kind').iterdir()) == []


def test_a_full_disk_is_a_warning(tmp_path, monkeypatch, caplog):
  def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, 'No space left on device')

  make = Maker()
  monkeypatch.setattr(cache.np, 'save', full)
  assert equal(get(tmp_path, make))
  assert 'No space left on device' in caplog.text and 'set CL_JAX_CACHE' in caplog.text
  assert list((tmp_path / 'kind').iterdir()) == []
  monkeypatch.undo()
  assert equal(get(tmp_path, make)) and make.calls == 2


def test_an_unwritable_cache_is_a_warning(tmp_path, caplog):
  (tmp_path / 'file').write_text('')
  make = Maker()
  assert equal(cache.cached(KEY, make, 'the thing', tmp_path / 'file' / 'cache'))
  assert 'cannot keep the thing' in caplog.text


def test_leftovers_of_killed_processes_go(tmp_path):
  parent = tmp_path / 'kind'
  for name, age in (('.entry-1.old', 2 * cache.ABANDONED), ('.entry-1.new', 0)):
    (parent / name).mkdir(parents=True)
    (parent / name / 'x.npy').write_text('half')
    seconds = (parent / name).stat().st_mtime - age
    os.utime(parent / name, (seconds, seconds))
  get(tmp_path, Maker())
  assert sorted(p.name for p in parent.iterdir()) == ['.entry-1.new', 'entry-1']


def test_it_says_that_it_prepares(tmp_path, caplog):
  with caplog.at_level(logging.INFO, 'cl_jax'):
    get(tmp_path, Maker())
  assert 'preparing the thing once' in caplog.text


def test_directory(monkeypatch, tmp_path):
  monkeypatch.setenv('CL_JAX_CACHE', str(tmp_path))
  assert cache.directory() == tmp_path
  monkeypatch.delenv('CL_JAX_CACHE')
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'xdg'))
  assert cache.directory() == tmp_path / 'xdg' / 'cl_jax'
  monkeypatch.delenv('XDG_CACHE_HOME')
  monkeypatch.setenv('HOME', str(tmp_path))
  assert cache.directory() == tmp_path / '.cache' / 'cl_jax'


def test_digest_keeps_its_parts_apart(tmp_path):
  path = tmp_path / 'a'
  path.write_bytes(b'ab')
  assert cache.digest('ab', 'c') != cache.digest('a', 'bc')
  assert cache.digest(path) == cache.digest('ab') == cache.digest(b'ab')


def test_many_writers_at_once(tmp_path, caplog):
  barrier = threading.Barrier(8)

  def one(_):
    barrier.wait()
    return all(equal(cache.cached((*KEY[:1], f'e{i}'), Maker(), 'it', tmp_path)) for i in range(5))

  with ThreadPoolExecutor(8) as pool:
    assert all(pool.map(one, range(8)))
  assert 'cannot keep' not in caplog.text
  assert sorted(p.name for p in (tmp_path / 'kind').iterdir()) == [f'e{i}' for i in range(5)]
