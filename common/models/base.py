"""Base models: small language models pretrained once on the embedded text, or a checkpoint.

`base_model("lm-small")` trains on first use and reads the cache afterwards; `base_model(DIR)` loads
a Hugging Face directory. Every paper on language models starts here.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import shutil
import sys
from typing import Any, Literal, NamedTuple

import filelock
import jax
import jax.numpy as jnp
import optax
import tokenizers
from flax import nnx

from common.checkpoints.huggingface import load_decoder
from common.checkpoints.orbax import load_params, save_params
from common.data.corpora import fingerprint
from common.data.pipelines import token_batches, token_windows
from common.data.tokenizer import load_tokenizer
from common.errors import UserError
from common.evaluation.perplexity import WindowLosses, window_losses
from common.models.decoder import Decoder, DecoderConfig
from common.models.sharding import cut_over_mesh
from common.paths import cache_dir
from common.training.loop import train
from common.training.losses import linear_next_token_loss
from common.training.optimizer import make_optimizer
from common.training.train_step import StepFn, init_train_state, make_train_step

CORPUS = "embedded:code,embedded:prose,embedded:science"

# Raise it when the same settings (see `_settings`) come to train another model, because code did
# change: the decoder's arithmetic or initialisation, the loss, the optimizer, the packing or the
# order of the batches. Models that were cached before are then trained anew.
RECIPE_VERSION = 1

# Parts that a batch is computed in: what a quarter of it keeps for the backward pass stays in a
# processor's cache.
MICROBATCHES = 4


class BaseModel(NamedTuple):
  """A pretrained model.

  Attributes:
    model: the decoder, float32.
    tokenizer: its tokenizer.
    metadata: how it was trained and how well (empty for a loaded checkpoint).
  """

  model: Decoder
  tokenizer: tokenizers.Tokenizer
  metadata: dict[str, Any]


# What a family does otherwise than Llama.
_LAYER_NORM = {
  "norm": "layer",
  "norm_eps": 1e-5,
  "gated_mlp": False,
  "qkv_bias": True,
  "attention_out_bias": True,
  "mlp_bias": True,
}
FAMILIES = {
  "llama": {},
  "opt": _LAYER_NORM
  | {"family": "opt", "position": "learned", "position_offset": 2, "activation": "relu"},
  "bloom": _LAYER_NORM
  | {"family": "bloom", "position": "alibi", "activation": "gelu_tanh", "embedding_norm": True},
}


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How a base model is pretrained: AdamW, warmup-cosine, packed rows of the three corpora."""

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  num_steps: int
  batch_size: int
  seq_len: int
  learning_rate: float
  weight_decay: float = 0.1
  family: Literal["llama", "opt", "bloom"] = "llama"

  @property
  def config(self) -> DecoderConfig:
    """A decoder of this family and size with tied embeddings."""
    return DecoderConfig(
      vocab_size=self.vocab_size,
      hidden_size=self.hidden_size,
      intermediate_size=self.intermediate_size,
      num_layers=self.num_layers,
      num_heads=self.num_heads,
      num_kv_heads=self.num_kv_heads,
      head_dim=self.hidden_size // self.num_heads,
      max_position_embeddings=1024,
      tie_word_embeddings=True,
      **FAMILIES[self.family],
    )

  @property
  def optimizer(self) -> dict[str, Any]:
    """All arguments of `make_optimizer`, spelled out: its defaults are free to change."""
    return {
      "learning_rate": self.learning_rate,
      "num_steps": self.num_steps,
      "warmup_steps": self.num_steps // 20,
      "final_fraction": 0.05,
      "weight_decay": self.weight_decay,
      "no_decay": (),
      "b1": 0.9,
      "b2": 0.95,
      "eps": 1e-8,
      "clip_norm": 1.0,
    }

  @property
  def data(self) -> dict[str, Any]:
    """The arguments of `token_batches` but for the tokenizer and the seed, spelled out."""
    return {
      "source": CORPUS,
      "split": "train",
      "seq_len": self.seq_len,
      "batch_size": self.batch_size,
      "packing": "first_fit",
      "shuffle": True,
      "num_epochs": None,
      "shard_count": jax.process_count(),
    }


RECIPES = {
  # Seconds of training: for tests.
  "lm-tiny": Recipe(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    num_steps=100,
    batch_size=8,
    seq_len=64,
    learning_rate=1e-2,
  ),
  # 1.1 M parameters, some minutes on two CPU cores: the model of the papers' default presets.
  "lm-small": Recipe(
    vocab_size=2048,
    hidden_size=128,
    intermediate_size=384,
    num_layers=4,
    num_heads=4,
    num_kv_heads=4,
    num_steps=700,
    batch_size=16,
    seq_len=128,
    learning_rate=6e-3,
  ),
}


def _small(family: str, width: int) -> Recipe:
  """A model with plain MLPs trained as long as lm-small."""
  return dataclasses.replace(
    RECIPES["lm-small"],
    family=family,
    hidden_size=width,
    intermediate_size=4 * width,
    num_heads=width // 32,
    num_kv_heads=width // 32,
  )


# "opt-small" and "bloom-small", and both at half and at one and a half times the width. (OPT's
# learned positions are trained up to the 128th only.)
RECIPES |= {
  f"{family}-small{suffix}": _small(family, width)
  for family in ("opt", "bloom")
  for suffix, width in (("-64", 64), ("", 128), ("-192", 192))
}


