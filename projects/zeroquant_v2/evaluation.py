"""What is measured, and on what: corpora, degradation classes, calibration draws, dense copies."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from common.data.pipelines import calibration_samples, evaluation_windows
from common.errors import UserError
from common.evaluation.perplexity import WindowLosses, window_losses
from common.models.base import BaseModel
from common.models.decoder import Decoder
from common.models.surgery import linear_paths
from common.quantization.activations import ActivationFormat, quantize_inputs
from common.quantization.linear import set_kernels
from common.quantization.low_rank import LowRank
from common.quantization.quantized_array import QuantizedArray

Array = jax.Array


class Evaluation(NamedTuple):
  """The evaluation text.

  Attributes:
    windows: {corpus: int32 [windows, seq]}.
    batch_size: windows per forward pass.
  """

  windows: dict[str, np.ndarray]
  batch_size: int

  def losses(self, model: Decoder) -> WindowLosses:
    """Of all corpora's windows, one corpus after the other."""
    return window_losses(
      model, np.concatenate(list(self.windows.values())), batch_size=self.batch_size
    )

  def mean_perplexity(self, losses: WindowLosses) -> float:
    """The paper's metric: the mean of the corpora's perplexities."""
    ends = np.cumsum([len(windows) for windows in self.windows.values()])[:-1]
    parts = [WindowLosses(nll, losses.tokens) for nll in np.split(losses.nll, ends)]
    return float(np.mean([part.perplexity for part in parts]))


def load_evaluation(config: ConfigDict, base: BaseModel) -> Evaluation:
  """Windows of every corpus' test split."""
  windows = evaluation_windows(
    config.corpora, base.tokenizer, seq_len=config.eval_length, per_source=config.eval_windows
  )
  return Evaluation(windows, config.eval_batch_size)


def calibration(config: ConfigDict, base: BaseModel, seed: int) -> Array:
  """A draw of calibration text, int32 [samples, seq]."""
  return jnp.asarray(
    calibration_samples(
      config.calibration,
      base.tokenizer,
      num_samples=config.calibration_samples,
      seq_len=config.calibration_length,
      seed=seed,
    )
  )


def degradation_class(degradation: float) -> str:
  """The paper's class of a rise of the mean perplexity (section 3)."""
  if degradation <= 0.1:
    return "Class-1"
  return "Class-2" if degradation <= 0.5 else "Class-3"


def parse_setting(setting: str) -> tuple[int, int]:
  """ "W4A8" -> (4, 8), bits of weights and activations; 16 stands for full precision.

  Raises:
    UserError: it is written otherwise.
  """
  found = re.fullmatch(r"W(\d+)A(\d+)", setting)
  if not found:
    raise UserError(f"setting {setting!r} is not of the form W4A8 (A16: activations not rounded)")
  return int(found[1]), int(found[2])


def activation_format(bits: int, symmetric: bool = False) -> ActivationFormat | None:
  """Per token; None for 16 bits."""
  return None if bits == 16 else ActivationFormat(bits, symmetric=symmetric)


# {path: packed weight} of every block, and {path: LoRC's factors}.
Weights = Sequence[Mapping[str, QuantizedArray]]
Factors = Sequence[Mapping[str, LowRank]]


def dense_model(
  model: Decoder,
  weights: Weights | None = None,
  factors: Factors | None = None,
  activations: ActivationFormat | None = None,
) -> Decoder:
  """A copy of the model with the kernels W_q + A B in plain layers: one program serves all formats.

  Args:
    model: in full precision.
    weights: of every block; None leaves them alone.
    factors: of every block; None for no LoRC.
    activations: format of the linears' inputs.
  """
  dense = nnx.clone(model)
  for i, block in enumerate(dense.blocks):
    paths = linear_paths(block)
    if weights is not None:
      set_kernels(block, dense_kernels(weights[i], {} if factors is None else factors[i]))
    if activations is not None:
      quantize_inputs(block, paths, activations)
  return dense


@jax.jit
def dense_kernels(weights: Mapping[str, QuantizedArray], factors: Mapping[str, LowRank]):
  """W_q + A B of a block's linears, {path: float32 [in, out]}; `factors` may be empty."""
  kernels = {path: weight.dequantize() for path, weight in weights.items()}
  return {p: w + factors[p].product() if p in factors else w for p, w in kernels.items()}
