"""LLM-FP4's table of a sentence encoder, with a small encoder in the place of every quantized one."""

from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from flax import nnx

from common.errors import UserError
from common.paths import data_dir
from common.reporting.measurements import Measurements
from projects.llm_fp4 import config as llm_fp4_config
from projects.llm_fp4 import encoder_experiment
from tests.common.models.small_classifier import write_classifier


def test_retrieval_and_domains_of_a_sentence_encoder(tmp_path):
  try:
    data_dir("vaswani_npl")
  except UserError as e:
    pytest.skip(str(e))
  config = llm_fp4_config.get_config("encoder")
  config.encoder = str(write_classifier(tmp_path)[0])
  config.update({"queries": 4, "documents": 20, "encoder_samples": 4, "encoder_length": 8})
  config.encoder_bits = (8,)
  report = SimpleNamespace(tables=[], claims=[])
  same = lambda config, model, method, bits, tokens, **ids: nnx.clone(model)
  with mock.patch.object(encoder_experiment, "quantize", same):
    encoder_experiment.compare_on_encoder(config, Measurements(tmp_path, config), report)
  (table,) = report.tables
  full, *others = (row[2:] for row in table.rows)
  assert len(others) == 4 and all(row == pytest.approx(full) for row in others)
  cosine, ndcg, accuracy, f1, matthews = full
  assert cosine == pytest.approx(1) and 0 <= ndcg <= 1 and 0 < accuracy <= 1
  assert 0 < f1 <= 1 and -1 <= matthews <= 1
  # Equal encoders: none is nearer, and nothing is lost.
  assert [claim.holds for claim in report.claims] == [False, False, False, True]


@pytest.mark.parametrize("labelled", [True, False])
def test_what_has_labels_is_searched_by_its_loss(tmp_path, labelled):
  """A task's calibration texts have them; a sentence encoder has no loss, and products all the same."""
  folder, task = write_classifier(tmp_path)
  config = llm_fp4_config.get_config("encoder")
  config.encoder, config.encoder_bits, config.encoder_samples = str(folder), (4,), 5
  if labelled:
    config.labelled_train = config.labelled_test = str(task)
  tokens, seen = np.ones((5, 8), np.int32), []

  def fpq(model, tokens, settings, **options):
    seen.append((settings, options))
    return model

  integer = lambda model, tokens, bits, **options: seen.append((None, options)) or model
  with (
    mock.patch.object(encoder_experiment, "fpq", fpq),
    mock.patch.object(encoder_experiment, "integer_model", integer),
  ):
    if labelled:
      report = SimpleNamespace(tables=[], claims=[])
      encoder_experiment.compare_on_encoder(config, Measurements(tmp_path, config), report)
    else:
      for method in encoder_experiment.METHODS:
        encoder_experiment.quantize(config, None, method, 4, tokens, segment_ids=tokens)
  (_, options), *searched = seen
  assert options["attention_products"] and "labels" not in options
  assert [settings.metric for settings, _ in searched] == [
    "l2",
    *["hessian" if labelled else "l2"] * 2,
  ]
  assert all(settings.attention_products for settings, _ in searched)
  for _, options in searched:
    # The labels of the file go through the model's names in turn.
    expected = np.arange(5) % 3 if labelled else None
    np.testing.assert_array_equal(options["labels"], expected)
