"""Product with a weight that is stored as low-rank factors and sparse values: one public function.

SLTrain (Han et al., NeurIPS 2024, arXiv 2406.02214, section 3) trains

    W = (alpha / r) A B + S,     S zero but for values V at fixed, random positions I

of which A, B, V and I are stored. Weights are [in, out] here, the transpose of the paper's: its A is
the transpose of A, its B that of B.
"""

import jax
import jax.numpy as jnp

from kernels.sparse_low_rank_matmul import xla

Array = jax.Array


def sparse_low_rank_matmul(
  x: Array, a: Array, b: Array, values: Array, indices: Array, *, scale: float = 1.0
) -> Array:
  """x W with W = scale A B + scatter(I, V), which exists during the product only.

  Backward (section 3.3), with g the gradient of the result and G = x^T g, which exists likewise:

    dx = g W^T,     dA = scale G B^T,     dB = scale A^T G,     dV = G at I

  W is computed again: what is kept between forward and backward is x, A, B, V and I.

  Args:
    x: [..., in], float32 or bfloat16; W is made in its dtype.
    a: A, [in, r], floating point; so are b and values.
    b: B, [r, out].
    values: V, [nonzeros].
    indices: I, int32 [nonzeros]: i * out + j for the value at W[i, j], 0 to in * out - 1. Values at
      one position add up.
    scale: alpha / r. (To train it, multiply A by it instead.)

  Returns:
    [..., out] in x's dtype; sums are accumulated in float32. Differentiable by x, a, b and values,
    in their dtypes.

  Raises:
    ValueError: an argument has an unsupported shape or type.
  """
  if x.ndim == 0 or x.dtype not in (jnp.float32, jnp.bfloat16):
    raise ValueError(f"x is {x.dtype} {x.shape}, expected float32 or bfloat16 [..., in]")
  for name, array, ndim in (("a", a, 2), ("b", b, 2), ("values", values, 1)):
    if array.ndim != ndim or not jnp.issubdtype(array.dtype, jnp.floating):
      raise ValueError(
        f"{name} is {array.dtype} {array.shape}, expected floating point of {ndim} dimensions"
      )
  if a.shape[0] != x.shape[-1] or a.shape[1] != b.shape[0]:
    raise ValueError(f"x {x.shape}, a {a.shape} and b {b.shape} do not make a product")
  if indices.dtype != jnp.int32 or indices.shape != values.shape:
    raise ValueError(
      f"indices are {indices.dtype} {indices.shape}, expected int32 {values.shape} as values"
    )
  if a.shape[0] * b.shape[1] >= 2**31:
    raise ValueError(f"a weight [{a.shape[0]}, {b.shape[1]}] has more positions than int32")
  return xla.sparse_low_rank_matmul(x, a, b, values, indices, scale)
