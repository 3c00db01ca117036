import numpy as np

from common.models.attention import merge_heads, split_heads


def test_heads_are_split_and_merged():
  x = np.arange(2 * 3 * 8).reshape(2, 3, 8)
  heads = split_heads(x, 4)
  assert heads.shape == (2, 2, 3, 4)
  np.testing.assert_array_equal(heads[1, 1, 2], x[1, 2, 4:])
  np.testing.assert_array_equal(merge_heads(heads), x)
