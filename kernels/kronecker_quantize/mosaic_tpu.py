"""Transform and rounding in one kernel on TPU: x is read once, codes and scales are written.

A row of x lies along the lanes, where P1^T X P2 wants it as a matrix X [n1, n2]:

- X P2 of all rows of a block at once. A matrix row that begins within a register is multiplied there,
  by P2 with zeros around it. After every `period` of them the next one begins at the first lane again,
  so that there are `period` such operands. Of n2 = 64, Llama-2-7B's, a register's two matrix rows are
  multiplied together, by I (x) P2, and two rows of x then share the lanes of one matrix.
- Rows change places: the products are stored with a stride, and a matrix is read in one piece. (An odd
  one: with a multiple of eight the compiler stores the rows of a register one by one.)
- P1^T Y of each matrix Y, stored with a stride likewise: registers hold rows of x again.

Then the smallest and largest value of each row, its scale and its codes.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.kronecker_quantize import xla

Array = jax.Array

LANES = 128
MAX_PERIOD = 8
MAX_CHANNELS = 32768
_PART_ROWS = 32  # An 8-bit register's.
_PARTS = 2  # Of a block: the one's products go on while the other is rounded.
_PRODUCTS = 4  # Into which X P2 is cut, for as many matrix units.
_VMEM_BYTES = 64 * 2**20
_ROUNDER = 1.5 * 2.0**23  # Added to a small float it rounds it; the low bits are the integer.


def unsupported(x: Array, left: Array, right: Array) -> str | None:
  """Why these arguments of `api.kronecker_quantize` have no kernel here, or None."""
  n1, n2 = len(left), len(right)
  if x.dtype not in (jnp.bfloat16, jnp.float32):
    return f"x of {x.dtype}, expected bfloat16 or float32"
  if 0 in x.shape:
    return f"x {list(x.shape)}, expected at least one row"
  if n1 * n2 > MAX_CHANNELS:
    return f"{n1 * n2} channels, expected at most {MAX_CHANNELS}"
  if _period(n2) > MAX_PERIOD:
    return f"a right factor of {n2}, expected a multiple of {LANES // MAX_PERIOD}"
  if n1 % _period(n2):
    return f"a left factor of {n1} beside {n2}, expected a multiple of {_period(n2)}"
  return None


def kronecker_quantize(
  x: Array, left: Array, right: Array, clip: Array | None, bits: int
) -> tuple[Array, Array]:
  """As `api.kronecker_quantize`, for arguments that `unsupported` has nothing against.

  Gradients of the scales are those of the reference.
  """
  return _kronecker_quantize(x, left, right, jnp.ones(2) if clip is None else clip, bits)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _kronecker_quantize(x, left, right, clip, bits):
  *leading, n = x.shape
  rows, n1, n2 = math.prod(leading), len(left), len(right)
  parts = _PARTS if rows > _PART_ROWS else 1
  block = _PART_ROWS * parts
  padded = jnp.pad(x.reshape(rows, n), ((0, max(block - rows, 0)), (0, 0)))
  side = _side(n2)  # Rows of x whose matrices share lanes.
  period = _period(side * n2)
  of_matrix, lanes = pl.cdiv(n1, 16) * 16, pl.cdiv(side * n2, LANES) * LANES
  # Matrix rows are stored as p, p + period, ..., p + 1, ...: so are the columns of P1^T.
  left = left.reshape(n1 // period, period, n1).swapaxes(0, 1).reshape(n1, n1)
  left = jnp.pad(left.T.astype(x.dtype), ((0, of_matrix - n1), (0, of_matrix - n1)))
  right = jnp.kron(jnp.eye(side * period, dtype=x.dtype), right.astype(x.dtype))
  right = right.reshape(len(right), period, side * n2).swapaxes(0, 1)
  right = jnp.pad(right, ((0, 0), (0, 0), (0, lanes - side * n2)))
  whole = lambda array: pl.BlockSpec(array.shape, lambda i: (0,) * array.ndim)
  of_rows = lambda columns: pl.BlockSpec((block, columns), lambda i: (i, 0))
  matrices = _PART_ROWS // side
  scratch = lambda size: pltpu.VMEM((parts, lanes // LANES, size, LANES), jnp.float32)
  codes, scales = pl.pallas_call(
    functools.partial(_kernel, bits=bits, n1=n1, n2=n2, matrices=min(matrices, rows)),
    grid=(pl.cdiv(len(padded), block),),
    in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), of_rows(n), whole(left), whole(right)],
    out_specs=[of_rows(n), of_rows(1)],
    out_shape=[
      jax.ShapeDtypeStruct(padded.shape, jnp.int8),
      jax.ShapeDtypeStruct((len(padded), 1), jnp.float32),
    ],
    scratch_shapes=[scratch(matrices * (of_matrix + 1)), scratch(of_matrix * (matrices + 1))],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel",), vmem_limit_bytes=_VMEM_BYTES
    ),
    name="kronecker_quantize",
  )(clip.astype(jnp.float32), padded, left, right)
  return codes[:rows].reshape(*leading, n), scales[:rows].reshape(*leading, 1)


def _forward(x, left, right, clip, bits):
  return _kronecker_quantize(x, left, right, clip, bits), (x, left, right, clip)


def _backward(bits, arrays, grads):
  scales_of = lambda *arrays: xla.kronecker_quantize(*arrays, bits)[1]
  return jax.vjp(scales_of, *arrays)[1](grads[1])


_kronecker_quantize.defvjp(_forward, _backward)


def _period(width: int) -> int:
  """Of how many runs of `width` lanes the next one begins at the first lane of a register."""
  return LANES // math.gcd(width, LANES)


def _side(n2: int) -> int:
  """How many rows of x have matrices side by side in the lanes of a register."""
  return 2 if 2 * n2 == LANES else 1


def _kernel(
  clip,
  x,
  left,
  right,
  codes,
  scales,
  by_matrix,
  by_row,
  *,
  bits: int,
  n1: int,
  n2: int,
  matrices: int,
):
  for part in range(len(by_row)):
    rows = pl.ds(part * _PART_ROWS, _PART_ROWS)
    inputs, outputs = x.at[rows], (codes.at[rows], scales.at[rows])
    _multiply_right(inputs, right, by_matrix.at[part], n1, n2, stride=len(left) + 1)
    _multiply_left(by_matrix.at[part], left, by_row.at[part], n1, matrices, inputs.dtype)
    _quantize(by_row.at[part], clip, *outputs, n1, n2, bits)


def _multiply_right(x, right, by_matrix, n1: int, n2: int, stride: int):
  """X P2 of the rows of x [rows, n1 n2], in `by_matrix` [tiles, matrices * stride, 128]."""
  rows, side, period = x.shape[0], _side(n2), len(right)
  starts = range(0, n1 * n2, side * period * n2)
  each = -(-len(starts) // _PRODUCTS)
  for p in range(period):
    first, last = p * n2 // LANES * LANES, -(-(p + 1) * n2 // LANES) * LANES
    for at in range(0, len(starts), each):
      parts = [x[:, start + first : start + last] for start in starts[at : at + each]]
      product = _dot(jnp.concatenate(parts), right[p, first:last])
      products = [product[i * rows : (i + 1) * rows] for i in range(len(parts))]
      if side == 2:
        products = [half for both in products for half in _exchange(both)]
      for i, y in enumerate(products, p * len(starts) + side * at):
        for tile in range(by_matrix.shape[0]):
          to = pl.ds(i, rows // side, stride=stride)
          by_matrix[tile, to, :] = y[:, tile * LANES : (tile + 1) * LANES]


def _multiply_left(by_matrix, left, by_row, n1: int, matrices: int, dtype):
  """P1^T Y of the first matrices Y, in `by_row` [tiles, of_matrix * (all matrices + 1), 128]."""
  tiles, of_matrix = range(by_row.shape[0]), len(left)
  stride = by_row.shape[1] // of_matrix

  def multiply(i, _):
    rows = pl.ds(i * (of_matrix + 1), of_matrix)
    y = _side_by_side([by_matrix[tile, rows, :] for tile in tiles])
    if n1 < of_matrix:  # Rows that nothing was stored in.
      y = jnp.where(jax.lax.broadcasted_iota(jnp.int32, y.shape, 0) < n1, y, 0)
    z = _dot(left[...], y.astype(dtype))
    for tile in tiles:
      to = pl.ds(i, of_matrix, stride=stride)
      by_row[tile, to, :] = z[:, tile * LANES : (tile + 1) * LANES]

  jax.lax.fori_loop(0, matrices, multiply, None, unroll=True)


def _quantize(by_row, clip, codes, scales, n1: int, n2: int, bits: int):
  """Codes and scales of rows whose transform is in `by_row`."""
  side = _side(n2)
  width, matrices = side * n2, _PART_ROWS // side

  def transformed(i):
    """Elements i n2, i n2 + 1, ... of all rows: [matrices, side * n2]."""
    rows = pl.ds(i * (matrices + 1), matrices)
    return _side_by_side([by_row[tile, rows, :] for tile in range(by_row.shape[0])])[:, :width]

  low = high = transformed(0)
  for i in range(1, n1):
    y = transformed(i)
    low, high = jnp.minimum(low, y), jnp.maximum(high, y)
  limit = 2 ** (bits - 1) - 1
  per_scale = []
  for i in range(side):
    lanes = slice(i * n2, (i + 1) * n2)
    smallest = low[:, lanes].min(axis=-1, keepdims=True) * clip[0]
    largest = high[:, lanes].max(axis=-1, keepdims=True) * clip[1]
    largest = jnp.maximum(jnp.abs(smallest), jnp.abs(largest))
    # A maximum may drop NaN, a comparison does not.
    scale = jnp.where(largest < xla.SMALLEST_SCALE, xla.SMALLEST_SCALE, largest) / limit
    scales[i * matrices : (i + 1) * matrices] = scale
    per_scale.append(jnp.broadcast_to(1 / scale, (matrices, n2)))
  per_scale = _side_by_side(per_scale)

  def rounded(i):
    y = jnp.clip(transformed(i) * per_scale, -limit - 1, limit)
    return jax.lax.bitcast_convert_type(y + _ROUNDER, jnp.int32)

  together = _period(n2)  # Matrix rows that fill registers.
  for start in range(0, n1, together):
    y = [rounded(start + i) for i in range(together)]
    if side == 2:
      y = _exchange_codes(jnp.concatenate(y).astype(jnp.int8))
    else:
      y = _side_by_side(y).astype(jnp.int8)
    codes[:, start * n2 : (start + together) * n2] = y


def _dot(a: Array, b: Array) -> Array:
  # The matrix unit would round float32 operands to bfloat16.
  precision = "highest" if a.dtype == jnp.float32 else None
  return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def _side_by_side(parts: list[Array]) -> Array:
  return jnp.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]


def _exchange(x: Array) -> list[Array]:
  """[(a, c), (b, d)] of x = ((a, b), (c, d)), in halves of its rows and lanes."""
  halves = jnp.split(x, 2)
  half = x.shape[1] // 2
  return [_side_by_side([y[:, at : at + half] for y in halves]) for at in (0, half)]


def _exchange_codes(codes: Array) -> Array:
  """((a, c), (b, d)) of ((a, b), (c, d)), int8 [32, 128], one register of words."""
  words = pltpu.bitcast(codes, jnp.int32)
  half_rows, half_lanes = (size // 2 for size in words.shape)
  row, lane = (jax.lax.broadcasted_iota(jnp.int32, words.shape, axis) for axis in (0, 1))
  opposite = pltpu.roll(pltpu.roll(words, half_rows, 0), half_lanes, 1)
  stays = (row < half_rows) == (lane < half_lanes)
  return pltpu.bitcast(jnp.where(stays, words, opposite), jnp.int8)
