"""The counter of a TPU's schedule, on programs written here as the compiler writes them."""

import pytest


@pytest.fixture
def count_cycles(monkeypatch):
  # The module tells libtpu to write files, which no other test wants.
  monkeypatch.setenv("LIBTPU_INIT_ARGS", "")
  from benchmarks.kernels.tpu_schedule import count_cycles

  return count_cycles


def program(*parts):
  """Text of bundles: each part is a depth and bodies, or a depth and a number of any bundles."""
  lines = []
  for depth, bodies in parts:
    bodies = ["%v1 = vadd.f32 %v2, %v3"] * bodies if isinstance(bodies, int) else bodies
    for body in bodies:
      label = "LB" if depth and "sphi" in body else ""
      lines.append(f"{len(lines):#x} {label} : {'> ' * depth}{{ {body} }}")
  return "\n".join(lines)


def pipeline(first, below, step, trips="12 /* loop exit test */", in_register=False):
  """A loop whose step of `step` bundles runs for first <= trip < below; 10 bundles are around it."""
  skip = ["%p9 = pnand %p7, %p8", "%1 = sbr.rel (%p9) target = $region30"]
  if in_register:
    skip = [
      "%p6 = pnand %p7, %p8",
      "%s5 = scalar_select /*predicate=*/%p6, /*on_true=*/1, /*on_false=*/0",
      "%p9 = scmp.ne.s32.totalorder %s5, 0",
      "%1 = sbr.rel (%p9) target = $region30",
    ]
  before = [
    "%s1 = sphi %s2, %s3",
    f"%p7 = scmp.ge.s32.totalorder %s1, {first}",
    f"%p8 = scmp.lt.s32.totalorder %s1, {below}",
    *skip,
  ]
  after = [
    "%s3 = sadd.s32 1, %s1 } /* Start/End empty region 30 */ {",
    f"%p4 = scmp.ge.s32.totalorder %s3, {trips}",
    "%2 = sbr.rel (!%p4) target = $region40",
  ]
  rest = 10 - len(before) - len(after)
  return program((0, 3), (1, rest), (1, before), (1, step), (1, after), (0, 2))


def test_a_loop_counts_as_often_as_it_turns(count_cycles):
  exit_test = ["%s1 = sphi %s2, %s3", "%p = scmp.ge.s32.totalorder %s, 7 /* loop exit test */"]
  assert count_cycles(program((0, 3), (1, exit_test), (1, 4), (0, 1))) == 3 + 7 * 6 + 1


@pytest.mark.parametrize("in_register", [False, True])
@pytest.mark.parametrize(("first", "below"), [(1, 11), (2, 10)])
def test_a_step_counts_as_often_as_its_condition_holds(count_cycles, first, below, in_register):
  text = pipeline(first, below, step=100, in_register=in_register)
  assert count_cycles(text) == 3 + 12 * 10 + (below - first) * 100 + 2


@pytest.mark.parametrize(("skipped", "steps"), [("lt", 12 - 5), ("ge", 5)])
def test_a_step_may_be_the_first_or_last_of_its_loop(count_cycles, skipped, steps):
  skip = f"%p9 = scmp.{skipped}.s32.totalorder %s1, 5"
  text = pipeline(0, 0, step=100).replace("%p9 = pnand %p7, %p8", skip)
  assert count_cycles(text) == 3 + 12 * 10 + steps * 100 + 2


def test_a_grid_that_is_not_constant_is_given(count_cycles):
  text = pipeline(1, 0, step=100, trips="%s8").replace("s1, 0", "s1, %s7")
  # Without a number of steps the loop counts once.
  assert count_cycles(text) == 3 + 110 + 2
  assert count_cycles(text, grid=20) == 3 + 22 * 10 + 20 * 100 + 2


def test_a_grid_without_a_pipeline_turns_once_a_step(count_cycles):
  text = program((0, 3), (1, ["%s1 = sphi %s2, %s3"]), (1, 9), (0, 1))
  assert count_cycles(text, grid=20) == 3 + 20 * 10 + 1
