"""Compiles steps for a TPU slice without a TPU, and tells whether they fit and what they cost."""

import dataclasses
import pathlib
import re
import sys
import tempfile
from collections.abc import Callable, Sequence

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding
from rich.console import Console
from rich.table import Table

from common.compilation.hlo import Cost, cost
from common.compilation.step import Step
from common.compilation.topology import Chip, Slice, tpu_slice

# Collectives stay whole and in the open, where they can be counted: otherwise the compiler cuts
# some into chains of permutes that overlap with the matrix products that need them.
OPTIONS = {
  "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
  "xla_tpu_enable_async_collective_fusion": "false",
}


_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes of one device's memory.

  Attributes:
    arguments: what is passed in, donated or not.
    outputs: results that do not take a donated argument's place.
    temporaries: everything else that lives during the step, code included.
  """

  arguments: int
  outputs: int
  temporaries: int

  @property
  def total(self) -> int:
    return self.arguments + self.outputs + self.temporaries


@dataclasses.dataclass(frozen=True)
class CompiledStep:
  """A step compiled for a slice.

  Attributes:
    name: the step's.
    memory, cost: None where it does not fit.
    needs: what the compiler says of a step that does not fit, such as "18.68G of 15.75G".
  """

  name: str
  memory: Memory | None
  cost: Cost | None
  needs: str = ""

  def fits(self, chip: Chip) -> bool:
    """Whether it fits the chip's memory."""
    return self.memory is not None and self.memory.total <= chip.hbm_bytes

  def seconds(self, chip: Chip) -> tuple[float, float]:
    """Lower bounds of the step's time: (arithmetic at peak, memory traffic at full bandwidth)."""
    return self.cost.flops / chip.flops_per_second, self.cost.hbm_bytes / chip.bytes_per_second


def compile_step(step: Step) -> CompiledStep:
  """Compiles a step for the devices that its arguments are placed on.

  The cost counts the bodies of loops as often as they run, where the trip count is known.

  Raises:
    ValueError: no argument has a NamedSharding.
    jax.errors.JaxRuntimeError: the compiler failed for another reason than memory.
  """
  placed = [x.sharding for x in jax.tree.leaves(step.arguments)]
  mesh = next((s.mesh for s in placed if isinstance(s, NamedSharding)), None)
  if mesh is None:
    raise ValueError(f"the step {step.name!r} has no argument that is placed on a mesh")
  function = step.function if hasattr(step.function, "lower") else jax.jit(step.function)
  try:
    with jax.set_mesh(mesh), jax.enable_x64(step.x64):
      compiled, text = compile_lowered(function.lower(*step.arguments))
  except jax.errors.JaxRuntimeError as e:
    # Fast on-chip memory may be exhausted too: that is a kernel's fault, not the slice's.
    if "RESOURCE_EXHAUSTED" not in str(e) or "hbm" not in str(e).lower():
      raise
    return CompiledStep(step.name, None, None, _sizes(str(e)))
  stats = compiled.memory_analysis()
  memory = Memory(
    arguments=stats.argument_size_in_bytes,
    outputs=stats.output_size_in_bytes - stats.alias_size_in_bytes,
    temporaries=stats.temp_size_in_bytes + stats.generated_code_size_in_bytes,
  )
  return CompiledStep(step.name, memory, cost(text))


def compile_lowered(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, str]:
  """Compiles a lowered program; returns it and its optimized, scheduled HLO text."""
  # The compiler writes its text itself: jaxlib cannot read back every operation of the TPU's. It
  # writes nothing of what JAX finds in its cache.
  enabled = jax.config.jax_enable_compilation_cache
  with tempfile.TemporaryDirectory() as folder:
    options = OPTIONS | {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
    try:
      jax.config.update("jax_enable_compilation_cache", False)
      compilation_cache.reset_cache()  # Or JAX would not look at the setting again.
      compiled = lowered.compile(compiler_options=options)
    finally:
      jax.config.update("jax_enable_compilation_cache", enabled)
      compilation_cache.reset_cache()
    (file,) = pathlib.Path(folder).glob("*.after_optimizations.txt")
    return compiled, file.read_text()


def compile_for(topology: str, compile_steps: Callable[[Sequence[jax.Device]], list[Step]]) -> int:
  """Compiles every step for a slice and prints a table of each; the command line's exit code.

  Args:
    topology: such as "v5e:4x4".
    compile_steps: the steps for the slice's devices.

  Returns:
    0 if every step fits, else 1.

  Raises:
    UserError: there is no such slice, or its mesh does not divide the model.
  """
  tpu = tpu_slice(topology)
  progress, console = Console(stderr=True), Console()
  fits = True
  for step in compile_steps(tpu.devices):
    with progress.status(f"compiling {step.name}"):
      compiled = compile_step(step)
    console.print(table(compiled, tpu))
    fits &= compiled.fits(tpu.chip)
  verdict = "every step fits" if fits else "not every step fits"
  print(f"{verdict} {topology}: {len(tpu.devices)} chips with {_in_units(tpu.chip.hbm_bytes)} each")
  if not fits:
    print("a larger slice, a smaller batch or more sharding would help", file=sys.stderr)
  return 0 if fits else 1


def table(compiled: CompiledStep, tpu: Slice) -> Table:
  """What a person sees of a compiled step; numbers are per chip."""
  result = Table("per chip", f"{compiled.name} on {tpu.name}")
  if compiled.memory is None:
    result.add_row("memory", f"[red]does not fit:[/] {compiled.needs}")
    return result
  memory, chip = compiled.memory, tpu.chip
  total = f"{_in_units(memory.total)} of {_in_units(chip.hbm_bytes)}"
  parts = ("arguments", "outputs", "temporaries")
  for part in parts:
    result.add_row(part, _in_units(getattr(memory, part)))
  result.add_row("memory", total if compiled.fits(chip) else f"[red]does not fit:[/] {total}")
  program = compiled.cost
  result.add_section()
  result.add_row("FLOPs", f"{program.flops:.3g}")
  result.add_row("HBM traffic", _in_units(program.hbm_bytes))
  for kind, found in program.collectives.items():
    sizes = f"together {_in_units(found.total_bytes)}, the largest {_in_units(found.sizes[-1])}"
    result.add_row(kind, f"{found.count:,} x, {sizes}")
  if not program.collectives:
    result.add_row("collectives", "none")
  if program.unknown_loops:
    note = f"{program.unknown_loops} with an unknown trip count, their bodies counted once"
    result.add_row("loops", note)
  result.add_section()
  arithmetic, traffic = compiled.seconds(chip)
  bound = "arithmetic" if arithmetic > traffic else "memory"
  result.add_row("time", f"at least {1e3 * max(arithmetic, traffic):.3g} ms ({bound}-bound)")
  return result


def _in_units(size: float) -> str:
  unit, name = next((u, n) for u, n in _UNITS if size >= u or u == 1)
  return f"{size / unit:.3g} {name}"


def _sizes(error: str) -> str:
  sizes = re.findall(r"\(([\d.]+[KMGT])\)", error.splitlines()[0])
  return " of ".join(sizes) if len(sizes) == 2 else error.splitlines()[0]
