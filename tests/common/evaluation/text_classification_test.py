"""Classification of texts: files, padding, classes, scores; in the papers that report them."""

import json
from unittest import mock

import numpy as np
import pytest
import tokenizers

from common.checkpoints.huggingface import Checkpoint
from common.errors import UserError
from common.evaluation.text_classification import encode_texts, predict, read_task, scores
from common.quantization import calibration
from projects.flexround import config as flexround_config
from projects.flexround import experiment as flexround_experiment
from projects.llm_fp4 import config as llm_fp4_config
from projects.llm_fp4 import experiment as llm_fp4_experiment
from projects.outlier_suppression_plus import config as osp_config
from projects.outlier_suppression_plus import experiment as osp_experiment
from tests.common.models.small_classifier import CHECKPOINT, write_classifier


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
  """The directory of a classifier, and a file of labelled sentences."""
  return write_classifier(tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="module")
def model(classifier):
  return Checkpoint(classifier[0]).load_model()


@pytest.fixture(scope="module")
def tokenizer(classifier):
  return tokenizers.Tokenizer.from_file(str(classifier[0] / "tokenizer.json"))


def test_texts_are_padded_and_cut(tokenizer):
  texts = encode_texts(tokenizer, [("w3 w4",), ("w5 w6 w7 w8",), ("w9", "w2")], 3)
  np.testing.assert_array_equal(texts.tokens, [[3, 4, 0], [5, 6, 7], [9, 2, 0]])
  np.testing.assert_array_equal(texts.segment_ids, [[1, 1, 0], [1, 1, 1], [1, 1, 0]])
  # A plain tokenizer puts both texts of a pair together; the second has another type.
  np.testing.assert_array_equal(texts.token_types, [[0, 0, 0], [0, 0, 0], [0, 1, 0]])


def test_classes_do_not_depend_on_the_batch(classifier, model, tokenizer):
  path = str(classifier[1])
  fields = "sentence", "label"
  task = read_task(path, path, fields, model, tokenizer, length=8, num_calibration=5)
  assert task.calibration.tokens.shape[0] == 5 and task.test.tokens.shape[0] == 12
  items = [json.loads(line) for line in classifier[1].read_text().splitlines()]
  expected = [model.config.labels.index(item["label"]) for item in items]
  np.testing.assert_array_equal(task.labels, expected)
  found = predict(model, task.test)
  np.testing.assert_array_equal(found, predict(model, task.test, batch_size=5))
  whole = model(
    task.test.tokens, segment_ids=task.test.segment_ids, token_types=task.test.token_types
  )
  np.testing.assert_array_equal(found, np.argmax(whole.logits, axis=-1))


def test_scores():
  labels, predicted = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])
  # F1 of class 0 is 2/3, of class 1 4/5; Matthews: (2 - 0) / sqrt(3 * 2 * 2 * 1).
  np.testing.assert_allclose(scores(labels, predicted), [3 / 4, 11 / 15, 2 / 12**0.5])


def test_bad_files(classifier, model, tokenizer, tmp_path):
  read = lambda train, test, model=model: read_task(
    train, test, ("sentence", "label"), model, tokenizer, length=8, num_calibration=2
  )
  good = str(classifier[1])
  for train, test in ((good, ""), ("", good)):
    with pytest.raises(UserError, match="give both"):
      read(train, test)
  bad = tmp_path / "bad.jsonl"
  bad.write_text('{"sentence": "w3", "label": "maybe"}')
  with pytest.raises(UserError, match="'maybe' is none of the model's"):
    read(good, str(bad))
  headless = Checkpoint(CHECKPOINT.with_name("bert_model")).load_model()
  with pytest.raises(UserError, match="needs a fine-tuned model"):
    read(good, good, headless)


@pytest.mark.parametrize(
  "module, experiment, changes",
  (
    (osp_config, osp_experiment, {"encoder_settings": ()}),
    (llm_fp4_config, llm_fp4_experiment, {"encoder_bits": ()}),
    (flexround_config, flexround_experiment, {"encoder_bits": (8,), "encoder_steps": 2}),
  ),
)
def test_the_task_of_a_paper(module, experiment, changes, classifier, model, tokenizer, tmp_path):
  config = module.get_config("encoder")
  config.update(changes)
  config.encoder = str(classifier[0])
  config.labelled_train = config.labelled_test = path = str(classifier[1])
  (table,) = experiment.run(config, tmp_path).tables
  assert [c.name for c in table.columns[2:]] == ["accuracy", "macro F1", "Matthews"]
  task = read_task(
    path, path, ("sentence", "label"), model, tokenizer, length=32, num_calibration=2
  )
  expected = scores(task.labels, predict(model, task.test))
  method, _, *found = table.rows[0]
  assert method == "full precision"
  np.testing.assert_allclose(found, expected)
  assert 0 < found[0] < 1
  # 8 bits change the class of one text in twelve at most.
  assert all(abs(row[2] - found[0]) < 0.1 for row in table.rows)


class Stop(Exception):
  pass


@pytest.mark.parametrize(
  "module, experiment",
  (
    (osp_config, osp_experiment),
    (llm_fp4_config, llm_fp4_experiment),
    (flexround_config, flexround_experiment),
  ),
)
def test_a_paper_is_calibrated_on_pairs_as_they_are(
  module, experiment, classifier, model, tokenizer, tmp_path
):
  """The second text has another type in calibration too."""
  items = [json.loads(line) for line in classifier[1].read_text().splitlines()]
  path = tmp_path / "pairs.jsonl"
  path.write_text("\n".join(json.dumps(item | {"second": "w7 w8 w9"}) for item in items))
  config, seen = module.get_config("encoder"), []
  config.encoder, config.labelled_fields = str(classifier[0]), ("sentence", "second", "label")
  config.labelled_train = config.labelled_test = str(path)

  def quantize_blocks(outer, blocks, tokens, quantize_block, **options):
    seen.append((tokens, options["segment_ids"], options["token_types"]))
    raise Stop

  with mock.patch.object(calibration, "quantize_blocks", quantize_blocks), pytest.raises(Stop):
    experiment.run(config, tmp_path)
  task = read_task(
    str(path), str(path), config.labelled_fields, model, tokenizer, length=32, num_calibration=12
  )
  assert set(np.unique(task.calibration.token_types)) == {0, 1}
  for found, expected in zip(*seen, task.calibration, strict=True):
    np.testing.assert_array_equal(found, expected)
