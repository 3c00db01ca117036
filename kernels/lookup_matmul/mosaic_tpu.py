"""Vector-quantized weights for few rows on TPU: vectors are looked up within registers.

A register is 8 x 128 words, and a lane gather takes, in each of its 8 rows, any of 128 words for each of
128 lanes. Codebooks are tables of 128 entries of 32-bit words, and a word is two elements of a
vector in bfloat16: a codebook of k centroids of v outputs takes k / 128 x v / 2 gathers for the 8 x 128
vectors of eight inputs, of which all but v / 2 are discarded. These gathers are what the product costs: it
is fast for 256 centroids or fewer, and takes time in proportion to k beyond.

Two registers of words become two of bfloat16 inputs by shifts, for one element of the vectors each (a
plane of the weights): what the matrix unit multiplies. The indices are packed in the order in which
that leaves the inputs.

float32 x takes the same path. A word is then one element as the sum of two bfloat16 (float16 is exactly
that, float32 up to 2^-17), x the sum of three, which are rows of one product.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.lookup_matmul import xla
from kernels.lookup_matmul.packing import (
  GROUP_ROWS,
  group_rows,
  index_bits,
  index_fields,
  pack_indices,
  unpack_indices,
)

Array = jax.Array

MAX_ROWS = 128
LANES = 128  # Of a register, and entries of a table.
_SUBLANES = 8
_ROW_TILE = 16  # Of bfloat16.
_MAX_GROUPS = 64  # Of inputs in a step of the grid.
_UNROLLED_GATHERS = 256  # At most, if eight inputs do not need more.
UNROLLED_TABLES = 32
VMEM_BYTES = 64 * 2**20


def unsupported(x: Array, codebooks: Array) -> str | None:
  """Why these arguments of `api.lookup_matmul`, of one stage, have no kernel here, or None."""
  inputs, rows = x.shape[-1], math.prod(x.shape[:-1])
  most = MAX_ROWS // _parts(x.dtype)
  if not 1 <= rows <= most:
    return f"{rows} rows, expected 1 to {most} of {x.dtype}"
  if codebooks.shape[0] > 1 and (inputs // codebooks.shape[0]) % GROUP_ROWS:
    return (
      f"{codebooks.shape[0]} groups of {inputs // codebooks.shape[0]} inputs, expected one group or "
      f"a multiple of {GROUP_ROWS} inputs"
    )
  return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def lookup_matmul(x: Array, packed: Array, codebooks: Array, columns: int) -> Array:
  """As `api.lookup_matmul`, of one stage, for arguments that `unsupported` has nothing against.

  A row with a value that is not finite has no finite result. Gradients are those of the reference.
  """
  *leading, inputs = x.shape
  rows, (books, k, v) = math.prod(leading), codebooks.shape
  vectors = packed.shape[-1]
  if group_rows(inputs) < GROUP_ROWS:  # Fewer than 4096 inputs: cheap to pack again.
    indices = jnp.pad(unpack_indices(packed, inputs), ((0, -inputs % GROUP_ROWS), (0, 0)))
    packed = pack_indices(indices, k)
  groups, words, _ = packed.shape
  parts = _parts(x.dtype)
  tables = _tables(codebooks, pairs=parts == 1)
  planes = v if parts == 1 else 2 * v
  # Of float32 the rows once for each part.
  x = jnp.pad(x.reshape(rows, inputs), ((0, 0), (0, groups * GROUP_ROWS - inputs)))
  x = jnp.concatenate(_bfloat16_parts(x, parts))
  x = jnp.pad(x, ((0, -len(x) % _ROW_TILE), (0, 0)))
  block = max(n for n in range(1, _MAX_GROUPS + 1) if (groups // books) % n == 0)
  per_book = groups // books // block
  out = pl.pallas_call(
    functools.partial(_kernel, bits=index_bits(k)),
    grid=(pl.cdiv(vectors, LANES), groups // block),
    in_specs=[
      pl.BlockSpec((len(x), block * GROUP_ROWS), lambda n, i: (0, i)),
      pl.BlockSpec((block, words, LANES), lambda n, i: (i, 0, n)),
      pl.BlockSpec((1, *tables.shape[1:]), lambda n, i: (jax.lax.div(i, per_book), 0, 0, 0)),
    ],
    out_specs=pl.BlockSpec((planes, len(x), LANES), lambda n, i: (0, 0, n)),
    out_shape=jax.ShapeDtypeStruct((planes, len(x), vectors), jnp.float32),
    scratch_shapes=[pltpu.VMEM((2 * tables.shape[2], GROUP_ROWS // 2, LANES), jnp.int32)],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
    ),
    name=f"lookup_matmul_k{k}",
  )(x, packed, tables)
  out = out[:, : parts * rows].reshape(v, planes // v, parts, rows, vectors).sum((1, 2))
  return out.transpose(1, 2, 0).reshape(rows, -1)[:, :columns].reshape(*leading, columns)


def _forward(x, packed, codebooks, columns):
  return lookup_matmul(x, packed, codebooks, columns), (x, packed, codebooks)


def _backward(columns, residuals, grad):
  x, packed, codebooks = residuals
  reference = lambda x, books: xla.lookup_matmul(x, packed, books, None, None, columns)
  x_grad, codebooks_grad = jax.vjp(reference, x, codebooks)[1](grad)
  return x_grad, None, codebooks_grad


lookup_matmul.defvjp(_forward, _backward)


def unrolled_units(num_tables: int, words: int) -> int:
  """Of 8 inputs each, how many the kernel's inner loop looks up at once."""
  units = GROUP_ROWS // _SUBLANES
  # Two at least: they make one register of bfloat16.
  while units > 2 and units * num_tables * words > _UNROLLED_GATHERS:
    units //= 2
  return units


