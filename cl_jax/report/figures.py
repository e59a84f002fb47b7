"""Figures of a section as PNG bytes, the same bytes for the same lines and versions.

matplotlib is imported when a figure is drawn. Colours are those of Okabe & Ito (2008), told apart with
every common colour vision; lines carry their names at their ends.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from cl_jax import metrics
from cl_jax.errors import UserError
from cl_jax.report import place
from cl_jax.report.lines import Group, Section, curves, matrix
from cl_jax.report.tables import LIKELIHOOD, scaled

MOST = 12  # methods in one figure; more cannot be told apart
MARKERS = 'osv^'  # one for every turn through the colours


class Theme(NamedTuple):
  name: str
  paper: str
  ink: str
  faint: str
  cycle: tuple[str, ...]


LIGHT = Theme(
  'light',
  '#ffffff',
  '#1b1b1b',
  '#c8c8c8',
  ('#0072b2', '#d55e00', '#009e73', '#aa4488', '#9c6b00', '#3a9fd8', '#555555'),
)
DARK = Theme(
  'dark',
  '#16181c',
  '#e8e6e3',
  '#4a4d55',
  ('#56b4e9', '#f28e4b', '#2ec4a0', '#dd8fbe', '#e6b93c', '#8fa8ff', '#b5b5b5'),
)


class Figure(NamedTuple):
  """A figure that can be drawn.

  Attributes:
    name: for the file. caption: below it. alt: what it shows, in words, for who cannot see it.
    draw: theme -> PNG bytes.
  """

  name: str
  caption: str
  alt: str
  draw: Callable[[Theme], bytes]


def figures(section: Section) -> Iterator[Figure]:
  """Those that the lines of the section have the numbers for."""
  groups = section.groups[:MOST]
  left = len(section.groups) - len(groups)
  rest = f' The first {MOST} methods of the table; {left} are left out.' if left else ''
  ends = ', '.join(f'{g.label} {np.mean(g.values("acc")):.0%}' for g in groups)
  stepwise = [g for g in groups if len(g.R()) > 1 and np.isfinite(g.R()[0]).any()]
  # Nats have no place on axes of per cent; the table has them.
  likelihood = groups[0].first.get('metric') == LIKELIHOOD
  if stepwise and not likelihood:
    square = points(groups) == groups[0].first['tasks']
    what = 'the tasks seen so far, after each task' if square else 'all tasks, at each evaluation'
    yield Figure(
      'accuracy',
      f'Accuracy on {what} (mean over seeds; bands are 95 % '
      f'intervals). Diamonds are bounds, dashed lines oracles.{rest}',
      f'Line chart of accuracy over {"tasks" if square else "evaluations"}; at the end: {ends}.',
      lambda theme: over_time(groups, theme),
    )
    when = 'after learning each task' if square else 'at each evaluation'
    fades = 'fades below the diagonal' if square else 'fades downwards'
    yield Figure(
      'matrices',
      f'Accuracy on every task (column) {when} (row), mean over seeds. Forgetting '
      f'is what {fades}.{rest}',
      f'Heat maps of the accuracy matrices of {", ".join(g.label for g in stepwise)}.',
      lambda theme: heat_maps(stepwise, theme),
    )
  sized = [g for g in groups if g.first['state_bytes'].get('total')]
  if sized and not likelihood:
    yield Figure(
      'bytes',
      'Final accuracy against every byte that is kept between steps: weights, optimiser, memory and '
      f'statistics (logarithmic). Hollow markers are bounds.{rest}',
      f'Scatter plot of accuracy against bytes of state: {ends}.',
      lambda theme: against_bytes(sized, theme),
    )
  if any(grows(g) for g in groups):
    longer = ', '.join(g.label for g in groups if grows(g))
    yield Figure(
      'growth',
      'Bytes of state after each task: what methods allocate per task is charged when it comes. '
      f'{longer}: more with every task; dotted lines: bounded.{rest}',
      f'Line chart of bytes of state over tasks; {longer} grow.',
      lambda theme: over_tasks(sized, theme),
    )
  inside = [g for g in groups if curves(g.first) is not None]
  if inside and not likelihood:
    yield Figure(
      'stability',
      'Accuracy on the earlier tasks inside the tasks that follow (first seed): a drop right after a '
      'switch is the stability gap.',
      f'Accuracy during training of {", ".join(g.label for g in inside)}.',
      lambda theme: stability(inside, theme),
    )


def points(groups: Sequence[Group]) -> int:
  """How many evaluations there are; blurry streams may have others than one a task."""
  return max(len(g.R()) for g in groups)


def over_time(groups: Sequence[Group], theme: Theme) -> bytes:
  with canvas(theme, 7.6, 4.4) as (fig, png):
    ax = fig.subplots()
    n, ends, bounds = points(groups), [], []
    square = n == groups[0].first['tasks']
    for i, g in enumerate(groups):
      style = look(i, theme)
      runs = np.array([seen_so_far(matrix(line)) for line in g.lines])
      centre, half = zip(*(metrics.interval(list(column)) for column in runs.T), strict=True)
      centre = np.array(centre)
      if g.bound or not np.isfinite(centre[:-1]).any():
        bounds.append((centre[-1], style['color']))
      else:
        x = np.arange(1, len(centre) + 1)
        ax.plot(x, 100 * centre, markersize=3.5, linestyle='--' if g.oracle else '-', **style)
        if None not in half:
          low, high = centre - np.array(half, float), centre + np.array(half, float)
          ax.fill_between(x, 100 * low, 100 * high, color=style['color'], alpha=0.15, linewidth=0)
      value = 100 * centre[-1]
      ends.append((value, f'{named(g)} {value:.0f}', style['color']))
    for value, colour in bounds:
      ax.axhline(100 * value, color=colour, linewidth=0.8, linestyle=(0, (1, 3)))
      ax.plot([n], [100 * value], marker='D', markersize=5, color=colour, clip_on=False)
    which = 'tasks seen so far' if square else 'all tasks'
    ax.set(ylabel=f'accuracy on {which}, %', ylim=(0, 102))
    # 4.4 percentage points is what a line of text takes.
    heights = place.apart([e[0] for e in ends], 4.4, (1, 101))
    label_ends(ax, n, ends, heights, 'tasks learnt' if square else 'evaluations')
    return png()


def label_ends(
  ax,
  n: int,
  ends: Sequence[tuple[float, str, str]],
  heights: Sequence[float],
  name: str = 'tasks learnt',
):
  """The axis of n points, and beside it the lines' names: `ends` are (value, text, colour)."""
  ax.set(xlabel=name, xlim=(0.8, n + 0.15))
  ax.set_xticks(range(1, n + 1) if n <= 20 else np.linspace(1, n, 11).astype(int))
  for y, (value, label, colour) in zip(heights, ends, strict=True):
    ax.annotate(
      label,
      (n, value),
      (1.02, y),
      textcoords=('axes fraction', 'data'),
      color=colour,
      va='center',
      fontsize=9,
      annotation_clip=False,
      arrowprops={'arrowstyle': '-', 'color': colour, 'linewidth': 0.5, 'alpha': 0.6},
    )


