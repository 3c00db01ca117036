import sys

from common import cli

if __name__ == "__main__":
  if any(
    arg.startswith(("--data", "-data")) for arg in sys.argv
  ):  # A regression on one's own table.
    from projects.dsl import estimate

    __doc__ = estimate.__doc__
    cli.run_app(estimate.main)
  cli.run("dsl")
