import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.quantized_matmul import packing
from kernels.quantized_matmul.packing import SUPPORTED_BITS, WORD_ROWS

pack = jax.jit(packing.pack, static_argnums=1, static_argnames="signed")
unpack = jax.jit(packing.unpack, static_argnums=(1, 2), static_argnames="signed")
NATIVE = {
  (2, False): jnp.uint2,
  (2, True): jnp.int2,
  (4, False): jnp.uint4,
  (4, True): jnp.int4,
  (8, False): jnp.uint8,
  (8, True): jnp.int8,
}


def code_range(bits, signed):
  return (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)


def random_codes(shape, bits, signed, seed=0):
  return np.random.default_rng(seed).integers(*code_range(bits, signed), shape).astype(np.int32)


# Few shapes, many values: every new shape compiles anew.
@hypothesis.settings(deadline=None, max_examples=40, derandomize=True)
@hypothesis.given(
  bits=st.sampled_from(SUPPORTED_BITS),
  signed=st.booleans(),
  rows=st.sampled_from((1, 32, 75, 256)),
  seed=st.integers(0, 2**32 - 1),
)
def test_unpack_inverts_pack(bits, signed, rows, seed):
  codes = random_codes((rows, 5), bits, signed, seed)
  unpacked = unpack(pack(jnp.asarray(codes), bits, signed=signed), bits, rows, signed=signed)
  assert unpacked.dtype == (jnp.int8 if signed else jnp.uint8)
  np.testing.assert_array_equal(unpacked, codes)


@pytest.mark.parametrize("dtype", (jnp.int32, jnp.float32))
@pytest.mark.parametrize("signed", (False, True))
@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_every_code_survives(bits, signed, dtype):
  low, high = code_range(bits, signed)
  codes = jnp.arange(low, high, dtype=dtype)[:, None]
  unpacked = unpack(pack(codes, bits, signed=signed), bits, len(codes), signed=signed)
  np.testing.assert_array_equal(unpacked, codes)


@pytest.mark.parametrize("bits, signed", NATIVE)
def test_native_types(bits, signed):
  values = pack(random_codes((6, 4), bits, signed), bits, signed=signed)
  assert values.dtype == NATIVE[bits, signed] and values.shape == (6, 4)


@pytest.mark.parametrize("rows, words", ((1, 3), (32, 3), (33, 6), (64, 6), (256, 24)))
def test_three_bits_take_three_words_per_32_rows(rows, words):
  values = pack(random_codes((rows, 4), 3, False), 3, signed=False)
  assert values.dtype == jnp.uint32 and values.shape == (words, 4)


@pytest.mark.parametrize("signed", (True, False))
@pytest.mark.parametrize("rows, run", ((34, 1), (512, 8)))
def test_three_bits_by_hand(rows, run, signed):
  """Codes by their place: byte of a word, word of a run and code of eight, in that order."""
  codes = random_codes((rows, 3), 3, signed)
  expected = np.zeros((-(-rows // WORD_ROWS) * 3, 3), np.uint32)
  # The byte, and the shift of each bit of the eight codes, the lowest first.
  places = [(byte, (low, low + 1, low + 2)) for byte in range(3) for low in (5, 1)]
  for row in range(-(-rows // WORD_ROWS) * WORD_ROWS):
    unit, inside = divmod(row, WORD_ROWS * run)
    eighth, inside = divmod(inside, 4 * run)
    word, byte = divmod(inside, 4)
    for column in range(3):
      code = int(codes[row, column]) & 7 if row < rows else 0
      code ^= 0 if signed else 4
      if eighth < 6:
        which, bits = places[eighth]
        where = [(which, bit) for bit in bits]
      else:
        where = [(which, 4 if eighth == 6 else 0) for which in (2, 1, 0)]
      for b, (which, bit) in enumerate(where):
        at = unit * 3 * run + which * run + word
        expected[at, column] |= np.uint32((code >> b & 1) << bit + 8 * byte)
  np.testing.assert_array_equal(pack(codes, 3, signed=signed), expected)