def seen_so_far(R: np.ndarray) -> np.ndarray:
  """f64[rows]: the mean over the tasks up to each row's; all tasks where R is not square."""
  square = R.shape[0] == R.shape[1]
  return np.array([row[: t + 1].mean() if square else row.mean() for t, row in enumerate(R)])


def heat_maps(groups: Sequence[Group], theme: Theme) -> bytes:
  columns = min(4, len(groups))
  rows = -(-len(groups) // columns)
  with canvas(theme, 1.0 + 2.0 * columns, 0.75 + 2.15 * rows) as (fig, png):
    axes = fig.subplots(rows, columns, squeeze=False)
    images = []
    for i, ax in enumerate(axes.flat):
      if i >= len(groups):
        ax.set_axis_off()
        continue
      R = groups[i].R()
      ax.set_facecolor(theme.faint)
      images.append(ax.imshow(100 * R, vmin=0, vmax=100, cmap='cividis', aspect='auto'))
      ax.set_title(named(groups[i]), fontsize=9)
      ax.grid(False)
      ticks = np.unique(np.linspace(0, R.shape[1] - 1, min(R.shape[1], 5)).round().astype(int))
      ax.set_xticks(ticks, ticks + 1)
      ticks = np.unique(np.linspace(0, R.shape[0] - 1, min(R.shape[0], 5)).round().astype(int))
      ax.set_yticks(ticks, ticks + 1)
      ax.tick_params(labelsize=8)
      for side in ax.spines.values():
        side.set_visible(False)
      if i % columns == 0:
        ax.set_ylabel(
          'after learning task' if R.shape[0] == R.shape[1] else 'evaluation', fontsize=8
        )
      if i + columns >= len(groups):
        ax.set_xlabel('accuracy on task', fontsize=8)
    bar = fig.colorbar(images[0], ax=axes, shrink=0.8, pad=0.02, aspect=25)
    bar.set_label('accuracy, %', fontsize=9)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8)
    return png()


