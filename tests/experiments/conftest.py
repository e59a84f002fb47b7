"""A tiny experiment on the data that ships, and the commands called as functions."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

TINY = """
from configs.common import words

def get_config(arg='class'):
  fields, methods = words(arg, 'class')
  return {
    **fields,
    'name': 'tiny',
    'seeds': (0, 1),
    'data': {'examples_per_class': 20, 'test_per_task': 20, 'test_batch': 20},
    'tasks': 5,
    'batch': 10,
    'epochs': 2,
    'ends_batch': 40,
    'model': {'name': 'mlp', 'sizes': (16,)},
    'optimizer': {'lr': 0.03},
    'methods': methods,
    'chunk': 3,
    **({'er': {'capacity': 30, 'draw': 5}} if 'er' in methods else {}),
  }
"""


class Done(NamedTuple):
  """What a command did."""

  code: int
  out: str
  err: str

  @property
  def line(self) -> str:
    """The last line on stderr, where an error is."""
    return self.err.strip().splitlines()[-1] if self.err.strip() else ''


def pytest_configure(config) -> None:
  config.addinivalue_line(
    'markers', 'many_kills: 30 killed processes, minutes; only with -m many_kills'
  )


def pytest_collection_modifyitems(config, items) -> None:
  if 'many_kills' not in config.getoption('-m'):
    left = [item for item in items if item.get_closest_marker('many_kills')]
    if left:
      items[:] = [item for item in items if item not in left]
      config.hook.pytest_deselected(items=left)


@pytest.fixture(scope='session')
def tiny(tmp_path_factory) -> Path:
  """A configuration whose runs take a moment: 5 legs of 8 steps."""
  path = tmp_path_factory.mktemp('configs') / 'tiny.py'
  path.write_text(TINY)
  return path


@pytest.fixture
def call(capsys) -> Callable[..., Done]:
  """main(argv) of a command in this process."""

  def run(main: Callable, *argv: str) -> Done:
    capsys.readouterr()
    code = main([str(word) for word in argv])
    out, err = capsys.readouterr()
    return Done(code, out, err)

  return run


@pytest.fixture(autouse=True, scope='module')
def no_report():
  """These tests are about runs; drawing their report takes longer than the runs do."""

  class Report:
    @staticmethod
    def write(workdir: Path) -> Path:
      assert (workdir / 'results.jsonl').exists()
      (workdir / 'report.html').write_text('report')
      return workdir / 'report.html'

  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(sys.modules, 'cl_jax.report', Report)
    yield


def final_state(workdir: Path) -> dict[str, np.ndarray]:
  """The arrays of the last checkpoint by path, as anybody with orbax reads them."""
  from orbax.checkpoint import v1 as ocp

  (folder,) = (workdir / 'checkpoints').iterdir()
  tree = ocp.load(max(folder.iterdir()) / 'tree')
  return {name: a for name, a in tree.items() if name.startswith('state/')}


def language_model(folder: Path, words: Iterable[str]) -> Path:
  """A directory with a random Llama of two layers, and a tokenizer of whole words."""
  import jax
  from tokenizers import Tokenizer, models, pre_tokenizers

  from cl_jax.models import causal, decoder

  known = {word: i for i, word in enumerate(['[UNK]', '</s>', *dict.fromkeys(words)])}
  made = Tokenizer(models.WordLevel(known, unk_token='[UNK]'))
  made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  folder.mkdir()
  made.save(str(folder / 'words.json'))
  shape = causal.Config(len(known), 16, 2, 2, 1, 24, 64)
  decoder.save(
    folder / 'model', shape, causal.draw(jax.random.key(0), shape, 0.3), folder / 'words.json'
  )
  return folder / 'model'


def lines(workdir: Path) -> list[dict[str, Any]]:
  return [json.loads(text) for text in (workdir / 'results.jsonl').read_text().splitlines()]
