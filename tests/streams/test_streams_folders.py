"""Archives as they are published, images of one shape, and datasets joined: on files of the right shapes."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from cl_jax.errors import UserError
from cl_jax.streams import folders, images
from cl_jax.streams.load import dataset
from configs import core50, five_datasets, split_cifar100, split_tiny_imagenet
from experiments import build, config
from experiments.streams import streams


def paint(path, shape, seed):
  """An image file of noise; JPEG where the name says so."""
  path.parent.mkdir(parents=True, exist_ok=True)
  x = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
  Image.fromarray(x).save(path)
  return x


@pytest.fixture
def place(tmp_path):
  """A data directory with small archives of all kinds, and no cache of an earlier test."""
  tiny, core, letters = (tmp_path / 'images' / folders.KINDS[k].folder for k in folders.KINDS)
  for c in range(20):
    for i in range(3):
      grey = (c, i) == (0, 0)  # a few files are
      paint(tiny / f'train/n{c:02}/images/n{c:02}_{i}.JPEG', (64, 64) if grey else (64, 64, 3), c)
    paint(tiny / f'val/images/val_{c}.JPEG', (64, 64, 3), c)
  lines = [f'val_{c}.JPEG\tn{c:02}\t0\t0\t62\t62\n' for c in range(20)]
  (tiny / 'val/val_annotations.txt').write_text(''.join(lines))
  (tiny / 'words.txt').write_text('n00\tgoldfish, Carassius auratus\nn99\tnothing\n')
  for session in range(1, 12):
    for thing in range(1, 51):
      name = f's{session}/o{thing}/C_{session:02}_{thing:02}_000.png'
      paint(core / name, (128, 128, 3), 100 * session + thing)
  for letter in 'ABCDEFGHIJ':
    for i in range(20):
      paint(letters / letter / f'{i}.png', (28, 28), i)
  (letters / 'A' / 'broken.png').write_bytes(b'')
  return tmp_path


def test_tiny_imagenet(place):
  train, test = dataset('tiny_imagenet', place)
  assert train.x.shape == (60, 64, 64, 3) and test.x.shape == (20, 64, 64, 3)
  assert train.names[:2] == ('goldfish', 'n01') and list(test.y) == list(range(20))
  assert list(np.bincount(train.y)) == [3] * 20
  file = place / 'images/tiny-imagenet-200/train/n03/images/n03_1.JPEG'
  np.testing.assert_array_equal(train.x[10], np.asarray(Image.open(file)))
  grey = train.x[0]
  assert (grey[..., 0] == grey[..., 1]).all() and (grey[..., 0] == grey[..., 2]).all()


def test_core50_tests_on_sessions_of_its_own(place):
  train, test = dataset('core50', place, image=(32, 32, 3))
  assert train.x.shape == (8 * 50, 32, 32, 3) and test.x.shape == (3 * 50, 32, 32, 3)
  assert set(test.domain) == {2, 6, 9} and not set(train.domain) & set(test.domain)
  assert train.names[0] == 'plug 1' and train.names[49] == 'remote 5'
  assert test.domain_names[9] == 'session 10'
  x = np.asarray(Image.open(place / 'images/core50_128x128/s1/o1/C_01_01_000.png'), float)
  mean = x.reshape(32, 4, 32, 4, 3).mean((1, 3))
  assert np.abs(train.x[0] - mean).max() <= 1


def test_notmnist_leaves_out_empty_files_and_holds_a_tenth(place):
  train, test = dataset('notmnist', place)
  assert train.x.shape == (180, 28, 28, 1) and list(np.bincount(test.y)) == [2] * 10
  both = np.concatenate([train.x, test.x])[np.concatenate([train.y, test.y]) == 0]
  assert len({x.tobytes() for x in both}) == 20


def test_what_is_absent_or_damaged_is_said(place, tmp_path):
  (tmp_path / 'empty').mkdir()
  for name, kind in folders.KINDS.items():
    with pytest.raises(
      UserError, match=f'{name} is not in .*{kind.folder}: download {kind.source}'
    ):
      dataset(name, tmp_path / 'empty')
  (place / 'images/tiny-imagenet-200/val/val_annotations.txt').write_text('val_0.JPEG\tn77\n')
  with pytest.raises(UserError, match='not as it was published.*n77'):
    dataset('tiny_imagenet', place)
  (place / 'images/notMNIST_small/B/3.png').write_bytes(b'not an image')
  with pytest.raises(UserError, match='notmnist in .* cannot be read'):
    dataset('notmnist', place)
  with pytest.raises(UserError, match='did you mean tiny_imagenet'):
    dataset('tiny_imagnet', place)
  for shape in ((32, 32), (32, 32, 2), (0, 3, 3)):
    with pytest.raises(UserError, match=r'must be \(height, width, 1 or 3\)'):
      dataset('core50', place, image=shape)
  with pytest.raises(UserError, match="core50 has no option 'domain'"):
    dataset('core50', place, domain='session')


def test_images_are_brought_to_a_shape():
  x = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
  np.testing.assert_array_equal(images.shaped(x, (), 'x'), x)
  small = images.shaped(x, (2, 2, 3), 'x')
  assert np.abs(small - x.reshape(2, 2, 2, 2, 3).mean((1, 3))).max() <= 1
  assert images.shaped(x, (4, 4, 1), 'x').shape == (4, 4, 1)
  assert images.shaped(x[..., :1], (2, 4, 3), 'x').shape == (2, 4, 3)
  bits = (x % 2).astype(np.uint8)
  assert set(np.unique(images.shaped(bits, (4, 4, 3), 'x'))) == {0, 255}
  with pytest.raises(UserError, match='is no image'):
    images.shaped(x.astype(np.float32), (2, 2, 3), 'x')


def test_datasets_join_with_labels_one_after_the_other(place):
  train, test = dataset('notmnist+core50+fashion_mnist_small', place, image=(28, 28, 1))
  assert len(train.names) == 70 and train.domain_names == (
    'notmnist',
    'core50',
    'fashion_mnist_small',
  )
  for part, (first, last) in zip(range(3), ((0, 9), (10, 59), (60, 69)), strict=True):
    for split in (train, test):
      own = split.y[split.domain == part]
      assert (own.min(), own.max()) == (first, last)
  assert train.names[10] == 'core50 plug 1'
  with pytest.raises(UserError, match='images of different shapes.*image='):
    dataset('notmnist+core50', place)


BENCHMARKS = {
  'tiny_imagenet': (split_tiny_imagenet, {}, (64, 64, 3), 10),
  'core50': (core50, {}, (32, 32, 3), 9),
  'five': (five_datasets, {'dataset': 'notmnist+mnist+cifar10'}, (32, 32, 3), 3),
  'cifar100': (split_cifar100, {'dataset': 'cifar100'}, (32, 32, 3), 17),
}


@pytest.mark.parametrize('name', BENCHMARKS)
def test_configurations_of_absent_data_run_on_data_of_its_shapes(name, place):
  """From the configuration to a traced step of the ResNet, with made-up images of the right shapes."""
  library = pytest.importorskip('tensorflow_datasets')
  module, changes, shape, tasks = BENCHMARKS[name]
  (place / 'tfds').mkdir()
  raw = {**module.get_config('task,er'), **changes, 'seeds': (0,)}
  with library.testing.mock_data(num_examples=600):
    if name == 'five':  # all ten classes of each occur among 600 examples
      raw['tasks'] = 3
    if name == 'cifar100':
      train, _ = dataset('cifar100', place)
      raw['task_sizes'] = (5,) * 16 + (len(train.names) - 80,)  # not every class is drawn
    resolved = config.resolve(raw)
    (stream,) = streams(resolved, place)
    (setup,) = build.prepare(resolved, place)
  assert stream.tasks == tasks and stream.x.shape[1:] == shape
  assert [len(c) for c in stream.task_classes] == list(
    resolved['task_sizes'] or [len(stream.task_classes[0])] * tasks
  )
  assert setup.streams[0].classes == sum(len(c) for c in stream.task_classes)
