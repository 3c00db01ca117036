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
from jax.sharding import SingleDeviceSharding  # noqa: E402

from common.compilation.compile_only import compile_lowered  # noqa: E402
from common.compilation.hlo import cost  # noqa: E402
from common.compilation.topology import tpu_slice  # noqa: E402

SLICES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
HERTZ = {"v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9}

# Bundles of the pipeline's bookkeeping behind the step of the grid, at most.
_AFTER_STEP = 64

_BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s*(?:[A-Z]{2})?\s*:\s*((?:>\s*)*)\{(.*)")
_EXIT = re.compile(r"scmp\.ge\.s32\.totalorder [^,]*, (\d+) /\* loop exit test")
_TARGET = re.compile(r"Start/End empty region (\d+)")
_BRANCH = re.compile(r"sbr\.rel \(.*?\) target = \$region(\d+)")


def schedule(
  function: Callable,
  shapes: Sequence[jax.ShapeDtypeStruct],
  chip: str,
  regions: Sequence[float] | Mapping[str, Sequence[float]] = (),
  small_region: int = 64,
  loops: Sequence[float] | Mapping[str, Sequence[float]] = (),
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

  On a chip of two cores (v5p) both run the program, each for its part of the trips.
  """
  where = SingleDeviceSharding(tpu_slice(SLICES[chip]).devices[0])
  arguments = [jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where) for s in shapes]
  before = set(glob.glob(f"{_FOLDER.name}/*"))
  compiled, text = compile_lowered(jax.jit(function).lower(*arguments))
  cycles = {}
  for path in sorted(set(glob.glob(f"{_FOLDER.name}/*")) - before):
    name = re.search(r"/\d+-([^<>]*)-\d+-final_bundles\.txt$", path)
    if name and "schedule-analysis" not in path:
      with open(path) as f:
        given = [_of_operation(name[1], weights) for weights in (regions, loops)]
        cycles[name[1]] = count_cycles(f.read(), given[0], small_region, given[1])
  # At least what is passed in and out: the text hides how some large weights come on chip.
  memory = compiled.memory_analysis()
  passed = memory.argument_size_in_bytes + memory.output_size_in_bytes
  return cycles, max(cost(text).hbm_bytes, passed)


def _of_operation(name: str, weights) -> Sequence[float]:
  if not isinstance(weights, Mapping):
    return weights
  return next((of for part, of in weights.items() if part in name), ())


def count_cycles(
  text: str,
  regions: Sequence[float] = (),
  small_region: int = 64,
  loops: Sequence[float] = (),
) -> float:
  """Bundles of a `final_bundles.txt`, weighed by trip counts; see `schedule`."""
  bundles, depth = [], 0
  for line in text.splitlines():
    if match := _BUNDLE.match(line):
      marks, body = match.groups()
      # An empty bundle is printed without the marks of its depth.
      depth = depth if body.lstrip().startswith("}") else marks.count(">")
      bundles.append((depth, body))
  return _count(bundles, 0, len(bundles), 0, (iter(regions), iter(loops)), small_region)


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
  regions, loops = given
  exits = [_EXIT.search(bundles[j][1]) for j in range(first, end) if bundles[j][0] == depth]
  trips = next((int(found[1]) for found in reversed(exits) if found), None)
  if trips is None:
    trips = next(loops, 1) if depth > 1 else 1  # The grid is the outermost loop.
  step, conditional = _predicated(bundles, range(first, end), depth, small)
  # The pipeline's first trip only starts to read, and its last one only waits for what is written.
  steps = trips - 2 if step and trips > 2 else trips
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
