"""The families of BERT, RoBERTa and T5."""

import dataclasses
from collections.abc import Collection
from typing import Any

from common.checkpoints.family import (
  Family,
  per_block,
  read_activation,
  read_labels,
  reject,
  write_activation,
  write_labels,
)
from common.errors import UserError
from common.models.encoder import Encoder, EncoderConfig
from common.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig

# What the part of a class's name after "Bert" or "Roberta" says about the head.
_HEADS = {
  "Model": "none",
  "ForMaskedLM": "masked_lm",
  "ForSequenceClassification": "sequence",
  "ForTokenClassification": "token",
}


def _read_encoder(hf: dict[str, Any], name: str, **options) -> EncoderConfig:
  reject(hf, is_decoder=False, add_cross_attention=False, position_embedding_type="absolute")
  architecture = (hf.get("architectures") or [f"{name}Model"])[0]
  head = _HEADS[architecture.removeprefix(name)]
  return EncoderConfig(
    vocab_size=hf["vocab_size"],
    hidden_size=hf["hidden_size"],
    intermediate_size=hf["intermediate_size"],
    num_layers=hf["num_hidden_layers"],
    num_heads=hf["num_attention_heads"],
    max_position_embeddings=hf["max_position_embeddings"],
    num_token_types=hf.get("type_vocab_size", 2),
    norm_eps=hf.get("layer_norm_eps", 1e-12),
    activation=read_activation(hf.get("hidden_act", "gelu")),
    head=head,
    labels=read_labels(hf) if head in ("sequence", "token") else (),
    tie_word_embeddings=hf.get("tie_word_embeddings", True),
    **options,
  )


def _read_bert(hf: dict[str, Any]) -> EncoderConfig:
  config = _read_encoder(hf, "Bert", pad_token_id=hf.get("pad_token_id") or 0, family="bert")
  return dataclasses.replace(config, head_activation=config.activation)


def _read_roberta(hf: dict[str, Any]) -> EncoderConfig:
  pad = hf.get("pad_token_id")
  return _read_encoder(
    hf,
    "Roberta",
    pad_token_id=1 if pad is None else pad,
    positions_skip_padding=True,
    family="roberta",
  )


def _write_encoder(config: EncoderConfig, name: str) -> dict[str, Any]:
  ending = next(ending for ending, head in _HEADS.items() if head == config.head)
  return {
    "architectures": [f"{name}{ending}"],
    "vocab_size": config.vocab_size,
    "hidden_size": config.hidden_size,
    "intermediate_size": config.intermediate_size,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "max_position_embeddings": config.max_position_embeddings,
    "type_vocab_size": config.num_token_types,
    "layer_norm_eps": config.norm_eps,
    "hidden_act": write_activation(config.activation),
    "pad_token_id": config.pad_token_id,
    "position_embedding_type": "absolute",
    "tie_word_embeddings": config.tie_word_embeddings,
  } | write_labels(config.labels)


def _encoder_names(prefix: str) -> dict[str, str]:
  block = {
    "attention.q_proj": "attention.self.query",
    "attention.k_proj": "attention.self.key",
    "attention.v_proj": "attention.self.value",
    "attention.o_proj": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp.up_proj": "intermediate.dense",
    "mlp.down_proj": "output.dense",
    "mlp_norm": "output.LayerNorm",
  }
  return {
    "embed_tokens": f"{prefix}embeddings.word_embeddings",
    "embed_positions": f"{prefix}embeddings.position_embeddings",
    "embed_token_types": f"{prefix}embeddings.token_type_embeddings",
    "embed_norm": f"{prefix}embeddings.LayerNorm",
    "pooler": f"{prefix}pooler.dense",
    **per_block("blocks.{}", f"{prefix}encoder.layer.{{}}", block),
  }


def _encoder_inspect(name: str, sequence_has_pooler: bool):
  """BERT's sequence classifier reads the pooler; a bare model may have one or not."""

  def inspect(config: EncoderConfig, names: Collection[str]) -> EncoderConfig:
    pooler = config.head == "sequence" and sequence_has_pooler
    if config.head == "none":
      pooler = name in names
    return dataclasses.replace(config, pooler=pooler)

  return inspect


def _encoder_family(name: str, read, head_names: dict[str, str], lm_head: str, **options) -> Family:
  prefix = f"{name.lower()}."
  names = _encoder_names(prefix)
  tied = {
    f"{lm_head}.decoder.weight": f"{names['embed_tokens']}.weight",
    f"{lm_head}.decoder.bias": f"{lm_head}.bias",
  }
  return Family(
    tuple(f"{name}{ending}" for ending in _HEADS),
    f"{name}Model",
    Encoder,
    read,
    lambda config: _write_encoder(config, name),
    prefix,
    names
    | head_names
    | {"lm_head.bias": f"{lm_head}.bias", "lm_head.decoder": f"{lm_head}.decoder"},
    inspect=_encoder_inspect(f"{names['pooler']}.weight", name == "Bert"),
    tied=tied,
    legacy_endings={"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"},
    **options,
  )


_UNREAD = ("embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias")

