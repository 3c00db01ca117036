"""Cycles of a TPU program, counted in the compiler's own schedule; no TPU is needed.

libtpu writes the final bundles (one per cycle) of every operation that it compiles, if it is told so
before it is loaded: import this module before anything starts a backend. Loops are weighed by their
trip counts. What a kernel does under a condition is a predicated region of its own: where it is not
run in every step of the grid, the caller says how often. Waiting for memory is not in the schedule:
a program takes at least the larger of its cycles and of its bytes over the bandwidth.
"""

import glob
import os
import re
import tempfile
from collections.abc import Callable, Sequence

_FOLDER = tempfile.TemporaryDirectory()
os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={_FOLDER.name} --xla_jf_dump_llo_text=true"

import jax  # noqa: E402
from jax.sharding import SingleDeviceSharding  # noqa: E402

from common.compilation.compile_only import compile_lowered  # noqa: E402
from common.compilation.hlo import cost  # noqa: E402
from common.compilation.topology import tpu_slice  # noqa: E402

SLICES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
HERTZ = {"v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9}

# Regions smaller than this are bookkeeping of the pipeline, counted as if always run.
_SMALL_REGION = 64

_BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s*([A-Z]{2})?\s*:\s*((?:>\s*)*)\{(.*)")
_EXIT = re.compile(r"scmp\.ge\.s32\.totalorder [^,]*, (\d+) /\* loop exit test")
_BRANCH = re.compile(r"sbr\.rel \(.*?\) target = \$region(\d+)")


def schedule(
  function: Callable, shapes: Sequence[jax.ShapeDtypeStruct], chip: str, regions: Sequence[int] = ()
) -> tuple[dict[str, int], float]:
  """Cycles by operation of one core, and the program's HBM bytes.

  Args:
    function: to compile.
    shapes: of its arguments.
    chip: "v5e", "v5p" or "v6e".
    regions: how often each large predicated region within the step of a Pallas kernel runs, in the
      order of the program.
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
        cycles[name[1]] = count_cycles(f.read(), regions)
  # At least what is passed in and out: the text hides how some large weights come on chip.
  memory = compiled.memory_analysis()
  passed = memory.argument_size_in_bytes + memory.output_size_in_bytes
  return cycles, max(cost(text).hbm_bytes, passed)


def count_cycles(text: str, regions: Sequence[int] = ()) -> int:
  """Bundles of a `final_bundles.txt`, weighed by trip counts; see `schedule`."""
  bundles, depth = [], 0
  for line in text.splitlines():
    if match := _BUNDLE.match(line):
      label, marks, body = match.groups()
      # An empty bundle is printed without the marks of its depth.
      depth = depth if body.lstrip().startswith("}") else marks.count(">")
      bundles.append((label, depth, body))
  return _count(bundles, 0, len(bundles), 0, iter(regions))


def _count(bundles, first: int, end: int, depth: int, regions) -> int:
  total, i = 0, first
  while i < end:
    if bundles[i][1] == depth:
      total, i = total + 1, i + 1
      continue
    stop = next((j for j in range(i, end) if bundles[j][1] <= depth), end)
    inner = range(i, stop)
    exits = [_EXIT.search(bundles[j][2]) for j in inner if bundles[j][1] == depth + 1]
    trips = next((int(found[1]) for found in reversed(exits) if found), 1)
    total += trips * _count(bundles, i, stop, depth + 1, regions)
    # A region under a condition, from the branch over it to its fallthrough, is not in every trip.
    for size in _predicated(bundles, inner, depth + 1):
      total += size * (next(regions, trips) - trips)
    i = stop
  return total


def _predicated(bundles, inner: range, depth: int) -> list[int]:
  """Sizes of the large regions that a branch skips, in order.

  The one that ends with the loop is the step itself, which the pipeline's first and last trips skip.
  """
  found, stack = [], []
  for i in inner:
    label, at, body = bundles[i]
    while label == "PF" and stack:
      start = stack.pop()
      if i - start > _SMALL_REGION and inner.stop - i > _SMALL_REGION:
        found.append((start, i - start))
      break
    if at == depth and _BRANCH.search(body) and "loop exit" not in body:
      stack.append(i)
  return [size for _, size in sorted(found)]
