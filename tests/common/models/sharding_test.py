import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from common.errors import UserError
from common.models.decoder import Decoder, DecoderConfig, KVCache
from common.models.encoder import Encoder, EncoderConfig
from common.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from common.models.resnet import ResNet, ResNetConfig
from common.models.scan import abstract_stack
from common.models.sharding import (
  PARAMETERS,
  RULES,
  cache_shardings,
  constrain,
  logical_axes,
  shardings,
)
from common.models.vit import VisionTransformer, VisionTransformerConfig
from common.quantization.calibration import rtn_block
from common.quantization.quantized_array import IntegerFormat
from common.training.optimizer import make_optimizer

MESH = AbstractMesh((1, 2, 2), ("data", "fsdp", "tensor"))
CONFIG = DecoderConfig(
  vocab_size=64,
  hidden_size=32,
  intermediate_size=64,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  max_position_embeddings=64,
)
BERT = dict(hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2)
MODELS = {
  "llama": lambda rngs: Decoder(CONFIG, rngs=rngs),
  "opt": lambda rngs: Decoder(
    dataclasses.replace(
      CONFIG,
      norm="layer",
      position="learned",
      embedding_dim=16,
      embedding_norm=True,
      gated_mlp=False,
      qkv_bias=True,
      attention_out_bias=True,
      mlp_bias=True,
    ),
    rngs=rngs,
  ),
  **{
    f"bert {head}": lambda rngs, head=head: Encoder(
      EncoderConfig(
        vocab_size=64,
        max_position_embeddings=32,
        head=head,
        labels=("a", "b", "c"),
        tie_word_embeddings=False,
        pooler=False,
        **BERT,
      ),
      rngs=rngs,
    )
    for head in ("masked_lm", "sequence", "token")
  },
  "t5": lambda rngs: EncoderDecoder(
    EncoderDecoderConfig(
      vocab_size=64,
      hidden_size=32,
      intermediate_size=64,
      num_layers=1,
      num_decoder_layers=1,
      num_heads=2,
      head_dim=16,
    ),
    rngs=rngs,
  ),
  "vit": lambda rngs: VisionTransformer(
    VisionTransformerConfig(
      image_size=(16, 16),
      patch_size=(8, 8),
      head="distilled",
      distillation_token=True,
      pooler_size=32,
      labels=("a", "b", "c"),
      **BERT,
    ),
    rngs=rngs,
  ),
  "resnet": lambda rngs: ResNet(
    ResNetConfig(embedding_size=8, hidden_sizes=(32, 64), depths=(2, 1), labels=("a", "b", "c")),
    rngs=rngs,
  ),
}


def specs(tree, **options):
  """{name: PartitionSpec} of every array."""
  found = jax.tree.leaves_with_path(shardings(tree, MESH, **options))
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator=".")
  return {name(path): sharding.spec for path, sharding in found}


def abstract_params(make):
  return nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: make(nnx.Rngs(0)))))


@pytest.mark.parametrize("name", MODELS)
def test_every_matrix_of_every_model_is_cut(name):
  found = specs(params := abstract_params(MODELS[name]))
  shapes = {jax.tree_util.keystr(p, simple=True, separator="."): x.shape
            for p, x in jax.tree.leaves_with_path(params)}  # fmt: skip
  whole = [n for n, spec in found.items() if len(shapes[n]) > 1 and not any(spec)]
  # One-column tables: T5's positions are cut by heads, and nothing else is small enough to spare.
  assert whole == []


def test_decoder_parameters_follow_the_table():
  found = specs(abstract_params(MODELS["llama"]))
  assert found["blocks.1.attention.q_proj.kernel"] == PartitionSpec(("fsdp",), ("tensor",))
  assert found["blocks.1.mlp.down_proj.kernel"] == PartitionSpec(("tensor",), ("fsdp",))
  assert found["embed_tokens.embedding"] == PartitionSpec(("tensor",), ("fsdp",))
  assert found["lm_head.kernel"] == PartitionSpec(("fsdp",), ("tensor",))
  assert not any(found["blocks.0.mlp_norm.scale"])


