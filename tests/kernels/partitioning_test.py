"""Kernels on a mesh: the same numbers on virtual devices, local shapes in programs for TPU slices."""

import importlib.util
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from common import cli
from common.compilation.topology import tpu_slice
from common.training.mesh import make_mesh
from kernels import partitioning
from kernels.attention.api import attention
from kernels.decode_attention.api import decode_attention
from kernels.integer_matmul.api import integer_matmul
from kernels.kronecker_quantize.api import kronecker_quantize
from kernels.lookup_matmul.api import lookup_matmul, pack_indices
from kernels.platform import has_tpu
from kernels.quantized_matmul.api import quantized_matmul

P = PartitionSpec
needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


def test_parts_are_as_the_whole():
  """On 8 virtual devices, which have to be there before JAX is imported."""
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
  }
  run = subprocess.run(
    [sys.executable, "-m", "tests.kernels.partitioning_run"],
    env=environment,
    capture_output=True,
    text=True,
  )
  assert run.returncode == 0, run.stderr
  assert run.stdout.splitlines()[-1] == "all agree"


def test_tensor_parallel_is_checked():
  x, values, scales = jnp.ones((1, 8)), jnp.ones((8, 4), jnp.int8), jnp.ones((1, 4))
  with pytest.raises(ValueError, match="tensor_parallel='rows' .* columns, inputs, None"):
    quantized_matmul(x, values, scales, bits=8, tensor_parallel="rows")


def test_without_a_mesh_nothing_is_cut():
  function = lambda x: x
  assert partitioning.on_parts(function, P(), P()) is function
  assert partitioning.batch_axes(8) == partitioning.tensor_axes(8) == ()
  assert not has_tpu()


def mesh_of(slice_name: str, **axes: int) -> jax.sharding.Mesh:
  cli.prepare_jax(compile_only=True)
  return make_mesh(axes, tpu_slice(slice_name).devices)


def program(mesh: jax.sharding.Mesh, function, *arrays) -> str:
  """The program of `function` for arrays (shape, dtype, axes) that lie on the mesh."""
  place = lambda shape, dtype, *axes: jax.ShapeDtypeStruct(
    shape, dtype, sharding=NamedSharding(mesh, P(*axes))
  )
  with jax.set_mesh(mesh):
    return jax.jit(function).lower(*(place(*array) for array in arrays)).compile().as_text()


def kernels_in(text: str) -> dict[str, str]:
  """The shapes of the results of kernels, by name."""
  calls = re.findall(r"%(\w+)[.\d]* = (.*?) custom-call\(.*tpu_custom_call", text)
  return {name: re.sub(r"\{[^}]*\}", "", shapes) for name, shapes in calls}


@needs_libtpu
def test_what_has_a_kernel():
  mesh = mesh_of("v5e:2x2", data=2, tensor=2)
  with jax.set_mesh(mesh):
    assert has_tpu() and has_tpu(["TPU v5 lite"]) and not has_tpu(["TPU v5"])
    inside = []
    cut = lambda x: inside.append((has_tpu(), partitioning.open_axes())) or x
    jax.eval_shape(
      jax.shard_map(cut, in_specs=P("data"), out_specs=P("data")),
      jax.ShapeDtypeStruct((8,), jnp.float32),
    )
    assert inside == [(True, {})]
  auto, devices = jax.sharding.AxisType.Auto, mesh.devices
  for shape, names, types, known in [
    ((4, 1), ("stage", "tensor"), (auto, auto), False),
    ((1, 4), ("stage", "tensor"), (auto, auto), True),
    ((4,), ("data",), (jax.sharding.AxisType.Explicit,), False),
  ]:
    with jax.set_mesh(jax.sharding.Mesh(devices.reshape(shape), names, axis_types=types)):
      assert has_tpu() == known


@needs_libtpu
@pytest.mark.parametrize(
  "tensor_parallel, w_axes, x_axes, part",
  [
    ("columns", (None, "tensor"), ("data",), "bf16[16,1024]"),
    ("inputs", ("tensor", None), ("data", "tensor"), "f32[16,2048]"),
  ],
)
def test_quantized_matmul(tensor_parallel, w_axes, x_axes, part):
  function = lambda *arrays: quantized_matmul(*arrays, bits=4, tensor_parallel=tensor_parallel)
  arrays = [
    ((32, 2048), jnp.bfloat16, *x_axes),
    ((2048, 2048), jnp.uint4, *w_axes),
    ((16, 2048), jnp.bfloat16, *w_axes),
    ((16, 2048), jnp.uint4, *w_axes),
  ]
  text = program(mesh_of("v5e:2x2", data=2, tensor=2), function, *arrays)
  assert kernels_in(text) == {"quantized_matmul_w4": part}
  assert "all-gather" not in text
  assert ("all-reduce" in text) == (tensor_parallel == "inputs")


