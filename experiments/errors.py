"""Exceptions of the runner; each derives from the builtin that old handlers catch."""


class DataError(RuntimeError):
  """A record could not be read; the message names its source and index."""
