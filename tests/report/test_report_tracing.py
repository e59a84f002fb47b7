"""The figures of causal traces."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from cl_jax.editing.restore import Trace
from cl_jax.editing.tracing import ROLES, Average, Prompt
from cl_jax.report import tracing
from cl_jax.report.figures import DARK, LIGHT

MAPS = np.random.default_rng(0).uniform(0.1, 0.9, (3, 12, 5)).astype(np.float32)
PROMPT = Prompt(np.array([3, 1, 4, 1, -1]), 0, 2)
WORDS = ['The', ' Seine', ' is', ' in']


def one(maps=MAPS, theme=LIGHT):
  trace = Trace(np.int32(7), np.float32(0.9), np.float32(0.1), maps)
  return tracing.traces(PROMPT, trace, WORDS, ' $Paris$', 10, theme)


def average(theme=LIGHT, **form):
  effect = np.random.default_rng(1).uniform(-0.1, 0.4, (3, 12, 6))
  effect[..., 1] = np.nan
  found = Average(0.8, 0.2, effect, np.array([4, 0, 4, 4, 9, 4]))
  return tracing.averages(found, 10, theme, **form)


@pytest.mark.parametrize('theme', [LIGHT, DARK], ids=['light', 'dark'])
@pytest.mark.parametrize('draw', [one, average])
def test_figures_are_pngs_and_always_the_same_bytes(draw, theme):
  png = draw(theme=theme)
  assert png.startswith(b'\x89PNG') and b'tEXt' not in png and b'tIME' not in png
  width, height = struct.unpack('>II', png[16:24])
  assert 800 < width < 2500 and 200 < height < 1000 and len(png) < 300_000
  assert draw(theme=theme) == png


def test_a_pdf_is_always_the_same_bytes_and_names_its_source():
  pdf = average(form='pdf', source='of this')
  assert pdf.startswith(b'%PDF') and b'(of this)' in pdf and b'Date' not in pdf
  assert average(form='pdf', source='of this') == pdf
  assert b'of this' in average(source='of this')


def test_padding_is_not_drawn_and_every_number_is():
  changed = MAPS.copy()
  changed[..., 4] = 9
  assert one(changed) == one()
  changed[2, 11, 3] = 0.95
  assert one(changed) != one()


def test_the_rows_are_tokens_with_stars_or_roles(monkeypatch):
  seen = []
  monkeypatch.setattr(tracing, 'maps_of', lambda maps, names, *rest: seen.append(list(names)))
  one()
  average()
  assert seen == [['The*', 'Seine*', 'is', 'in'], list(ROLES)]
