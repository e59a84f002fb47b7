"""The data that ships with the package (attribution and licences in NOTICE)."""

from __future__ import annotations

import hashlib
from pathlib import Path

from cl_jax.errors import UserError

DATA = Path(__file__).parent.parent / 'data'

# Of the files that cl_jax/data/make.py writes.
SHA256 = {
  'fashion_mnist_small.npz': '2dcfaa3dd1cf7cacf763eff733edce8694e267f18655f91e427ddf3956534a26',
  'clinc150_train.jsonl.gz': 'ec41cda2f57ca76d9cc5b641d3e2485983d0ef45f6ecd800b21eefff5b45fbc0',
  'clinc150_val.jsonl.gz': '3b9f8dc3f64f176f011426404f10ecf1ad55202b9539da9ae54542d4fe9979e9',
  'clinc150_test.jsonl.gz': '9de5fff8668ba6509e25b579ab56e07fbd917e44a9b3f55148de947406556607',
}


def file(name: str) -> Path:
  """The path of a shipped file, after its sha256 was checked."""
  path = DATA / name
  try:
    with path.open('rb') as opened:
      found = hashlib.file_digest(opened, 'sha256').hexdigest()
  except OSError as error:
    raise UserError(
      f'the shipped file {path} cannot be read ({error}); install cl_jax again'
    ) from error
  if found != SHA256[name]:
    raise UserError(
      f'the shipped file {path} is damaged (sha256 {found[:16]}..., expected '
      f'{SHA256[name][:16]}...); install cl_jax again'
    )
  return path
