"""How often the loops of the lookup kernel on TPU turn, for `tpu_schedule.schedule`."""

from kernels.lookup_matmul import mosaic_tpu
from kernels.lookup_matmul.packing import GROUP_ROWS


def lookup_loops(inputs: int, k: int, v: int) -> list[int]:
  """Trips of its loops (`mosaic_tpu._kernel`), without those of one trip.

  Args:
    inputs: of the weight.
    k, v: centroids and outputs of a vector.
  """
  tables, words = -(-k // mosaic_tpu.LANES), -(-v // 2)
  runs = GROUP_ROWS // 8 // mosaic_tpu.unrolled_units(tables, words)
  trips = [-(-inputs // GROUP_ROWS), runs, -(-tables // mosaic_tpu.UNROLLED_TABLES)]
  trips = [n for n in trips if n > 1]
  # The compiler may put a bundle of the step among those of its only loop, which are then counted as
  # several loops.
  return trips * 8 if len(trips) == 1 else trips
