"""Weight-only products of public libraries on TPU, counted: qwix and tokamax.

qwix multiplies bfloat16 x by weights that it dequantizes to bfloat16 before XLA's product (`qwix.dot`).
It quantizes with zero points to 4 and 8 bits; without, 2 bits are its int2 or, as its 3 bits are, int4.
By hand, of 16 x 4096 x 4096 in 4 bits with zero points on v5e, in bundles: 8 x 3159 of a step, which
the pipeline of 12 trips runs for 2 <= trip < 10, + 12 x 124 around it + 19 before and behind + 126 that
widen the zero points + 173 of the program make 27078, which is the count. The end of the sum, 39 of a
step, would have to be counted once: up to 1 % is too much.

tokamax has a kernel of its own under `ragged_dot`, of which one group is a plain product: integers
without zero points. `ragged_dot` refuses fewer than 128 rows, so that the kernel beneath is called, with
rows padded to 16. It takes all inputs of a block of columns at once and the best of `TOKAMAX_COLUMNS`;
the scales that it repeats for itself are counted. Of two cores it uses one. By hand, as above without
zero points and with 256 columns: 16 x 906, the reading of x left out, which is the same for all, + 121
before and behind make 14617.
"""

from benchmarks.kernels.tpu_schedule import bound, schedule  # isort: skip

import jax
import jax.numpy as jnp

from benchmarks.kernels.quantized_matmul_cases import SMALL_REGION

# What qwix and tokamax multiply by, of each number of bits, with and without zero points.
QWIX_TYPES = {
  "qwix": {4: [jnp.int4], 8: [jnp.int8]},
  "qwix_symmetric": {2: [jnp.int2, "int2"], 3: ["int3"], 4: [jnp.int4], 8: [jnp.int8]},
}
TOKAMAX_TYPES = {2: jnp.int2, 4: jnp.int4, 8: jnp.int8}
TOKAMAX_COLUMNS = (256, 512, 1024)


def qwix_peers(chip: str, shape, bits: int, rows: int, group) -> dict[str, dict]:
  """The best bounds of qwix's products with and without zero points, those it has.

  Args:
    chip: "v5e", "v5p" or "v6e".
    shape: inputs and columns of the weights.
    bits: of a weight.
    rows: of x.
    group: inputs and columns that share a scale; one column.
  """
  x = jax.ShapeDtypeStruct((rows, shape[0]), jnp.bfloat16)
  found = {}
  for name, types in QWIX_TYPES.items():
    bounds = [qwix_bound(chip, x, shape, t, group, name == "qwix") for t in types.get(bits, ())]
    if bounds:
      found[name] = min(bounds, key=lambda one: one["bound_us"])
  return found


def tokamax_peers(chip: str, shape, bits: int, rows: int, group) -> dict[str, dict]:
  """The best bound of tokamax's kernel, if it has these bits; arguments as above."""
  if bits not in TOKAMAX_TYPES:
    return {}
  x = jax.ShapeDtypeStruct((rows, shape[0]), jnp.bfloat16)
  bounds = [
    tokamax_bound(chip, x, shape, TOKAMAX_TYPES[bits], group, columns)
    for columns in TOKAMAX_COLUMNS
  ]
  bounds = [one for one in bounds if one]
  return {"tokamax": min(bounds, key=lambda one: one["bound_us"])} if bounds else {}


def qwix_bound(chip, x, shape, qtype, group, zero_points: bool) -> dict:
  import qwix

  leaves, tree = jax.tree.flatten(quantized(shape, qtype, group, zero_points))
  program = lambda x, *leaves: qwix.dot(x, tree.unflatten(leaves))
  cycles, hbm_bytes = schedule(program, [x, *leaves], chip, (), SMALL_REGION)
  return bound(chip, sum(cycles.values()), hbm_bytes) | {"type": jnp.dtype(leaves[0].dtype).name}


def quantized(shape, qtype, group, zero_points: bool):
  """qwix's abstract weights of a shape."""
  import qwix

  return jax.eval_shape(
    lambda w: qwix.quantize(
      w,
      qtype,
      channelwise_axes=[1],
      tiled_axes={0: group[0]},
      calibration_method="minmax" if zero_points else "absmax",
    ),
    jax.ShapeDtypeStruct(shape, jnp.bfloat16),
  )


def tokamax_bound(chip, x, shape, qtype, group, columns: int) -> dict | None:
  """None where a block of so many columns is too large for the chip or the kernel has no such."""
  from tokamax._src.ops.ragged_dot import pallas_mosaic_tpu_kernel as kernels

  rows = x.shape[0]
  padded = -(-rows // 16) * 16
  leaves, tree = jax.tree.flatten(quantized(shape, qtype, group, False))
  leaves = [jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype) for leaf in leaves]

  def program(x, *leaves):
    product = kernels.gmm(
      jnp.pad(x, ((0, padded - rows), (0, 0))),
      tree.unflatten(leaves),
      group_sizes=jnp.full(1, padded, jnp.int32),
      precision=jax.lax.Precision.DEFAULT,
      out_dtype=x.dtype,
      tiling=(padded, shape[0], columns),
    )
    return product[:rows]

  steps = shape[1] // columns
  # x is read before the first step, and would be again if its block changed.
  regions = {"gmm": [0, steps]}
  try:
    cycles, hbm_bytes = schedule(
      program, [x, *leaves], chip, regions, SMALL_REGION, grids={"gmm": steps}
    )
  except (jax.errors.JaxRuntimeError, NotImplementedError):
    return None
  return bound(chip, sum(cycles.values()), hbm_bytes) | {"columns": columns}