def against_bytes(groups: Sequence[Group], theme: Theme) -> bytes:
  from matplotlib import ticker

  with canvas(theme, 7.6, 4.4) as (fig, png):
    ax = fig.subplots()
    points = []
    for i, g in enumerate(groups):
      style = look(i, theme)
      x = g.first['state_bytes']['total']
      centre, half = metrics.interval([100 * v for v in g.values('acc')])
      ax.errorbar(
        x,
        centre,
        yerr=half,
        markersize=7,
        markerfacecolor=theme.paper if g.bound else style['color'],
        capsize=3,
        **style,
      )
      points.append((x, centre, named(g), style['color']))
    xs = [p[0] for p in points]
    ax.set_xscale('log')
    spread = max(xs) / min(xs)
    margin = max(spread**0.12, 1.5)
    ax.set_xlim(min(xs) / margin, max(xs) * margin ** (2.2 if spread > 10 else 1.6))
    ax.set(xlabel='bytes of state', ylabel='accuracy at the end, %', ylim=(0, 104))
    ax.xaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: scaled(v, 'B', '.3g')))
    ax.xaxis.set_minor_formatter(ticker.NullFormatter())
    if spread < 30:
      ax.xaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    fig.canvas.draw()
    place.beside(ax, points)
    return png()


def grows(g: Group) -> bool:
  return bool(g.first['state_bytes_by_task'])


def over_tasks(groups: Sequence[Group], theme: Theme) -> bytes:
  """Bytes of state after each task, one line a method."""
  with canvas(theme, 7.6, 4.4) as (fig, png):
    ax = fig.subplots()
    ends = []
    for i, g in enumerate(groups):
      style, sizes = look(i, theme), g.first['state_bytes_by_task']
      sizes = sizes or [g.first['state_bytes']['total']] * g.first['tasks']
      style['linestyle'] = '-' if grows(g) else ':'
      ax.plot(range(1, len(sizes) + 1), sizes, markersize=3.5, **style)
      ends.append((sizes[-1], f'{named(g)} {scaled(sizes[-1], "B", ".3g")}', style['color']))
    ax.set(ylabel='bytes of state', ylim=(0, 1.05 * max(e[0] for e in ends)))
    ax.yaxis.set_major_formatter(lambda v, _: scaled(v, 'B', '.3g'))
    top = ax.get_ylim()[1]
    label_ends(ax, len(sizes), ends, place.apart([e[0] for e in ends], top / 23, (0, top)))
    return png()


