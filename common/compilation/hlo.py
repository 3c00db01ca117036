"""What a compiled program does, read from XLA's text: FLOPs, memory traffic and collectives.

XLA's own `cost_analysis` counts the body of a loop once; here everything is multiplied by the trip
count, which is read from the loop's condition. Numbers are per device.

  FLOPs       of matrix products and convolutions, two per multiply-add, and what kernels estimate
  HBM bytes   read and written by each scheduled operation, operands and results that live in HBM;
              a slice of a larger array counts as the slice. Buffers in on-chip memory are free.
  collectives count, and bytes of the whole array that each moves: what an all-gather produces, a
              reduce-scatter consumes, the others produce
"""

import dataclasses
import functools
import math
import re
from collections import Counter

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_FLOPS = re.compile(r'"flops":"(\d+)"')
_NAME = re.compile(r"%([\w.\-]+)")
_FREE = frozenset(
  "parameter constant get-tuple-element tuple bitcast while call conditional after-all domain "
  "partition-id replica-id opt-barrier async-start async-update async-done".split()
)


@dataclasses.dataclass(frozen=True)
class Collective:
  """All collectives of one kind that one device takes part in during one run.

  Attributes:
    count: how many.
    total_bytes: their sizes together.
    sizes: their different sizes in bytes, the largest last.
  """

  count: int
  total_bytes: int
  sizes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Cost:
  """What one run of a program costs one device.

  Attributes:
    flops, hbm_bytes: see the module.
    collectives: by kind.
    unknown_loops: loops whose trip count is not in the text; their bodies are counted once.
  """

  flops: float
  hbm_bytes: float
  collectives: dict[str, Collective]
  unknown_loops: int


@dataclasses.dataclass(frozen=True)
class _Array:
  bits: int
  dims: tuple[int, ...]
  in_hbm: bool

  @property
  def bytes(self) -> float:
    return self.bits * math.prod(self.dims) / 8

  @property
  def hbm_bytes(self) -> float:
    return self.bytes if self.in_hbm else 0


@dataclasses.dataclass(frozen=True)
class _Instruction:
  name: str
  opcode: str
  shape: str
  operands: tuple[str, ...]
  arguments: str  # Of a constant its value, of a parameter its index.
  attributes: str

  @functools.cached_property
  def arrays(self) -> list[_Array]:
    """The arrays of the result, tuples flattened."""
    return [_array(match) for match in _ARRAY.finditer(self.shape)]

  def attribute(self, name: str) -> str | None:
    match = re.search(rf"\b{name}=%?([\w.\-]+|\{{[^}}]*\}})", self.attributes)
    return match and match[1]


class _Computation(dict):
  """Instructions by name, in order."""

  root: str


def cost(text: str) -> Cost:
  """Reads the text of an optimized, scheduled HLO module (`compiled.as_text()`)."""
  computations, entry = _parse(text)
  reader = _Reader(computations)
  reader.run(entry, 1)
  collectives = {
    kind: Collective(
      count=sum(found.values()),
      total_bytes=round(sum(size * times for size, times in found.items())),
      sizes=tuple(sorted(map(round, found))),
    )
    for kind in COLLECTIVES
    if (found := reader.collectives[kind])
  }
  return Cost(reader.flops, reader.hbm_bytes, collectives, reader.unknown_loops)


