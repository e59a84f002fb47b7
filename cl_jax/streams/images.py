"""Images of one shape, whatever they were."""

from __future__ import annotations

from typing import Any

import numpy as np

from cl_jax.errors import UserError

MODES = {1: 'L', 3: 'RGB'}


def shaped(x: Any, shape: tuple[int, ...], where: str) -> np.ndarray:
  """u8[H, W, C] (or u8[H, W], or an image of Pillow) as u8[h, w, c]; an empty shape leaves it as it is.

  Pixels are averaged over the area they come to stand for (Pillow's box filter); colours become grey by ITU-R
  601-2, grey becomes three equal colours. What holds only 0 and 1 is black and white: 1 becomes 255.
  """
  image = _image(x, where)
  if shape:
    height, width, channels = shape
    image = image.convert(MODES[channels])
    if image.size != (width, height):
      image = image.resize((width, height), image_module().Resampling.BOX)
  out = np.asarray(image if image.mode in MODES.values() else image.convert('RGB'))
  return out if out.ndim == 3 else out[..., None]


def check_shape(shape: tuple[int, ...], where: str) -> tuple[int, ...]:
  """The shape as it was given.

  Raises:
    UserError: it is neither () nor (height, width, 1 or 3).
  """
  fine = all(type(n) is int and n > 0 for n in shape) and len(shape) == 3 and shape[2] in MODES
  if shape and not fine:
    raise UserError(
      f'{where}: image={shape} must be (height, width, 1 or 3), or () for as they are'
    )
  return tuple(shape)


def image_module():
  try:
    from PIL import Image
  except ImportError as error:
    raise UserError(
      f'reading images needs the extra "data": pip install "cl_jax[data]" ({error})'
    ) from error
  return Image


def _image(x: Any, where: str) -> Any:
  if not isinstance(x, np.ndarray):
    return x
  if x.dtype != np.uint8 or x.ndim not in (2, 3) or (x.ndim == 3 and x.shape[2] not in MODES):
    raise UserError(f'{where}: {x.dtype}{list(x.shape)} is no image of 1 or 3 channels of uint8')
  x = black_and_white(x)
  return image_module().fromarray(x[..., 0] if x.ndim == 3 and x.shape[2] == 1 else x)


def black_and_white(x: np.ndarray) -> np.ndarray:
  """Images of 0 and 1 (Omniglot's) as images of 0 and 255; others as they are."""
  return 255 * x if x.dtype == np.uint8 and x.max(initial=0) == 1 else x
