"""The error that a user can mend."""


class UserError(Exception):
  """Bad input from the user: what was wrong, what was expected, what to do, in one line.

  `common.cli.run` prints the message without a traceback and exits with code 2. Anything else
  that escapes a binary is a bug and keeps its traceback.
  """
