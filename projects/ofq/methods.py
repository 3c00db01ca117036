"""The methods that are compared, and how each is trained."""

from ml_collections import ConfigDict

from projects.ofq.training import TrainingSettings

LSQ, DAMPENING, FREEZING, QVIT = "LSQ", "LSQ + dampening", "LSQ + freezing", "Q-ViT"
STATSQ, QKR, CGA = "StatsQ", "StatsQ + QKR", "StatsQ + QKR + CGA"
METHODS = {
  LSQ: {"weight_quantizer": "lsq", "qkr": False},
  DAMPENING: {"weight_quantizer": "lsq", "qkr": False},
  FREEZING: {"weight_quantizer": "lsq", "qkr": False},
  QVIT: {"weight_quantizer": "lsq", "qkr": False, "rectify_queries_and_keys": True},
  STATSQ: {"qkr": False},
  QKR: {},
  CGA: {},
}
# The paper's ablation, and what it is beside.
MAIN = (LSQ, STATSQ, QKR, CGA)
BASELINES = (DAMPENING, FREEZING, QVIT)


def training_settings(config: ConfigDict, method: str, steps_per_epoch: int) -> TrainingSettings:
  """The config's, for one method."""
  return TrainingSettings(
    learning_rate=config.learning_rate,
    num_steps=config.epochs * steps_per_epoch,
    warmup_steps=round(config.warmup_epochs * steps_per_epoch),
    final_fraction=config.final_learning_rate / config.learning_rate,
    weight_decay=config.weight_decay,
    boundary_range=config.boundary_range,
    label_smoothing=config.label_smoothing,
    mixup=config.mixup,
    cutmix=config.cutmix,
    freezing_thresholds=tuple(config.freezing_thresholds),
    guidance=config.guidance if method == QVIT else 0.0,
  )
