"""The decoders' families: Llama, Mistral, Qwen2, OPT, GPT-2, GPT-NeoX and BLOOM."""

from typing import Any

from common.checkpoints.family import (
  Family,
  per_block,
  read_activation,
  reject,
  write_activation,
)
from common.errors import UserError
from common.models.decoder import Decoder, DecoderConfig, RopeScaling


def _rope(hf: dict[str, Any], default_theta: float = 10000.0) -> dict[str, Any]:
  """Reads both spellings: `rope_parameters` (transformers 5), `rope_theta` + `rope_scaling`."""
  rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
  theta = rope.get("rope_theta", hf.get("rope_theta", default_theta))
  kind = rope.get("rope_type", rope.get("type", "default"))
  scaling = None
  if kind in ("linear", "dynamic", "llama3"):
    trained = hf["max_position_embeddings"]
    if kind == "llama3":
      trained = rope["original_max_position_embeddings"]
    scaling = RopeScaling(
      kind,
      float(rope["factor"]),
      int(trained),
      float(rope.get("low_freq_factor", 1.0)),
      float(rope.get("high_freq_factor", 4.0)),
    )
  elif kind != "default":
    raise UserError(
      f"RoPE scaling {kind!r} is not supported; supported: default, linear, dynamic, llama3"
    )
  return {"rope_theta": float(theta), "rope_scaling": scaling}


