import jax
import pytest
from jax.sharding import AxisType

from common.errors import UserError
from common.training.mesh import AXES, make_mesh


def test_axes_default_to_one_and_minus_one_takes_the_rest():
  devices = jax.devices()[:1]
  mesh = make_mesh({"fsdp": -1}, devices)
  assert mesh.axis_names == AXES and dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1}
  assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize("axes", [{}, {"tensor": 1}])
def test_one_device_makes_a_mesh_of_one(axes):
  assert make_mesh(axes, jax.devices()[:1]).size == 1


@pytest.mark.parametrize(
  "axes, message",
  [
    ({"data": 2}, "data=2, fsdp=1, tensor=1 does not use the 1 devices"),
    ({"data": 0}, "data=0"),
    ({"data": -1, "fsdp": -1}, "one of them may be -1"),
    ({"data": 2, "tensor": -1}, "tensor=-1"),
    ({"model": 1}, "unknown mesh axes model; there are data, fsdp, tensor"),
  ],
)
def test_sizes_that_do_not_fit_are_refused(axes, message):
  with pytest.raises(UserError, match=message):
    make_mesh(axes, jax.devices()[:1])