def _parts(dtype) -> int:
  """How many bfloat16 numbers sum up to one of this type."""
  return 3 if dtype == jnp.float32 else 1


def _bfloat16_parts(a: Array, parts: int) -> list[Array]:
  """bfloat16 arrays that sum up to a, the largest first."""
  found, rest = [], a.astype(jnp.float32)
  for _ in range(parts):
    # Not a cast there and back, which the compiler may leave out.
    part = jax.lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7)
    found.append(part.astype(jnp.bfloat16))
    rest -= part
  return found


def _tables(codebooks: Array, pairs: bool) -> Array:
  """Codebooks [groups, k, v] as words, int32 [groups, ceil(k / 128), words of a vector, 128].

  Args:
    codebooks: of any float type.
    pairs: whether a word is two elements, or one as the sum of two.
  """
  books, k, v = codebooks.shape
  if pairs:
    halves = jnp.pad(codebooks, ((0, 0), (0, 0), (0, v % 2))).astype(jnp.bfloat16)
    halves = halves.reshape(books, k, -1, 2)
  else:
    halves = jnp.stack(_bfloat16_parts(codebooks, 2), axis=-1)
  words = jax.lax.bitcast_convert_type(halves, jnp.int32)
  words = jnp.pad(words, ((0, 0), (0, -k % LANES), (0, 0)))
  return words.reshape(books, -1, LANES, words.shape[-1]).swapaxes(2, 3)


def _kernel(x, packed, tables, out, weights, *, bits: int):
  words = tables.shape[2]
  unrolled = unrolled_units(*tables.shape[1:3])

  @pl.when(pl.program_id(1) == 0)
  def _():
    out[...] = jnp.zeros(out.shape, out.dtype)

  def of_group(group, _):
    def of_units(run, _):
      for pair in range(0, unrolled, 2):
        unit = run * unrolled + pair
        first, second = (
          _looked_up(tables, _indices(packed, group, unit + i, bits)) for i in range(2)
        )
        rows = pl.ds(pl.multiple_of((unit >> 1) * _SUBLANES, _SUBLANES), _SUBLANES)
        for word in range(words):
          weights[2 * word, rows], weights[2 * word + 1, rows] = _halves(first[word], second[word])

    jax.lax.fori_loop(0, GROUP_ROWS // _SUBLANES // unrolled, of_units, None)
    of_inputs = x[:, pl.ds(pl.multiple_of(group * GROUP_ROWS, GROUP_ROWS), GROUP_ROWS)]
    for plane in range(len(out)):
      of_plane = pltpu.bitcast(weights[plane], jnp.bfloat16)
      out[plane] += jnp.dot(of_inputs, of_plane, preferred_element_type=jnp.float32)

  jax.lax.fori_loop(0, len(packed), of_group, None)


def _indices(packed, group, unit, bits: int) -> Array:
  """The indices of 8 inputs, int32 [8, 128]; see `packing`."""
  indices, start, at = 0, 0, 0
  for field in index_fields(bits):
    place = (unit & ~(field - 1)).astype(jnp.uint32)
    first = pl.multiple_of(start + (unit & field - 1) * _SUBLANES, _SUBLANES)
    words = packed[group, pl.ds(first, _SUBLANES)]
    values = jax.lax.shift_right_logical(words, place) & jnp.uint32((1 << field) - 1)
    indices |= values.astype(jnp.int32) << at
    start, at = start + field * _SUBLANES, at + field
  return indices


def _looked_up(tables, indices: Array) -> list[Array]:
  """The words of the vectors at indices [8, 128], each int32 [8, 128]."""
  num_tables, words = tables.shape[1:3]
  table_of, entry = indices >> LANES.bit_length() - 1, indices & LANES - 1

  def of_tables(run, found):
    for i in range(min(num_tables, UNROLLED_TABLES)):
      table = run * UNROLLED_TABLES + i
      chosen = table_of == table
      for word in range(words):
        entries = jnp.broadcast_to(tables[0, table, pl.ds(word, 1)], indices.shape)
        candidates = jnp.take_along_axis(entries, entry, axis=1, mode="promise_in_bounds")
        found[word] = jnp.where(chosen, candidates, found[word])
    return found

  found = [jnp.zeros(indices.shape, jnp.int32)] * words
  return jax.lax.fori_loop(0, pl.cdiv(num_tables, UNROLLED_TABLES), of_tables, found)


def _halves(first: Array, second: Array) -> tuple[Array, Array]:
  """The lower halves of the words of 8 inputs and of the next 8, and the upper ones, int32 [8, 128].

  A register of [8, 128] words is one of [16, 128] bfloat16 values, two rows of which share a word.
  """
  upper = jnp.int32(-(1 << 16))
  lower_halves = (first & ~upper) | (second << 16)
  return lower_halves, jax.lax.shift_right_logical(first, jnp.int32(16)) | (second & upper)