class _Reader:
  def __init__(self, computations: dict[str, _Computation]):
    self.computations = computations
    self.flops = self.hbm_bytes = 0.0
    self.collectives = {kind: Counter() for kind in COLLECTIVES}
    self.unknown_loops = 0
    self._channels = set()

  def run(self, name: str, times: int, fused: bool = False) -> None:
    """Adds what `times` runs of a computation cost; `fused` ones touch no memory of their own."""
    computation = self.computations[name]
    for instruction in computation.values():
      opcode = instruction.opcode
      if opcode in ("dot", "convolution"):
        self.flops += times * _product_flops(instruction, computation)
      elif opcode == "custom-call":
        self.flops += times * sum(map(float, _FLOPS.findall(instruction.attributes)))
      if opcode.removesuffix("-start") in COLLECTIVES:
        self._add_collective(instruction, computation, name, times, fused)
      if not fused:
        self.hbm_bytes += times * self._traffic(instruction, computation)
      if opcode == "while":
        trips = _trip_count(instruction, computation, self.computations)
        self.unknown_loops += trips is None
        self.run(instruction.attribute("body"), times * (1 if trips is None else trips))
      elif opcode == "conditional":
        for branch in _branches(instruction):
          self.run(branch, times)
      elif called := instruction.attribute("calls"):
        self.run(called, times, fused or opcode == "fusion")
      elif opcode == "call":
        self.run(instruction.attribute("to_apply"), times, fused)

  def _add_collective(self, instruction, computation, where: str, times: int, fused: bool) -> None:
    kind = instruction.opcode.removesuffix("-start")
    # A collective that is spread over several fusions occurs in each, with one channel. (Those of
    # `jax.shard_map`, outside of fusions, all have one.)
    channel = (kind, instruction.attribute("channel_id"))
    if fused and channel[1] is not None and channel in self._channels:
      return
    self._channels.add(channel)
    operands = sum(a.bytes for name in instruction.operands for a in computation[name].arrays)
    results = sum(a.bytes for a in instruction.arrays)
    if instruction.opcode.endswith("-start") and kind != "all-reduce":
      # The result of a start is (operands, results, scalars of the transfer).
      results = sum(a.bytes for a in instruction.arrays if a.dims) - operands
    if kind == "all-reduce" and where.startswith("all-reduce-scatter"):
      kind = "reduce-scatter"  # TPU: an all-reduce of which each device keeps a slice.
    size = operands if instruction.opcode.startswith("reduce-scatter") else results
    self.collectives[kind][size] += times

  def _traffic(self, instruction, computation) -> float:
    """HBM bytes of one run of an instruction that is not inside of a fusion."""
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done"):
      return 0
    operands = [computation[name] for name in instruction.operands]
    if opcode == "fusion":
      fused = self.computations[instruction.attribute("calls")]
      parameters = sorted(
        (i for i in fused.values() if i.opcode == "parameter"), key=lambda i: int(i.arguments)
      )
      return sum(self._read(p, fused) for p in parameters) + self._written(
        fused[fused.root], fused, instruction.arrays
      )
    if opcode.endswith("-start"):
      return sum(a.hbm_bytes for a in instruction.arrays)
    if opcode in ("dynamic-slice", "slice", "gather"):
      return 2 * sum(a.hbm_bytes for a in instruction.arrays)
    if opcode == "dynamic-update-slice":
      return 2 * sum(a.hbm_bytes for a in operands[1].arrays)
    return sum(a.hbm_bytes for i in (instruction, *operands) for a in i.arrays)

  def _read(self, value: _Instruction, fused: _Computation) -> float:
    """HBM bytes that a fusion reads of its parameter, or of a view of it."""
    whole = sum(a.hbm_bytes for a in value.arrays)
    total = 0.0
    for user in fused.values():
      if value.name not in user.operands:
        continue
      first = user.operands[0] == value.name
      if user.opcode == "bitcast":
        total += self._read(user, fused)
      elif first and user.opcode in ("dynamic-slice", "slice", "gather"):
        total += sum(a.bytes for a in user.arrays)
      elif first and user.opcode == "dynamic-update-slice":
        pass  # In place: only the update is touched.
      elif user.opcode == "fusion":
        inner = self.computations[user.attribute("calls")]
        index = str(user.operands.index(value.name))
        parameter = next(
          i for i in inner.values() if i.opcode == "parameter" and i.arguments == index
        )
        total += self._read(parameter, inner)
      else:
        return whole
    return min(total, whole)

  def _written(self, root: _Instruction, fused: _Computation, results: list[_Array]) -> float:
    """HBM bytes that a fusion writes."""
    if root.opcode == "tuple" and len(root.operands) == len(results):
      return sum(self._written(fused[n], fused, [r]) for n, r in zip(root.operands, results))
    if not any(r.in_hbm for r in results):
      return 0
    if root.opcode == "bitcast":
      return self._written(fused[root.operands[0]], fused, results)
    if root.opcode == "dynamic-update-slice":
      return sum(a.bytes for a in fused[root.operands[1]].arrays)
    if root.opcode == "fusion":
      inner = self.computations[root.attribute("calls")]
      return self._written(inner[inner.root], inner, results)
    return sum(r.hbm_bytes for r in results)


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
  computations, entry, current = {}, None, None
  for line in text.splitlines():
    if not line.startswith(" "):
      header = _HEADER.match(line)
      if header:
        current = computations[header[2]] = _Computation()
        entry = header[2] if header[1] else entry
    elif current is not None and (match := _INSTRUCTION.match(line)):
      shape, rest = _balanced(line, match.end())
      opcode, _, tail = line[rest:].lstrip().partition("(")
      arguments, end = _balanced("(" + tail, 0)
      current[match[2]] = _Instruction(
        name=match[2],
        opcode=opcode,
        shape=shape,
        operands=tuple(_NAME.findall(arguments)),
        arguments=arguments[1:-1],
        attributes=("(" + tail)[end:].partition(", metadata=")[0]
        + " ".join(re.findall(r'"known_trip_count":\{"n":"\d+"\}|"flops":"\d+"', tail)),
      )
      if match[1]:
        current.root = match[2]
  return computations, entry


