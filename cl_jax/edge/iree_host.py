"""A module of a learner on this machine, call by call, beside the plan of its memory."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cl_jax.edge.emulate import TIMEOUT, Call
from cl_jax.edge.iree_compile import extra
from cl_jax.edge.iree_plan import Host
from cl_jax.errors import Fault

DRIVER = 'local-sync'  # one thread, in order: steadier and faster here than the pool of local-task
ALIGNMENT = 64


class Session:
  """A module on this machine; the state is the module's.

  All sessions of a process share one allocator and its statistics.

  Args:
    vmfb: see `iree_compile.Compiled`.
  """

  def __init__(self, vmfb: bytes):
    rt = self.rt = extra('runtime')
    self.device = rt.get_driver(DRIVER).create_default_device()
    instance = rt.VmInstance()
    self.module = rt.VmModule.copy_buffer(instance, vmfb)
    self.context = rt.VmContext(
      instance, [rt.create_hal_module(instance, self.device), self.module]
    )

  def call(self, name: str, arrays: Sequence[np.ndarray], counted: bool = True) -> list[np.ndarray]:
    """Calls a function; with `counted`, its arguments are allocated by the runtime and copied."""
    rt = self.rt
    given, out = rt.VmVariantList(len(arrays)), rt.VmVariantList(1)
    keep = []  # an imported buffer does not hold the memory that it is in
    for a in arrays:
      a = np.ascontiguousarray(a).reshape(np.shape(a))
      kind = getattr(rt.HalElementType, ELEMENTS[str(a.dtype)])
      memory, usage = rt.MemoryType.DEVICE_LOCAL, rt.BufferUsage.DEFAULT
      allocator = self.device.allocator
      if counted:
        given.push_ref(allocator.allocate_buffer_copy(memory, usage, self.device, a, kind))
        continue
      keep.append(_aligned(a))
      keep.append(allocator.import_host_allocation(keep[-1], memory, usage))
      given.push_ref(rt.HalBufferView(keep[-1], list(a.shape), kind))
    self.context.invoke(self.module.lookup_function(name), given, out)
    del given, keep
    results = []
    for k in range(len(out)):
      view = out.get_as_object(k, rt.HalBufferView)
      results.append(np.array(rt.DeviceArray(self.device, view).to_host()))
      del view
    return results

  def statistics(self) -> dict[str, dict[str, int]]:
    """What the runtime's allocator counted, as `iree_plan.Heap` has it."""
    s = self.device.allocator.statistics
    kinds = ('device', 'host')
    return {
      'live': {k: s[f'{k}_bytes_allocated'] - s[f'{k}_bytes_freed'] for k in kinds},
      'peak': {k: s[f'{k}_bytes_peak'] for k in kinds},
      'total': {k: s[f'{k}_bytes_allocated'] for k in kinds},
    }


class Played(NamedTuple):
  """What calls left.

  Attributes:
    losses: f32 of every step.
    logits: of every prediction, flat.
    leaves: of the state.
    apart: calls after which the allocator and the plan differ, and how; None where there is no plan.
    peak: bytes of device memory that the allocator had at most, from the first call on.
  """

  losses: np.ndarray
  logits: list[np.ndarray]
  leaves: list[np.ndarray]
  apart: tuple[str, ...] | None
  peak: int


def play(
  vmfb: bytes, vm: bytes | None, leaves: Sequence[np.ndarray], calls: Sequence[Call]
) -> Played:
  """Runs the calls in a process of their own from the state `leaves`, and the plan of their memory.

  Args:
    vmfb, vm: see `iree_compile.Compiled`; without `vm` there is no plan.
    leaves: the initial state; it is memory of the caller, which nothing counts.
    calls: in order.

  Raises:
    Fault: the process failed, or did not end within TIMEOUT.
  """
  whole = [('load', leaves), *calls, ('save', [])]
  with tempfile.TemporaryDirectory() as folder:
    place = Path(folder)
    (place / 'module.vmfb').write_bytes(vmfb)
    (place / 'calls.json').write_text(json.dumps([(name, len(arrays)) for name, arrays in whole]))
    flat = [a for _, arrays in whole for a in arrays]
    np.savez(place / 'in.npz', **{str(k): a for k, a in enumerate(flat)})
    words = [sys.executable, '-m', 'cl_jax.edge.iree_host', folder]
    try:
      done = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired as error:
      raise Fault(f'host: the module did not end within {TIMEOUT:g} s') from error
    if done.returncode:
      tail = ' / '.join(done.stderr.strip().splitlines()[-2:])
      raise Fault(f'host: the module ended with code {done.returncode} ({tail[:300]})')
    counted = json.loads((place / 'statistics.json').read_text())
    with np.load(place / 'out.npz') as file:
      results = iter([file[str(k)] for k in range(len(file.files))])
  losses = np.concatenate([np.zeros(0), *(next(results)[None] for n, _ in whole if n == 'step')])
  logits = [next(results).ravel() for n, _ in whole if n == 'predict']
  state = [next(results).view(a.dtype).reshape(a.shape) for a in leaves]
  apart = None if vm is None else _apart(Host(vm), whole, counted)
  return Played(losses.astype(np.float32), logits, state, apart, counted[-1]['peak']['device'])


