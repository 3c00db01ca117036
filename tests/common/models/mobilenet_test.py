import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.models.mobilenet import InvertedResidual, MobileNet, MobileNetConfig, Stage

SMALL = MobileNetConfig(
  stem_channels=4,
  stages=(Stage(1, 4, 1, 1), Stage(2, 8, 2, 2)),
  head_channels=16,
  labels=("a", "b", "c"),
)


def test_the_papers_size():
  """3.5 M parameters with 1000 classes and a resolution of 7 x 7 before the pool (Table 2)."""
  config = MobileNetConfig(labels=tuple(map(str, range(1000))))
  model = nnx.eval_shape(lambda: MobileNet(config, rngs=nnx.Rngs(0)))
  size = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
  assert size == 3_504_872  # As of torchvision's mobilenet_v2.
  images = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
  out = nnx.eval_shape(lambda m, x: m(x), model, images)
  assert out.hidden.shape == (2, 7, 7, 1280) and out.logits.shape == (2, 1000)


def test_a_block_is_expand_depthwise_project_and_a_residual():
  block = InvertedResidual(SMALL, 4, 4, 3, 1, nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(0), (2, 5, 5, 4))
  layers = block.expand, block.depthwise, block.project
  kernels = [layer.conv.kernel[...] for layer in layers]
  assert [k.shape for k in kernels] == [(1, 1, 4, 12), (3, 3, 1, 12), (1, 1, 12, 4)]
  # Fresh batch norms only divide by sqrt(1 + eps).
  y = np.clip(np.einsum("bhwi,io->bhwo", x, kernels[0][0, 0]), 0, 6)
  padded = np.pad(y, ((0, 0), (1, 1), (1, 1), (0, 0)))
  y = sum(padded[:, i : i + 5, j : j + 5] * kernels[1][i, j, 0] for i in range(3) for j in range(3))
  y = np.einsum("bhwi,io->bhwo", np.clip(y, 0, 6), kernels[2][0, 0])
  np.testing.assert_allclose(block(x, False), x + y, atol=1e-3)
  assert not InvertedResidual(SMALL, 4, 4, 3, 2, nnx.Rngs(0)).residual
  assert not InvertedResidual(SMALL, 4, 8, 3, 1, nnx.Rngs(0)).residual


def test_training_reaches_every_parameter():
  model = MobileNet(SMALL, rngs=nnx.Rngs(0))
  images = jax.random.normal(jax.random.key(0), (4, 16, 16, 3))
  loss = lambda model, images: jnp.sum(model(images, train=True).logits ** 2)
  gradients = nnx.jit(nnx.grad(loss))(model, images)
  for path, gradient in gradients.flat_state():
    assert np.abs(gradient.get_value()).max() > 0, path
