"""Figures of docs/: each a PNG and a PDF, the same bytes every time, which name what they were drawn from."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cl_jax import durable
from cl_jax.report.figures import metadata

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / 'docs/figures'
FORMS = ('png', 'pdf')


def stamp(source: Path) -> str:
  """'results/bench.csv 0123456789abcdef': a file, or a folder, and its digest; in the figures' metadata."""
  whole = hashlib.sha256()
  for path in [source] if source.is_file() else durable.files(source):
    whole.update(path.read_bytes())
  return f'{source.relative_to(ROOT).as_posix()} {whole.hexdigest()[:16]}'


@contextmanager
def drawn(path: Path, source: str, width: float, height: float, columns: int = 1) -> Iterator[Any]:
  """A figure of so many inches and its axes; at the end it is `path`, a PNG, and the PDF beside it.

  Nothing of the machine's own matplotlib settings comes in.

  Args:
    source: see `stamp`.
    columns: axes in a row, with one vertical axis for all.
  """
  import matplotlib
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  with matplotlib.rc_context():
    matplotlib.rcdefaults()
    matplotlib.rcParams['pdf.fonttype'] = 42  # TrueType: journals refuse matplotlib's own type 3
    figure = Figure(figsize=(width, height), layout='constrained')
    FigureCanvasAgg(figure)
    yield figure, figure.subplots(1, columns, sharey=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    for form in FORMS:
      figure.savefig(path.with_suffix(f'.{form}'), dpi=110, metadata=metadata(form, source))
  print(f'{path.stem} drawn')


def shown(name: str, alt: str, source: str, command: str, configuration: str) -> str:
  """The Markdown of a figure: the picture, and beneath it where it comes from."""
  return (
    f'![{alt}](figures/{name}.png)\n\n'
    f'Drawn by `make figures` from `{source}` ([PDF](figures/{name}.pdf)). Command: {command}. '
    f'Configuration: {configuration}.'
  )


def check(sources: Mapping[str, Path]) -> int:
  """Says which figures {name: source} were not drawn from what their source is now; the exit code."""
  old = [
    f'{name}.{form}'
    for name, source in sources.items()
    for form in FORMS
    if not (path := FIGURES / f'{name}.{form}').exists()
    or stamp(source).encode() not in path.read_bytes()
  ]
  for name in old:
    print(f'docs/figures/{name} is not current: run make figures', file=sys.stderr)
  return int(bool(old))
