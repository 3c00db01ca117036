"""Losses as (sum, count) pairs, which add up over microbatches and devices."""

import jax
import jax.numpy as jnp
import optax


def next_token_loss(
  logits: jax.Array, tokens: jax.Array, segment_ids: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Cross-entropy of every token given those before it in its document.

    sum over targets of  logsumexp(logits[t]) - logits[t, tokens[t + 1]]

  Position t has a target where t and t + 1 lie in one document: the first token of a document
  and padding are never targets.

  Args:
    logits: [batch, seq, vocab], any float; the arithmetic is float32.
    tokens: [batch, seq] int32.
    segment_ids: [batch, seq] int32, the document of each token in a packed row; 0 is padding.

  Returns:
    (sum of the negative log-likelihoods in nats, number of targets), both float32 [].
  """
  is_target = _is_target(segment_ids)
  nll = optax.softmax_cross_entropy_with_integer_labels(
    logits[:, :-1].astype(jnp.float32), tokens[:, 1:]
  )
  return jnp.sum(nll, where=is_target), jnp.sum(is_target, dtype=jnp.float32)


def linear_next_token_loss(
  x: jax.Array,
  kernel: jax.Array,
  tokens: jax.Array,
  segment_ids: jax.Array,
  *,
  chunk_length: int = 128,
) -> tuple[jax.Array, jax.Array]:
  """`next_token_loss` of the logits x @ kernel, which are never in memory as a whole.

  The gradients of a chunk of positions are made together with its loss, so that of a large
  vocabulary a small part of the logits is in memory at a time and nothing is computed again.

  Args:
    x: [batch, seq, dim], such as `Decoder.head_input`.
    kernel: [dim, vocab], such as `Decoder.head_kernel`.
    tokens, segment_ids: int32 [batch, seq].
    chunk_length: positions of every row whose logits are in memory at a time.

  Returns:
    As `next_token_loss`.
  """
  is_target = jnp.pad(_is_target(segment_ids), ((0, 0), (0, 1)))
  targets = jnp.roll(tokens, -1, axis=1)
  seq = x.shape[1]
  padding = ((0, 0), (0, -seq % chunk_length))
  rows = (
    jnp.pad(x, (*padding, (0, 0))),
    jnp.pad(targets, padding),
    jnp.pad(is_target, padding).astype(jnp.float32),
  )
  chunks = jax.tree.map(
    lambda a: a.reshape(len(a), -1, chunk_length, *a.shape[2:]).swapaxes(0, 1), rows
  )
  return _linear_cross_entropy(chunks[0], kernel, *chunks[1:]), jnp.sum(
    is_target, dtype=jnp.float32
  )


@jax.custom_vjp
def _linear_cross_entropy(x, kernel, targets, weights):
  """Weighted sum of cross-entropies. x: [chunks, batch, length, dim], the others likewise."""
  return _loss_and_gradients(x, kernel, targets, weights)[0]


def _loss_and_gradients(x, kernel, targets, weights):
  def chunk(carry, rows):
    loss, kernel_grad = carry
    x, targets, weights = rows
    logits = jnp.matmul(x, kernel, preferred_element_type=jnp.float32)
    largest = jnp.max(logits, axis=-1, keepdims=True)
    exponentials = jnp.exp(logits - largest)
    total = jnp.sum(exponentials, axis=-1, keepdims=True)
    target = jnp.take_along_axis(logits, targets[..., None], axis=-1)
    nll = (jnp.log(total) + largest - target)[..., 0]
    # d nll / d logits = softmax - one_hot.
    is_label = targets[..., None] == jnp.arange(logits.shape[-1])
    grad = (weights[..., None] * (exponentials / total - is_label)).astype(x.dtype)
    x_grad = jnp.matmul(grad, kernel.T)
    kernel_grad += jnp.einsum("bld,blv->dv", x, grad, preferred_element_type=jnp.float32)
    return (loss + jnp.sum(weights * nll), kernel_grad), x_grad

  start = (jnp.zeros((), jnp.float32), jnp.zeros(kernel.shape, jnp.float32))
  (loss, kernel_grad), x_grad = jax.lax.scan(chunk, start, (x, targets, weights))
  return loss, (x_grad, kernel_grad.astype(kernel.dtype))


def _scale_gradients(gradients, scale):
  x_grad, kernel_grad = gradients
  scaled = lambda g: (g * scale).astype(g.dtype)
  return scaled(x_grad), scaled(kernel_grad), None, None


_linear_cross_entropy.defvjp(_loss_and_gradients, _scale_gradients)


def _is_target(segment_ids: jax.Array) -> jax.Array:
  """bool [batch, seq - 1]: whether the next token belongs to the same document."""
  return (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] != 0)
