import importlib.util

import pytest

from common import cli


@pytest.fixture(autouse=True)
def tpu_compiler():
  """What libtpu needs in order to be loaded where there is no TPU."""
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu is not installed")
  cli.prepare_jax(compile_only=True)