ENCODERS: dict[str, Family] = {
  "bert": _encoder_family(
    "Bert",
    _read_bert,
    {
      "lm_head.dense": "cls.predictions.transform.dense",
      "lm_head.norm": "cls.predictions.transform.LayerNorm",
      "sequence_classifier": "classifier",
      "token_classifier": "classifier",
    },
    "cls.predictions",
    buffers=(*_UNREAD, "cls.seq_relationship.weight", "cls.seq_relationship.bias"),
  ),
  "roberta": _encoder_family(
    "Roberta",
    _read_roberta,
    {
      "lm_head.dense": "lm_head.dense",
      "lm_head.norm": "lm_head.layer_norm",
      "sequence_dense": "classifier.dense",
      "sequence_classifier": "classifier.out_proj",
      "token_classifier": "classifier",
    },
    "lm_head",
    buffers=_UNREAD,
  ),
}


def _read_t5(hf: dict[str, Any]) -> EncoderDecoderConfig:
  kind = hf.get("feed_forward_proj", "relu")
  gate, _, activation = kind.rpartition("-")
  if gate not in ("", "gated"):
    raise UserError(f"config.json has feed_forward_proj={kind!r}; expected NAME or gated-NAME")
  # The name "gated-gelu" has always meant the approximation by tanh.
  activation = "gelu_new" if kind == "gated-gelu" else activation
  layers, start = hf["num_layers"], hf.get("decoder_start_token_id")
  decoder_layers = hf.get("num_decoder_layers")
  pad = hf.get("pad_token_id") or 0
  stop = hf.get("eos_token_id", 1)
  # In older checkpoints tie_word_embeddings=false turns the scaling off as well.
  tied = hf.get("tie_word_embeddings", True)
  return EncoderDecoderConfig(
    vocab_size=hf["vocab_size"],
    hidden_size=hf["d_model"],
    intermediate_size=hf["d_ff"],
    num_layers=layers,
    num_decoder_layers=layers if decoder_layers is None else decoder_layers,
    num_heads=hf["num_heads"],
    head_dim=hf["d_kv"],
    num_buckets=hf.get("relative_attention_num_buckets", 32),
    max_distance=hf.get("relative_attention_max_distance", 128),
    norm_eps=hf.get("layer_norm_epsilon", 1e-6),
    activation=read_activation(activation),
    gated_mlp=gate == "gated",
    tie_word_embeddings=tied,
    scale_output=hf.get("scale_decoder_outputs", tied),
    pad_token_id=pad,
    eos_token_id=stop[0] if isinstance(stop, list) else stop,
    decoder_start_token_id=pad if start is None else start,
    family="t5",
  )


def _write_t5(config: EncoderDecoderConfig) -> dict[str, Any]:
  activation = write_activation(config.activation)
  if config.gated_mlp:
    activation = "gated-" + ("gelu" if config.activation == "gelu_tanh" else activation)
  return {
    "vocab_size": config.vocab_size,
    "d_model": config.hidden_size,
    "d_ff": config.intermediate_size,
    "num_layers": config.num_layers,
    "num_decoder_layers": config.num_decoder_layers,
    "num_heads": config.num_heads,
    "d_kv": config.head_dim,
    "relative_attention_num_buckets": config.num_buckets,
    "relative_attention_max_distance": config.max_distance,
    "layer_norm_epsilon": config.norm_eps,
    "feed_forward_proj": activation,
    "is_encoder_decoder": True,
    "tie_word_embeddings": config.tie_word_embeddings,
    "scale_decoder_outputs": config.scale_output,
    "pad_token_id": config.pad_token_id,
    "eos_token_id": config.eos_token_id,
    "decoder_start_token_id": config.decoder_start_token_id,
  }


def _t5_stack(stack: str) -> dict[str, str]:
  feed_forward = "layer.2" if stack == "decoder" else "layer.1"
  attention = {f"{part}_proj": part for part in "qkvo"}
  block = {
    "attention_norm": "layer.0.layer_norm",
    **per_block("attention", "layer.0.SelfAttention", attention),
    "mlp_norm": f"{feed_forward}.layer_norm",
    "mlp.in_proj": f"{feed_forward}.DenseReluDense.wi",
    "mlp.gate_proj": f"{feed_forward}.DenseReluDense.wi_0",
    "mlp.up_proj": f"{feed_forward}.DenseReluDense.wi_1",
    "mlp.down_proj": f"{feed_forward}.DenseReluDense.wo",
  }
  if stack == "decoder":
    block["cross_norm"] = "layer.1.layer_norm"
    block |= per_block("cross_attention", "layer.1.EncDecAttention", attention)
  return {
    f"{stack}.relative_bias": f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias",
    f"{stack}.final_norm": f"{stack}.final_layer_norm",
    **per_block(f"{stack}.blocks.{{}}", f"{stack}.block.{{}}", block),
  }


ENCODER_DECODERS: dict[str, Family] = {
  "t5": Family(
    ("T5ForConditionalGeneration",),
    "T5Model",
    EncoderDecoder,
    _read_t5,
    _write_t5,
    prefix="",
    names={
      "embed_tokens": "shared",
      "lm_head": "lm_head",
      **_t5_stack("encoder"),
      **_t5_stack("decoder"),
    },
    tied={
      "lm_head.weight": "shared.weight",
      "encoder.embed_tokens.weight": "shared.weight",
      "decoder.embed_tokens.weight": "shared.weight",
    },
    buffers=("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),
  ),
}
