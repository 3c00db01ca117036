import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from common.compilation.compile_only import compile_lowered
from common.compilation.hlo import Collective, cost
from common.compilation.topology import tpu_slice

LOOP = """\
HloModule loop, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (p: bf16[64,32]) -> bf16[16,32] {
  %p = bf16[64,32]{1,0} parameter(0)
  %all-reduce.3 = bf16[64,32]{1,0} all-reduce(%p), channel_id=3, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %slice.1 = bf16[16,32]{1,0} dynamic-slice(%all-reduce.3, %zero, %zero), dynamic_slice_sizes={16,32}
}

%first_half (p.1: bf16[8,32]) -> bf16[32,32] {
  %p.1 = bf16[8,32]{1,0} parameter(0)
  ROOT %all-gather.7 = bf16[32,32]{1,0} all-gather(%p.1), channel_id=7, dimensions={0}
}

%second_half (p.2: bf16[8,32]) -> bf16[32,32] {
  %p.2 = bf16[8,32]{1,0} parameter(0)
  ROOT %all-gather.8 = bf16[32,32]{1,0} all-gather(%p.2), channel_id=7, dimensions={0}
}

%condition (c: (s32[], bf16[8,32], bf16[64,32])) -> pred[] {
  %c = (s32[], bf16[8,32]{1,0}, bf16[64,32]{1,0}) parameter(0)
  %counter = s32[] get-tuple-element(%c), index=0
  %limit = s32[] constant(LIMIT)
  ROOT %less = pred[] compare(%counter, %limit), direction=DIRECTION
}

%body (t: (s32[], bf16[8,32], bf16[64,32])) -> (s32[], bf16[8,32], bf16[64,32]) {
  %t = (s32[], bf16[8,32]{1,0}, bf16[64,32]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = bf16[8,32]{1,0} get-tuple-element(%t), index=1
  %g = bf16[64,32]{1,0} get-tuple-element(%t), index=2
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %half.1 = bf16[32,32]{1,0} fusion(%x), kind=kCustom, calls=%first_half
  %half.2 = bf16[32,32]{1,0} fusion(%x), kind=kCustom, calls=%second_half
  %scattered = bf16[16,32]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1
  %dot.1 = bf16[8,32]{1,0} dot(%x, %half.2), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %out = (s32[], bf16[8,32]{1,0}, bf16[64,32]{1,0}) tuple(%next, %dot.1, %g)
}

ENTRY %main (w: bf16[8,32], g.1: bf16[64,32]) -> bf16[8,32] {
  %w = bf16[8,32]{1,0} parameter(0)
  %g.1 = bf16[64,32]{1,0} parameter(1)
  %start = s32[] constant(2)
  %permute = (bf16[8,32]{1,0}, bf16[8,32]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%w), channel_id=9, source_target_pairs={{0,1},{1,0}}
  %permuted = bf16[8,32]{1,0} collective-permute-done(%permute)
  %init = (s32[], bf16[8,32]{1,0}, bf16[64,32]{1,0}) tuple(%start, %permuted, %g.1)
  %loop = (s32[], bf16[8,32]{1,0}, bf16[64,32]{1,0}) while(%init), condition=%condition, body=%body
  ROOT %result = bf16[8,32]{1,0} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


def loop(limit=12, direction="LT"):
  return cost(LOOP.replace("LIMIT", str(limit)).replace("DIRECTION", direction))


def test_bodies_of_loops_count_as_often_as_they_run():
  found = loop()
  assert found.unknown_loops == 0
  assert found.flops == 10 * 2 * 8 * 32 * 32
  assert found.collectives["all-gather"] == Collective(10, 10 * 2048, (2048,))


def test_collectives_outside_of_fusions_count_whatever_their_channel():
  """`jax.shard_map` gives all of them the same one."""
  found = cost("""HloModule two

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %first = f32[8]{0} all-reduce(%x), channel_id=1, to_apply=%add
  ROOT %second = f32[8]{0} all-reduce(%first), channel_id=1, to_apply=%add
}
""")
  assert found.collectives["all-reduce"] == Collective(2, 2 * 32, (32,))


def test_loops_of_unknown_length_count_once_and_are_reported():
  found = loop(direction="NE")
  assert found.unknown_loops == 1
  assert found.flops == 2 * 8 * 32 * 32


def test_a_collective_spread_over_fusions_is_one():
  assert loop(limit=3).collectives["all-gather"].count == 1


def test_an_all_reduce_that_keeps_a_slice_is_a_reduce_scatter():
  found = loop(limit=3).collectives
  assert found["reduce-scatter"] == Collective(1, 64 * 32 * 2, (64 * 32 * 2,))
  assert "all-reduce" not in found


def test_started_collectives_count_their_result():
  assert loop().collectives["collective-permute"] == Collective(1, 8 * 32 * 2, (8 * 32 * 2,))


def compiled(function, *shapes):
  where = SingleDeviceSharding(tpu_slice("v5e:1x1").devices[0])
  arguments = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=where) for s in shapes]
  return compile_lowered(jax.jit(function).lower(*arguments))


@pytest.mark.parametrize(
  "function, shapes",
  [
    (lambda x, w: jax.nn.relu(x @ w), [(512, 1024), (1024, 768)]),
    (lambda q, k: jnp.einsum("bqhd,bkhd->bhqk", q, k), [(2, 128, 4, 64), (2, 256, 4, 64)]),
    (
      lambda x, w: jax.lax.conv_general_dilated(
        x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
      ),
      [(8, 32, 32, 64), (3, 3, 64, 128)],
    ),
  ],
)
def test_without_loops_it_agrees_with_xla(function, shapes):
  program, text = compiled(function, *shapes)
  ours, theirs = cost(text), program.cost_analysis()
  # XLA also counts the elementwise operations, and traffic in on-chip memory.
  assert ours.flops == pytest.approx(theirs["flops"], rel=0.02)
  assert 0 < ours.hbm_bytes <= 1.05 * theirs["bytes accessed"]


def test_a_scan_costs_as_much_as_its_steps():
  layers = 6

  def scanned(x, weights):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

  program = cost(compiled(scanned, (256, 2048), (layers, 2048, 2048))[1])
  assert program.flops == pytest.approx(layers * 2 * 256 * 2048 * 2048)
  weights = layers * 2048 * 2048 * 2
  assert weights <= program.hbm_bytes < 2.5 * weights
