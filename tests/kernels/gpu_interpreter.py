"""Runs Mosaic GPU kernels on the CPU: JAX's interpreter, and what it lacks in this version.

It knows no transposed operands of the tensor cores and no layouts of registers (which change no value),
and compiles a kernel of several warpgroups anew for each of them and each block.
"""

import contextlib
import importlib.util
import pathlib
import threading
import unittest.mock

import jax
import jax.experimental.topologies
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import thread_map
from jax._src.pallas.mosaic_gpu import core
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.params import force_gpu_interpret_mode
from jax._src.state.types import TransposeTransform
from jax.interpreters import mlir
from jax.sharding import SingleDeviceSharding

from kernels.platform import HOPPER, has_one_gpu

mlir.register_lowering(core.layout_cast_p, lambda _, x, **__: [x], platform="cpu")


@contextlib.contextmanager
def gpu_interpreter():
  """Kernels that are traced inside run in the interpreter."""
  programs, lock = {}, threading.Lock()

  def run(jaxpr, consts, *args):
    with lock:
      if jaxpr not in programs:
        function = jax.jit(lambda consts, *args: jax.core.eval_jaxpr(jaxpr, consts, *args))
        programs[jaxpr] = function.lower(consts, *args).compile()
    programs[jaxpr](consts, *args)

  with (
    unittest.mock.patch.object(gpu_callbacks, "wgmma", _wgmma),
    unittest.mock.patch.object(thread_map, "_run_jaxpr", run),
    force_gpu_interpret_mode(),
  ):
    yield


def _wgmma(
  *,
  token,
  device_id,
  thread_id,
  acc_allocation_key_as_array,
  acc_transforms,
  a_allocation_key_as_array,
  a_transforms,
  b_allocation_key_as_array,
  b_transforms,
  **_,
):
  """As JAX's callback, with transposed operands."""
  memory = gpu_callbacks._get_shared_memory()
  thread = memory.get_global_thread_id(int(device_id), int(thread_id))

  def read(key, transforms):
    key = gpu_callbacks.HostAllocationKey.from_array(key)
    transforms = jax.tree.map(int, gpu_callbacks._remove_noop_transforms(transforms))
    transposed = [t for t in transforms if isinstance(t, TransposeTransform)]
    indices = [t for t in transforms if hasattr(t, "indices")]
    where = gpu_callbacks.interpret_utils.to_range(indices)
    value, *_ = memory.get_buffer_content(key, where, thread, logging_info=None)
    for _ in transposed:
      value = value.T
    return key, where, value

  key, where, total = read(acc_allocation_key_as_array, acc_transforms)
  a = read(a_allocation_key_as_array, a_transforms)[-1]
  b = read(b_allocation_key_as_array, b_transforms)[-1]
  total = total + np.matmul(a.astype(np.float32), b.astype(np.float32))
  memory.store_buffer_content(key, where, total, thread, logging_info=None)
  return token


TARGET = pathlib.Path(__file__).parent / "h100.txtpb"  # XLA's description of an H100.

on_hopper = pytest.mark.skipif(
  not has_one_gpu(HOPPER), reason="this machine does not have one Hopper GPU"
)
with_cuda_plugin = pytest.mark.skipif(
  importlib.util.find_spec("jax_cuda13_plugin") is None, reason="jax[cuda13] is not installed"
)


def lower_for_gpu(function, *shapes) -> str:
  """The program of a function for NVIDIA GPUs, kernels in Mosaic's form; no plugin is needed.

  Args:
    function: of arrays.
    shapes: trees of jax.ShapeDtypeStruct.
  """
  return jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def compile_for_h100(function, *shapes) -> jax.stages.Compiled:
  """As `lower_for_gpu`, down to machine code: JAX's CUDA plugin is needed, a GPU is not."""
  topology = jax.experimental.topologies.get_topology_desc(
    platform="cuda", topology_name="h100", topology="1x1x1", target_config=TARGET.read_text()
  )
  where = SingleDeviceSharding(topology.devices[0])
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes)
  return jax.jit(function).lower(*shapes).compile()
