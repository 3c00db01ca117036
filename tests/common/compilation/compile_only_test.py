import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from common.compilation.compile_only import compile_for, compile_step
from common.compilation.decoder_steps import decode_step, decoder_config, training_step
from common.compilation.step import Step, independent
from common.compilation.topology import CHIPS, tpu_slice
from common.errors import UserError
from common.models.decoder import DecoderConfig
from common.models.llama_sizes import LLAMA_SIZES
from common.models.scan import abstract_stack
from common.training.mesh import make_mesh

LLAMA_70B = LLAMA_SIZES["meta-llama/Llama-2-70b-hf"]
LLAMA_8B = LLAMA_SIZES["meta-llama/Meta-Llama-3-8B"]


@pytest.mark.parametrize("family", CHIPS)
def test_every_chip_of_a_slice_is_one_device(family):
  two_cores = CHIPS[family].two_cores
  tpu = tpu_slice(f"{family}:{'2x2x2' if two_cores else '2x4'}")
  assert len(tpu.devices) == 8 and tpu.chip is CHIPS[family]


@pytest.mark.parametrize("name", ["v9:2x2", "v5e", "v5e:2x2x2", "v5p:2x2", "v5e:3x3", "2x2", ""])
def test_unknown_slices_are_refused_with_examples(name):
  with pytest.raises(UserError, match=r"v5[ep]:(4x4|2x2x4)"):
    tpu_slice(name)


def doubling(name, rows, devices):
  """A step whose argument and result are [rows, 1024, 1024] float32, cut over the devices."""
  where = NamedSharding(make_mesh({"fsdp": -1}, devices), PartitionSpec("fsdp"))
  x = jax.ShapeDtypeStruct((rows, 1024, 1024), jnp.float32, sharding=where)
  return Step(name, lambda x: 2 * x, (x,))


def test_steps_that_fit(capsys):
  code = compile_for("v5e:2x2", lambda devices: [doubling("double", 256, devices)])
  printed = capsys.readouterr().out
  assert code == 0
  assert "double on v5e:2x2" in printed and "every step fits v5e:2x2: 4 chips" in printed
  rows = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in printed.splitlines()
          if line.startswith("│")}  # fmt: skip
  assert rows["arguments"] == rows["outputs"] == "256 MiB"
  assert rows["memory"].endswith("MiB of 16 GiB")
  assert rows["HBM traffic"] == "512 MiB"
  assert rows["collectives"] == "none"
  assert rows["time"] == "at least 0.656 ms (memory-bound)"  # 512 MiB at 819 GB/s.


def test_independent_replications_are_cut_over_the_devices():
  devices = tpu_slice("v5e:2x2").devices
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 10))
  x = jax.ShapeDtypeStruct((10, 1024), jnp.float32)
  widths = []

  def draw(keys, x):
    widths.append((len(keys), x.shape))
    noise = jax.vmap(lambda key: jax.random.uniform(key, (1024,), jnp.float64))(keys)
    return x + noise

  step = independent("draws", draw, (keys, x), devices, x64=True)
  assert [a.shape for a in step.arguments] == [(12,), (12, 1024)]
  compiled = compile_step(step)
  assert set(widths) == {(3, (3, 1024))}  # Three of twelve for each device.
  assert compiled.cost.collectives == {}
  assert compiled.memory.outputs >= 3 * 1024 * 8  # float64.


def test_a_step_that_does_not_fit(capsys):
  steps = lambda devices: [doubling("small", 256, devices), doubling("large", 10240, devices)]
  assert compile_for("v5e:2x2", steps) == 1
  captured = capsys.readouterr()
  assert "does not fit" in captured.out and "not every step fits v5e:2x2" in captured.out
  assert "smaller batch" in captured.err


def test_an_unplaced_step_is_refused():
  x = jax.ShapeDtypeStruct((8,), jnp.float32)
  with pytest.raises(ValueError, match="'loose' has no argument that is placed"):
    compile_step(Step("loose", lambda x: x, (x,)))


def test_decoder_config_of_names_and_not_of_others():
  assert decoder_config("lm-tiny").hidden_size == 64
  assert decoder_config("meta-llama/Llama-2-7b-hf").intermediate_size == 11008
  with pytest.raises(UserError, match="no model 'gpt-9'.*Llama-2-70b"):
    decoder_config("gpt-9")


