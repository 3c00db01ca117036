import dataclasses
import functools
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from common.errors import UserError
from common.models.decoder import Block, make_context
from common.models.surgery import get_module
from common.quantization import rtn
from common.quantization.calibration import run_block
from common.quantization.linear import get_kernels
from common.quantization.quantized_array import IntegerFormat
from common.quantization.quantized_kernel import (
  QuantizedKernel,
  freeze_kernels,
  quantize_kernels,
  quantized_kernels,
)
from common.quantization.reconstruction import (
  Learned,
  ReconstructionSettings,
  check_sample_memory,
  in_host_memory,
  reconstruct,
  samples_at,
  squared_error,
)
from common.quantization.straight_through import straight_through
from tests.common.models.small_decoders import ARCHITECTURES, random_module

LLAMA = ARCHITECTURES["llama"]
FORMAT = IntegerFormat(2)
ADAM = optax.adam(3e-3)
SETTINGS = ReconstructionSettings(num_steps=40, batch_size=4)


class StraightThroughWeight(nnx.Module):
  """Weights trained through their rounding, the simplest quantizer with something to learn."""

  def __init__(self, kernel):
    self.latent = Learned(kernel)

  def __call__(self):
    w = self.latent[...]
    return straight_through(w, rtn.fake_quantize(w, FORMAT))


@pytest.fixture(scope="module")
def problem():
  """(block, student, inputs, targets, context)."""
  block = random_module(lambda: Block(LLAMA, nnx.Rngs(0)), seed=0)
  student = nnx.clone(block)
  kernels = get_kernels(student)
  quantize_kernels(student, {p: StraightThroughWeight(k) for p, k in kernels.items()})
  x = jax.random.normal(jax.random.key(0), (10, 6, LLAMA.hidden_size))
  positions = jnp.arange(6)[None]
  context, _ = make_context(LLAMA, positions, jnp.ones_like(positions))
  return block, student, x, run_block(block, x, context), context


def test_it_starts_from_rounding_and_ends_nearer_to_the_target(problem):
  block, student, x, target, context = problem
  trained, log = reconstruct(student, x, target, context, jax.random.key(0), SETTINGS, ADAM)
  rounded = run_block(student, x, context)
  # Two batches of four of the ten samples.
  expected = np.mean((rounded - target)[:8] ** 2)
  assert float(log.before) == pytest.approx(float(expected), rel=1e-4)
  assert log.losses.shape == (40,) and float(log.after) < 0.8 * float(log.before)
  output = run_block(trained, x, context)
  assert float(log.after) == pytest.approx(float(np.mean((output - target)[:8] ** 2)), rel=1e-3)
  # The student it was given is as before, and nothing but `Learned` variables changed.
  np.testing.assert_array_equal(run_block(student, x, context), rounded)
  before, after = nnx.state(student, nnx.Param), nnx.state(trained, nnx.Param)
  jax.tree.map(np.testing.assert_array_equal, before, after)
  assert quantized_kernels(trained).keys() == get_kernels(block).keys()
  freeze_kernels(trained)
  assert isinstance(get_module(trained, "mlp.up_proj"), nnx.Linear)
  np.testing.assert_allclose(run_block(trained, x, context), output, rtol=1e-5, atol=1e-6)
  assert len(np.unique(get_module(trained, "mlp.up_proj").kernel[...][:, 0])) <= 4


def test_training_that_makes_it_worse_is_not_kept(problem):
  _, student, x, target, context = problem
  wild = optax.sgd(1e6)
  kept, log = reconstruct(student, x, target, context, jax.random.key(0), SETTINGS, wild)
  assert log.after == log.before
  jax.tree.map(np.testing.assert_array_equal, nnx.state(kept, Learned), nnx.state(student, Learned))
  last = ReconstructionSettings(num_steps=40, batch_size=4, keep_best=False)
  changed, log = reconstruct(student, x, target, context, jax.random.key(0), last, wild)
  assert not log.after <= log.before