def _balanced(line: str, start: int) -> tuple[str, int]:
  """The text from `start` to the space after it, or its closing parenthesis, and where it ends."""
  if line[start] != "(":
    end = line.index(" ", start)
    return line[start:end], end
  depth = 0
  for i in range(start, len(line)):
    depth += (line[i] == "(") - (line[i] == ")")
    if depth == 0:
      return line[start : i + 1], i + 1
  raise ValueError(f"unbalanced parentheses in {line[:200]!r}")


def _array(match: re.Match) -> _Array:
  kind, dims, layout = match.groups()
  digits = re.search(r"\d+", kind)
  bits = int(digits[0]) if digits else {"pred": 8}.get(kind, 0)
  sizes = tuple(int(d) for d in dims.split(",") if d)
  return _Array(bits, sizes, not re.search(r"S\([1-9]", layout or ""))


def _branches(instruction: _Instruction) -> list[str]:
  listed = instruction.attribute("branch_computations")
  if listed:
    return _NAME.findall(listed)
  return [instruction.attribute("true_computation"), instruction.attribute("false_computation")]


def _trip_count(loop: _Instruction, computation, computations) -> int | None:
  """Trips of a loop that counts by one from a constant up to a constant, as `lax.scan` does."""
  if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
    return int(known[1])
  condition = computations[loop.attribute("condition")]
  test = condition[condition.root]
  while test.opcode in ("fusion", "bitcast", "copy") and len(test.operands) == 1:
    test = condition[test.operands[0]]
  if test.opcode != "compare" or test.attribute("direction") != "LT":
    return None
  counter, limit = (condition[name] for name in test.operands)
  if limit.opcode != "constant" or counter.opcode != "get-tuple-element":
    return None
  start = computation[loop.operands[0]]
  index = int(counter.attribute("index"))
  if start.opcode == "tuple":
    first = computation[start.operands[index]]
    while first.opcode in ("copy", "bitcast"):
      first = computation[first.operands[0]]
    if first.opcode == "constant":
      return max(int(limit.arguments) - int(first.arguments), 0)
  return int(limit.arguments)


def _product_flops(instruction: _Instruction, computation: _Computation) -> float:
  left, right = (computation[name].arrays[0].dims for name in instruction.operands[:2])
  out = instruction.arrays[0].dims
  if instruction.opcode == "dot":
    contracted = re.findall(r"\d+", instruction.attribute("lhs_contracting_dims") or "")
    return 2.0 * math.prod(out) * math.prod(left[int(d)] for d in contracted)
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
  lhs, rhs, result = labels.groups()
  size = lambda axis, names, dims: dims[names.index(axis)]
  groups = int(instruction.attribute("batch_group_count") or 1)
  total = 2.0 * size("i", rhs, right) * size("o", rhs, right) * size("b", lhs, left) / groups
  window = dict(re.findall(r"(\w+)=([\d_x\-]+)", instruction.attribute("window") or ""))
  for i, axis in enumerate(sorted(set(lhs) - set("bf"))):
    get = lambda name, default, i=i: window[name].split("x")[i] if name in window else default
    total *= _valid_taps(
      taps=size(axis, rhs, right),
      outputs=size(axis, result, out),
      inputs=size(axis, lhs, left),
      stride=int(get("stride", 1)),
      padding=int(get("pad", "0_0").split("_")[0]),
      input_dilation=int(get("lhs_dilate", 1)),
      tap_dilation=int(get("rhs_dilate", 1)),
    )
  return total


@functools.lru_cache(maxsize=1024)
def _valid_taps(*, taps, outputs, inputs, stride, padding, input_dilation, tap_dilation) -> int:
  """Pairs of output and kernel position that meet an input, neither padding nor a hole.

  The TPU compiler writes batched matrix products as convolutions, whose windows meet few.
  """
  count = 0
  for tap in range(taps):
    # Output o meets position o * stride + tap * tap_dilation - padding of the dilated input.
    offset = tap * tap_dilation - padding
    low = max(0, -(offset // stride))
    high = min(outputs - 1, ((inputs - 1) * input_dilation - offset) // stride)
    if input_dilation == 1:
      count += max(0, high - low + 1)
    else:
      positions = range(low, high + 1)
      count += sum((o * stride + offset) % input_dilation == 0 for o in positions)
  return count
