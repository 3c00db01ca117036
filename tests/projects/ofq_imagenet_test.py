"""OFQ's run on a checkpoint and a folder of images, to the integer model in a file."""

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from common.checkpoints.huggingface import save_model
from common.errors import UserError
from common.models.swin import Swin, SwinConfig
from projects.ofq import config, experiment, training
from projects.ofq.integer_model import load_integer

SWIN = SwinConfig(
  image_size=(8, 8),
  patch_size=(2, 2),
  embedding_size=4,
  depths=(1,),
  num_heads=(2,),
  window_size=2,
  head="classification",
  labels=("a", "b", "c"),
)


@pytest.mark.parametrize(
  "field, value",
  [("rand_augment", 11), ("repeated_augmentation", 0), ("mixup", -0.1), ("cutmix", -1.0)],
)
def test_a_wrong_recipe_is_refused(field, value, tmp_path):
  paper = config.get_config("paper")
  paper[field] = value
  with pytest.raises(UserError, match=f"{field}={value}; expected"):
    experiment.run(paper, tmp_path)


def test_the_whole_run_on_a_folder_of_images(tmp_path, monkeypatch):
  mixed, mix_batch = [], training.mix_batch
  monkeypatch.setattr(
    training, "mix_batch", lambda *batch, **how: mixed.append(how) or mix_batch(*batch, **how)
  )
  rng = np.random.default_rng(0)
  for split, count in (("train", 2), ("val", 1)):
    for label in "abc":
      (tmp_path / split / label).mkdir(parents=True)
      for i in range(count):
        pixels = rng.integers(0, 256, (20, 24, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / split / label / f"{i}.png")
  # One block, for a step that compiles soon.
  model = nnx.jit(lambda: Swin(SWIN, rngs=nnx.Rngs(0)))()
  save_model(model, tmp_path / "swin")
  paper = config.get_config("paper")
  paper.model, paper.data = str(tmp_path / "swin"), f"folder:{tmp_path}"
  paper.batch_size, paper.microbatches = 4, 1
  paper.epochs, paper.annealing_epochs, paper.warmup_epochs = 2, 1, 0.0
  paper.mixup, paper.repeated_augmentation = 0.8, 2
  assert paper.rand_augment and paper.random_erasing
  [table] = experiment.run(paper, tmp_path / "out").tables
  _, (method, seed, trained, integer, oscillating) = table.rows
  assert (method, seed) == (experiment.CGA, 0) and 0 <= oscillating <= 100
  assert mixed[0] == {"mixup_alpha": 0.8, "cutmix_alpha": 0.0}
  # Three images; the products' sums are in another order.
  np.testing.assert_allclose(integer, trained, atol=1e-4)
  assert load_integer(tmp_path / "out" / "statsq-qkr-cga-0.safetensors").config == SWIN
