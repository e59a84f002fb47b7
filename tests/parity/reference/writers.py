"""Reference for two ways to write a memory by class, in feature space: golden/writers.npz.

Chaudhry et al. 2019 (On Tiny Episodic Memories), section 4: mean of features, and k-means. The
paper leaves the bookkeeping open; it is as follows. Just the writers: features phi come as inputs.
m slots per class, slot = class m + place. n_c counts all rows seen of class c, this one included.

mof      mu_c <- mu_c + (phi - mu_c) / n_c   (mu_c starts at 0, so it is phi for the first row)
         d = |phi - mu_c|, with the NEW mu_c; a stored row keeps the d of the moment it was stored.
         A place free: the row takes the lowest one. Otherwise the stored row with the LARGEST kept
         d (ties: lowest place) is replaced if d is strictly smaller than it, else the row is
         dropped.
kmeans   The first m rows of a class are its centroids, with counts 1, and are stored in those
         places. Each later row goes to the nearest centroid of its class (squared distance, ties:
         lowest place): n <- n + 1, c <- c + (phi - c) / n with the new n. It replaces the row of
         that place if |phi - c|^2 is strictly smaller than |kept - c|^2, both with the NEW c; so
         the features of the stored rows are kept. Otherwise it is dropped.
         The first row that joins a centroid ties EXACTLY with the stored row (c is their midpoint)
         and is dropped. Features are multiples of 1/16 below 8, so that the midpoint, the squares
         and the sums are exact in float32 too, in either form of the squared distance.
All other comparisons are clear of rounding: relative differences above 1e-4.

Two streams of 80 rows, 3 classes, m = 3:
  0  classes mixed at random, a fixed cloud per class
  1  classes in blocks that overlap, clouds that move as the stream goes on

Keys, W in {mof, kmeans}. Inputs:
  m, classes, features [2,80,7], labels [2,80]
Outputs:
  W/slots [2,80,9]         content after each row, as positions in the stream; -1 is empty
  W/written [2,80]         the slot the row went to; -1 if it was dropped
  mof/mean [2,80,3,7]      mu_c after each row; 0 before the first row of a class
  mof/distance [2,80,9]    the kept d after each row; 0 where empty
  kmeans/centroid [2,80,9,7], kmeans/count [2,80,9]   after each row; 0 where there is none yet
  kmeans/nearest [2,80]    the slot of the centroid the row went to (its own for the first m)
"""

from __future__ import annotations

import numpy as np
import problem as pb

ROWS, CLASSES, SLOTS, SIZE = 80, 3, 3, pb.HIDDEN[1]


def clear(a: float, b: float) -> bool:
  return abs(a - b) > 1e-4 * max(abs(a), abs(b))


def mof(features: pb.Array, labels: np.ndarray) -> dict:
  slots = np.full((CLASSES, SLOTS), -1, dtype=np.int64)
  kept = np.zeros((CLASSES, SLOTS))
  mean, seen = np.zeros((CLASSES, SIZE)), np.zeros(CLASSES, dtype=np.int64)
  trace = []
  for n, (phi, c) in enumerate(zip(features, labels, strict=True)):
    seen[c] += 1
    mean[c] = mean[c] + (phi - mean[c]) / seen[c]
    d = float(np.linalg.norm(phi - mean[c]))
    place, free = -1, np.flatnonzero(slots[c] < 0)
    if len(free):
      place = int(free[0])
    else:
      worst = int(np.argmax(kept[c]))
      assert all(clear(kept[c, worst], kept[c, i]) for i in range(SLOTS) if i != worst)
      assert clear(d, kept[c, worst])
      place = worst if d < kept[c, worst] else -1
    if place >= 0:
      slots[c, place], kept[c, place] = n, d
    written = c * SLOTS + place if place >= 0 else -1
    trace.append((slots.ravel().copy(), written, mean.copy(), kept.ravel().copy()))
  names = ('slots', 'written', 'mean', 'distance')
  return {k: np.stack(v) for k, v in zip(names, zip(*trace, strict=True), strict=True)}


def kmeans(features: pb.Array, labels: np.ndarray) -> dict:
  slots = np.full((CLASSES, SLOTS), -1, dtype=np.int64)
  centroid = np.zeros((CLASSES, SLOTS, SIZE))
  count = np.zeros((CLASSES, SLOTS), dtype=np.int64)
  trace = []
  for n, (phi, c) in enumerate(zip(features, labels, strict=True)):
    free = np.flatnonzero(slots[c] < 0)
    if len(free):
      place, replace = int(free[0]), True
      centroid[c, place], count[c, place] = phi, 1
    else:
      d2 = ((phi - centroid[c]) ** 2).sum(1)
      place = int(np.argmin(d2))
      assert all(clear(d2[place], d2[i]) for i in range(SLOTS) if i != place)
      count[c, place] += 1
      centroid[c, place] += (phi - centroid[c, place]) / count[c, place]
      new = float(((phi - centroid[c, place]) ** 2).sum())
      old = float(((features[slots[c, place]] - centroid[c, place]) ** 2).sum())
      assert new == old if count[c, place] == 2 else clear(new, old), (new, old)
      replace = new < old
    if replace:
      slots[c, place] = n
    at = c * SLOTS + place
    state = (slots.ravel().copy(), at if replace else -1, at)
    trace.append((*state, centroid.reshape(-1, SIZE).copy(), count.ravel().copy()))
  names = ('slots', 'written', 'nearest', 'centroid', 'count')
  return {k: np.stack(v) for k, v in zip(names, zip(*trace, strict=True), strict=True)}


def main() -> None:
  rng = np.random.default_rng(1715)
  centres = rng.normal(size=(CLASSES, SIZE)) + 0.8
  mixed = rng.integers(0, CLASSES, size=ROWS)
  chance = np.stack([np.abs(np.arange(ROWS) - at) < 24 for at in (10, 40, 70)], axis=1)
  blocks = np.array([rng.choice(CLASSES, p=row / row.sum()) for row in chance.astype(np.float64)])
  labels = np.stack([mixed, blocks]).astype(np.int64)
  clouds = centres[labels] + rng.normal(size=(2, ROWS, SIZE)) * 0.7
  clouds[1] += np.linspace(0, 1.2, ROWS)[:, None] * rng.normal(size=SIZE)
  # As after a ReLU, and on a grid that float32 holds exactly.
  features = np.round(np.maximum(clouds, 0.0) * 16) / 16
  assert features.max() < 8
  out = {'m': SLOTS, 'classes': CLASSES, 'features': features, 'labels': labels}
  for name, writer in (('mof', mof), ('kmeans', kmeans)):
    results = [writer(f, y) for f, y in zip(features, labels, strict=True)]
    both = {k: np.stack([r[k] for r in results]) for k in results[0]}
    written = (both['written'] >= 0).sum(1) - CLASSES * SLOTS  # beyond filling
    assert np.all(written >= 6) and np.all((both['written'] < 0).sum(1) >= 20), written
    out |= pb.prefixed(name, both)
  pb.save('writers', out)


if __name__ == '__main__':
  main()