def test_qdrop_mixes_the_two_inputs():
  """A student that returns what it is given shows which input an element came from."""

  class Shift(nnx.Module):
    def __init__(self):
      self.shift = Learned(jnp.zeros(()))

    def __call__(self, x):
      return x + self.shift[...]

  def share(student, output, target, progress):
    return jnp.mean(output - student.shift[...])

  settings = ReconstructionSettings(num_steps=3, batch_size=8, drop_probability=0.25)
  x = jnp.zeros((8, 40, 20))
  _, log = reconstruct(
    Shift(),
    x,
    x,
    None,
    jax.random.key(0),
    settings,
    ADAM,
    full_precision_inputs=x + 1,
    objective=share,
    run=lambda student, x, context: student(x),
  )
  # 6400 elements: four standard deviations of the share are 0.022.
  np.testing.assert_allclose(log.losses, 0.25, atol=0.022)
  assert len(np.unique(np.asarray(log.losses))) == 3
  with pytest.raises(ValueError, match="full_precision_inputs"):
    reconstruct(Shift(), x, x, None, jax.random.key(0), settings, ADAM)


def test_every_sample_comes_once_an_epoch_and_progress_is_a_fraction():
  class Sum(nnx.Module):
    def __init__(self):
      self.shift = Learned(jnp.zeros(()))

    def __call__(self, x):
      return x + 0 * self.shift[...]

  seen = lambda student, output, target, progress: jnp.sum(output) + 1000 * progress
  run = lambda student, x, context: student(x)
  settings = ReconstructionSettings(num_steps=6, batch_size=2)
  x = 2.0 ** jnp.arange(6)[:, None]
  _, log = reconstruct(
    Sum(), x, x, None, jax.random.key(0), settings, ADAM, objective=seen, run=run
  )
  batches = np.asarray(log.losses) - 1000 * np.arange(6) / 6
  # Powers of two: a sum of 63 is every sample once.
  np.testing.assert_allclose(batches.reshape(2, 3).sum(axis=1), 63, rtol=1e-5)


def test_a_context_of_every_sample_follows_its_rows(problem):
  block, student, x, target, context = problem
  per_sample = jax.tree.map(
    lambda leaf: jnp.broadcast_to(leaf, (len(x), *leaf.shape[1:])) if leaf.ndim else leaf, context
  )
  one = reconstruct(student, x, target, context, jax.random.key(0), SETTINGS, ADAM)[1]
  each = reconstruct(student, x, target, per_sample, jax.random.key(0), SETTINGS, ADAM)[1]
  np.testing.assert_allclose(each.losses, one.losses, rtol=1e-3)


def test_samples_in_host_memory_give_the_same_reconstruction():
  """With QDrop: all three arrays of samples are fetched from there, wherever they were before."""

  class Product(nnx.Module):
    def __init__(self):
      self.weight = Learned(jnp.eye(5))

    def __call__(self, x):
      return x @ self.weight[...]

  settings = ReconstructionSettings(num_steps=6, batch_size=4, drop_probability=0.5)
  in_host = dataclasses.replace(settings, sample_memory="pinned_host")
  samples = jax.random.normal(jax.random.key(0), (3, 10, 6, 5))

  def run(settings, samples):
    return reconstruct(
      Product(),
      samples[0],
      samples[1],
      None,
      jax.random.key(0),
      settings,
      ADAM,
      full_precision_inputs=samples[2],
      run=lambda student, x, context: student(x),
    )

  expected, expected_log = run(settings, samples)
  assert float(expected_log.after) < float(expected_log.before)
  there = [in_host_memory(x) for x in samples]
  assert {x.sharding.memory_kind for x in there} == {"pinned_host"}
  for arguments in ((in_host, samples), (in_host, there), (settings, there)):
    learned, log = run(*arguments)
    # The same sums, compiled anew.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), log, expected_log)
    np.testing.assert_allclose(learned.weight[...], expected.weight[...], rtol=1e-5, atol=1e-6)


