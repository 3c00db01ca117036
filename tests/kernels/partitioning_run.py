"""Kernels' functions cut over 8 virtual CPU devices, for the tests.

python -m tests.kernels.partitioning_run
checks each cut against the same function on one device, forward and backward. The references stand in
for the kernels, which the TPU interpreter cannot run on so many devices: what is checked is which part
each device has, and how the parts' results and gradients come together.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from common.training.mesh import AXES, make_mesh
from kernels import partitioning
from kernels.attention import api as attention
from kernels.decode_attention import api as decode_attention
from kernels.integer_matmul import api as integer_matmul
from kernels.kronecker_quantize import api as kronecker_quantize
from kernels.lookup_matmul import api as lookup_matmul
from kernels.quantized_matmul import api as quantized_matmul
from kernels.quantized_matmul.packing import pack

P = PartitionSpec
SEEN = []  # Shapes of the first argument of kernels, on a device.


def stand_in(module, name, reference) -> None:
  """Lets `reference` run for the kernel `name` of the op's TPU module."""

  def run(*arguments, **named):
    SEEN.append((arguments[0] if arguments else named["query"]).shape)
    return reference(*arguments, **named)

  setattr(module.mosaic_tpu, name, run)


def compare(name, function, arrays, specs, mesh, seen, tolerance=1e-5) -> None:
  """`function(implementation, *arrays)`, with arrays that lie as `specs` say, on and off the mesh.

  Args:
    seen: shape of the first argument on a device.
    tolerance: of results and gradients in float32, in parts of the largest.
  """

  def loss(implementation):
    def value(*arrays):
      y = function(implementation, *arrays)
      # A slope that differs from element to element; codes have none.
      parts = [jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(y) if leaf.dtype == jnp.float32]
      return sum(parts), y

    floats = tuple(i for i, x in enumerate(arrays) if x.dtype == jnp.float32)
    return jax.jit(jax.value_and_grad(value, floats, has_aux=True))

  (_, expected), expected_grads = loss("xla")(*arrays)
  SEEN.clear()
  with jax.set_mesh(mesh):
    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs)]
    (_, found), found_grads = loss("mosaic_tpu")(*placed)
  assert set(SEEN) == {seen}, (name, SEEN, seen)
  close = lambda a, b: np.testing.assert_allclose(
    np.asarray(a, np.float32),
    np.asarray(b, np.float32),
    atol=tolerance * max(float(jnp.abs(jnp.asarray(b, jnp.float32)).max()), 1e-3),
    err_msg=name,
  )
  jax.tree.map(close, (found, found_grads), (expected, expected_grads))
  print(name)


def normal(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def codes(low, high, *shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).integers(low, high, shape), jnp.int32)


def quantized_products() -> None:
  stand_in(quantized_matmul, "quantized_matmul", quantized_matmul.xla.quantized_matmul)
  mesh = make_mesh({"data": 2, "tensor": 4})

  def compare_product(name, x, scales, x_spec, w_spec, seen, tensor_parallel, bits=4, mesh=mesh):
    values = pack(codes(0, 2**bits, x[-1], 512), bits, signed=False)
    zeros = codes(0, 2**bits, *scales).astype(values.dtype if bits != 3 else jnp.uint8)

    def function(implementation, x, values, scales, zeros):
      return quantized_matmul.quantized_matmul(
        x / 16,
        values,
        scales,
        zeros,
        bits=bits,
        tensor_parallel=tensor_parallel,
        implementation=implementation,
      )

    of_scales = P(*(axis if size % 4 == 0 else None for axis, size in zip(w_spec, scales)))
    arrays = normal(*x), values, jnp.abs(normal(*scales)) / 16, zeros
    compare(name, function, arrays, (x_spec, w_spec, of_scales, of_scales), mesh, seen)

  compare_product("columns", (4, 512), (4, 512), P("data"), P(None, "tensor"), (2, 512), "columns")
  compare_product(
    "inputs", (4, 512), (4, 512), P("data", "tensor"), P("tensor", None), (2, 128), "inputs"
  )
  compare_product(
    "inputs of one group",
    (2, 2, 512),
    (1, 512),
    P("data"),
    P("tensor", None),
    (1, 2, 128),
    "inputs",
  )
  compare_product(
    "3 bits", (4, 1024), (8, 512), P("data"), P("tensor", None), (2, 256), "inputs", bits=3
  )
  compare_product(
    "groups of columns", (4, 512), (512, 4), P("data"), P(None, "tensor"), (2, 512), "columns"
  )
  # What cannot be kept is gathered.
  compare_product(
    "inputs within a group", (4, 512), (2, 512), P("data"), P("tensor", None), (2, 512), "inputs"
  )
  compare_product("odd rows", (3, 512), (4, 512), P(), P(None, "tensor"), (3, 512), "columns")
  compare_product("W is whole", (4, 512), (4, 512), P("data"), P(None, "tensor"), (2, 512), None)
  compare_product(
    "slices of fsdp",
    (8, 512),
    (4, 512),
    P(("data", "fsdp")),
    P("fsdp", "tensor"),
    (2, 512),
    "columns",
    mesh=make_mesh({"data": 2, "fsdp": 2, "tensor": 2}),
  )


