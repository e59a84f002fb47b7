"""Makes the shipped data again, byte for byte: python -m cl_jax.data.make --data_dir=DIR

DIR holds tfds/fashion_mnist (array_record) and text/classify/clinc150/{train,val,test}.jsonl. With
`--out` the files go elsewhere; the command ends by comparing them with the digests in builtin.py.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import sys
import zipfile
from pathlib import Path

import numpy as np

from cl_jax.errors import UserError
from cl_jax.streams import tfds
from cl_jax.streams.arrays import groups
from cl_jax.streams.builtin import DATA, SHA256

TRAIN, TEST = 600, 200  # images of each Fashion-MNIST class


def fashion(data_dir: Path, out: Path) -> None:
  """The first 600 training and 200 test images of every class, in their original order."""
  parts = {}
  for split, count in (('train', TRAIN), ('test', TEST)):
    data = tfds.load('fashion_mnist', split, data_dir)
    keep = np.sort(np.concatenate([members[:count] for _, members in groups(data.y)]))
    parts[f'x_{split}'], parts[f'y_{split}'] = data.x[keep], data.y[keep].astype(np.uint8)
    parts['names'] = np.array(data.names)
  with zipfile.ZipFile(
    out / 'fashion_mnist_small.npz', 'w', zipfile.ZIP_DEFLATED, compresslevel=9
  ) as z:
    for name, array in parts.items():
      buffer = io.BytesIO()
      np.save(buffer, array, allow_pickle=False)
      entry = zipfile.ZipInfo(f'{name}.npy', date_time=(1980, 1, 1, 0, 0, 0))
      entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
      z.writestr(entry, buffer.getvalue(), compresslevel=9)


def clinc(data_dir: Path, out: Path) -> None:
  """All in-scope sentences of CLINC150, order kept, keys in one order."""
  for split in ('train', 'val', 'test'):
    lines = (data_dir / 'text/classify/clinc150' / f'{split}.jsonl').read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    text = ''.join(
      json.dumps({k: r[k] for k in ('text', 'label', 'domain')}, ensure_ascii=False) + '\n'
      for r in rows
    )
    packed = bytearray(gzip.compress(text.encode(), 9, mtime=0))
    packed[9] = 3  # the byte that names the system: Python 3.13 changed it
    (out / f'clinc150_{split}.jsonl.gz').write_bytes(packed)


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--data_dir', type=Path, required=True)
  parser.add_argument('--out', type=Path, default=DATA)
  args = parser.parse_args()
  try:
    args.out.mkdir(parents=True, exist_ok=True)
    fashion(args.data_dir, args.out)
    clinc(args.data_dir, args.out)
  except (UserError, OSError) as error:
    print(error, file=sys.stderr)
    return 2
  same = True
  for name, sha256 in SHA256.items():
    now = digest_of(args.out / name)
    same &= now == sha256
    print(f'{name}  {now}  {"as published" if now == sha256 else "DIFFERS from " + sha256}')
  return 0 if same else 3


def digest_of(path: Path) -> str:
  """sha256 of the file, as sha256sum prints it."""
  import hashlib

  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


if __name__ == '__main__':
  sys.exit(main())
