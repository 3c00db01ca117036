"""Small random decoders, one per way in which the decoder's architectures differ."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.models.decoder import Decoder, DecoderConfig
from common.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig

_BASE = {
  "vocab_size": 64,
  "hidden_size": 32,
  "intermediate_size": 64,
  "num_layers": 2,
  "num_heads": 4,
  "num_kv_heads": 4,
  "head_dim": 8,
  "max_position_embeddings": 32,
}
_PLAIN = {
  "norm": "layer",
  "norm_eps": 1e-5,
  "gated_mlp": False,
  "qkv_bias": True,
  "attention_out_bias": True,
  "mlp_bias": True,
}
_OPT = _PLAIN | {
  "activation": "relu",
  "position": "learned",
  "position_offset": 2,
  "family": "opt",
}
ARCHITECTURES = {
  "llama": DecoderConfig(**_BASE),
  "qwen2, grouped-query": DecoderConfig(
    **_BASE | {"num_kv_heads": 2, "qkv_bias": True, "tie_word_embeddings": True, "family": "qwen2"}
  ),
  "opt": DecoderConfig(**_BASE | _OPT),
  "opt, post-norm": DecoderConfig(**_BASE | _OPT | {"norm_placement": "post", "final_norm": False}),
  "bloom": DecoderConfig(
    **_BASE
    | _PLAIN
    | {"activation": "gelu_tanh", "position": "alibi", "embedding_norm": True, "family": "bloom"}
  ),
  "neox": DecoderConfig(
    **_BASE
    | _PLAIN
    | {"activation": "gelu", "parallel_residual": True, "rotary_dim": 4, "family": "gpt_neox"}
  ),
}


def random_module(make, seed: int = 0, dtype=jnp.float32):
  """`make()` with every parameter random: norm gains around 1, biases around 0, none of them 0."""
  rng = np.random.default_rng(seed)
  graphdef, state = nnx.split(nnx.eval_shape(make))
  flat = dict(state.flat_state())
  for path, variable in flat.items():
    noise = rng.normal(size=variable.shape)
    value = {
      "kernel": lambda n: n / np.sqrt(n.shape[0]),
      "scale": lambda n: 1 + 0.3 * np.tanh(n),
      "bias": lambda n: 0.3 * n,
      "embedding": lambda n: n,
    }[path[-1]](noise)
    flat[path] = variable.replace(jnp.asarray(value.astype(np.float32)).astype(dtype))
  return nnx.merge(graphdef, nnx.State.from_flat_path(flat))


def random_decoder(config: DecoderConfig, seed: int = 0, dtype=jnp.float32) -> Decoder:
  return random_module(lambda: Decoder(config, rngs=nnx.Rngs(0)), seed, dtype)


def random_encoder_decoder(seed: int = 0, **changes) -> EncoderDecoder:
  """A T5 of one layer on either side; `changes` of its config."""
  config = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_layers": 1,
    "num_decoder_layers": 1,
    "num_heads": 2,
    "head_dim": 8,
    "tie_word_embeddings": False,
  }
  config = EncoderDecoderConfig(**config | changes)
  return random_module(lambda: EncoderDecoder(config, rngs=nnx.Rngs(0)), seed)


def random_tokens(config: DecoderConfig, samples: int = 4, seq: int = 16, seed: int = 0):
  return np.random.default_rng(seed).integers(0, config.vocab_size, (samples, seq)).astype(np.int32)


@nnx.jit
def logits(model: Decoder, tokens):
  """float32 [batch, seq, vocab]."""
  return model(tokens)[0]
