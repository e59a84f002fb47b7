"""Heat maps of causal traces, as in Meng et al. (NeurIPS 2022), figures 1 and 2."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cl_jax.editing.restore import KINDS, Trace
from cl_jax.editing.tracing import ROLES, Average, Prompt
from cl_jax.report.figures import LIGHT, Theme, canvas

TITLES = ('one state', 'MLPs', 'attention')


def traces(
  prompt: Prompt, trace: Trace, words: Sequence[str], answer: str, window: int, theme: Theme = LIGHT
) -> bytes:
  """One prompt as PNG bytes: p(answer) with a state put back, by token (downwards) and layer.

  Args:
    words: the text of every token; those of the subject get a star.
    answer: its text.
    window: what `tracing.trace` was given.
  """
  n = int((np.asarray(prompt.tokens) >= 0).sum())
  names = [
    f'{w.strip() or "␣"}{"*" if prompt.lo <= i < prompt.hi else ""}'
    for i, w in enumerate(words[:n])
  ]
  maps = np.asarray(trace.maps)[..., :n]
  about = (
    f'p({answer.strip()}): {float(trace.clean):.3f} clean, {float(trace.corrupted):.3f} corrupted'
  )
  return maps_of(maps, names, float(trace.corrupted), f'p({answer.strip()})', about, window, theme)


def averages(
  found: Average, window: int, theme: Theme = LIGHT, form: str = 'png', source: str = ''
) -> bytes:
  """The average indirect effect by role of the token (downwards) and layer, as the bytes of a PNG or PDF.

  Args:
    window: what `tracing.trace` was given.
    form, source: see `figures.metadata`.
  """
  about = f'p: {float(found.clean):.3f} clean, {float(found.corrupted):.3f} corrupted, on average'
  what = 'average indirect effect'
  return maps_of(found.effect, ROLES, 0.0, what, about, window, theme, form, source)


def maps_of(
  maps: np.ndarray,
  names: Sequence[str],
  middle: float,
  what: str,
  about: str,
  window: int,
  theme: Theme,
  form: str = 'png',
  source: str = '',
) -> bytes:
  """A row of heat maps f[3, layers, tokens], each with its own scale; white, in its middle, is no effect."""
  depth = maps.shape[1]
  with canvas(theme, 11.0, 1.25 + 0.24 * len(names)) as (fig, image_of):
    axes = fig.subplots(1, len(KINDS), sharey=True)
    fig.suptitle(about, fontsize=10)
    for ax, values, title in zip(axes, maps, TITLES, strict=True):
      most = max(np.nanmax(np.abs(values - middle)), 1e-6)
      image = ax.imshow(
        values.T,
        vmin=middle - most,
        vmax=middle + most,
        cmap='RdBu_r',
        aspect='auto',
        interpolation='nearest',
      )
      ax.set_facecolor(theme.faint)
      ax.grid(False)
      for side in ax.spines.values():
        side.set_visible(False)
      ax.set_title(title if title == TITLES[0] else f'{title}, window of {window}', fontsize=9)
      ax.set_xticks(range(0, depth, -(-depth // 7)))
      ax.set_xlabel('layer', fontsize=8)
      ax.tick_params(labelsize=8, length=0)
      bar = fig.colorbar(image, ax=ax, pad=0.02, aspect=18)
      bar.outline.set_visible(False)
      bar.ax.tick_params(labelsize=7)
    axes[0].set_yticks(range(len(names)), names)
    bar.set_label(what, fontsize=8)
    return image_of(form, source)
