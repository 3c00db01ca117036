"""Every equivalent transformation leaves the function of every decoder that it supports.

The decoders are the Hugging Face checkpoints beside the tests, against the logits of transformers,
and small random ones of every architecture, against their own. Shifts, scales and thresholds are
those of each method's rule on the model's activations; weights and activations are not rounded.
"""

import dataclasses
import functools
import itertools
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from apps.quantization import methods
from common.checkpoints.huggingface import Checkpoint
from common.errors import UserError
from common.models.decoder import AttentionContext, Decoder
from common.models.surgery import get_module, linear_paths, record_inputs, replace_module
from common.quantization.activations import ActivationFormat
from common.quantization.awq import BlockSearch, activation_statistic, apply_search, channel_scale
from common.quantization.equivalent import fold_scale, fold_shift, scaling_groups, smoothquant_scale
from common.quantization.linear import get_kernels, set_kernels
from common.quantization.online_transforms import TransformedAttention
from common.quantization.quantized_array import IntegerFormat
from common.quantization.reconstruction import Learned
from common.quantization.shift_and_scale import channel_range, channel_shift, threshold_scale
from projects.flatquant.flat_block import FlatQuantSettings
from projects.flatquant.flatquant import initial_block, reparametrize
from projects.flatquant.rotation import rotate_residual
from projects.flatquant.transforms import hadamard
from projects.llm_fp4 import models as fpq
from projects.llm_fp4.llm_fp4 import FPQSettings
from projects.outlier_suppression_plus import outlier_suppression_plus as osp
from projects.outlier_suppression_plus.post_norm import PostNormBlock
from projects.outlier_suppression_plus.sites import ShiftAndScale, sites, takes_shift
from projects.qllm import qllm
from projects.qllm import settings as qllm_settings
from projects.qllm.channel_reassembly import num_extra, num_splits, reassemble
from projects.qllm.sites import SiteReassembly
from projects.qllm.sites import sites as qllm_sites
from tests.common.models.small_decoders import (
  ARCHITECTURES,
  random_decoder,
  random_encoder_decoder,
  random_tokens,
)

CHECKPOINTS = pathlib.Path(__file__).parents[2] / "golden" / "hf_checkpoints"
NAMES = ("llama", "llama_gqa_tied", "mistral", "opt", "gpt2", "gpt_neox")
# Random decoders of the architectures that no checkpoint has.
SAME = {"llama": "llama", "opt": "opt", "neox": "gpt_neox"}
DECODERS = [f"checkpoint {n}" for n in NAMES if (CHECKPOINTS / n).is_dir()]
DECODERS += [n for n in ARCHITECTURES if f"checkpoint {SAME.get(n)}" not in DECODERS]
W4, A4 = IntegerFormat(4), ActivationFormat(4)


class Case(NamedTuple):
  """A decoder and what it computes.

  Attributes:
    model: in float32; not to be modified.
    tokens, segment_ids: int32 [batch, seq], segment 0 for padding.
    logits: expected, float32 [batch, seq, vocab].
    inputs: of every block's linears, {path below the block: [batch, seq, in]}.
    x: input of every block, [batch, seq, dim].
    context: of the blocks.
  """

  model: Decoder
  tokens: np.ndarray
  segment_ids: np.ndarray
  logits: np.ndarray
  inputs: list[dict[str, jax.Array]]
  x: list[jax.Array]
  context: AttentionContext


@nnx.jit
def logits(model, tokens, segment_ids):
  return model(tokens, segment_ids=segment_ids)[0]


@nnx.jit
def record(model, tokens, segment_ids):
  """Context of the blocks, their inputs and those of their linears."""
  x, context = model.stem(tokens, segment_ids)
  xs, inputs = [], []
  for block in model.blocks:
    xs.append(x)
    (x, _), of_block = record_inputs(
      block, linear_paths(block), lambda block, x=x: block(x, context)
    )
    inputs.append(of_block)
  return context, xs, inputs


