"""The classifier f = head(phi(x)), with a second head for the aggregate embedding of a bag."""

import jax
import jax.numpy as jnp
from flax import nnx


class Mlp(nnx.Module):
  """phi: hidden layers and the embedding, all with ReLU.

  Args:
    in_features: d.
    hidden: widths of the hidden layers; the last one is that of phi.
  """

  def __init__(self, in_features: int, hidden: tuple[int, ...], *, rngs: nnx.Rngs):
    widths = (in_features, *hidden)
    self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in zip(widths, widths[1:])])

  def __call__(self, x: jax.Array) -> jax.Array:
    """[rows, d] -> [rows, hidden[-1]]."""
    for layer in self.layers:
      x = nnx.relu(layer(x))
    return x


class Cnn(nnx.Module):
  """phi of small colour images, which come as flat rows: 3 x 3 convolutions, each halving the side.

  Args:
    in_features: side * side * 3.
    hidden: channels of the convolutions; the last one is the width of phi.
  """

  def __init__(self, in_features: int, hidden: tuple[int, ...], *, rngs: nnx.Rngs):
    self.side = round((in_features / 3) ** 0.5)
    channels = (3, *hidden[:-1])
    self.convolutions = nnx.List(
      [nnx.Conv(a, b, (3, 3), rngs=rngs) for a, b in zip(channels, channels[1:])]
    )
    self.last = nnx.Linear(channels[-1], hidden[-1], rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    x = x.reshape(-1, self.side, self.side, 3)
    for convolution in self.convolutions:
      x = nnx.max_pool(nnx.relu(convolution(x)), (2, 2), strides=(2, 2))
    return nnx.relu(self.last(x.mean(axis=(1, 2))))


class Classifier(nnx.Module):
  """Args: encoder: "mlp" or "cnn"; the others as theirs."""

  def __init__(self, encoder: str, in_features: int, hidden: tuple[int, ...], *, rngs: nnx.Rngs):
    self.embed = {"mlp": Mlp, "cnn": Cnn}[encoder](in_features, hidden, rngs=rngs)
    self.head = nnx.Linear(hidden[-1], 1, rngs=rngs)
    self.bag_head = nnx.Linear(hidden[-1], 1, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Log odds: [rows, d] -> [rows]."""
    return self.head(self.embed(x))[:, 0]


def forward(
  network: Classifier, x: jax.Array, weight: jax.Array, bag_of: jax.Array, size: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Log odds of the rows [rows], and of the bags by their mean embedding [bags].

  x [rows, d], weight [rows] (0: padding), bag_of [rows], size [bags].
  """
  phi = network.embed(x)
  pooled = jax.ops.segment_sum(phi * weight[:, None], bag_of, len(size))
  pooled /= jnp.maximum(size, 1)[:, None]
  return network.head(phi)[:, 0], network.bag_head(pooled)[:, 0]
