"""The family of MobileNetV2: every width follows from one multiplier.

The momentum of its batch norms and the dropout before its classifier are of training only and are not
read.
"""

import fractions
from typing import Any

from common.checkpoints.family import Family, per_block, read_labels, reject, write_labels
from common.errors import UserError
from common.models.mobilenet import MobileNet, MobileNetConfig

_AT_WIDTH_1 = MobileNetConfig()
_DIVISOR = 8  # Of every width, which is also the least.


def _width(channels: int, multiplier: float) -> int:
  """The nearest multiple of 8 to channels * multiplier, not 10 % below it."""
  exact = round(channels * multiplier)
  width = max(_DIVISOR, (exact + _DIVISOR // 2) // _DIVISOR * _DIVISOR)
  return width + _DIVISOR if width < 0.9 * exact else width


# What `_write` tries, the roundest numbers first: several multipliers give the same widths.
_MULTIPLIERS = sorted(
  (
    m for m in (fractions.Fraction(i, 100) for i in range(1, 401)) if _width(32, m) != _width(16, m)
  ),
  key=lambda m: (m.denominator, m),
)


def _read(hf: dict[str, Any]) -> MobileNetConfig:
  reject(
    hf,
    hidden_act="relu6",
    depth_divisible_by=_DIVISOR,
    min_depth=_DIVISOR,
    output_stride=32,
    first_layer_is_expansion=True,
  )
  expansion, multiplier = hf.get("expand_ratio", 6), hf.get("depth_multiplier", 1.0)
  if expansion != int(expansion) or expansion < 2:
    raise UserError(
      f"config.json has expand_ratio={expansion!r}, which is not supported; expected an integer from 2"
    )
  first, *others = (
    stage._replace(channels=_width(stage.channels, multiplier)) for stage in _AT_WIDTH_1.stages
  )
  stem = _width(_AT_WIDTH_1.stem_channels, multiplier)
  if stem == first.channels:
    # Our first block would add its input, which theirs never does.
    raise UserError(
      f"config.json has depth_multiplier={multiplier!r}, which is not supported: it gives the stem and "
      "the first block the same width"
    )
  narrow_head = multiplier > 1 or not hf.get("finegrained_output", True)
  head = _AT_WIDTH_1.head_channels
  headless = (hf.get("architectures") or ["MobileNetV2Model"])[0] == "MobileNetV2Model"
  return MobileNetConfig(
    stem_channels=stem,
    stages=(first, *(stage._replace(expansion=int(expansion)) for stage in others)),
    head_channels=_width(head, multiplier) if narrow_head else head,
    num_channels=hf.get("num_channels", 3),
    norm_eps=hf.get("layer_norm_eps", 0.001),
    tf_padding=hf.get("tf_padding", True),
    labels=() if headless else read_labels(hf),
  )


def _write(config: MobileNetConfig) -> dict[str, Any]:
  """The multiplier is one that gives the config's widths; 1 where there is none (see `save_model`)."""
  name = "MobileNetV2ForImageClassification" if config.labels else "MobileNetV2Model"
  hf = {
    "architectures": [name],
    "num_channels": config.num_channels,
    "depth_multiplier": 1.0,
    "depth_divisible_by": _DIVISOR,
    "min_depth": _DIVISOR,
    "expand_ratio": float(config.stages[-1].expansion),
    "output_stride": 32,
    "first_layer_is_expansion": True,
    "finegrained_output": True,
    "hidden_act": "relu6",
    "tf_padding": config.tf_padding,
    "layer_norm_eps": config.norm_eps,
  } | write_labels(config.labels)
  for multiplier in _MULTIPLIERS:
    for finegrained in (True, False):
      tried = hf | {"depth_multiplier": float(multiplier), "finegrained_output": finegrained}
      if hf["expand_ratio"] >= 2 and _read(tried) == config:
        return tried
  return hf


_LAYERS = {"expand": "expand_1x1", "depthwise": "conv_3x3", "project": "reduce_1x1"}
_PARTS = {"conv": "convolution", "norm": "normalization"}
_BLOCK = {f"{o}.{p}": f"{t}.{q}" for o, t in _LAYERS.items() for p, q in _PARTS.items()}

MOBILENET: dict[str, Family] = {
  "mobilenet_v2": Family(
    ("MobileNetV2ForImageClassification", "MobileNetV2Model"),
    "MobileNetV2Model",
    MobileNet,
    _read,
    _write,
    prefix="mobilenet_v2.",
    names={
      **per_block("stem", "mobilenet_v2.conv_stem.first_conv", _PARTS),
      **per_block("first", "mobilenet_v2.conv_stem", _BLOCK),
      **per_block("blocks.{}", "mobilenet_v2.layer.{}", _BLOCK),
      **per_block("last", "mobilenet_v2.conv_1x1", _PARTS),
      "classifier": "classifier",
    },
    buffers=(".num_batches_tracked",),
  ),
}