def test_of_samples_in_host_memory_only_the_batch_is_copied():
  """Two of 64 samples, as XLA counts temporary memory."""
  samples = in_host_memory(jnp.ones((64, 32, 1024)))
  mean = jax.jit(lambda x, rows: jnp.mean(samples_at(x, rows)))
  compiled = mean.lower(samples, jnp.zeros(2, jnp.int32)).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 4 / 64 * samples.nbytes


def test_an_unknown_memory_is_an_error():
  with pytest.raises(UserError, match="sample_memory='disk'.*device, pinned_host"):
    ReconstructionSettings(num_steps=1, batch_size=1, sample_memory="disk")


def test_a_memory_that_the_backend_does_not_have_is_an_error():
  device = mock.Mock(platform="metal")
  device.addressable_memories.return_value = [types.SimpleNamespace(kind="device")]
  with mock.patch.object(jax, "local_devices", return_value=[device]):
    check_sample_memory("device")
    with pytest.raises(UserError, match="'pinned_host': the backend metal has device memory only"):
      check_sample_memory("pinned_host")


def test_blocks_of_one_shape_compile_once(problem):
  _, student, x, target, context = problem
  compilations = []
  listener = lambda name, *_, **__: compilations.append(name) if "backend_compile" in name else None
  other = nnx.clone(student)
  arguments = (x, target, context, jax.random.key(0), SETTINGS, ADAM)
  reconstruct(student, *arguments)
  jax.monitoring.register_event_duration_secs_listener(listener)
  try:
    reconstruct(other, *arguments)
  finally:
    jax.monitoring.unregister_event_duration_listener(listener)
  assert not compilations


def test_learning_rates_share_a_compilation():
  class Shift(nnx.Module):
    def __init__(self):
      self.shift = Learned(jnp.zeros(3))

    def __call__(self, x):
      return x + self.shift[...]

  x = jax.random.normal(jax.random.key(0), (4, 3))
  arguments = (Shift(), x, x + 1, None, jax.random.key(0), ReconstructionSettings(5, 2))
  run = lambda student, x, context: student(x)
  compilations = []
  listener = lambda name, *_, **__: compilations.append(name) if "backend_compile" in name else None

  def learned(optimizer, **options):
    return reconstruct(*arguments, optimizer, run=run, **options)[1].losses

  learned(optax.adam, learning_rate=0.1)
  jax.monitoring.register_event_duration_secs_listener(listener)
  try:
    found = learned(optax.adam, learning_rate=0.3)
  finally:
    jax.monitoring.unregister_event_duration_listener(listener)
  assert not compilations
  np.testing.assert_allclose(found, learned(optax.adam(0.3)), rtol=1e-6)
  assert float(found[-1]) < float(found[0])


def test_a_convolution_can_have_a_learned_kernel():
  conv = nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0))
  double = lambda kernel: 2 * kernel
  layer = QuantizedKernel(conv, functools.partial(double, conv.kernel[...]))
  x = jax.random.normal(jax.random.key(0), (2, 5, 5, 3))
  bias = conv.bias[...]
  np.testing.assert_allclose(layer(x) - bias, 2 * (conv(x) - bias), rtol=1e-4, atol=1e-5)


def test_what_has_nothing_to_learn_is_an_error(problem):
  block, _, x, target, context = problem
  with pytest.raises(ValueError, match="no Learned variable"):
    reconstruct(block, x, target, context, jax.random.key(0), SETTINGS, ADAM)


def test_the_default_objective_is_the_mean_squared_error():
  a, b = jnp.asarray([1.0, 2.0], jnp.bfloat16), jnp.asarray([0.0, 4.0], jnp.bfloat16)
  assert squared_error(None, a, b, 0.0) == 2.5
