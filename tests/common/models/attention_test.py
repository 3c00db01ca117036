import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.models.attention import dot_product_attention, merge_heads, split_heads


def arrays(seq, keys, heads, kv_heads, dtype=np.float32):
  rng = np.random.default_rng(0)
  shapes = [(2, heads, seq, 8), (2, kv_heads, keys, 8), (2, kv_heads, keys, 8)]
  query, key, value = (jnp.asarray(rng.normal(size=s), dtype) for s in shapes)
  mask = rng.random((2, 1, seq, keys)) < 0.6
  mask[..., 0] = True
  bias = rng.normal(size=(1, heads, seq, keys)).astype(np.float32)
  return query, key, value, mask, bias


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("seq, keys", [(5, 5), (1, 7)])
@pytest.mark.parametrize("scale", [None, 1.0])
def test_equals_that_of_jax(seq, keys, heads, kv_heads, scale):
  query, key, value, mask, bias = arrays(seq, keys, heads, kv_heads)
  swap = lambda x: x.swapaxes(1, 2)
  expected = jax.nn.dot_product_attention(
    swap(query), swap(key), swap(value), bias=bias, mask=mask, scale=scale
  )
  out = dot_product_attention(query, key, value, mask=mask, bias=bias, scale=scale)
  np.testing.assert_allclose(swap(out), expected, atol=2e-6)


def test_a_row_without_keys_is_finite_and_so_are_gradients():
  query, key, value, mask, _ = arrays(3, 4, 2, 2)
  mask[0, :, 1] = False
  f = lambda *qkv: dot_product_attention(*qkv, mask=mask)
  np.testing.assert_allclose(f(query, key, value)[0, :, 1], value[0].mean(axis=1), atol=1e-6)
  grads = jax.grad(lambda *qkv: jnp.sum(f(*qkv) ** 2), (0, 1, 2))(query, key, value)
  assert all(np.isfinite(g).all() for g in grads)


def test_bfloat16_has_a_float32_softmax():
  query, key, value, mask, bias = arrays(5, 6, 4, 2, jnp.bfloat16)
  out = dot_product_attention(query, key, value, mask=mask, bias=bias)
  assert out.dtype == jnp.bfloat16
  exact = dot_product_attention(*(x.astype(jnp.float32) for x in (query, key, value)),
                                mask=mask, bias=bias)  # fmt: skip
  # The weights and the result are rounded to 8 bits.
  np.testing.assert_allclose(out.astype(np.float32), exact, atol=0.02 * float(jnp.abs(value).max()))


def test_heads_are_split_and_merged():
  x = np.arange(2 * 3 * 8).reshape(2, 3, 8)
  heads = split_heads(x, 4)
  assert heads.shape == (2, 2, 3, 4)
  np.testing.assert_array_equal(heads[1, 1, 2], x[1, 2, 4:])
  np.testing.assert_array_equal(merge_heads(heads), x)