def _apart(plan: Host, whole: Sequence[Call], counted: Sequence[dict]) -> tuple[str, ...]:
  apart = []
  for (name, arrays), got in zip(whole, counted, strict=True):
    plan.call(name, [a.nbytes for a in arrays], counted=name != 'load')
    want = {'live': plan.heap.live, 'peak': plan.heap.peak, 'total': plan.heap.total}
    if got != want:
      apart.append(f'after {name} {got} were allocated and {want} planned')
  return tuple(apart)


def _played(folder: Path) -> None:
  """What `play` starts: reads the calls, writes losses, predictions, the state and the statistics."""
  session = Session((folder / 'module.vmfb').read_bytes())
  results, counted = {'step': [], 'predict': [], 'save': []}, []
  with np.load(folder / 'in.npz') as file:
    arrays = iter([file[str(k)] for k in range(len(file.files))])
  for name, n in json.loads((folder / 'calls.json').read_text()):
    out = session.call(name, [next(arrays) for _ in range(n)], counted=name != 'load')
    counted.append(session.statistics())
    results.setdefault(name, []).extend(out)
  (folder / 'statistics.json').write_text(json.dumps(counted))
  flat = [*results['step'], *results['predict'], *results['save']]
  np.savez(folder / 'out.npz', **{str(k): a for k, a in enumerate(flat)})


def planned(vm: bytes, tables: Mapping[str, Sequence[int]]) -> dict[str, int]:
  """Bytes of device memory, call by call, with the arguments of the call and without what `load` is given.

  Args:
    vm: see `iree_compile.Compiled`.
    tables: for each function, the bytes of its arguments.

  Returns:
    'constants'; 'resident' between calls; the peak of every function; 'peak' of them all; 'host', what is
    read back to decide loops.

  Raises:
    UserError: where control flow depends on data.
  """
  plan = Host(vm)
  peaks = {'constants': plan.heap.live['device']}
  resident = host = 0
  order = ['load', 'predict', 'step', 'step', 'boundary', 'step', 'step', 'predict', 'save']
  for name in (n for n in order if n in tables):
    plan.heap.mark()
    plan.call(name, tables[name], counted=name != 'load')
    peaks[name] = max(peaks.get(name, 0), plan.heap.peak['device'])
    host = max(host, plan.heap.peak['host'])
    if name not in ('save', 'load'):
      resident = max(resident, plan.heap.live['device'])
  functions = [n for n in tables if n in peaks]
  return {**peaks, 'resident': resident, 'peak': max(peaks[n] for n in functions), 'host': host}


def _aligned(a: np.ndarray) -> np.ndarray:
  """A copy of the bytes where the runtime can use them as they are."""
  room = np.zeros(a.nbytes + ALIGNMENT, np.uint8)
  at = -room.ctypes.data % ALIGNMENT
  inside = room[at : at + a.nbytes]
  inside[:] = np.frombuffer(a.tobytes(), np.uint8)
  return inside


ELEMENTS = {
  'bool': 'BOOL_8', 'float32': 'FLOAT_32',
  **{f'int{n}': f'SINT_{n}' for n in (8, 16, 32, 64)}, **{f'uint{n}': f'UINT_{n}' for n in (8, 16, 32, 64)},
}  # fmt: skip

if __name__ == '__main__':
  _played(Path(sys.argv[1]))
