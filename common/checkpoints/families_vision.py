"""The families of ViT, DeiT, Swin and ResNet."""

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
from common.models.resnet import ResNet, ResNetConfig
from common.models.swin import Swin, SwinConfig
from common.models.vit import VisionTransformer, VisionTransformerConfig

# What the part of a class's name after "ViT" or "DeiT" says about the head.
_HEADS = {
  "Model": "none",
  "ForImageClassification": "classification",
  "ForImageClassificationWithTeacher": "distilled",
}


def _pair(size: int | list[int]) -> tuple[int, int]:
  return (size, size) if isinstance(size, int) else (size[0], size[1])


def _unpair(size: tuple[int, int]) -> int | list[int]:
  return size[0] if size[0] == size[1] else list(size)


def _read_vit(hf: dict[str, Any], name: str) -> VisionTransformerConfig:
  architecture = (hf.get("architectures") or [f"{name}Model"])[0]
  head = _HEADS[architecture.removeprefix(name)]
  return VisionTransformerConfig(
    image_size=_pair(hf["image_size"]),
    patch_size=_pair(hf["patch_size"]),
    hidden_size=hf["hidden_size"],
    intermediate_size=hf["intermediate_size"],
    num_layers=hf["num_hidden_layers"],
    num_heads=hf["num_attention_heads"],
    num_channels=hf.get("num_channels", 3),
    norm_eps=hf.get("layer_norm_eps", 1e-12),
    activation=read_activation(hf.get("hidden_act", "gelu")),
    qkv_bias=hf.get("qkv_bias", True),
    distillation_token=name == "DeiT",
    pooler_size=hf.get("pooler_output_size") or hf["hidden_size"],
    pooler_activation=read_activation(hf.get("pooler_act", "tanh")),
    head=head,
    labels=() if head == "none" else read_labels(hf),
    family=name.lower(),
  )


def _write_vit(config: VisionTransformerConfig, name: str) -> dict[str, Any]:
  ending = next(ending for ending, head in _HEADS.items() if head == config.head)
  return {
    "architectures": [f"{name}{ending}"],
    "image_size": _unpair(config.image_size),
    "patch_size": _unpair(config.patch_size),
    "hidden_size": config.hidden_size,
    "intermediate_size": config.intermediate_size,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "num_channels": config.num_channels,
    "layer_norm_eps": config.norm_eps,
    "hidden_act": write_activation(config.activation),
    "qkv_bias": config.qkv_bias,
    "pooler_output_size": config.pooler_size or config.hidden_size,
    "pooler_act": write_activation(config.pooler_activation),
  } | write_labels(config.labels)


def _vit_family(name: str, heads: list[str]) -> Family:
  prefix = f"{name.lower()}."
  block = {
    "attention_norm": "layernorm_before",
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp_norm": "layernorm_after",
    "mlp.up_proj": "intermediate.dense",
    "mlp.down_proj": "output.dense",
  }

  def inspect(config: VisionTransformerConfig, names: Collection[str]) -> VisionTransformerConfig:
    pools = config.head == "none" and f"{prefix}pooler.dense.weight" in names
    return config if pools else dataclasses.replace(config, pooler_size=None)

  return Family(
    tuple(f"{name}{ending}" for ending in heads),
    f"{name}Model",
    VisionTransformer,
    lambda hf: _read_vit(hf, name),
    lambda config: _write_vit(config, name),
    prefix,
    names={
      "class_token": f"{prefix}embeddings.cls_token",
      "distillation_token": f"{prefix}embeddings.distillation_token",
      "embed_positions": f"{prefix}embeddings.position_embeddings",
      "embed_patches": f"{prefix}embeddings.patch_embeddings.projection",
      "final_norm": f"{prefix}layernorm",
      "pooler": f"{prefix}pooler.dense",
      "classifier": "classifier",
      "class_classifier": "cls_classifier",
      "distillation_classifier": "distillation_classifier",
      **per_block("blocks.{}", f"{prefix}encoder.layer.{{}}", block),
    },
    inspect=inspect,
    buffers=("pooler.dense.weight", "pooler.dense.bias", "embeddings.mask_token"),
  )


def _read_swin(hf: dict[str, Any]) -> SwinConfig:
  reject(hf, use_absolute_embeddings=False)
  architecture = (hf.get("architectures") or ["SwinModel"])[0]
  head = _HEADS[architecture.removeprefix("Swin")]
  return SwinConfig(
    image_size=_pair(hf["image_size"]),
    patch_size=_pair(hf["patch_size"]),
    embedding_size=hf["embed_dim"],
    depths=tuple(hf["depths"]),
    num_heads=tuple(hf["num_heads"]),
    window_size=hf["window_size"],
    mlp_ratio=float(hf.get("mlp_ratio", 4.0)),
    num_channels=hf.get("num_channels", 3),
    norm_eps=hf.get("layer_norm_eps", 1e-5),
    activation=read_activation(hf.get("hidden_act", "gelu")),
    qkv_bias=hf.get("qkv_bias", True),
    head=head,
    labels=() if head == "none" else read_labels(hf),
    family="swin",
  )


