"""Heads before tokens, [batch, heads, tokens, head_dim], as `kernels/attention` takes them.

Each head's keys are then one matrix in memory: products need no transposed copy of a KV cache, which
on the CPU costs more than they do.
"""

import jax

Array = jax.Array


def split_heads(x: Array, head_dim: int) -> Array:
  """[batch, seq, heads * head_dim] -> [batch, heads, seq, head_dim]."""
  return x.reshape(*x.shape[:2], -1, head_dim).swapaxes(1, 2)


def merge_heads(x: Array) -> Array:
  """[batch, heads, seq, head_dim] -> [batch, seq, heads * head_dim]."""
  x = x.swapaxes(1, 2)
  return x.reshape(*x.shape[:2], -1)