def parameter_bytes(config: DecoderConfig) -> int:
  leaves = jax.tree.leaves(abstract_stack(config, jnp.bfloat16)[1])
  return sum(x.size * x.dtype.itemsize for x in leaves)


@pytest.mark.parametrize(
  "config, slice_name, batch_size, max_length, new_tokens",
  [
    pytest.param(LLAMA_70B, "v5p:2x2x4", 32, 4096, 1, id="decode-70b-v5p"),
    pytest.param(LLAMA_70B, "v5p:2x2x4", 2, 1024, 1024, id="prefill-70b-v5p"),
    pytest.param(LLAMA_8B, "v5e:4x4", 32, 4096, 1, id="decode-8b-v5e"),
  ],
)
def test_tensor_parallel_inference(config, slice_name, batch_size, max_length, new_tokens):
  tpu = tpu_slice(slice_name)
  mesh = make_mesh({"data": 2, "tensor": 8}, tpu.devices)
  options = {"batch_size": batch_size, "max_length": max_length, "new_tokens": new_tokens}
  compiled = compile_step(decode_step(*abstract_stack(config, jnp.bfloat16), mesh, **options))
  assert compiled.fits(tpu.chip)
  cache = config.num_layers * batch_size * max_length * config.num_kv_heads * config.head_dim * 4
  held = parameter_bytes(config) / 8 + cache / 16
  assert compiled.memory.arguments == pytest.approx(held, rel=0.01)
  assert compiled.memory.outputs < 2**20  # The cache is updated in place.
  # Two sums over the tensor axis for each block (attention, MLP), one of embeddings; no weights and
  # no activations are gathered.
  collectives = compiled.cost.collectives
  assert 2 * config.num_layers <= collectives["all-reduce"].count <= 2 * config.num_layers + 4
  activations = batch_size // 2 * new_tokens * config.hidden_size * 2
  gathered = collectives.get("all-gather")
  assert gathered is None or gathered.sizes[-1] < activations / 10
  assert set(collectives) <= {"all-reduce", "all-gather"}
  # What must be done, and not twice of it.
  products = 2 * parameter_bytes(config) / 2 * batch_size / 2 * new_tokens / 8
  assert 0.9 * products < compiled.cost.flops < 1.6 * products
  assert compiled.cost.hbm_bytes > 0.95 * (parameter_bytes(config) / 8)


@pytest.mark.parametrize("slice_name", ["v5e:4x4", "v5p:2x2x2"])
def test_fully_sharded_training(slice_name):
  config = LLAMA_SIZES["meta-llama/Llama-2-7b-hf"]
  tpu = tpu_slice(slice_name)
  mesh = make_mesh({"fsdp": -1}, tpu.devices)
  compiled = compile_step(training_step(config, mesh, batch_size=mesh.size, seq_len=2048))
  assert compiled.fits(tpu.chip)
  weights = parameter_bytes(config)  # bfloat16.
  # Masters and Adam's two moments, float32, in parts; the new state takes the old one's place.
  assert compiled.memory.arguments == pytest.approx(3 * 2 * weights / mesh.size, rel=0.02)
  assert compiled.memory.outputs < 2**20
  collectives = compiled.cost.collectives
  # Every block's matrices are gathered forward, for the recomputation, and at most once more; the
  # head's once. The embedding's rows travel instead of its table.
  dim, hidden, table = config.hidden_size, config.intermediate_size, config.vocab_size
  blocks = weights - 2 * table * dim * 2
  gathered = collectives["all-gather"]
  assert 2 * blocks <= gathered.total_bytes <= 3 * blocks
  # Nothing but weights and the rows' token ids: no activations.
  ids = mesh.size * 2048 * 4
  assert set(gathered.sizes) == {ids, dim * dim * 2, dim * hidden * 2, table * dim * 2}
  # Gradients are summed once.
  sums = [collectives[k] for k in ("all-reduce", "reduce-scatter") if k in collectives]
  assert sum(found.total_bytes for found in sums) == pytest.approx(
    blocks + table * dim * 2, rel=0.01
  )
  assert collectives["all-to-all"].sizes[-1] <= 2048 * dim * 4  # The embedding's rows.
  assert set(collectives) <= {"all-gather", "all-reduce", "reduce-scatter", "all-to-all"}
