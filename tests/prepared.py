"""A TFDS dataset in array_record files, prepared without TensorFlow: 80 + 20 small images of 4 classes."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np

NAME, SIDE, CLASSES, SHARDS = 'squares', 6, 4, {'train': (40, 40), 'test': (20,)}


def prepare(data_dir: Path) -> Path:
  """Writes data_dir/tfds/squares/1.0.0 and returns it."""
  from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]
  from PIL import Image

  place = data_dir / 'tfds' / NAME / '1.0.0'
  place.mkdir(parents=True)
  rng = np.random.default_rng(0)
  for split, shards in SHARDS.items():
    for i, count in enumerate(shards):
      name = f'{NAME}-{split}.array_record-{i:05d}-of-{len(shards):05d}'
      writer = array_record_module.ArrayRecordWriter(str(place / name), 'group_size:1')
      for n in range(count):
        png = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE), np.uint8)).save(png, 'png')
        writer.write(example(png.getvalue(), n % CLASSES))
      writer.close()
  (place / 'features.json').write_text(json.dumps(FEATURES))
  info = {'name': NAME, 'version': '1.0.0', 'fileFormat': 'array_record', 'moduleName': 'none'}
  keys = [{'featureKey': 'image'}, {'featureKey': 'label'}]
  splits = [
    {
      'name': split,
      'numBytes': '1',
      'shardLengths': [str(n) for n in shards],
      'filepathTemplate': '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}',
    }
    for split, shards in SHARDS.items()
  ]
  info |= {'supervisedKeys': {'tuple': {'items': keys}}, 'splits': splits}
  (place / 'dataset_info.json').write_text(json.dumps(info))
  return place


def example(png: bytes, label: int) -> bytes:
  """A tf.train.Example: features {image: bytes_list, label: int64_list}."""
  features = {b'image': part(1, part(1, png)), b'label': part(3, part(1, bytes([label])))}
  return part(1, b''.join(part(1, part(1, k) + part(2, v)) for k, v in features.items()))


def part(number: int, content: bytes) -> bytes:
  """A field of a protocol buffer that has a length."""
  size, n = [], len(content)
  while n > 127:
    size.append(n & 127 | 128)
    n >>= 7
  return bytes([number << 3 | 2, *size, n]) + content


PREFIX = 'tensorflow_datasets.core.features'
FEATURES = {
  'pythonClassName': f'{PREFIX}.features_dict.FeaturesDict',
  'featuresDict': {
    'features': {
      'image': {
        'pythonClassName': f'{PREFIX}.image_feature.Image',
        'image': {
          'dtype': 'uint8',
          'encodingFormat': 'png',
          'shape': {'dimensions': [str(SIDE), str(SIDE), '1']},
        },
      },
      'label': {
        'pythonClassName': f'{PREFIX}.class_label_feature.ClassLabel',
        'classLabel': {'numClasses': str(CLASSES)},
      },
    }
  },
}
