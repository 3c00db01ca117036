"""How each Hugging Face decoder family spells its config and its tensors.

`FAMILIES` maps a `model_type` to a `Family`: two functions between config.json and
`DecoderConfig`, and the names of the tensors. Adding a family is adding an entry.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from common.errors import UserError
from common.models.decoder import DecoderConfig, RopeScaling

ACTIVATIONS = {
  "silu": "silu",
  "gelu": "gelu",
  "gelu_new": "gelu_tanh",
  "gelu_pytorch_tanh": "gelu_tanh",
  "gelu_fast": "gelu_tanh",
  "relu": "relu",
}


@dataclasses.dataclass(frozen=True)
class Family:
  """One architecture on the Hugging Face side.

  Attributes:
    architecture: class name written to config.json.
    read: config.json's dict -> DecoderConfig.
    write: DecoderConfig -> the family's own keys of config.json.
    prefix: what precedes every name but the head's; headless checkpoints leave it out.
    names: our module path -> theirs. "{i}" is the block's index.
    fused_qkv: how q, k and v share one tensor: "concat" (q rows, then k, then v), "interleaved"
      (q, k, v of head 0, then of head 1, ...), or None.
    transposed: kernels are stored [out, in] (False: GPT-2's Conv1D stores [in, out]).
    buffers: name endings that carry no weights (masks, rotary tables).
  """

  architecture: str
  read: Callable[[dict[str, Any]], DecoderConfig]
  write: Callable[[DecoderConfig], dict[str, Any]]
  prefix: str
  names: dict[str, str]
  fused_qkv: str | None = None
  transposed: bool = True
  buffers: tuple[str, ...] = ("rotary_emb.inv_freq",)


def _activation(name: str) -> str:
  if name not in ACTIVATIONS:
    raise UserError(f"activation {name!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
  return ACTIVATIONS[name]


def _hf_activation(name: str) -> str:
  return {"gelu_tanh": "gelu_new"}.get(name, name)


def _reject(hf: dict[str, Any], **supported) -> None:
  """Refuses options whose value changes the computation in a way that the decoder lacks."""
  for key, value in supported.items():
    if hf.get(key, value) != value:
      raise UserError(
        f"config.json has {key}={hf[key]!r}, which is not supported; expected {value!r}"
      )


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
  heads = hf["num_attention_heads"]
  family = hf["model_type"]
  window = hf.get("sliding_window")
  if family == "llama":
    window = None
  if family == "qwen2":
    if not hf.get("use_sliding_window", False):
      window = None
    elif hf.get("max_window_layers", 0) != 0:
      raise UserError("a sliding window on some layers only (max_window_layers) is not supported")
  return DecoderConfig(
    vocab_size=hf["vocab_size"],
    hidden_size=hf["hidden_size"],
    intermediate_size=hf["intermediate_size"],
    num_layers=hf["num_hidden_layers"],
    num_heads=heads,
    num_kv_heads=hf.get("num_key_value_heads") or heads,
    head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
    max_position_embeddings=hf["max_position_embeddings"],
    norm_eps=hf.get("rms_norm_eps", 1e-6),
    activation=_activation(hf.get("hidden_act", "silu")),
    qkv_bias=family == "qwen2" or hf.get("attention_bias", False),
    attention_out_bias=family != "qwen2" and hf.get("attention_bias", False),
    mlp_bias=hf.get("mlp_bias", False),
    sliding_window=window,
    tie_word_embeddings=hf.get("tie_word_embeddings", False),
    family=family,
    **_rope(hf),
  )


def _write_llama(config: DecoderConfig) -> dict[str, Any]:
  out = {
    "hidden_size": config.hidden_size,
    "intermediate_size": config.intermediate_size,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "num_key_value_heads": config.num_kv_heads,
    "head_dim": config.head_dim,
    "max_position_embeddings": config.max_position_embeddings,
    "rms_norm_eps": config.norm_eps,
    "hidden_act": _hf_activation(config.activation),
  } | _write_rope(config)
  if config.family == "llama":
    out |= {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
  else:
    out["sliding_window"] = config.sliding_window
  if config.family == "qwen2":
    out |= {"use_sliding_window": config.sliding_window is not None, "max_window_layers": 0}
  return out


def _read_opt(hf: dict[str, Any]) -> DecoderConfig:
  _reject(hf, enable_bias=True, layer_norm_elementwise_affine=True, _remove_final_layer_norm=False)
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
    activation=_activation(hf.get("activation_function", "relu")),
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
  return {
    "hidden_size": config.hidden_size,
    "ffn_dim": config.intermediate_size,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "max_position_embeddings": config.max_position_embeddings,
    "do_layer_norm_before": config.norm_placement == "pre",
    "word_embed_proj_dim": config.embedding_dim or config.hidden_size,
    "activation_function": _hf_activation(config.activation),
  }


def _read_gpt2(hf: dict[str, Any]) -> DecoderConfig:
  _reject(
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
    activation=_activation(hf.get("activation_function", "gelu_new")),
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
    "n_embd": config.hidden_size,
    "n_inner": config.intermediate_size,
    "n_layer": config.num_layers,
    "n_head": config.num_heads,
    "n_positions": config.max_position_embeddings,
    "layer_norm_epsilon": config.norm_eps,
    "activation_function": _hf_activation(config.activation),
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
    activation=_activation(hf.get("hidden_act", "gelu")),
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
  return rope | {
    "hidden_size": config.hidden_size,
    "intermediate_size": config.intermediate_size,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "max_position_embeddings": config.max_position_embeddings,
    "layer_norm_eps": config.norm_eps,
    "use_parallel_residual": config.parallel_residual,
    "hidden_act": _hf_activation(config.activation),
    "attention_bias": config.qkv_bias,
    "rotary_pct": fraction,
    "rotary_emb_base": config.rope_theta,
  }


def _read_bloom(hf: dict[str, Any]) -> DecoderConfig:
  _reject(hf, apply_residual_connection_post_layernorm=False)
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
  return {
    "hidden_size": config.hidden_size,
    "n_layer": config.num_layers,
    "n_head": config.num_heads,
    "seq_length": config.max_position_embeddings,
    "layer_norm_epsilon": config.norm_eps,
  }


def _llama_family(architecture: str) -> Family:
  return Family(
    architecture=architecture,
    read=_read_llama,
    write=_write_llama,
    prefix="model.",
    names={
      "embed_tokens": "embed_tokens",
      "final_norm": "norm",
      "lm_head": "lm_head",
      "attention_norm": "layers.{i}.input_layernorm",
      "attention.q_proj": "layers.{i}.self_attn.q_proj",
      "attention.k_proj": "layers.{i}.self_attn.k_proj",
      "attention.v_proj": "layers.{i}.self_attn.v_proj",
      "attention.o_proj": "layers.{i}.self_attn.o_proj",
      "mlp_norm": "layers.{i}.post_attention_layernorm",
      "mlp.gate_proj": "layers.{i}.mlp.gate_proj",
      "mlp.up_proj": "layers.{i}.mlp.up_proj",
      "mlp.down_proj": "layers.{i}.mlp.down_proj",
    },
  )


def _fused(name: str) -> dict[str, str]:
  return {f"attention.{part}_proj": name for part in "qkv"}


FAMILIES: dict[str, Family] = {
  "llama": _llama_family("LlamaForCausalLM"),
  "mistral": _llama_family("MistralForCausalLM"),
  "qwen2": _llama_family("Qwen2ForCausalLM"),
  "opt": Family(
    architecture="OPTForCausalLM",
    read=_read_opt,
    write=_write_opt,
    prefix="model.",
    names={
      "embed_tokens": "decoder.embed_tokens",
      "embed_positions": "decoder.embed_positions",
      "project_in": "decoder.project_in",
      "project_out": "decoder.project_out",
      "final_norm": "decoder.final_layer_norm",
      "lm_head": "lm_head",
      "attention_norm": "decoder.layers.{i}.self_attn_layer_norm",
      "attention.q_proj": "decoder.layers.{i}.self_attn.q_proj",
      "attention.k_proj": "decoder.layers.{i}.self_attn.k_proj",
      "attention.v_proj": "decoder.layers.{i}.self_attn.v_proj",
      "attention.o_proj": "decoder.layers.{i}.self_attn.out_proj",
      "mlp_norm": "decoder.layers.{i}.final_layer_norm",
      "mlp.up_proj": "decoder.layers.{i}.fc1",
      "mlp.down_proj": "decoder.layers.{i}.fc2",
    },
  ),
  "gpt2": Family(
    architecture="GPT2LMHeadModel",
    read=_read_gpt2,
    write=_write_gpt2,
    prefix="transformer.",
    names={
      "embed_tokens": "wte",
      "embed_positions": "wpe",
      "final_norm": "ln_f",
      "lm_head": "lm_head",
      "attention_norm": "h.{i}.ln_1",
      **_fused("h.{i}.attn.c_attn"),
      "attention.o_proj": "h.{i}.attn.c_proj",
      "mlp_norm": "h.{i}.ln_2",
      "mlp.up_proj": "h.{i}.mlp.c_fc",
      "mlp.down_proj": "h.{i}.mlp.c_proj",
    },
    fused_qkv="concat",
    transposed=False,
    buffers=(".attn.bias", ".attn.masked_bias"),
  ),
  "gpt_neox": Family(
    architecture="GPTNeoXForCausalLM",
    read=_read_gpt_neox,
    write=_write_gpt_neox,
    prefix="gpt_neox.",
    names={
      "embed_tokens": "embed_in",
      "final_norm": "final_layer_norm",
      "lm_head": "embed_out",
      "attention_norm": "layers.{i}.input_layernorm",
      **_fused("layers.{i}.attention.query_key_value"),
      "attention.o_proj": "layers.{i}.attention.dense",
      "mlp_norm": "layers.{i}.post_attention_layernorm",
      "mlp.up_proj": "layers.{i}.mlp.dense_h_to_4h",
      "mlp.down_proj": "layers.{i}.mlp.dense_4h_to_h",
    },
    fused_qkv="interleaved",
    buffers=("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias"),
  ),
  "bloom": Family(
    architecture="BloomForCausalLM",
    read=_read_bloom,
    write=_write_bloom,
    prefix="transformer.",
    names={
      "embed_tokens": "word_embeddings",
      "embed_norm": "word_embeddings_layernorm",
      "final_norm": "ln_f",
      "lm_head": "lm_head",
      "attention_norm": "h.{i}.input_layernorm",
      **_fused("h.{i}.self_attention.query_key_value"),
      "attention.o_proj": "h.{i}.self_attention.dense",
      "mlp_norm": "h.{i}.post_attention_layernorm",
      "mlp.up_proj": "h.{i}.mlp.dense_h_to_4h",
      "mlp.down_proj": "h.{i}.mlp.dense_4h_to_h",
    },
    fused_qkv="interleaved",
  ),
}