def transformed_products() -> None:
  """Within vmap, scan and jit, and where `jax.shard_map` has cut the arrays already."""
  mesh = make_mesh({"data": 2, "tensor": 4})
  values = pack(codes(-8, 8, 512, 512), 4, signed=True)

  def product(implementation, x, scales, tensor_parallel="columns"):
    return quantized_matmul.quantized_matmul(
      x / 16,
      values,
      scales,
      bits=4,
      tensor_parallel=tensor_parallel,
      implementation=implementation,
    )

  def mapped(implementation, x, scales):
    return jax.vmap(lambda x: product(implementation, x, scales))(x)

  def scanned(implementation, x, scales):
    step = jax.checkpoint(lambda x, scales: (jnp.tanh(product(implementation, x, scales)), None))
    return jax.lax.scan(jax.jit(step), x, scales)[0]

  scales = jnp.abs(normal(4, 512)) / 16
  compare("vmap", mapped, (normal(3, 4, 512), scales), (P(), P()), mesh, (2, 512))
  stacked = jnp.stack([scales] * 3)
  compare("scan", scanned, (normal(4, 512), stacked), (P("data"), P()), mesh, (2, 512))

  def manual(implementation, x, scales):
    if implementation == "xla":
      return product(implementation, x, scales)
    part = lambda x, scales: product(implementation, x, scales)
    specs = P("data"), P()
    return jax.shard_map(part, in_specs=specs, out_specs=P("data"), check_vma=False)(x, scales)

  compare("shard_map", manual, (normal(4, 512), scales), (P("data"), P()), mesh, (2, 512))


