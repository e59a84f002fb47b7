"""The networks of the workloads in PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def make(net: str, units: int, classes: int) -> nn.Module:
  match net:
    case 'mlp':
      return nn.Sequential(
        nn.Linear(784, units),
        nn.ReLU(),
        nn.Linear(units, units),
        nn.ReLU(),
        nn.Linear(units, classes),
      )
    case 'cnn':
      return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 8 * 8, 128),
        nn.ReLU(),
        nn.Linear(128, classes),
      )
    case 'resnet':
      return ResNet(classes)
  raise ValueError(net)


class Block(nn.Module):
  def __init__(self, d_in: int, d: int, stride: int):
    super().__init__()
    self.conv1 = nn.Conv2d(d_in, d, 3, stride, 1, bias=False)
    self.conv2 = nn.Conv2d(d, d, 3, 1, 1, bias=False)
    self.norm1, self.norm2 = nn.BatchNorm2d(d), nn.BatchNorm2d(d)
    self.skip = nn.Identity()
    if d_in != d:
      self.skip = nn.Sequential(nn.Conv2d(d_in, d, 1, stride, bias=False), nn.BatchNorm2d(d))

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    h = F.relu(self.norm1(self.conv1(x)))
    return F.relu(self.norm2(self.conv2(h)) + self.skip(x))


class ResNet(nn.Module):
  """The reduced ResNet-18: 20 filters, no pooling in the stem."""

  def __init__(self, classes: int, width: int = 20):
    super().__init__()
    self.stem, self.norm = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
    layers, d_in = [], width
    for stage in range(4):
      d = width * 2**stage
      layers += [Block(d_in, d, 2 if stage else 1), Block(d, d, 1)]
      d_in = d
    self.blocks, self.head = nn.Sequential(*layers), nn.Linear(d_in, classes)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    h = self.blocks(F.relu(self.norm(self.stem(x))))
    return self.head(h.mean((2, 3)))
