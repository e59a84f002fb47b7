"""What all tests share: the environment they run in, the data they may ask for, a tiny stream."""

from __future__ import annotations

import gc
import os
import re
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / '.cache'

# Before jax is imported, and inherited by the processes that tests start. One compilation cache for
# the whole suite; with a limit on its size jax locks it, so that two workers can share it.
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(CACHE / 'jax'))
os.environ.setdefault('JAX_COMPILATION_CACHE_MAX_SIZE', str(2 << 30))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.3')
os.environ.setdefault('CL_JAX_CACHE', str(CACHE / 'cl_jax'))
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('MPLBACKEND', 'agg')
# A program is compiled in one piece, not in up to 32 for as many cores: less work, of which workers share the
# cores. An option that a compiler does not know ends the process.
ONE_PIECE = '--xla_cpu_parallel_codegen_split_count=1'
if [*map(int, version('jaxlib').split('.')[:2])] < [0, 11]:
  os.environ.setdefault('XLA_FLAGS', ONE_PIECE)

import hypothesis  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from cl_jax.types import Batch, Stream  # noqa: E402
from tests.compiling import QUICKLY  # noqa: E402

hypothesis.settings.register_profile('here', deadline=None, max_examples=40)
hypothesis.settings.register_profile(
  'ci', parent=hypothesis.settings.get_profile('here'), derandomize=True
)
hypothesis.settings.load_profile('ci' if os.environ.get('CI') else 'here')

# With CL_JAX_REQUIRE_DATA=1 a skipped test fails, unless the reason it gives is the machine itself.
REQUIRE = os.environ.get('CL_JAX_REQUIRE_DATA', '') not in ('', '0')
OF_THE_MACHINE = re.compile(r'\b(GPU|TPU|accelerator|Slurm|root|Python 3|cross compiler)\b')


def _insist(report) -> None:
  if not (REQUIRE and report.skipped) or hasattr(report, 'wasxfail'):
    return
  where = report.longrepr
  reason = str(where[2]) if isinstance(where, tuple) else str(where)
  if not OF_THE_MACHINE.search(reason):
    report.outcome = 'failed'
    report.longrepr = (
      f'{report.nodeid} would be skipped, and CL_JAX_REQUIRE_DATA forbids it: {reason}'
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
  report = yield
  _insist(report)
  return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
  report = yield
  _insist(report)
  return report


def pytest_collection_finish(session):
  # What is imported by now stays; looking through it for garbage again and again takes a twentieth of the
  # processor time, measured over contract tests.
  del session
  gc.freeze()
  gc.set_threshold(20_000, 20, 20)


@pytest.fixture(scope='session')
def data_dir() -> Path:
  """The parent of tfds/, text/, edit/: CL_JAX_DATA. Tests that ask for it are skipped without it."""
  place = os.environ.get('CL_JAX_DATA')
  if not place:
    pytest.skip(
      'needs public data sets: set CL_JAX_DATA to the directory that holds tfds/ and text/'
    )
  if not Path(place).is_dir():
    pytest.fail(f'CL_JAX_DATA={place} is not a directory')
  return Path(place)


@pytest.fixture(scope='module')
def quickly():
  """XLA optimises little in the tests of a module: programs that run for milliseconds cost their compiling.

  As `tests.compiling.quick`, for what is compiled far from the test. Not where bits of two programs, times or
  bytes are compared.
  """
  old = jax.config.read('jax_disable_most_optimizations')
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', old)


@pytest.fixture(scope='module')
def started_quickly():
  """As `quickly`, of the processes that a module's tests start."""
  with pytest.MonkeyPatch.context() as patch:
    for name, value in QUICKLY.items():
      patch.setenv(name, value)
    yield


@pytest.fixture(scope='session')
def toy_stream() -> Stream:
  return made_toy_stream()


def made_toy_stream() -> Stream:
  """3 tasks x 30 steps x 10 rows: 6 Gaussian classes in 8 dimensions, two a task; all is told.

  Class c has rows 100 c ... 100 c + 99; the test data are the training data, task by task.
  """
  rng = np.random.default_rng(0)
  tasks, steps, rows, width, classes = 3, 30, 10, 8, 6
  centres = 2 * rng.normal(size=(classes, width))
  y = np.repeat(np.arange(classes), 100).astype(np.int32)
  x = (centres[y] + rng.normal(size=(len(y), width))).astype(np.float32)
  of_task = np.arange(len(y)).reshape(tasks, -1)
  index = np.stack([rng.choice(own, (steps, rows)) for own in of_task]).astype(np.int32)
  task = np.broadcast_to(np.arange(tasks, dtype=np.int32)[:, None, None], (tasks, 2, 100))
  test = Batch(
    jnp.asarray(x.reshape(tasks, 2, 100, width)),
    jnp.asarray(y.reshape(tasks, 2, 100)),
    jnp.ones((tasks, 2, 100)),
    jnp.asarray(task),
  )
  return Stream(
    x=jnp.asarray(x),
    y=jnp.asarray(y),
    index=jnp.asarray(index),
    ends=jnp.asarray(of_task.reshape(tasks, 2, 100), jnp.int32),
    test=test,
    scenario='task',
    told=('boundary', 'task_train', 'task_test'),
    classes=classes,
    task_names=('a', 'b', 'c'),
    task_classes=tuple((2 * t, 2 * t + 1) for t in range(tasks)),
  )
