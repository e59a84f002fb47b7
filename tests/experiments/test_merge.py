"""The network of a finished run as a pretrained ViT."""

from __future__ import annotations

import json

import numpy as np
import pytest

from cl_jax.models import vit
from experiments import build, config, run, weights


@pytest.mark.long
def test_a_vit_with_lora_is_written_and_read_by_a_configuration(tmp_path, capsys):
  """Adapters are in the weights that they adapt and in no other; the head stays behind."""
  words = {
    'data.examples_per_class': 4, 'data.test_per_task': 4, 'data.test_batch': 4, 'tasks': 1,
    'epochs': 1, 'eval_every': 3, 'ends_batch': 4, 'batch': 4, 'lora.targets': 'backbone/layers/q/w',
  }  # fmt: skip
  fields = [f'--config.{k}={v}' for k, v in words.items()]
  place, out = tmp_path / 'run', tmp_path / 'out'
  argv = ['--config=configs/edge_vit.py:lora', f'--workdir={place}', *fields]
  assert run.main(argv) == 0
  foreign = place / 'checkpoints/seeds-0/.0000000099.x.part'
  foreign.mkdir()
  assert weights.main(['merge', str(place), f'--out={out}']) == 0
  assert foreign.exists(), 'another process may be writing it'
  assert 'image=28 patch=7 channels=1 d=32 depth=2' in capsys.readouterr().out
  shape, after = vit.load(out)
  assert shape == vit.Config(28, 7, 1, 32, 2, 2, 64)
  resolved = config.tuples(json.loads((place / 'config.json').read_text()))
  before = build.prepare(resolved, None, print)[0].weights['frozen']['backbone']
  same = {
    name: np.array_equal(before['layers'][name]['w'], after['layers'][name]['w']) for name in 'qkvo'
  }
  assert same == {'q': False, 'k': True, 'v': True, 'o': True}
  np.testing.assert_array_equal(before['positions'], after['positions'])
  again = config.resolve(
    config.load('configs/edge_vit.py:lora,pretrained')
    | {'model': {'name': 'vit', 'pretrained': str(out)}}
  )
  found = build.network(again, 10)[1]
  np.testing.assert_array_equal(found['layers']['q']['w'], after['layers']['q']['w'])
