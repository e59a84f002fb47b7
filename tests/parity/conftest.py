"""What the parity tests of knowledge editing share."""

from __future__ import annotations

import jax
import pytest

from tests.parity.edited import NETS, Case


@pytest.fixture(scope='module', params=NETS)
def case(request):
  with jax.enable_x64(True):
    yield Case(request.param)


@pytest.fixture
def x64():
  with jax.enable_x64(True):
    yield