def stability(groups: Sequence[Group], theme: Theme) -> bytes:
  """A panel per method: accuracy on every earlier task, step by step."""
  with canvas(theme, 7.6, 0.7 + 1.9 * len(groups)) as (fig, png):
    axes = fig.subplots(len(groups), 1, squeeze=False, sharex=True)[:, 0]
    for ax, g in zip(axes, groups, strict=True):
      curve = curves(g.first)
      assert curve is not None
      L, K, T = curve.shape
      every = g.first['config'].get('eval_every') or 1
      x = every * np.arange(1, L * K + 1)
      line = 100 * curve.reshape(L * K, T)
      shown = range(min(L, T)) if T <= 6 else np.unique(np.linspace(0, T - 2, 6).astype(int))
      for i, t in enumerate(shown):
        own = look(i, theme)
        ax.plot(x[t * K :], line[t * K :, t], color=own['color'], label=f'task {t + 1}')
      for leg in range(1, L):
        ax.axvline(every * leg * K, color=theme.faint, linewidth=0.8, zorder=0)
      ax.set_title(g.label, fontsize=9, loc='left')
      ax.set(ylim=(0, 102), ylabel='accuracy, %')
    axes[-1].set_xlabel('steps')
    axes[0].legend(fontsize=8, frameon=False, ncols=6, loc='lower left', bbox_to_anchor=(0.2, 1.0))
    return png()


def look(i: int, theme: Theme) -> dict[str, Any]:
  """Colour and marker of the i-th method."""
  n = len(theme.cycle)
  return {'color': theme.cycle[i % n], 'marker': MARKERS[i // n % len(MARKERS)], 'linewidth': 1.6}


def named(g: Group) -> str:
  return f'{g.label} (oracle)' if g.oracle else g.label


@contextmanager
def canvas(theme: Theme, width: float, height: float):
  """An empty figure of so many inches, and the function that turns it into the bytes of a PNG or PDF.

  Nothing of the machine's own matplotlib settings comes in, no date and no version goes out.
  """
  try:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas
  except ImportError as error:
    raise UserError(f"figures need matplotlib: pip install 'cl_jax[run]' ({error})") from error
  with matplotlib.rc_context(), warnings.catch_warnings():
    warnings.simplefilter('ignore', UserWarning)  # a glyph that the font lacks becomes a box
    matplotlib.rcdefaults()
    matplotlib.rcParams.update(
      {
        'font.size': 10,
        'pdf.fonttype': 42,  # TrueType: journals refuse matplotlib's own type 3
        'figure.facecolor': theme.paper,
        'savefig.facecolor': theme.paper,
        'axes.facecolor': theme.paper,
        'axes.edgecolor': theme.ink,
        'axes.labelcolor': theme.ink,
        'axes.spines.top': False,
        'axes.spines.right': False,
        'axes.grid': True,
        'axes.axisbelow': True,
        'grid.color': theme.faint,
        'grid.linewidth': 0.5,
        'text.color': theme.ink,
        'text.parse_math': False,  # labels are names, never formulas
        'xtick.color': theme.ink,
        'ytick.color': theme.ink,
      }
    )
    fig = Canvas(figsize=(width, height), layout='constrained')
    FigureCanvasAgg(fig)

    def image(form: str = 'png', source: str = '') -> bytes:
      out = io.BytesIO()
      about = metadata(form, source)
      fig.savefig(out, format=form, dpi=144, metadata=about, bbox_inches='tight')
      return out.getvalue()

    yield fig, image


def metadata(form: str, source: str = '') -> dict[str, str | None]:
  """What a file says of itself: no date and no version, so that equal figures are equal files.

  Args:
    form: 'png' or 'pdf'.
    source: what it was drawn from, as text.
  """
  if form == 'pdf':
    return {'CreationDate': None, 'Creator': None, 'Producer': None, 'Subject': source or None}
  return {'Software': None, 'Source': source or None}