def _write_rope(config: DecoderConfig) -> dict[str, Any]:
  # Both spellings, so that old and new readers agree.
  out: dict[str, Any] = {"rope_theta": config.rope_theta}
  parameters: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_type": "default"}
  scaling = config.rope_scaling
  if scaling is not None:
    parameters |= {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
      parameters |= {
        "original_max_position_embeddings": scaling.original_max_position,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
      }
    out["rope_scaling"] = {k: v for k, v in parameters.items() if k != "rope_theta"}
  return out | {"rope_parameters": parameters}


def _read_llama(hf: dict[str, Any]) -> DecoderConfig:
  heads, layers = hf["num_attention_heads"], hf["num_hidden_layers"]
  family = hf["model_type"]
  window, full = hf.get("sliding_window", 4096), ()  # Mistral's and Qwen2's default.
  if family == "llama" or (family == "qwen2" and not hf.get("use_sliding_window", False)):
    window = None
  if family == "qwen2" and window is not None:
    kinds = hf.get("layer_types")
    if kinds is None:
      first = hf.get("max_window_layers", 28)
      kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    full = tuple(i for i, kind in enumerate(kinds) if kind == "full_attention")
    if len(full) == layers:
      window, full = None, ()
  return DecoderConfig(
    vocab_size=hf["vocab_size"],
    hidden_size=hf["hidden_size"],
    intermediate_size=hf["intermediate_size"],
    num_layers=layers,
    num_heads=heads,
    num_kv_heads=hf.get("num_key_value_heads") or heads,
    head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
    max_position_embeddings=hf["max_position_embeddings"],
    norm_eps=hf.get("rms_norm_eps", 1e-6),
    activation=read_activation(hf.get("hidden_act", "silu")),
    qkv_bias=family == "qwen2" or hf.get("attention_bias", False),
    attention_out_bias=family != "qwen2" and hf.get("attention_bias", False),
    mlp_bias=hf.get("mlp_bias", False),
    sliding_window=window,
    full_attention_layers=full,
    tie_word_embeddings=hf.get("tie_word_embeddings", False),
    family=family,
    **_rope(hf),
  )


def _write_common(config: DecoderConfig) -> dict[str, Any]:
  return {
    "vocab_size": config.vocab_size,
    "tie_word_embeddings": config.tie_word_embeddings,
    "hidden_size": config.hidden_size,
  }


def _write_llama(config: DecoderConfig) -> dict[str, Any]:
  layers = range(config.num_layers)
  out = {
    "intermediate_size": config.intermediate_size,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "num_key_value_heads": config.num_kv_heads,
    "head_dim": config.head_dim,
    "max_position_embeddings": config.max_position_embeddings,
    "rms_norm_eps": config.norm_eps,
    "hidden_act": write_activation(config.activation),
  } | _write_common(config)
  out |= _write_rope(config)
  if config.family == "llama":
    out |= {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
  else:
    out["sliding_window"] = config.sliding_window
  if config.family == "qwen2":
    full = [config.sliding_window is None or i in config.full_attention_layers for i in layers]
    out |= {
      "use_sliding_window": not all(full),
      "max_window_layers": sum(full),
      "layer_types": ["full_attention" if f else "sliding_attention" for f in full],
    }
  return out


def _read_opt(hf: dict[str, Any]) -> DecoderConfig:
  reject(hf, enable_bias=True, layer_norm_elementwise_affine=True, _remove_final_layer_norm=False)
  heads, dim = hf["num_attention_heads"], hf["hidden_size"]
  pre = hf.get("do_layer_norm_before", True)
  width = hf.get("word_embed_proj_dim") or dim
  return DecoderConfig(
    vocab_size=hf["vocab_size"],
    hidden_size=dim,
    intermediate_size=hf["ffn_dim"],
    num_layers=hf["num_hidden_layers"],
    num_heads=heads,
    num_kv_heads=heads,
    head_dim=dim // heads,
    max_position_embeddings=hf["max_position_embeddings"],
    norm="layer",
    norm_eps=1e-5,
    norm_placement="pre" if pre else "post",
    final_norm=pre,
    embedding_dim=None if width == dim else width,
    activation=read_activation(hf.get("activation_function", "relu")),
    gated_mlp=False,
    qkv_bias=True,
    attention_out_bias=True,
    mlp_bias=True,
    position="learned",
    position_offset=2,
    tie_word_embeddings=hf.get("tie_word_embeddings", True),
    family="opt",
  )


def _write_opt(config: DecoderConfig) -> dict[str, Any]:
  return _write_common(config) | {
    "ffn_dim": config.intermediate_size,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "max_position_embeddings": config.max_position_embeddings,
    "do_layer_norm_before": config.norm_placement == "pre",
    "word_embed_proj_dim": config.embedding_dim or config.hidden_size,
    "activation_function": write_activation(config.activation),
  }


def _read_gpt2(hf: dict[str, Any]) -> DecoderConfig:
  reject(
    hf,
    scale_attn_weights=True,
    scale_attn_by_inverse_layer_idx=False,
    add_cross_attention=False,
  )
  heads, dim = hf["n_head"], hf["n_embd"]
  return DecoderConfig(
    vocab_size=hf["vocab_size"],
    hidden_size=dim,
    intermediate_size=hf.get("n_inner") or 4 * dim,
    num_layers=hf["n_layer"],
    num_heads=heads,
    num_kv_heads=heads,
    head_dim=dim // heads,
    max_position_embeddings=hf["n_positions"],
    norm="layer",
    norm_eps=hf.get("layer_norm_epsilon", 1e-5),
    activation=read_activation(hf.get("activation_function", "gelu_new")),
    gated_mlp=False,
    qkv_bias=True,
    attention_out_bias=True,
    mlp_bias=True,
    position="learned",
    tie_word_embeddings=hf.get("tie_word_embeddings", True),
    family="gpt2",
  )


def _write_gpt2(config: DecoderConfig) -> dict[str, Any]:
  return {
    "vocab_size": config.vocab_size,
    "tie_word_embeddings": config.tie_word_embeddings,
    "n_embd": config.hidden_size,
    "n_inner": config.intermediate_size,
    "n_layer": config.num_layers,
    "n_head": config.num_heads,
    "n_positions": config.max_position_embeddings,
    "layer_norm_epsilon": config.norm_eps,
    "activation_function": write_activation(config.activation),
  }


def _read_gpt_neox(hf: dict[str, Any]) -> DecoderConfig:
  heads, dim = hf["num_attention_heads"], hf["hidden_size"]
  rope = hf.get("rope_parameters") or {}
  fraction = rope.get("partial_rotary_factor", hf.get("rotary_pct", 0.25))
  bias = hf.get("attention_bias", True)
  return DecoderConfig(
    vocab_size=hf["vocab_size"],
    hidden_size=dim,
    intermediate_size=hf["intermediate_size"],
    num_layers=hf["num_hidden_layers"],
    num_heads=heads,
    num_kv_heads=heads,
    head_dim=dim // heads,
    max_position_embeddings=hf["max_position_embeddings"],
    norm="layer",
    norm_eps=hf.get("layer_norm_eps", 1e-5),
    parallel_residual=hf.get("use_parallel_residual", True),
    activation=read_activation(hf.get("hidden_act", "gelu")),
    gated_mlp=False,
    qkv_bias=bias,
    attention_out_bias=bias,
    mlp_bias=True,
    rotary_dim=int(dim // heads * fraction),
    tie_word_embeddings=hf.get("tie_word_embeddings", False),
    family="gpt_neox",
    **_rope(hf, hf.get("rotary_emb_base", 10000.0)),
  )


def _write_gpt_neox(config: DecoderConfig) -> dict[str, Any]:
  fraction = (config.rotary_dim or config.head_dim) / config.head_dim
  rope = _write_rope(config)
  rope["rope_parameters"]["partial_rotary_factor"] = fraction
  return (
    _write_common(config)
    | rope
    | {
      "intermediate_size": config.intermediate_size,
      "num_hidden_layers": config.num_layers,
      "num_attention_heads": config.num_heads,
      "max_position_embeddings": config.max_position_embeddings,
      "layer_norm_eps": config.norm_eps,
      "use_parallel_residual": config.parallel_residual,
      "hidden_act": write_activation(config.activation),
      "attention_bias": config.qkv_bias,
      "rotary_pct": fraction,
      "rotary_emb_base": config.rope_theta,
    }
  )


def _read_bloom(hf: dict[str, Any]) -> DecoderConfig:
  reject(hf, apply_residual_connection_post_layernorm=False)
  heads = hf.get("n_head") or hf["num_attention_heads"]
  dim = hf.get("hidden_size") or hf["n_embed"]
  return DecoderConfig(
    vocab_size=hf["vocab_size"],
    hidden_size=dim,
    intermediate_size=4 * dim,
    num_layers=hf.get("n_layer") or hf["num_hidden_layers"],
    num_heads=heads,
    num_kv_heads=heads,
    head_dim=dim // heads,
    max_position_embeddings=hf.get("seq_length", 2048),
    norm="layer",
    norm_eps=hf.get("layer_norm_epsilon", 1e-5),
    embedding_norm=True,
    activation="gelu_tanh",
    gated_mlp=False,
    qkv_bias=True,
    attention_out_bias=True,
    mlp_bias=True,
    position="alibi",
    tie_word_embeddings=hf.get("tie_word_embeddings", True),
    family="bloom",
  )


def _write_bloom(config: DecoderConfig) -> dict[str, Any]:
  return _write_common(config) | {
    "n_layer": config.num_layers,
    "n_head": config.num_heads,
    "seq_length": config.max_position_embeddings,
    "layer_norm_epsilon": config.norm_eps,
  }


def _family(architecture: str, base: str, read, write, names: dict[str, str], **options) -> Family:
  tied = {f"{names['lm_head']}.weight": f"{names['embed_tokens']}.weight"}
  return Family((architecture, base), base, Decoder, read, write, names=names, tied=tied, **options)


def _llama_family(name: str) -> Family:
  block = {
    "attention_norm": "input_layernorm",
    "attention.q_proj": "self_attn.q_proj",
    "attention.k_proj": "self_attn.k_proj",
    "attention.v_proj": "self_attn.v_proj",
    "attention.o_proj": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate_proj": "mlp.gate_proj",
    "mlp.up_proj": "mlp.up_proj",
    "mlp.down_proj": "mlp.down_proj",
  }
  names = {
    "embed_tokens": "model.embed_tokens",
    "final_norm": "model.norm",
    "lm_head": "lm_head",
    **per_block("blocks.{}", "model.layers.{}", block),
  }
  return _family(
    f"{name}ForCausalLM",
    f"{name}Model",
    _read_llama,
    _write_llama,
    names,
    prefix="model.",
    buffers=("rotary_emb.inv_freq",),
  )


def _fused(name: str) -> dict[str, str]:
  return {f"attention.{part}_proj": name for part in "qkv"}


_OPT_BLOCK = {
  "attention_norm": "self_attn_layer_norm",
  "attention.q_proj": "self_attn.q_proj",
  "attention.k_proj": "self_attn.k_proj",
  "attention.v_proj": "self_attn.v_proj",
  "attention.o_proj": "self_attn.out_proj",
  "mlp_norm": "final_layer_norm",
  "mlp.up_proj": "fc1",
  "mlp.down_proj": "fc2",
}
_GPT2_BLOCK = {
  "attention_norm": "ln_1",
  **_fused("attn.c_attn"),
  "attention.o_proj": "attn.c_proj",
  "mlp_norm": "ln_2",
  "mlp.up_proj": "mlp.c_fc",
  "mlp.down_proj": "mlp.c_proj",
}
_GPT_NEOX_BLOCK = {
  "attention_norm": "input_layernorm",
  **_fused("attention.query_key_value"),
  "attention.o_proj": "attention.dense",
  "mlp_norm": "post_attention_layernorm",
  "mlp.up_proj": "mlp.dense_h_to_4h",
  "mlp.down_proj": "mlp.dense_4h_to_h",
}
_BLOOM_BLOCK = {
  "attention_norm": "input_layernorm",
  **_fused("self_attention.query_key_value"),
  "attention.o_proj": "self_attention.dense",
  "mlp_norm": "post_attention_layernorm",
  "mlp.up_proj": "mlp.dense_h_to_4h",
  "mlp.down_proj": "mlp.dense_4h_to_h",
}

DECODERS: dict[str, Family] = {
  "llama": _llama_family("Llama"),
  "mistral": _llama_family("Mistral"),
  "qwen2": _llama_family("Qwen2"),
  "opt": _family(
    "OPTForCausalLM",
    "OPTModel",
    _read_opt,
    _write_opt,
    {
      "embed_tokens": "model.decoder.embed_tokens",
      "embed_positions": "model.decoder.embed_positions",
      "project_in": "model.decoder.project_in",
      "project_out": "model.decoder.project_out",
      "final_norm": "model.decoder.final_layer_norm",
      "lm_head": "lm_head",
      **per_block("blocks.{}", "model.decoder.layers.{}", _OPT_BLOCK),
    },
    prefix="model.",
  ),
  "gpt2": _family(
    "GPT2LMHeadModel",
    "GPT2Model",
    _read_gpt2,
    _write_gpt2,
    {
      "embed_tokens": "transformer.wte",
      "embed_positions": "transformer.wpe",
      "final_norm": "transformer.ln_f",
      "lm_head": "lm_head",
      **per_block("blocks.{}", "transformer.h.{}", _GPT2_BLOCK),
    },
    prefix="transformer.",
    fused_qkv="concat",
    transposed=False,
    buffers=(".attn.bias", ".attn.masked_bias"),
  ),
  "gpt_neox": _family(
    "GPTNeoXForCausalLM",
    "GPTNeoXModel",
    _read_gpt_neox,
    _write_gpt_neox,
    {
      "embed_tokens": "gpt_neox.embed_in",
      "final_norm": "gpt_neox.final_layer_norm",
      "lm_head": "embed_out",
      **per_block("blocks.{}", "gpt_neox.layers.{}", _GPT_NEOX_BLOCK),
    },
    prefix="gpt_neox.",
    fused_qkv="interleaved",
    buffers=("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias"),
  ),
  "bloom": _family(
    "BloomForCausalLM",
    "BloomModel",
    _read_bloom,
    _write_bloom,
    {
      "embed_tokens": "transformer.word_embeddings",
      "embed_norm": "transformer.word_embeddings_layernorm",
      "final_norm": "transformer.ln_f",
      "lm_head": "lm_head",
      **per_block("blocks.{}", "transformer.h.{}", _BLOOM_BLOCK),
    },
    prefix="transformer.",
    fused_qkv="interleaved",
  ),
}
