"""Imports torchvision also where its compiled operators were built for another PyTorch than ours.

Avalanche and peft import it, but none of those operators is used here.
"""

from __future__ import annotations

import importlib
import re
import sys

import torch


def ready() -> None:
  """Declares, without a body, each operator whose absence stops the import."""
  for _ in range(20):
    try:
      importlib.import_module('torchvision')
      return
    except RuntimeError as error:
      missing = re.search(r'operator (torchvision::\w+) does not exist', str(error))
      if missing is None:
        raise
      for name in [m for m in sys.modules if m.startswith('torchvision')]:
        del sys.modules[name]
      torch.library.define(missing[1], '(Tensor boxes, Tensor scores, float iou) -> Tensor')
