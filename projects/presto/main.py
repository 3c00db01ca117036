import sys

from common import cli

if __name__ == "__main__":
  if any(arg.startswith(("--data", "-data")) for arg in sys.argv):  # A table of one's own.
    from projects.presto import estimate

    __doc__ = estimate.__doc__
    cli.run_app(estimate.main)
  cli.run("presto")