def test_stacked_optimizer_state_is_cut_like_the_parameters():
  _, params = abstract_stack(CONFIG)
  state = jax.eval_shape(make_optimizer(learning_rate=1.0, num_steps=9).init, params)
  found = specs({"params": params, "opt": state})
  expected = PartitionSpec(None, ("fsdp",), ("tensor",))
  moments = [n for n in found if n.endswith("blocks.attention.q_proj.kernel")]
  assert len(moments) == 3  # The parameter, and Adam's two moments.
  assert {found[name] for name in moments} == {expected}
  assert all(not any(spec) for name, spec in found.items() if name.endswith("count"))


@pytest.mark.parametrize("bits", [3, 4])
def test_packed_weights_are_cut_like_kernels(bits):
  format = IntegerFormat(bits, group_size=16)
  config = dataclasses.replace(CONFIG, hidden_size=64, head_dim=16)
  edit = lambda block: rtn_block(block, format)
  found = specs(abstract_stack(config, edit_block=edit)[1])
  name = "blocks.attention.q_proj.weight"
  assert found[f"{name}.values"] == PartitionSpec(None, ("fsdp",), ("tensor",))
  assert found[f"{name}.scales"] == PartitionSpec(None, ("fsdp",), ("tensor",))


def test_indivisible_dimension_names_parameter_dimension_and_axis():
  params = abstract_params(
    lambda rngs: Decoder(dataclasses.replace(CONFIG, vocab_size=63), rngs=rngs)
  )
  with pytest.raises(
    UserError, match=r"tensor=2 does not divide dimension 0 \(vocab\) of embed_tok"
  ):
    shardings(params, MESH)
  whole = shardings(params, MESH, rules=RULES | {"vocab": ()})
  assert whole["embed_tokens"]["embedding"].spec == PartitionSpec(None, ("fsdp",))


def test_models_on_a_mesh_are_as_on_one_device(tmp_path):
  """On virtual devices, which have to be there before JAX is imported."""
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    # On a processor two programs at once can wait for each other's collectives.
    "JAX_CPU_ENABLE_ASYNC_DISPATCH": "0",
  }
  run = subprocess.run(
    [sys.executable, "-m", "tests.common.models.on_mesh_run", str(tmp_path)],
    env=environment,
    capture_output=True,
    text=True,
  )
  assert run.returncode == 0, run.stderr[-4000:]
  assert run.stdout.splitlines()[-1] == "all agree"


def test_unknown_matrix_must_be_listed():
  params = {"gate": {"matrix": jnp.zeros((4, 4))}, "bias": jnp.zeros(3), "step": jnp.zeros(())}
  with pytest.raises(ValueError, match="no logical axes for gate.matrix"):
    shardings(params, MESH)
  found = specs(params, table=PARAMETERS | {"gate.matrix": ("embed", "mlp")})
  assert found["gate.matrix"] == PartitionSpec(("fsdp",), ("tensor",))
  assert found["step"] == PartitionSpec()
  with pytest.raises(ValueError, match="has 3 dimensions"):
    logical_axes("blocks.0.mlp.up_proj.kernel", 3)


def test_cache_is_cut_over_rows_and_heads():
  cache = jax.eval_shape(lambda: KVCache.empty(CONFIG, 4, 16))
  found = cache_shardings(cache, MESH)
  assert found.keys[1].spec == PartitionSpec(("fsdp",), ("tensor",), None, None)
  assert found.positions.spec == PartitionSpec(("fsdp",), None)
  assert found.length.spec == PartitionSpec()
  three = jax.eval_shape(
    lambda: KVCache.empty(dataclasses.replace(CONFIG, num_heads=3, num_kv_heads=3), 4, 16)
  )
  with pytest.raises(UserError, match="kv_heads.*cache.keys.0.*size 3"):
    cache_shardings(three, MESH)


def test_constrain_without_a_mesh_is_the_identity():
  x = jnp.ones((2, 3))
  assert constrain(x, "batch", "residual") is x


def test_constrain_cuts_what_the_mesh_divides():
  mesh = AbstractMesh((1, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
  cut = lambda x: constrain(x, "batch", None, "heads", "residual")
  with jax.sharding.use_abstract_mesh(mesh):
    jaxpr = jax.make_jaxpr(cut)(np.ones((4, 6, 3, 8), np.float32))
  (equation,) = jaxpr.eqns
  any_ = PartitionSpec.UNCONSTRAINED
  assert equation.params["sharding"].spec == PartitionSpec(("data", "fsdp"), any_, any_, None)
