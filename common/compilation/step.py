"""A step of a program, ready to be compiled."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Step(NamedTuple):
  """What `compile_steps(config, devices)` of a paper lists.

  Attributes:
    name: what it does, and at which size.
    function: pure; may be jitted already, with donation and output shardings.
    arguments: pytrees of jax.ShapeDtypeStruct with shardings on one mesh.
  """

  name: str
  function: Callable[..., Any]
  arguments: tuple[Any, ...]
