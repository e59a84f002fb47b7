"""W1 and W2 in Avalanche, as its documentation says, without loggers.

`preloaded`: the experiences are tensors in memory. `pil`: images are decoded and transformed one by one,
as the datasets of torchvision that its benchmarks are made of do. Its ReplayPlugin rehearses nothing in
the first experience, so it trains on fewer rows than the others.
"""

from __future__ import annotations

from benchmarks.workers.serve import options, serve

GIVEN = options()

import warnings  # noqa: E402

warnings.filterwarnings('ignore')

import numpy as np  # noqa: E402
import torch  # noqa: E402

from benchmarks.workers import vision  # noqa: E402

torch.set_num_threads(1)
vision.ready()

from avalanche.benchmarks import benchmark_from_datasets  # noqa: E402
from avalanche.benchmarks.utils import _make_taskaware_classification_dataset  # noqa: E402
from avalanche.evaluation.metrics import accuracy_metrics  # noqa: E402
from avalanche.training.plugins import (  # noqa: E402
  EvaluationPlugin,
  EWCPlugin,
  LwFPlugin,
  ReplayPlugin,
)
from avalanche.training.storage_policy import ReservoirSamplingBuffer  # noqa: E402
from avalanche.training.supervised import Naive  # noqa: E402
from PIL import Image  # noqa: E402
from torch import nn  # noqa: E402

from benchmarks.workers import torch_models  # noqa: E402


class Pictures(torch.utils.data.Dataset):
  """What torchvision's MNIST and CIFAR10 do for every example."""

  def __init__(self, x: np.ndarray, y: np.ndarray, view):
    self.x, self.targets, self.view = x, y.tolist(), view

  def __len__(self) -> int:
    return len(self.targets)

  def __getitem__(self, i: int):
    pixels = torch.from_numpy(np.array(Image.fromarray(self.x[i]))).float() / 255
    return self.view(pixels), self.targets[i]


def dataset(x: np.ndarray, y: np.ndarray, kind: str, view=None):
  if kind == 'pil':
    view = torch.arange(x[0].size) if view is None else torch.from_numpy(view.astype('i8'))
    raw = Pictures(x.reshape(len(x), 28, 28), y, lambda p: p.reshape(-1)[view])
  else:
    pixels = torch.from_numpy(x.astype('f')) / 255
    raw = torch.utils.data.TensorDataset(pixels, torch.from_numpy(y.astype('i8')))
  return _make_taskaware_classification_dataset(raw, targets=y.tolist(), task_labels=0)


def plugins(method: str, memory: int, draw: int, size: int):
  match method:
    case 'er':
      store = ReservoirSamplingBuffer(memory)
      return [ReplayPlugin(memory, batch_size=size, batch_size_mem=draw, storage_policy=store)]
    case 'ewc':
      return [EWCPlugin(10.0, mode='online', decay_factor=0.9)]
    case 'lwf':
      return [LwFPlugin(1.0, 2.0)]
  return []


def prepare(
  data: str,
  net: str = 'mlp',
  units: int = 256,
  method: str = 'er',
  kind: str = 'preloaded',
  memory: int = 100,
  draw: int = 10,
  rate: float = 0.1,
):
  with np.load(data) as stored:
    parts = {name: stored[name] for name in stored.files}
  index, views, test_x = parts['index'], parts.get('views'), parts['test_x']
  x, y = parts['x'], parts['y']
  size = index.shape[-1]
  train, test = [], []
  for t, rows in enumerate(index.reshape(len(index), -1)):
    rows = rows[rows >= 0]
    if views is None:  # W2: images
      image = lambda a: a.transpose(0, 3, 1, 2)  # noqa: E731
      train.append(dataset(image(x[rows]), y[rows], kind))
      test.append(dataset(image(test_x[t]), parts['test_y'][t], kind))
    elif kind == 'pil':
      train.append(dataset(x[rows], y[rows], kind, views[t]))
      test.append(dataset(parts['raw'], parts['test_y'][t], kind, views[t]))
    else:
      train.append(dataset(x[rows].reshape(len(rows), -1)[:, views[t]], y[rows], kind))
      test.append(dataset(test_x[t].reshape(len(test_x[t]), -1), parts['test_y'][t], kind))
  scenario = benchmark_from_datasets(train=train, test=test)

  def repeat(i):
    torch.manual_seed(i)
    model = torch_models.make(net, units, int(y.max()) + 1)
    plugin = EvaluationPlugin(accuracy_metrics(experience=True), loggers=[])
    strategy = Naive(
      model=model,
      optimizer=torch.optim.SGD(model.parameters(), lr=rate),
      criterion=nn.CrossEntropyLoss(),
      train_mb_size=size,
      train_epochs=1,
      eval_mb_size=500,
      plugins=plugins(method, memory, draw, size),
      evaluator=plugin,
    )
    strategy.eval(scenario.test_stream)
    for experience in scenario.train_stream:
      strategy.train(experience)
      found = strategy.eval(scenario.test_stream)
    values = [v for name, v in found.items() if name.startswith('Top1_Acc_Exp/eval_phase')]
    assert len(values) == len(test), list(found)
    return {'accuracy': float(np.mean(values))}

  return repeat, {}


serve(lambda: prepare(**GIVEN))
