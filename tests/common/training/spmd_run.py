"""A decoder trained for 20 steps on a mesh, for the tests.

python -m tests.common.training.spmd_run WORKDIR DATA,FSDP,TENSOR [restore]
joins the other processes if the environment names them, trains, and prints one JSON line: the loss
of every step and how many devices hold how much of one weight. With `restore` it then restores the
checkpoint onto other meshes and checks that it is the same state.
"""

import json
import sys

import jax
import numpy as np

from common.checkpoints.orbax import TrainingCheckpoints
from common.models.decoder import DecoderConfig
from common.models.scan import abstract_stack, stack
from common.models.sharding import batch_sharding, place, shardings
from common.training import distributed
from common.training.loop import train
from common.training.losses import next_token_loss
from common.training.mesh import make_mesh
from common.training.optimizer import make_optimizer
from common.training.train_step import TrainState, init_train_state, make_train_step

ROWS, SEQ, NUM_STEPS = 8, 16, 20
CONFIG = DecoderConfig(
  vocab_size=64,
  hidden_size=32,
  intermediate_size=64,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  max_position_embeddings=32,
)
OPTIMIZER = make_optimizer(
  learning_rate=1e-2, num_steps=NUM_STEPS, warmup_steps=2, weight_decay=0.1
)


class ProcessRows:
  """This process's rows of the global batches [ROWS, SEQ]."""

  position = 0

  def __next__(self):
    rng = np.random.default_rng(self.position)
    self.position += 1
    # A second half of each row that repeats the first: something to learn.
    half = rng.integers(0, 64, (ROWS, SEQ // 2))
    mine = np.split(np.tile(half, 2).astype(np.int32), jax.process_count())[jax.process_index()]
    return {"tokens": mine, "segment_ids": np.ones_like(mine)}

  def get_state(self):
    return {"position": self.position}

  def set_state(self, state):
    self.position = state["position"]


def run(workdir, mesh: jax.sharding.Mesh) -> tuple[TrainState, list[float]]:
  """Trains on the mesh; returns the state and the loss of every step."""
  from flax import nnx

  from common.models.decoder import Decoder

  scanned = abstract_stack(CONFIG)[0]
  make = lambda: stack(Decoder(CONFIG, rngs=nnx.Rngs(0)))[1]
  params_at = shardings(jax.eval_shape(make), mesh)

  def loss_fn(params, batch, key):
    del key
    logits, _ = scanned(params, batch["tokens"], segment_ids=batch["segment_ids"])
    return next_token_loss(logits, batch["tokens"], batch["segment_ids"])

  losses = []
  with jax.set_mesh(mesh):
    params = jax.jit(make, out_shardings=params_at)()
    state = init_train_state(params, OPTIMIZER, jax.random.key(1))
    step_fn = make_train_step(loss_fn, OPTIMIZER, state_shardings=shardings(state, mesh))

    def recorded(state, batch):
      state, metrics = step_fn(state, batch)
      losses.append(metrics["loss"])
      return state, metrics

    options = {"num_steps": NUM_STEPS, "workdir": workdir, "quiet": True}
    state = train(state, recorded, ProcessRows(), batch_sharding=batch_sharding(mesh), **options)
  return state, [float(loss) for loss in losses]


def restore(workdir, state: TrainState, axes: dict[str, int], devices) -> None:
  """Restores the checkpoint of `state` onto another mesh, and checks where and what it is."""
  mesh = make_mesh(axes, devices)
  where = shardings(state, mesh)
  with TrainingCheckpoints(f"{workdir}/checkpoints") as checkpoints:
    restored, iterator = checkpoints.restore_latest(place(state, where))
  assert iterator == {"position": NUM_STEPS}
  raw = lambda x: (
    jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
  )
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(raw(a), raw(b)), restored, state)
  for x, sharding in zip(jax.tree.leaves(restored), jax.tree.leaves(where)):
    assert x.sharding.is_equivalent_to(sharding, x.ndim), (x.sharding, sharding)


def main(workdir: str, sizes: str, then: str = "") -> None:
  distributed.initialize()
  mesh = make_mesh(dict(zip(("data", "fsdp", "tensor"), map(int, sizes.split(",")))))
  state, losses = run(workdir, mesh)
  if then == "restore":
    restore(workdir, state, {"data": 8}, jax.devices())
    restore(workdir, state, {}, jax.devices()[:1])
  if jax.process_index() == 0:
    weight = state.params["blocks"]["mlp"]["up_proj"]["kernel"]
    shard = weight.addressable_shards[0].data.shape
    print(json.dumps({"losses": losses, "devices": len(jax.devices()), "shard": shard}))


if __name__ == "__main__":
  main(*sys.argv[1:])
