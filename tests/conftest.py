"""The environment that JAX reads, set before any test imports it."""

from common import cli

cli.prepare_jax()
