"""Lines as experiments.run writes them, without running anything."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cl_jax import metrics

T = 4


def matrix(seed: int, keep: float, learnt: float = 0.9) -> np.ndarray:
  """f64[T, T]: learnt on the diagonal, fading by `keep` a task, zero before a task is learnt."""
  rng = np.random.default_rng(seed)
  age = np.arange(T)[:, None] - np.arange(T)[None, :]
  R = learnt * keep ** np.maximum(age, 0) + 0.02 * rng.random((T, T))
  return np.where(age < 0, 0.0, R.round(6))


def result(method='naive', seed=0, R=None, needs=(), scenario='class', total=1_000_000, **other):
  """A line of results.jsonl; `other` goes into it, and config fields as config={...}."""
  R = matrix(seed, 0.5) if R is None else np.asarray(R, np.float64)
  bound = scenario == 'joint'
  measured = metrics.summary(R[-1:] if bound else R)
  if bound:
    R[:-1] = np.nan
  config = {
    'scenario': scenario,
    'base': 'class' if bound else '',
    'methods': [] if method == 'naive' else [method],
    'epochs': 2,
    'seeds': [0, 1, 2],
  }
  return {
    'config': config | other.pop('config', {}),
    'config_sha256': 'c' * 64,
    'method': method,
    'needs': [*needs],
    'scenario': scenario,
    'dataset': 'clinc150',
    'model': 'bert',
    'seed': seed,
    'tasks': R.shape[1],
    'R': [[None if np.isnan(v) else float(v) for v in row] for row in R],
    **measured,
    'state_bytes': {
      'frozen': 500_000,
      'trainable': 1000,
      'statistics': 0,
      'optimiser': 2000,
      f'method/{method}': 300,
      'loop': 12,
      'total': total,
    },
    'flops_per_step': 2_500_000,
    'passes': {'train_forward': 1.0, 'train_backward': 1.0, 'predict_forward': 1.0},
    'steps': 40,
    'wall_s': 12.5,
    'compile_s': 2.5,
    'peak_rss_bytes': 300_000_000,
    'state_sha256': 'd' * 64,
    'commit': 'e' * 40,
    'versions': {'python': '3.11.2', 'jax': '0.10.2'},
    'device': '1 x cpu',
    'started': f'2026-01-01T00:00:0{seed}+00:00',
    'command': 'python -m experiments.run --config=configs/some.py --workdir=some',
  } | other


@pytest.fixture
def make() -> Callable:
  return result


@pytest.fixture
def fade() -> Callable:
  return matrix


@pytest.fixture
def put(tmp_path: Path) -> Callable:
  """Writes lines (dicts, or texts as they are) to a results.jsonl and returns its directory."""

  def write(*lines, name='run') -> Path:
    folder = tmp_path / name
    folder.mkdir(parents=True, exist_ok=True)
    rows = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / 'results.jsonl').write_text(''.join(row + '\n' for row in rows))
    return folder

  return write
