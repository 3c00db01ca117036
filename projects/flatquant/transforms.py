"""FlatQuant's invertible matrices: how they are parametrised, and what is fixed or learned in them.

    P = U diag(sigma) V^T,  P^-T = U diag(1 / sigma) V^T,  U, V orthogonal          (section 3.1)
    Q = (I - A / 2)^-1 (I + A / 2),  A = tril(R, -1) - tril(R, -1)^T                 (Cayley)

so that the inverse is free. Alternatively P is a raw matrix, inverted in every step ("inverse").
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.fft
import scipy.linalg
from flax import nnx

from common.quantization.reconstruction import Learned
from kernels.kronecker_quantize.api import kronecker_transform

Array = jax.Array

Parametrization = Literal["svd", "inverse", "rotation", "hadamard"]


@jax.custom_jvp
def inverse(matrices: Array) -> Array:
  """Of one matrix [n, n], or of each of [matrices, n, n].

  Its derivative is two products, where that of a solver is another solve.
  """
  if matrices.ndim == 2:
    return jnp.linalg.inv(matrices)
  # One at a time: on a CPU a batched LU decomposition hands its matrices to the threads that run the
  # program, and waits. Once each of them is in such a decomposition, none is left to do the work.
  return jax.lax.map(jnp.linalg.inv, matrices)


@inverse.defjvp
def _inverse_jvp(primals, tangents):
  result = inverse(*primals)
  product = functools.partial(jnp.matmul, precision="highest")
  return result, -product(product(result, tangents[0]), result)


def cayley(raw: Array) -> Array:
  """The rotations Q of the strictly lower triangles of `raw`, [..., n, n] each.

  I - A / 2 is invertible for every skew-symmetric A: a NaN here comes from the raw matrix.
  """
  lower = jnp.tril(raw, -1)
  half = (lower - lower.mT) / 2
  eye = jnp.eye(raw.shape[-1], dtype=raw.dtype)
  # (I - A / 2)^-1 (I + A / 2), for I + A / 2 = 2 I - (I - A / 2).
  return 2 * inverse(eye - half) - eye


@functools.partial(jax.jit, static_argnums=1)
def random_orthogonal(key: Array, n: int) -> Array:
  """Uniformly distributed orthogonal matrix, float32 [n, n]: QR of a Gaussian with signs mended."""
  q, r = jnp.linalg.qr(jax.random.normal(key, (n, n)))
  return q * jnp.sign(jnp.diag(r))


def hadamard(n: int) -> np.ndarray:
  """An orthogonal matrix of entries as equal in size as can be, float32 [n, n].

  Sylvester's Hadamard matrix of the power of two in n times, of what is left: nothing; Paley's
  Hadamard matrix of order q + 1, q = 3 mod 4 prime; or a cosine transform where neither exists.
  """
  odd = n // (n & -n)
  orders = [odd * 2**k for k in (2, 3) if n % (odd * 2**k) == 0 and odd > 1]
  order = next((m for m in orders if _is_prime(m - 1)), odd)
  if order == odd:
    rest = scipy.fft.dct(np.eye(odd), norm="ortho", axis=0) if odd > 1 else np.ones((1, 1))
  else:
    rest = _paley(order - 1) / np.sqrt(order)
  power = n // order
  return np.kron(scipy.linalg.hadamard(power) / np.sqrt(power), rest).astype(np.float32)


def random_hadamard(key: Array, n: int) -> np.ndarray:
  """A Hadamard matrix with random signs of its rows, float32 [n, n]."""
  signs = np.asarray(jax.random.rademacher(key, (n, 1), jnp.float32))
  return signs * hadamard(n)


class Factors(NamedTuple):
  """P = left (x) right with its inverse, and the scale before it: x -> (x * scale) P.

  Attributes:
    left, right: [n1, n1] and [n2, n2].
    inverse_left, inverse_right: inverse transposes of both.
    scale: c, [n], or 1.
  """

  left: Array
  right: Array
  inverse_left: Array
  inverse_right: Array
  scale: Array

  def apply(self, x: Array) -> Array:
    """(x * c) P. x: [..., n]."""
    return kronecker_transform(x * self.scale.astype(x.dtype), self.left, self.right)

  def apply_inverse(self, kernel: Array) -> Array:
    """P^-1 diag(1 / c) W of a kernel W [n, out], which undoes `apply` on its input."""
    columns = kernel.T / self.scale
    return kronecker_transform(columns, self.inverse_left, self.inverse_right).T


class SVDMatrix(nnx.Module):
  """P = U diag(sigma) V^T with U and V by Cayley, or a rotation H Q with Q by Cayley.

  Both R start as random orthogonal matrices (as raw matrices, not as the rotations) and sigma at 1.
  Of a rotation U is H, a Hadamard matrix with random signs, and sigma 1: neither is learned, and
  V = Q^T starts as the identity. That is what SpinQuant learns (Liu et al., ICLR 2025). Which of both
  it is, an array says, so that they share compilations.
  """

  def __init__(self, n: int, key: Array, *, rotation: bool = False):
    if rotation:
      start, raw = random_hadamard(key, n), np.zeros((2, n, n), np.float32)
    else:
      start = np.eye(n, dtype=np.float32)
      raw = jnp.stack([random_orthogonal(k, n) for k in jax.random.split(key)])
    self.raw = Learned(jnp.asarray(raw))
    self.sigma = Learned(jnp.ones(n, jnp.float32))
    self.start = nnx.Param(jnp.asarray(start))
    self.rotation = nnx.Param(jnp.asarray(rotation))

  def matrices(self) -> tuple[Array, Array]:
    """(P, P^-T), [n, n] each."""
    u, v = cayley(self.raw[...])
    u = jnp.where(self.rotation[...], self.start[...], u)
    sigma = jnp.where(self.rotation[...], 1, self.sigma[...])
    product = lambda diagonal: jnp.matmul(u * diagonal, v.T, precision="highest")
    return product(sigma), product(1 / sigma)


class RawMatrix(nnx.Module):
  """P as it is, inverted where needed; it starts orthogonal."""

  def __init__(self, n: int, key: Array):
    self.raw = Learned(random_orthogonal(key, n))

  def matrices(self) -> tuple[Array, Array]:
    """(P, P^-T), [n, n] each."""
    return self.raw[...], inverse(self.raw[...]).T


class FixedRotation(nnx.Module):
  """An orthogonal matrix that is not learned, such as a Hadamard matrix."""

  def __init__(self, matrix: Array):
    self.matrix = nnx.Param(jnp.asarray(matrix, jnp.float32))

  def matrices(self) -> tuple[Array, Array]:
    """(P, P^-T), which are equal, [n, n] each."""
    return self.matrix[...], self.matrix[...]


class KroneckerTransform(nnx.Module):
  """x -> (x * c) (P1 (x) P2); a part that is not used is the identity."""

  def __init__(
    self,
    left: nnx.Module,
    right: nnx.Module,
    scale: Array | None,
    *,
    use_left: bool = True,
    use_right: bool = True,
    use_scale: bool = True,
  ):
    """Matrices with `.matrices()`, c [n] or None for 1, and what of them is used."""
    self.left, self.right = left, right
    self.scale = None if scale is None else Learned(scale.astype(jnp.float32))
    # Switches are arrays: ablations then share compilations.
    self.use_left, self.use_right = (
      nnx.Param(jnp.asarray(use_left)),
      nnx.Param(jnp.asarray(use_right)),
    )
    self.use_scale = nnx.Param(jnp.asarray(use_scale))

  def factors(self) -> Factors:
    """The matrices, their inverses and c, as they are now."""
    pick = lambda use, matrices: [
      jnp.where(use[...], m, jnp.eye(len(m), dtype=m.dtype)) for m in matrices
    ]
    left, inverse_left = pick(self.use_left, self.left.matrices())
    right, inverse_right = pick(self.use_right, self.right.matrices())
    one = jnp.ones((), left.dtype)
    scale = one if self.scale is None else jnp.where(self.use_scale[...], self.scale[...], one)
    return Factors(left, right, inverse_left, inverse_right, scale)


def _is_prime(n: int) -> bool:
  return n > 1 and all(n % i for i in range(2, int(n**0.5) + 1))


def _paley(q: int) -> np.ndarray:
  """Paley's Hadamard matrix of order q + 1, q = 3 mod 4 prime, entries 1 and -1."""
  squares = {i * i % q for i in range(1, q)}
  residue = np.array([0] + [1 if i in squares else -1 for i in range(1, q)])
  skew = np.zeros((q + 1, q + 1))
  skew[0, 1:], skew[1:, 0] = 1, -1
  skew[1:, 1:] = residue[(np.arange(q)[None] - np.arange(q)[:, None]) % q]
  return np.eye(q + 1) + skew
