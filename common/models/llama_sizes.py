"""Public sizes of Llama and Mistral by their Hugging Face names, as in those models' config.json."""

from common.models.decoder import DecoderConfig


def _llama2(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int):
  return DecoderConfig(
    vocab_size=32000,
    hidden_size=hidden,
    intermediate_size=intermediate,
    num_layers=layers,
    num_heads=heads,
    num_kv_heads=kv_heads,
    head_dim=128,
    max_position_embeddings=4096,
    norm_eps=1e-5,
  )


LLAMA_SIZES = {
  "meta-llama/Llama-2-7b-hf": _llama2(4096, 11008, 32, 32, 32),
  "meta-llama/Llama-2-13b-hf": _llama2(5120, 13824, 40, 40, 40),
  "meta-llama/Llama-2-70b-hf": _llama2(8192, 28672, 80, 64, 8),
  "meta-llama/Meta-Llama-3-8B": DecoderConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    max_position_embeddings=8192,
    norm_eps=1e-5,
    rope_theta=500000.0,
  ),
}

MISTRAL_SIZES = {
  "mistralai/Mistral-7B-Instruct-v0.2": DecoderConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    max_position_embeddings=32768,
    norm_eps=1e-5,
    rope_theta=1e6,
    family="mistral",
  ),
}