def check_base_model(name_or_path: str, field: str) -> None:
  """Raises a UserError, before anything is read, if `base_model` cannot know the model.

  field: of the config, for the message.
  """
  if name_or_path not in RECIPES and not pathlib.Path(name_or_path).expanduser().is_dir():
    raise UserError(
      f"{field}={name_or_path}: there is no such folder, expected a checkpoint or "
      f"{', '.join(RECIPES)}; set --config.{field}"
    )


def base_model(name_or_path: str, *, seed: int = 0) -> BaseModel:
  """Returns a base model by name, or loads a Hugging Face directory.

  Args:
    name_or_path: a name in `RECIPES` (pretrained on first use, then cached), or a directory.
    seed: of initialisation and data order, for the named models.

  Raises:
    UserError: there is no such name or directory, or it cannot be loaded, see `Checkpoint`.
  """
  if name_or_path in RECIPES:
    return _pretrained(name_or_path, RECIPES[name_or_path], seed)
  if not pathlib.Path(name_or_path).expanduser().is_dir():
    raise UserError(
      f"no base model {name_or_path!r}: expected {', '.join(RECIPES)} or a checkpoint directory"
    )
  return BaseModel(load_decoder(name_or_path), load_tokenizer(name_or_path), {})


def _pretrained(name: str, recipe: Recipe, seed: int) -> BaseModel:
  tokenizer = load_tokenizer(f"embedded-{recipe.vocab_size}")
  settings = _settings(recipe, tokenizer, seed)
  folder = cache_dir("base_models", fingerprint())
  path = folder / f"{name}-{seed}-{_digest(json.dumps(settings, sort_keys=True))[:12]}"
  make = lambda: nnx.split(Decoder(recipe.config, rngs=nnx.Rngs(seed)))
  graphdef, params = nnx.eval_shape(make)
  # Of several runs that need the model at once, one trains and the others wait. (The processes of
  # one distributed run train together.)
  lock = filelock.FileLock(folder / f".{path.name}.lock")
  with contextlib.nullcontext() if path.exists() or jax.process_count() > 1 else lock:
    if not path.exists():
      print(f"pretraining the base model {name} once (seed {seed}): {path}", file=sys.stderr)
      workdir = folder / f"{path.name}.run"
      # Every mesh, and none, finds the same model.
      with jax.set_mesh(None):
        trained = _pretrain(graphdef, make()[1], recipe, tokenizer, seed, workdir)
        losses = _validate(nnx.merge(graphdef, trained), tokenizer)
      metadata = {
        "recipe": settings,
        "validation_perplexity": losses.perplexity,
        "validation_bits_per_byte": losses.bits_per_byte,
      }
      save_params(path, nnx.to_pure_dict(trained), metadata)
      shutil.rmtree(workdir / "checkpoints", ignore_errors=True)
  pure, metadata = load_params(path, nnx.to_pure_dict(params))
  nnx.replace_by_pure_dict(params, pure)
  return BaseModel(cut_over_mesh(nnx.merge(graphdef, params)), tokenizer, metadata)


def _settings(recipe: Recipe, tokenizer: tokenizers.Tokenizer, seed: int) -> dict[str, Any]:
  """Everything that determines the trained model: the key of the cache."""
  return {
    "version": RECIPE_VERSION,
    "model": dataclasses.asdict(recipe.config),
    "optimizer": recipe.optimizer,
    "data": recipe.data | {"fingerprint": fingerprint()},
    "tokenizer": _digest(tokenizer.to_str()),
    "seed": seed,
  }


def _digest(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()


def _validate(model: Decoder, tokenizer: tokenizers.Tokenizer) -> WindowLosses:
  windows = token_windows(CORPUS, tokenizer, split="validation", seq_len=256)
  # Evenly spaced, so that every domain has its share.
  chosen = slice(None, None, max(1, len(windows.tokens) // 256))
  return window_losses(model, windows.tokens[chosen], num_bytes=windows.num_bytes[chosen])


def pretraining_step(graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation) -> StepFn:
  """The train step of the base models, see `make_train_step`.

  The batch has tokens, positions and segment_ids, int32 [batch, seq]; `MICROBATCHES` divides it.
  """

  def loss_fn(params, batch, key):
    del key  # No dropout.
    model = nnx.merge(graphdef, params)
    x, _ = model.run_blocks(batch["tokens"], batch["positions"], batch["segment_ids"])
    ids = batch["tokens"], batch["segment_ids"]
    return linear_next_token_loss(model.head_input(x), model.head_kernel, *ids)

  return make_train_step(loss_fn, optimizer, accumulate_steps=MICROBATCHES)


def _pretrain(graphdef, params, recipe: Recipe, tokenizer, seed: int, workdir):
  optimizer = make_optimizer(**recipe.optimizer)
  batches = token_batches(tokenizer=tokenizer, seed=seed, **recipe.data)
  state = train(
    init_train_state(params, optimizer, jax.random.key(seed)),
    pretraining_step(graphdef, optimizer),
    iter(batches),
    num_steps=recipe.num_steps,
    workdir=workdir,
    save_every=max(recipe.num_steps // 5, 1),
    keep=1,
    description="pretraining",
  )
  return jax.tree.map(jnp.asarray, state.params)