@functools.cache
def case(name: str) -> Case:
  kind, _, checkpoint = name.partition(" ")
  if kind == "checkpoint":
    model = Checkpoint(CHECKPOINTS / checkpoint).load_model()
    with np.load(CHECKPOINTS / checkpoint / "reference.npz") as file:
      tokens, segment_ids = (file[k].astype(np.int32) for k in ("input_ids", "attention_mask"))
      expected = file["logits"]
  else:
    model = random_decoder(ARCHITECTURES[name])
    tokens = random_tokens(model.config)
    segment_ids = np.ones_like(tokens)
    expected = np.asarray(logits(model, tokens, segment_ids))
  context, xs, inputs = record(model, tokens, segment_ids)
  return Case(model, tokens, segment_ids, expected, inputs, xs, context)


def check_same_function(case: Case, changed: Decoder) -> None:
  """The logits are the expected ones to 1e-4, of the largest where that is above 1; padding aside."""
  real = case.segment_ids != 0
  result = np.asarray(logits(changed, case.tokens, case.segment_ids))[real]
  bound = 1e-4 * max(1.0, float(np.abs(case.logits[real]).max()))
  np.testing.assert_allclose(result, case.logits[real], rtol=0, atol=bound)


def check_changed(case: Case, changed: Decoder, path: str) -> None:
  """The kernel at `path` of every block is another one: what is compared is not the model itself."""
  for old, new in zip(case.model.blocks, changed.blocks, strict=True):
    old, new = (np.asarray(get_module(block, path).kernel[...]) for block in (old, new))
    assert old.shape != new.shape or np.abs(old - new).max() > 1e-2 * np.abs(old).max()


def with_blocks(case: Case, change) -> Decoder:
  """A copy of the model with `change(index, block)` in the place of each block."""
  model = nnx.clone(case.model)
  model.blocks = nnx.List([change(i, block) for i, block in enumerate(case.model.blocks)])
  return model


@functools.partial(nnx.jit, static_argnums=2)
def scaled_blocks(block, inputs, config):
  """The block with SmoothQuant's scales, and with AWQ's for an exponent of 1/2; in one program."""
  smoothquant, awq = nnx.clone(block), {}
  for group in scaling_groups(config):
    x = inputs[group.linears[0]]
    # Of the kernels as they are by then: an earlier group may have scaled their outputs.
    kernels = list(get_kernels(smoothquant, list(group.linears)).values())
    x_max = jnp.abs(x).max(axis=(0, 1))
    fold_scale(smoothquant, group, smoothquant_scale(x_max, kernels))
    awq[group.previous] = channel_scale(activation_statistic(x), 0.5)
  return smoothquant, apply_search(block, BlockSearch(awq, {}), config)


@pytest.mark.parametrize("name", DECODERS)
def test_channel_scales_of_smoothquant_and_awq(name):
  this = case(name)
  pairs = zip(this.model.blocks, this.inputs, strict=True)
  scaled = [scaled_blocks(block, inputs, this.model.config) for block, inputs in pairs]
  for blocks in zip(*scaled, strict=True):
    changed = nnx.clone(this.model)
    changed.blocks = nnx.List(blocks)
    check_changed(this, changed, "mlp.down_proj")
    check_same_function(this, changed)


@nnx.jit
def shifted_and_scaled(model, inputs):
  """The folded model, and the largest scale of every site."""
  config, found = model.config, []
  for block, of_linears in zip(model.blocks, inputs, strict=True):
    wrapped = PostNormBlock(nnx.clone(block)) if config.norm_placement == "post" else block
    of_block = {}
    for site in sites(config):
      x = of_linears[site.linears[0]]
      shift = channel_shift(x) * takes_shift(wrapped, site)
      low, high = channel_range(x - shift)
      # So low a threshold that it scales nearly every channel.
      scale = threshold_scale(low, high, 0.2 * jnp.maximum(high, -low).max())
      of_block[site.previous] = ShiftAndScale(shift, scale, None)
    found.append(of_block)
  return osp.fold_model(model, found), [[f.scale.max() for f in b.values()] for b in found]


