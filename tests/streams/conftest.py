"""Small data whose every example can be recognised."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cl_jax.streams.arrays import arrays


@pytest.fixture(scope='session')
def numbered():
  """(per_class, classes, first) -> Arrays: x f32[N, 1] is the example's own number."""

  def make(per_class, classes, first=0, domains=None):
    y = np.tile(np.arange(classes), per_class)
    x = np.arange(first, first + len(y), dtype=np.float32)[:, None]
    return arrays(x, y, None if domains is None else y % domains)

  return make


@pytest.fixture(scope='session')
def images():
  """(count, classes, size) -> Arrays of random u8 images whose labels go round."""

  def make(count, classes=5, size=6, seed=0):
    x = np.random.default_rng(seed).integers(0, 256, (count, size, size, 1), np.uint8)
    return arrays(x, np.arange(count) % classes)

  return make


@pytest.fixture(scope='session')
def decoded(tmp_path_factory) -> Path:
  """One cache of decoded data for the whole session."""
  return tmp_path_factory.mktemp('decoded')