def _write_swin(config: SwinConfig) -> dict[str, Any]:
  ending = next(ending for ending, head in _HEADS.items() if head == config.head)
  return {
    "architectures": [f"Swin{ending}"],
    "image_size": _unpair(config.image_size),
    "patch_size": _unpair(config.patch_size),
    "embed_dim": config.embedding_size,
    "depths": list(config.depths),
    "num_heads": list(config.num_heads),
    "window_size": config.window_size,
    "mlp_ratio": config.mlp_ratio,
    "num_channels": config.num_channels,
    "layer_norm_eps": config.norm_eps,
    "hidden_act": write_activation(config.activation),
    "qkv_bias": config.qkv_bias,
    "use_absolute_embeddings": False,
  } | write_labels(config.labels)


_SWIN_BLOCK = {
  "attention_norm": "layernorm_before",
  "attention.q_proj": "attention.self.query",
  "attention.k_proj": "attention.self.key",
  "attention.v_proj": "attention.self.value",
  "attention.o_proj": "attention.output.dense",
  "relative_position_bias": "attention.self.relative_position_bias_table",
  "mlp_norm": "layernorm_after",
  "mlp.up_proj": "intermediate.dense",
  "mlp.down_proj": "output.dense",
}


def _read_resnet(hf: dict[str, Any]) -> ResNetConfig:
  architecture = (hf.get("architectures") or ["ResNetModel"])[0]
  return ResNetConfig(
    embedding_size=hf["embedding_size"],
    hidden_sizes=tuple(hf["hidden_sizes"]),
    depths=tuple(hf["depths"]),
    block=hf.get("layer_type", "bottleneck"),
    num_channels=hf.get("num_channels", 3),
    activation=read_activation(hf.get("hidden_act", "relu")),
    downsample_in_first_stage=hf.get("downsample_in_first_stage", False),
    downsample_in_bottleneck=hf.get("downsample_in_bottleneck", False),
    labels=() if architecture == "ResNetModel" else read_labels(hf),
    family="resnet",
  )


def _write_resnet(config: ResNetConfig) -> dict[str, Any]:
  return {
    "architectures": ["ResNetForImageClassification" if config.labels else "ResNetModel"],
    "embedding_size": config.embedding_size,
    "hidden_sizes": list(config.hidden_sizes),
    "depths": list(config.depths),
    "layer_type": config.block,
    "num_channels": config.num_channels,
    "hidden_act": write_activation(config.activation),
    "downsample_in_first_stage": config.downsample_in_first_stage,
    "downsample_in_bottleneck": config.downsample_in_bottleneck,
  } | write_labels(config.labels)


_RESNET_BLOCK = {
  "shortcut.conv": "shortcut.convolution",
  "shortcut.norm": "shortcut.normalization",
  "layers.{}.conv": "layer.{}.convolution",
  "layers.{}.norm": "layer.{}.normalization",
}

VISION: dict[str, Family] = {
  "vit": _vit_family("ViT", ["Model", "ForImageClassification"]),
  "deit": _vit_family("DeiT", list(_HEADS)),
  "swin": Family(
    ("SwinModel", "SwinForImageClassification"),
    "SwinModel",
    Swin,
    _read_swin,
    _write_swin,
    prefix="swin.",
    names={
      "embed_patches": "swin.embeddings.patch_embeddings.projection",
      "embed_norm": "swin.embeddings.norm",
      "final_norm": "swin.layernorm",
      "classifier": "classifier",
      **per_block("stages.{}.blocks.{}", "swin.encoder.layers.{}.blocks.{}", _SWIN_BLOCK),
      "stages.{}.merging.norm": "swin.encoder.layers.{}.downsample.norm",
      "stages.{}.merging.reduction": "swin.encoder.layers.{}.downsample.reduction",
    },
    buffers=("attention.self.relative_position_index", "embeddings.mask_token"),
  ),
  "resnet": Family(
    ("ResNetModel", "ResNetForImageClassification"),
    "ResNetModel",
    ResNet,
    _read_resnet,
    _write_resnet,
    prefix="resnet.",
    names={
      "stem.conv": "resnet.embedder.embedder.convolution",
      "stem.norm": "resnet.embedder.embedder.normalization",
      "classifier": "classifier.1",
      **per_block("stages.{}.{}", "resnet.encoder.stages.{}.layers.{}", _RESNET_BLOCK),
    },
    buffers=(".num_batches_tracked",),
  ),
}
