"""The environment that JAX reads, set before any test imports it, and its programs freed in time."""

import os

import hypothesis
import pytest

from common import cli

cli.prepare_jax()
import jax  # noqa: E402

if os.environ.get("JAX_PLATFORMS") == "cpu":
  # The programs of most tests run once, and to optimize them takes far longer. The variable is for the
  # processes that tests start. Programs that are compiled for TPU stay the same.
  jax.config.update("jax_disable_most_optimizations", True)
  os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"

# XLA's older emitters of fused loops, a module at a time: the tests compile far more than they run,
# and these compile in a fraction of the time. XLA reads its flags at the first compilation, libtpu, which
# ends the process at one that it does not know, later.
_users_flags = _flags = os.environ["XLA_FLAGS"]
if jax.__version_info__ < (0, 11):  # Whose XLA ends the process too: it has no older emitters.
  _flags += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
os.environ["XLA_FLAGS"] = _flags
jax.jit(lambda x: x + 1)(0)
os.environ["XLA_FLAGS"] = _users_flags

# An example may compile, and how long that takes depends on what else the machine does.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")


@pytest.fixture(autouse=True, scope="module")
def free_programs():
  """Drops a file's compiled programs after it.

  Each takes several memory maps of the process, of which Linux allows 65,530: the whole suite would
  come near.
  """
  yield
  jax.clear_caches()


@pytest.fixture(scope="session")
def same_compiler():
  """The environment in which another process computes the same bits as this one."""
  return os.environ | {"XLA_FLAGS": _flags}