@pytest.mark.parametrize("name", DECODERS)
def test_shift_and_scale_of_outlier_suppression_plus(name):
  this = case(name)
  changed, largest = shifted_and_scaled(this.model, this.inputs)
  assert np.min(largest) > 2
  check_changed(this, changed, "mlp.up_proj")
  check_same_function(this, changed)


@pytest.fixture
def no_rounding(monkeypatch):
  """Leaves of `qllm.assemble_student` what it does to channels."""
  monkeypatch.setattr(qllm, "_quantize", lambda w, format: w)
  monkeypatch.setattr(qllm, "pack_linears", set_kernels)
  monkeypatch.setattr(qllm, "quantize_inputs", lambda *_: None)
  monkeypatch.setattr(qllm, "quantize_attention", lambda *_: None)


@functools.partial(jax.jit, static_argnums=1)
def disassembly(x, max_extra):
  """The largest channels split into two, a tenth of them at most; what `find_reassemblies` gives."""
  largest = jnp.abs(x).max(axis=(0, 1))
  threshold = jnp.maximum(jnp.sort(largest)[-largest.size // 10], 0.5 * largest.max())
  splits, extra = num_splits(largest, threshold), num_extra(largest, threshold)
  reassembly = reassemble(None, None, splits, max_extra, kind="disassembly")
  return SiteReassembly(reassembly, threshold, extra, jnp.float32(0), None)


@pytest.mark.parametrize("name", [n for n in DECODERS if n != "opt, post-norm"])
def test_disassembled_channels_of_qllm(name, no_rounding):
  this = case(name)
  config = this.model.config
  settings = qllm_settings.Settings(W4, A4, reassembly="disassembly", tuning=None)

  def disassemble(i, block):
    found = {}
    for site in qllm_sites(config):
      x = this.inputs[i][site.linears[0]]
      found[site.previous] = disassembly(x, settings.max_extra(x.shape[-1]))
      assert 0 < int(found[site.previous].extra) <= x.shape[-1] // 10
    return qllm.assemble_student(block, found, config, settings, jax.random.key(0))

  changed = with_blocks(this, disassemble)
  check_changed(this, changed, "attention.q_proj")
  check_same_function(this, changed)


FLATQUANT = [n for n in DECODERS if n.split()[-1] in ("llama", "llama_gqa_tied", "mistral")]
FLATQUANT.insert(1, "qwen2, grouped-query")


# Every decoder with one kind of matrices: each pair compiles for seconds.
@pytest.mark.parametrize(
  "name, matrices", zip(FLATQUANT, itertools.cycle(("svd", "hadamard", "inverse")))
)
def test_online_transforms_of_flatquant(name, matrices):
  this = case(name)
  # Keys are only transformed where they are rounded; the rounding is taken out again below.
  settings = FlatQuantSettings(keys=A4, clip=False, matrices=matrices)
  rng = np.random.default_rng(0)
  noise = lambda leaf: leaf * np.exp(0.2 * rng.normal(size=leaf.shape)).astype(np.float32)

  def transform(i, block):
    flat = initial_block(block, this.x[i], this.context, jax.random.key(i), settings)
    # As if learned: matrices that are no rotations.
    nnx.update(flat, jax.tree.map(noise, nnx.state(flat, Learned)))
    block = reparametrize(flat, settings)
    over = block.attention.attend
    attend = TransformedAttention(over.key_transform[...], over.head_transform[...], {}, {})
    replace_module(block, "attention.attend", attend)
    return block

  changed = with_blocks(this, transform)
  check_changed(this, changed, "attention.v_proj")
  check_same_function(this, changed)


@pytest.mark.parametrize("name", FLATQUANT)
def test_a_rotated_residual_stream(name):
  this = case(name)
  rotated = rotate_residual(this.model, hadamard(this.model.config.hidden_size))
  check_changed(this, rotated, "mlp.gate_proj")
  check_same_function(this, rotated)


FPQ = FPQSettings(8, 8, format_search=False, rounds=1, grid_size=2, tokens=8)


@nnx.jit
def run_linears(block, inputs):
  return {path: get_module(block, path)(x) for path, x in inputs.items()}


@pytest.mark.parametrize("name", DECODERS)
def test_llm_fp4_s_channel_biases_in_the_weights(name):
  """Codes whose exponents took the channels' biases multiply as the rounded tensors do."""
  this = case(name)
  block, inputs = this.model.blocks[0], this.inputs[0]
  searches = fpq.search_block(block, this.x[0], this.context, FPQ)
  assert any(np.ptp(search.offsets) > 0 for search in searches.values())
  simulated, folded = nnx.clone(block), nnx.clone(block)
  fpq.apply_search(simulated, searches, FPQ)
  fpq.apply_search(folded, searches, FPQ, packed=True)
  expected, found = run_linears(simulated, inputs), run_linears(folded, inputs)
  for path, x in inputs.items():
    exact = get_module(block, path)(x)
    size = float(jnp.abs(exact).max())
    # Rounding changes the product; the fold does not.
    assert float(jnp.abs(expected[path] - exact).max()) > 1e-3 * size
    differences = np.abs(found[path] - expected[path]).max(axis=-1)
    # A token with a value at the middle of two codes may go either way.
    assert np.mean(differences > 1e-4 * max(1.0, size)) <= 0.02


# Architectures that a transformation does not support. Where there are calibration data, None takes
# their place: whoever looked at them first would fail with another error.


@pytest.mark.parametrize("name", [n for n in DECODERS if n not in FLATQUANT])
def test_flatquant_refuses_other_architectures(name):
  model = case(name).model
  with pytest.raises(UserError, match="a norm before a gated MLP"):
    initial_block(model.blocks[0], None, None, jax.random.key(0), FlatQuantSettings())
  with pytest.raises(UserError, match="a norm before a gated MLP"):
    methods.make_method("flatquant", model.config, methods.Options(group_size=-1))
  with pytest.raises(UserError, match="RMSNorm before their linears"):
    rotate_residual(model, None)


def test_qllm_and_outlier_suppression_plus_refuse_other_architectures():
  settings = qllm_settings.Settings(W4, A4, tuning=None)
  post = random_decoder(ARCHITECTURES["opt, post-norm"])
  with pytest.raises(UserError, match="norm_placement='post'"):
    qllm.quantize(post, None, settings, None)
  encoder_decoder = random_encoder_decoder()
  with pytest.raises(UserError, match="EncoderDecoder; supported: decoders"):
    qllm.quantize(encoder_decoder, None, settings, None)
  with pytest.raises(UserError, match="EncoderDecoder; supported: decoders"):
    osp.quantize(encoder_decoder, None, osp.Settings(W4, A4))
  # Without biases the norm cannot take a shift: post-norm is for LayerNorm only.
  config = dataclasses.replace(ARCHITECTURES["llama"], norm_placement="post")
  with pytest.raises(UserError, match="post-norm blocks with norm='rms'"):
    osp.quantize(random_decoder(config), None, osp.Settings(W4, A4))


@pytest.mark.parametrize("name", FLATQUANT)
def test_no_shift_behind_a_norm_without_bias(name):
  model = nnx.clone(case(name).model)
  before = jax.tree.leaves(nnx.state(model))
  for group in scaling_groups(model.config)[:1]:
    with pytest.raises(UserError, match="has no bias that could take a shift"):
      fold_shift(model.blocks[0], group, jnp.ones(model.config.hidden_size))
  assert all(a is b for a, b in zip(before, jax.tree.leaves(nnx.state(model)), strict=True))
