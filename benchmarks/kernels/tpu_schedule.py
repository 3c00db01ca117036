"""Cycles of a TPU program, counted in the compiler's own schedule; no TPU is needed.

libtpu writes the final bundles (one per cycle) of every operation that it compiles, if it is told so
before it is loaded: import this module before anything starts a backend. Loops are weighed by their
trip counts. What a kernel does under a condition is a predicated region of its own: where it is not
run in every step of the grid, the caller says how often, and so of a loop whose trips vary. Waiting
for memory is not in the schedule: a program takes at least the larger of its cycles and of its
bytes over the bandwidth.
"""

import glob
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence

_FOLDER = tempfile.TemporaryDirectory()
os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={_FOLDER.name} --xla_jf_dump_llo_text=true"

import jax  # noqa: E402
from jax.sharding import Mesh, SingleDeviceSharding  # noqa: E402

from common.compilation.compile_only import compile_lowered  # noqa: E402
from common.compilation.hlo import cost  # noqa: E402
from common.compilation.topology import CHIPS, tpu_slice  # noqa: E402

SLICES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
HERTZ = {"v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9}

# Bundles of the pipeline's bookkeeping behind the step of the grid, at most.
_AFTER_STEP = 64

_BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s*(?:[A-Z]{2})?\s*:\s*((?:>\s*)*)\{(.*)")
_EXIT = re.compile(r"scmp\.ge\.s32\.totalorder [^,]*, (\d+) /\* loop exit test")
_TARGET = re.compile(r"Start/End empty region (\d+)")
_BRANCH = re.compile(r"sbr\.rel \(.*?\) target = \$region(\d+)")
_SKIPPED_IF = re.compile(r"sbr\.rel \((%\w+)\)")
_DEFINED = re.compile(r"(%[ps]\w+) = ([^;}]*)")
_IN_REGISTER = re.compile(r"scmp\.ne\.s32\.totalorder (%\w+), 0")
_FROM = re.compile(r"scmp\.ge\.s32\.totalorder %\w+, (\d+)")
_BELOW = re.compile(r"scmp\.lt\.s32\.totalorder %\w+, (\d+)")


def schedule(
  function: Callable,
  shapes: Sequence[jax.ShapeDtypeStruct],
  chip: str,
  regions: Sequence[float] | Mapping[str, Sequence[float]] = (),
  small_region: int = 64,
  loops: Sequence[float] | Mapping[str, Sequence[float]] = (),
  grids: Mapping[str, int] = {},
) -> tuple[dict[str, float], float]:
  """Cycles by operation of one core, and the program's HBM bytes.

  Args:
    function: to compile.
    shapes: of its arguments.
    chip: "v5e", "v5p" or "v6e".
    regions: how often each large predicated region within the step of a Pallas kernel runs, in the
      order of the program; of several kernels by what their names contain.
    small_region: at most so many bundles are bookkeeping of the pipeline, counted as if always run.
    loops: trips of each loop of a Pallas kernel without a constant number of them, on average, in
      the order of the program, likewise; 1 by default. Regions in a loop are counted for each time
      that the loop starts.
    grids: steps of one core of a Pallas kernel whose grid is not constant, likewise by names.

  On a chip of two cores (v5p) both run the program, each for its part of the trips.
  """
  device = tpu_slice(SLICES[chip]).devices[0]
  where = SingleDeviceSharding(device)
  arguments = [jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where) for s in shapes]
  _clear()
  with on_chip(chip):
    lowered = jax.jit(function).lower(*arguments)
  compiled, text = compile_lowered(lowered)
  cycles = {}
  for path in sorted(glob.glob(f"{_FOLDER.name}/*")):
    name = re.search(r"/\d+-([^<>]*)-\d+-final_bundles\.txt$", path)
    if name and "schedule-analysis" not in path:
      with open(path) as f:
        given = [_of_operation(name[1], weights) for weights in (regions, loops)]
        grid = next((steps for part, steps in grids.items() if part in name[1]), None)
        cycles[name[1]] = count_cycles(f.read(), given[0], small_region, given[1], grid)
  _clear()
  # At least what is passed in and out: the text hides how some large weights come on chip.
  memory = compiled.memory_analysis()
  passed = memory.argument_size_in_bytes + memory.output_size_in_bytes
  return cycles, max(cost(text).hbm_bytes, passed)


def on_chip(chip: str):
  """A context in which kernels, which ask what they are traced for, see this chip."""
  device = tpu_slice(SLICES[chip]).devices[0]
  return jax.sharding.use_abstract_mesh(Mesh([device], ("chip",)).abstract_mesh)


def _clear() -> None:
  """Removes what the compiler has written: tens of megabytes of each program."""
  for path in glob.glob(f"{_FOLDER.name}/*"):
    os.remove(path)


def bound(chip: str, cycles: float, hbm_bytes: float) -> dict:
  """The time that a program takes at least, in microseconds, and whether the memory limits it."""
  compute = cycles / HERTZ[chip]
  memory = hbm_bytes / CHIPS[chip].bytes_per_second
  return {
    "cycles": cycles,
    "hbm_bytes": hbm_bytes,
    "bound_us": max(compute, memory) * 1e6,
    "limit": "memory" if memory > compute else "schedule",
  }


def _of_operation(name: str, weights) -> Sequence[float]:
  if not isinstance(weights, Mapping):
    return weights
  return next((of for part, of in weights.items() if part in name), ())


def count_cycles(
  text: str,
  regions: Sequence[float] = (),
  small_region: int = 64,
  loops: Sequence[float] = (),
  grid: int | None = None,
) -> float:
  """Bundles of a `final_bundles.txt`, weighed by trip counts; see `schedule`."""
  bundles, depth = [], 0
  for line in text.splitlines():
    if match := _BUNDLE.match(line):
      marks, body = match.groups()
      # An empty bundle is printed without the marks of its depth.
      depth = depth if body.lstrip().startswith("}") else marks.count(">")
      bundles.append((depth, body))
  given = iter(regions), iter(loops), grid
  return _count(bundles, 0, len(bundles), 0, given, small_region)


def _count(bundles, first: int, end: int, depth: int, given, small: int) -> float:
  total, i = 0, first
  while i < end:
    if bundles[i][0] == depth:
      total, i = total + 1, i + 1
      continue
    stop = next((j for j in range(i, end) if bundles[j][0] <= depth), end)
    total += _count_loop(bundles, i, stop, depth + 1, given, small)
    i = stop
  return total


def _count_loop(bundles, first: int, end: int, depth: int, given, small: int) -> float:
  regions, loops, grid = given
  exits = [_EXIT.search(bundles[j][1]) for j in range(first, end) if bundles[j][0] == depth]
  trips = next((int(found[1]) for found in reversed(exits) if found), None)
  step, conditional = _predicated(bundles, range(first, end), depth, small)
  if trips is None and depth > 1:
    trips = next(loops, 1)
  elif trips is None:
    # The grid is the outermost loop, with a trip ahead of the first step and one behind the last.
    trips = grid + 2 * (step is not None) if grid else 1
  steps = _steps(bundles, step[0] - 1, trips) if step and trips > 2 else trips
  parts = [(first, end, trips)]
  if step:
    parts = [(first, step[0], trips), (*step, steps), (step[1], end, trips)]
  total = 0
  for at, part_end, times in parts:
    for start, stop in (region for region in conditional if at <= region[0] < part_end):
      total += times * _count(bundles, at, start, depth, given, small)
      total += next(regions, times) * _count(bundles, start, stop, depth, given, small)
      at = stop
    total += times * _count(bundles, at, part_end, depth, given, small)
  return total


def _steps(bundles, branch: int, trips: int) -> int:
  """How often a pipeline's step runs, which the branch skips but for `from <= trip < below`.

  The first trips only start to read, and the last ones only wait for what is written: mostly one
  each, but XLA reads some operands several steps ahead, and may begin or end with a step.
  """
  defined = dict(found for _, body in bundles for found in _DEFINED.findall(body))
  skip = _SKIPPED_IF.search(bundles[branch][1])
  skipped = defined.get(skip[1], "") if skip else ""
  if kept := _IN_REGISTER.match(skipped):  # A predicate that a scalar register holds meanwhile.
    select = re.search(r"\*/(%p\w+),", defined.get(kept[1], ""))
    skipped = defined.get(select[1], "") if select else ""
  if from_first := _FROM.match(skipped):
    return int(from_first[1])
  if to_last := _BELOW.match(skipped):
    return trips - int(to_last[1])
  tests = " ".join(defined.get(name, "") for name in re.findall(r"%p\w+", skipped))
  first, below = _FROM.search(tests), _BELOW.search(tests)
  # A grid that is not constant has its number in a register.
  return int(below[1]) - int(first[1]) if first and below else trips - 2


def _predicated(
  bundles, inner: range, depth: int, small: int
) -> tuple[tuple[int, int] | None, list[tuple[int, int]]]:
  """What the branches of a loop skip: the step of the grid, if there is one, and regions in it.

  The step ends with the loop. A region is [first, end), from the branch over it to its fallthrough;
  of nested ones under conditions the outermost counts.
  """
  found, branches = [], {}
  for i in inner:
    at, body = bundles[i]
    for target in _TARGET.findall(body):
      if target in branches:
        found.append((branches.pop(target) + 1, i))
    branch = _BRANCH.search(body)
    if at == depth and branch:
      branches[branch[1]] = i
  found = sorted(region for region in found if region[1] - region[0] > small)
  # At the end of the loop there is only bookkeeping behind the step, and so there is before it. The
  # grid is the outermost loop.
  is_step = lambda first, end: inner.stop - end <= _AFTER_STEP < end - first
  step = next((region for region in found if depth == 1 and is_step(*region)), None)
  outermost = []
  for first, end in found:
    in_step = step is None or step[0] <= first and end <= step[1] and (first, end) != step
    # One that holds a loop only skips a loop of no trips.
    holds_loop = any(bundles[i][0] > depth for i in range(first, end))
    if in_step and not holds_loop and not (outermost and end <= outermost[-1][1]):
      outermost.append((first, end))
  return step, outermost