def attentions() -> None:
  stand_in(attention, "attention", attention.xla.attention)
  mesh = make_mesh({"data": 2, "tensor": 4})

  def compare_attention(name, shapes, spec, seen, bias=(1, 1, 8, 8), segments=2, mesh=mesh):
    slopes = jnp.linspace(0.1, 0.5, shapes[0][1])
    segment_ids = jnp.asarray(np.arange(8) // 3 + 1, jnp.int32) * jnp.ones((segments, 1), jnp.int32)

    def function(implementation, query, key, value, bias):
      return attention.attention(
        query,
        key,
        value,
        segment_ids=segment_ids,
        alibi_slopes=slopes,
        bias=bias,
        implementation=implementation,
      )

    query, cache = shapes
    arrays = normal(*query), normal(*cache, seed=1), normal(*cache, seed=2), normal(*bias, seed=3)
    compare(name, function, arrays, (spec, spec, spec, P()), mesh, seen)

  two = ((2, 8, 8, 4), (2, 4, 8, 4))
  cut = P("data", "tensor")
  compare_attention("batch and heads", two, cut, (1, 2, 8, 4))
  compare_attention("a bias of each head", two, cut, (1, 2, 8, 4), bias=(2, 8, 8, 8), segments=1)
  compare_attention("a bias of two dimensions", two, cut, (1, 2, 8, 4), bias=(8, 8))
  # Copies of two key heads for four devices; what cannot be kept is gathered.
  few = ((2, 8, 8, 4), (2, 2, 8, 4))
  compare_attention("few key heads", few, P("data"), (1, 2, 8, 4))
  compare_attention("tokens", two, P("data", None, "tensor"), (1, 2, 8, 4))
  odd = ((3, 6, 8, 4), (3, 3, 8, 4))
  compare_attention("odd batch and heads", odd, P(), (3, 6, 8, 4), segments=3)


def decode_attentions() -> None:
  stand_in(decode_attention, "decode_attention", decode_attention.xla.decode_attention)
  mesh = make_mesh({"data": 2, "tensor": 4})
  lengths, starts = jnp.asarray([5, 7], jnp.int32), jnp.asarray([1, 0], jnp.int32)
  slopes = jnp.linspace(0.1, 0.5, 8)

  def of_rows(implementation, query, keys, values, key_scales, value_scales):
    return decode_attention.decode_attention(
      query,
      keys,
      values,
      lengths,
      starts=starts,
      key_scales=key_scales,
      value_scales=value_scales,
      alibi_slopes=slopes,
      return_log_sum_exp=True,
      implementation=implementation,
    )

  query = normal(2, 8, 4)
  cache = [codes(-7, 8, 2, 4, 8, 4, seed=seed).astype(jnp.int8) for seed in (1, 2)]
  scales = [jnp.abs(normal(2, 4, 8, seed=seed)) for seed in (1, 2)]
  cut = P("data", "tensor")
  compare("decode, rows", of_rows, (query, *cache, *scales), (cut,) * 5, mesh, (1, 2, 4))

  def of_pages(implementation, query, keys, values):
    table = jnp.asarray([[3, 1], [0, 5]], jnp.int32)
    return decode_attention.decode_attention(
      query, keys, values, lengths * 8, page_table=table, implementation=implementation
    )

  pages = [normal(6, 4, 32, 4, seed=seed) for seed in (1, 2)]
  specs = cut, P(None, "tensor"), P(None, "tensor")
  compare("decode, pages", of_pages, (query, *pages), specs, mesh, (1, 2, 4))


def lookup_products() -> None:
  stand_in(
    lookup_matmul,
    "lookup_matmul",
    lambda x, packed, books, columns: lookup_matmul.xla.lookup_matmul(
      x, packed, books, None, None, columns
    ),
  )
  mesh = make_mesh({"data": 2, "tensor": 2, "fsdp": 2})

  def compare_product(name, inputs, columns, groups, spec, seen, tensor_parallel):
    planes = [
      lookup_matmul.pack_indices(codes(0, 16, inputs, -(-columns // v), seed=v), 16) for v in (2, 4)
    ]

    def function(implementation, x, books, residual_books, planes, residual_planes):
      return lookup_matmul.lookup_matmul(
        x,
        planes,
        books,
        residual_planes,
        residual_books,
        columns=columns,
        tensor_parallel=tensor_parallel,
        implementation=implementation,
      )

    arrays = normal(4, inputs) / 16, normal(groups, 16, 2), normal(1, 16, 4, seed=1), *planes
    compare(name, function, arrays, (P(), P(), P(), spec, P()), mesh, seen)

  compare_product("lookup, columns", 256, 16, 1, P(None, None, "tensor"), (1, 256), "columns")
  compare_product("lookup, inputs", 512, 16, 2, P("tensor"), (1, 256), "inputs")
  compare_product("lookup, part of a vector", 256, 12, 1, P(), (1, 256), "columns")
  compare_product("lookup, part of packed inputs", 256, 16, 1, P(), (1, 256), "inputs")


def rows_only() -> None:
  stand_in(kronecker_quantize, "kronecker_quantize", kronecker_quantize.xla.kronecker_quantize)
  stand_in(integer_matmul, "integer_matmul", integer_matmul.xla.integer_matmul)
  mesh = make_mesh({"data": 4, "tensor": 2})

  def transform(implementation, x, left, right, clip):
    return kronecker_quantize.kronecker_quantize(
      x, left, right, clip, bits=4, implementation=implementation
    )

  arrays = normal(8, 8 * 16), normal(8, 8, seed=1), normal(16, 16, seed=2), jnp.asarray([0.9, 0.8])
  compare("kronecker_quantize", transform, arrays, (P("data"), P(), P(), P()), mesh, (2, 128))

  def product(implementation, x, scales, values):
    return integer_matmul.integer_matmul(
      x, values, scales, activation_bits=8, implementation=implementation
    )

  values = codes(-8, 8, 128, 16).astype(jnp.int8)
  arrays = normal(4, 32, 128), jnp.abs(normal(1, 16)) / 16, values
  compare("integer_matmul", product, arrays, (P("data"), P(), P()), mesh, (1, 32, 128))


def main() -> None:
  assert (*partitioning.BATCH_AXES, partitioning.TENSOR_AXIS) == AXES
  quantized_products()
  transformed_products()
  attentions()
  decode_attentions()
  lookup_products()
  rows_only()
  print("all agree")


if __name__ == "__main__":
  main()
