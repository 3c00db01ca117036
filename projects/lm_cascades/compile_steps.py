"""The cascade's steps at the config's size, compiled for a TPU slice: decode, score, embed, learn."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from common.checkpoints.huggingface import Checkpoint
from common.compilation.step import Step
from common.models.decoder import Decoder
from common.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from common.models.sharding import batch_sharding, place, shardings
from common.training.mesh import make_mesh
from projects.lm_cascades import outputs, post_hoc

_FLAN = {
  "vocab_size": 32128,
  "head_dim": 64,
  "activation": "gelu_tanh",
  "gated_mlp": True,
  "tie_word_embeddings": False,
  "scale_output": False,
}
# Public sizes of FLAN-T5, as in those models' config.json: width, MLP, layers, heads.
_SIZES = {"base": (768, 2048, 12, 12), "large": (1024, 2816, 24, 16), "xl": (2048, 5120, 24, 32)}
FLAN_T5 = {
  f"google/flan-t5-{name}": EncoderDecoderConfig(
    hidden_size=dim,
    intermediate_size=hidden,
    num_layers=layers,
    num_decoder_layers=layers,
    num_heads=heads,
    **_FLAN,
  )
  for name, (dim, hidden, layers, heads) in _SIZES.items()
}
# Calibration inputs of the learned rule's step.
_INPUTS = 4000


def compile_steps(config: ConfigDict, devices: Sequence[jax.Device]) -> list[Step]:
  """Greedy decoding by both models, rescoring, the large model's state, a learned rule's fit."""
  mesh = make_mesh({"data": -1}, devices)
  rows = -(-config.decode_batch // len(devices)) * len(devices)
  everywhere = NamedSharding(mesh, PartitionSpec())
  ids = lambda length, dtype=jnp.int32: jax.ShapeDtypeStruct(
    (rows, length), dtype, sharding=batch_sharding(mesh)
  )
  source, target = config.max_source_tokens, config.max_new_tokens
  prompts = (ids(source), ids(source))
  stop = jax.ShapeDtypeStruct((1,), jnp.int32, sharding=everywhere)
  steps, sizes = [], {}
  for name, path in (("small", config.small), ("large", config.large)):
    model_config = FLAN_T5[path] if path in FLAN_T5 else Checkpoint(path).config
    kind = EncoderDecoder if isinstance(model_config, EncoderDecoderConfig) else Decoder
    model = nnx.eval_shape(lambda kind=kind, c=model_config: kind(c, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), state)
    state = place(state, shardings(state, mesh))
    sizes[name] = model_config.hidden_size
    decode = lambda *args, graphdef=graphdef: outputs.decode_rows(graphdef, *args, target)
    label = f"{rows} x {source} -> {target} tokens"
    steps.append(Step(f"decode, {name} model, {label}", decode, (state, *prompts, stop)))
    if name == "small":
      score = functools.partial(outputs.teacher_forced, graphdef)
      arguments = (state, *prompts, ids(target), ids(target, jnp.bool_))
      steps.append(Step(f"score and embed, small model, {label}", score, arguments))
    else:
      first = lambda *args, graphdef=graphdef: outputs.first_state(
        graphdef, *args, config.embed_layers
      )
      name = f"state after {config.embed_layers} decoder layers, large model"
      steps.append(Step(name, first, (state, *prompts)))
  width = config.num_quantiles + 3 + sum(sizes.values())
  return [*steps, fit_step(config, width, everywhere)]


def fit_step(config: ConfigDict, width: int, everywhere: NamedSharding) -> Step:
  """All runs of Post-Hoc-Embed-1+2 on one device's copy of the features: they are small."""
  shape = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)
  held_out = round(config.validation_share * _INPUTS)
  arguments = (
    shape(_INPUTS, width),
    *(shape(_INPUTS) for _ in range(3)),
    shape(_INPUTS - held_out, dtype=jnp.int32),
    shape(held_out, dtype=jnp.int32),
    shape(config.runs, 2, dtype=jnp.uint32),
    shape(),
    shape(dtype=jnp.bool_),
  )

  def fit(x, target, small, large, train, validation, words, learning_rate, logistic):
    keys = jax.random.wrap_key_data(words)
    rows = (x, target, small, large, train, validation, keys, learning_rate, logistic)
    sizes = {"batch_size": config.learner_batch, "epochs": config.epochs}
    return post_hoc.fit_networks(*rows, hidden=config.hidden_embed, **sizes)

  return Step(f"fit Post-Hoc-Embed-1+2, {config.runs} runs, {_INPUTS} inputs", fit, arguments)
