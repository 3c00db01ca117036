"""Sizes and costs of Kronecker-factored transforms, P = P1 (x) P2 of n = n1 n2 channels."""

import math

import jax

from common.errors import UserError

Array = jax.Array


def factor_pair(n: int, n1: int | None = None) -> tuple[int, int]:
  """The factors n1 <= n2 of n that are closest to each other.

  Both even or both odd, as in n = a^2 - b^2 = (a - b) (a + b) of the official code; where no such
  pair exists (n = 2 mod 4, on which that code never ends) any two factors.

  Args:
    n: at least 1.
    n1: chooses the first factor instead.

  Raises:
    UserError: n1 does not divide n.
  """
  if n1 is not None:
    if n1 < 1 or n % n1:
      raise UserError(f"left_size={n1} does not divide {n} channels; choose a divisor of {n}")
    return n1, n // n1
  alike = lambda i: n % 4 == 2 or (i + n // i) % 2 == 0
  left = next(i for i in range(math.isqrt(n), 0, -1) if n % i == 0 and alike(i))
  return left, n // left


def multiplications(n: int, n1: int) -> int:
  """Of one token's transform: n (n1 + n2), less a factor of size 1, which costs nothing."""
  return n * sum(size for size in factor_pair(n, n1) if size > 1)


def seconds_per_token(
  n: int,
  n1: int,
  *,
  flops_per_second: float,
  bytes_per_second: float,
  bits: int = 4,
  fused: bool = True,
) -> float:
  """A lower bound of transform and quantization together: the slower of arithmetic and memory.

  Fused, a token's bfloat16 channels are read once and its codes written once; unfused, both
  products and the quantizer read and write bfloat16. (The factors are read once for many tokens.)

  Args:
    n, n1: channels, and the size of the first factor.
    flops_per_second, bytes_per_second: the chip's peaks.
    bits: of the codes.
    fused: one kernel instead of three.
  """
  traffic = n * (2 + bits / 8) if fused else n * (2 * 4 + 2 + bits / 8)
  return max(2 * multiplications(n, n1) / flops_per_second, traffic / bytes_per_second)
