"""One run over all devices of one process, or of several: `--shard`, and what processes must agree on.

Every process runs the same command on the same configuration and computes the same steps; the first one alone
writes into the working directory, apart from checkpoints, into which each puts what it holds.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from cl_jax import shard
from cl_jax.errors import Fault, UserError
from cl_jax.types import Learner
from experiments import build, cli
from experiments.job import Job
from experiments.options import Spread

LOOPBACK = '127.0.0.1:'
HEARTBEAT = 30  # seconds without a sign of life after which the other processes end themselves


def start(spread: Spread) -> None:
  """Before jax first computes: the devices of this process, and the connection to the others.

  Raises:
    UserError: the others cannot be reached; a Fault where Slurm has started them all.
  """
  cores = cli.cores()
  # Processes of one machine share its cores; what several machines have is their own.
  own = spread.coordinator.startswith(LOOPBACK)
  cli.devices(max(1, cores // spread.processes) if own else cores)
  if not spread.coordinator:
    return
  settings: Any = jax.config
  # What jax chooses by itself since 0.4.34; processes on CPUs cannot talk without it.
  settings.update('jax_cpu_collectives_implementation', 'gloo')
  where: dict[str, Any] = {}  # Slurm and its like say themselves who is who
  if spread.coordinator != 'auto':
    where = {'coordinator_address': spread.coordinator}
    where |= {'num_processes': spread.processes, 'process_id': spread.process}
  try:
    jax.distributed.initialize(**where, heartbeat_timeout_seconds=HEARTBEAT)
  except (ValueError, RuntimeError) as error:
    # Where Slurm said who is who nobody has mistyped it: one may have died, and a launch tries again.
    kind = Fault if spread.coordinator == 'auto' and isinstance(error, RuntimeError) else UserError
    raise kind(
      f'--coordinator={spread.coordinator}: the processes did not find each other: {error}'
    ) from error
  if not own and alone_on_its_node(os.environ):
    # In Slurm jax gives each process one GPU; the only one of a node has all of them.
    settings.update('jax_cuda_visible_devices', 'all')
    settings.update('jax_rocm_visible_devices', 'all')


def alone_on_its_node(environment: Mapping[str, str]) -> bool:
  """Whether Slurm has started as many processes as the step has nodes."""
  nodes = environment.get('SLURM_STEP_NUM_NODES')
  return nodes is not None and environment.get('SLURM_NTASKS') == nodes


def joined(spread: Spread) -> bool:
  """Whether this command is one of several processes."""
  return bool(spread.coordinator)


def first() -> bool:
  return jax.process_index() == 0


def agreed(signum: int, due: bool) -> tuple[int, bool]:
  """The signal that any process got, and whether the first one finds a checkpoint due: the same for all.

  Clocks and signals differ between processes. What they decide must not, or one waits for ever for another.
  """
  if jax.process_count() == 1:
    return signum, due
  found = multihost_utils.process_allgather(np.array([signum, due], np.int32))
  return int(found[:, 0].max()), bool(found[0, 1])


def aside(mode: str) -> Any:
  """A context in which arrays are made in the memory of the host: weights may not fit on one device."""
  if not mode or jax.default_backend() == 'cpu':
    return nullcontext()
  return jax.default_device(jax.local_devices(backend='cpu')[0])


def alone(setup: build.Setup) -> list[build.Setup]:
  """A setup for each seed: what is spread over all devices is one run."""
  pairs = zip(setup.seeds, setup.streams, strict=True)
  return [setup._replace(seeds=(seed,), streams=[stream]) for seed, stream in pairs]


def spread(job: Job, mode: str) -> Job:
  """The job of one run, its learner over all devices.

  Raises:
    UserError: the devices cannot share a batch evenly.
  """
  cut = shard.over(None, mode)
  setup, rows = job.setup, job.setup.config['batch']
  if rows % cut.n:
    raise UserError(
      f'config.batch={rows}: {cut.n} devices cannot share it evenly; take a multiple of {cut.n}'
    )

  def made(hp, weights) -> Learner:
    own = setup.assemble(hp, weights, shard.sharded(setup.model(weights), cut))
    return shard.placed(own, cut)

  return job._replace(setup=setup._replace(build=made), cut=cut)