@needs_libtpu
def test_quantized_matmul_is_left_to_xla():
  """Where W is whole on a tensor axis, the groups are not, or a part has no kernel."""
  mesh = mesh_of("v5e:2x2", tensor=4)
  for tensor_parallel, groups, columns in [(None, 4, 512), ("inputs", 2, 512), ("columns", 4, 256)]:
    shapes = [
      ((1, 512), jnp.bfloat16),
      ((512, columns), jnp.int4),
      ((groups, columns), jnp.float32),
    ]
    with jax.set_mesh(mesh):
      jaxpr = jax.make_jaxpr(
        lambda *arrays, tensor_parallel=tensor_parallel: quantized_matmul(
          *arrays, bits=4, tensor_parallel=tensor_parallel
        )
      )(*(jax.ShapeDtypeStruct(*shape) for shape in shapes))
    assert "pallas_call" not in str(jaxpr)


@needs_libtpu
def test_attention_and_its_gradients():
  def loss(query, key, value):
    return attention(query, key, value).astype(jnp.float32).sum()

  cut = "data", "tensor"
  arrays = [((2, heads, 256, 128), jnp.bfloat16, *cut) for heads in (8, 4, 4)]
  text = program(mesh_of("v5e:2x2", data=2, tensor=2), jax.grad(loss, (0, 1, 2)), *arrays)
  found = kernels_in(text)
  assert set(found) >= {"attention_forward"} and len(found) >= 2  # And backward.
  assert "bf16[1,4,256,128]" in found["attention_forward"]
  assert not re.search("all-gather|all-reduce|all-to-all", text)


@needs_libtpu
@pytest.mark.parametrize("paged", (True, False))
def test_decode_attention(paged):
  def function(query, keys, values, key_scales, value_scales, lengths, table):
    return decode_attention(
      query,
      keys,
      values,
      lengths,
      page_table=table if paged else None,
      key_scales=key_scales,
      value_scales=value_scales,
    )

  cut = (None if paged else "data", "tensor")
  arrays = [
    ((4, 16, 128), jnp.bfloat16, "data", "tensor"),
    *[((4, 8, 256, 128), jnp.int8, *cut)] * 2,
    *[((4, 8, 256), jnp.float32, *cut)] * 2,
    ((4,), jnp.int32, "data"),
    ((4, 2), jnp.int32, "data"),
  ]
  text = program(mesh_of("v5e:2x2", data=2, tensor=2), function, *arrays)
  name = "decode_attention_pages" if paged else "decode_attention"
  assert "bf16[2,4,2,128]" in kernels_in(text)[name]
  assert not re.search("all-gather|all-reduce|all-to-all", text)


@needs_libtpu
def test_lookup_matmul():
  mesh = mesh_of("v5e:2x2", data=2, tensor=2)
  planes = jax.eval_shape(lambda i: pack_indices(i, 256), np.zeros((512, 256), np.int32))
  function = lambda *arrays: lookup_matmul(*arrays, columns=2048, tensor_parallel="columns")
  arrays = [
    ((4, 512), jnp.bfloat16, "data"),
    (planes.shape, planes.dtype, None, None, "tensor"),
    ((1, 256, 8), jnp.bfloat16),
  ]
  text = program(mesh, function, *arrays)
  assert "128]" in kernels_in(text)["lookup_matmul_k256"]  # Half of the vectors.
  assert "all-gather" not in text


@needs_libtpu
def test_activations_are_quantized_by_row():
  mesh = mesh_of("v5p:2x2x1", data=4)
  arrays = [((64, 512), jnp.bfloat16, "data"), ((16, 16), jnp.bfloat16), ((32, 32), jnp.bfloat16)]
  text = program(mesh, lambda *arrays: kronecker_quantize(*arrays, bits=4), *arrays)
  assert "s8[32,512]" in kernels_in(text)["kronecker_quantize"]
  assert "all-gather" not in text
  arrays = [
    ((4, 2048, 256), jnp.bfloat16, "data"),
    ((256, 256), jnp.int8),
    ((1, 256), jnp.float32),
  ]
  text = program(mesh, lambda *arrays: integer_matmul(*arrays, activation_bits=8), *arrays)
  assert "s8[2048,256]" in kernels_in(text)["quantize_activations"]
  assert "all-gather" not in text
