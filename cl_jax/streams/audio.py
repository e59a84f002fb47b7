"""Spoken digits: clips of sound as small 8-bit pictures of time and pitch (log-mel spectrograms)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cl_jax.errors import UserError
from cl_jax.streams.arrays import DAMAGED, Arrays, arrays

FILE = 'audio/spoken_digit.npz'
FRAME, HOP, FFT = 200, 80, 256  # samples at 8 kHz: 25 ms every 10 ms
FRAMES, BANDS = 10, 16
RANGE = 9.0  # nats below the loudest cell of a clip that 8 bits hold; about 39 dB of power
TAKES = 5  # the official test clips: the first takes of every speaker and digit


def spoken_digit(root: Path) -> tuple[Arrays, Arrays]:
  """(train, test) of the Free Spoken Digit Dataset (Jackson et al.): 10 words by 6 speakers, 3,000 clips.

  The official split: takes 0 to 4 of every speaker and digit are the test data. x is u8[N, 10, 16, 1], see
  `log_mel`; the label is the digit, the domain the speaker.

  Raises:
    UserError: `root` holds no audio/spoken_digit.npz, or another file than that.
  """
  path = root / FILE
  if not path.is_file():
    raise UserError(
      f'spoken_digit: there is no {path}; it holds the arrays samples, offsets, label, speaker, '
      'speaker_names, take and rate of the Free Spoken Digit Dataset'
    )
  try:
    with path.open('rb') as file, np.load(file, allow_pickle=False) as stored:
      parts = {key: stored[key] for key in stored.files}
    samples, offsets, take = parts['samples'], parts['offsets'], parts['take']
    _check(samples, offsets, {name: parts[name] for name in ('label', 'speaker', 'take')})
    label, speaker = parts['label'].astype(np.int32), parts['speaker'].astype(np.int32)
    names, rate = tuple(map(str, parts['speaker_names'])), int(parts['rate'])
  except (*DAMAGED, TypeError) as error:
    raise UserError(f'{path} cannot be read as spoken digits ({error})') from error
  x = np.stack([log_mel(samples[a:b], rate) for a, b in zip(offsets, offsets[1:], strict=False)])
  digits = tuple(map(str, range(int(label.max()) + 1)))
  test = take < TAKES
  pair = [
    arrays(x[of], label[of], speaker[of], digits, names, f'{path} {split}')
    for split, of in (('train', ~test), ('test', test))
  ]
  return pair[0], pair[1]


def _check(samples: np.ndarray, offsets: np.ndarray, rows: dict[str, np.ndarray]) -> None:
  """ValueError unless `offsets` cut `samples` into clips that hold something, with a row of `rows` each."""
  if samples.ndim != 1 or samples.dtype.kind not in 'iuf':
    raise ValueError(
      f'samples must be one row of numbers; got {samples.dtype}{list(samples.shape)}'
    )
  if offsets.ndim != 1 or offsets.dtype.kind not in 'iu' or len(offsets) < 2:
    raise ValueError(
      f'offsets must be whole numbers, one more than clips; got {offsets.dtype}{list(offsets.shape)}'
    )
  clips = len(offsets) - 1
  for name, found in rows.items():
    if found.shape != (clips,):
      raise ValueError(f'{name} has the shape {list(found.shape)} and offsets are of {clips} clips')
  ends = offsets.astype(np.int64)
  if ends[0] < 0 or ends[-1] > len(samples):
    raise ValueError(
      f'offsets go from {ends[0]} to {ends[-1]} and there are {len(samples)} samples'
    )
  if len(empty := np.flatnonzero(np.diff(ends) < 1)):
    raise ValueError(f'clip {empty[0]} is empty: from {ends[empty[0]]} to {ends[empty[0] + 1]}')


def log_mel(samples: np.ndarray, rate: int, frames: int = FRAMES, bands: int = BANDS) -> np.ndarray:
  """The clip i16[n] as u8[frames, bands, 1], whatever its length.

  Power in triangular bands that are even on the mel scale (Davis & Mermelstein 1980), Hann windows of 25 ms
  every 10 ms, averaged over `frames` equal parts of the clip; then its logarithm, where 255 is the loudest
  cell of the clip and 0 is RANGE nats below it or quieter: neither loudness nor length show.
  """
  x = samples.astype(np.float32)
  x = np.append(x[0], x[1:] - 0.97 * x[:-1])  # pre-emphasis
  count = max(frames, 1 + max(0, len(x) - FRAME) // HOP)
  x = np.pad(x, (0, max(0, FRAME + (count - 1) * HOP - len(x))))
  windows = np.lib.stride_tricks.sliding_window_view(x, FRAME)[::HOP][:count] * np.hanning(FRAME)
  power = np.square(np.abs(np.fft.rfft(windows, FFT)))
  mel = power @ triangles(bands, rate).T
  part = np.arange(count) * frames // count
  mean = np.stack([mel[part == k].mean(0) for k in range(frames)])
  level = np.log(mean + 1e-6 * mean.max() + 1e-9)
  scaled = 255 * (1 + (level - level.max()) / RANGE)
  return np.clip(np.round(scaled), 0, 255).astype(np.uint8)[..., None]


def triangles(bands: int, rate: int) -> np.ndarray:
  """Weights f64[bands, FFT / 2 + 1]: each band's triangle reaches to the centres of its neighbours."""
  mel = lambda f: 2595 * np.log10(1 + f / 700)  # noqa: E731
  hertz = 700 * (10 ** (np.linspace(mel(60), mel(rate / 2), bands + 2) / 2595) - 1)
  f = np.arange(FFT // 2 + 1) * rate / FFT
  up = (f - hertz[:-2, None]) / (hertz[1:-1] - hertz[:-2])[:, None]
  down = (hertz[2:, None] - f) / (hertz[2:] - hertz[1:-1])[:, None]
  return np.maximum(0, np.minimum(up, down))
