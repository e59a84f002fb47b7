"""Reference for GDumb's greedy balanced sampler: golden/gdumb.npz.

Prabhu et al. 2020, alg. 1, the sampler alone (no network). K slots; a row of class c arrives:
  seen <- seen + {c}
  wanted if c is new or (stored rows of c) < K / |seen|       a real quotient, not rounded
  not wanted: dropped
  wanted, a slot free: stored in the lowest free slot (slots 0..K-1 fill in order)
  wanted, full: the class with most stored rows loses one (ties: the lowest class number). Its rows
    in slot order are numbered 0..count-1; number floor(u count) is replaced, in its own slot. u is
    uniform on [0, 1), one per row of the stream, stored as input and used only here.
A class once seen stays seen (none can be emptied: the largest class holds at least two rows here).
The largest class is never c itself. The paper's alg. 1 divides by the classes seen BEFORE the row:
the same, for a new class is stored in any case. Many ports use K // |seen|: not the same.
The authors' own code takes the first K / classes rows of every class and has no such sampler.

Three streams of 60 labels over 5 classes, K = 12:
  0  uniform at random
  1  sorted by class: 12 rows each of classes 3, 0, 4, 1, 2
  2  unbalanced (most rows of class 1), class 4 not before row 40
No u count lies within 1e-3 of an integer.

Keys. Inputs:
  K, classes, labels [3,60], u [3,60]
Outputs:
  slots [3,60,12]   content after each row, as positions in the stream; -1 is empty
  written [3,60]    the slot the row went to; -1 if it was dropped
  victim [3,60]     the class that lost a row; -1 if none did
"""

from __future__ import annotations

import numpy as np
import problem as pb

ROWS, CLASSES, K = 60, 5, 12


def sample(labels: np.ndarray, u: np.ndarray) -> dict:
  slots = np.full(K, -1, dtype=np.int64)
  seen: set[int] = set()
  trace, written, victims = [], [], []
  for n, c in enumerate(labels):
    new = int(c) not in seen
    seen.add(int(c))
    stored = labels[slots[slots >= 0]]
    count = np.bincount(stored, minlength=CLASSES)
    slot = victim = -1
    if new or count[c] < K / len(seen):
      if (slots < 0).any():
        slot = int(np.flatnonzero(slots < 0)[0])
      else:
        victim = int(np.argmax(count))  # the first of equals
        assert victim != c and count[victim] >= 2
        place = u[n] * count[victim]
        assert 1e-3 < place % 1 < 1 - 1e-3
        slot = int(np.flatnonzero(labels[slots] == victim)[int(np.floor(place))])
      slots[slot] = n
    trace.append(slots.copy())
    written.append(slot)
    victims.append(victim)
  return {'slots': np.stack(trace), 'written': np.array(written), 'victim': np.array(victims)}


def main() -> None:
  rng = np.random.default_rng(1714)
  mixed = rng.integers(0, CLASSES, size=ROWS)
  by_class = np.repeat([3, 0, 4, 1, 2], ROWS // CLASSES)
  early = rng.choice(4, size=40, p=[0.15, 0.6, 0.15, 0.1])
  late = rng.choice(5, size=20, p=[0.2, 0.3, 0.1, 0.1, 0.3])
  labels = np.stack([mixed, by_class, np.concatenate([early, late])]).astype(np.int64)
  u = rng.uniform(size=labels.shape)
  results = [sample(a, b) for a, b in zip(labels, u, strict=True)]
  out = {k: np.stack([r[k] for r in results]) for k in results[0]}
  for i in range(3):  # every branch in every stream
    assert (out['victim'][i] >= 0).sum() >= 3 and (out['written'][i] < 0).sum() >= 10
    assert np.all(np.bincount(labels[i], minlength=CLASSES) > 0)
  pb.save('gdumb', out | {'K': K, 'classes': CLASSES, 'labels': labels, 'u': u})


if __name__ == '__main__':
  main()
