"""Exceptions and exit codes of the experiments runner.

Each class derives from the builtin that a Python user would catch. Exit codes:
0 done, 1 error, 2 bad config, 143 preempted and saved, 144 preempted without a save.
"""

EXIT_DONE = 0
EXIT_ERROR = 1
EXIT_BAD_CONFIG = 2
EXIT_PREEMPTED_SAVED = 143
EXIT_PREEMPTED_UNSAVED = 144


class ConfigError(ValueError):
  """A config has an unknown key, a wrong type, a repeated key or a bad value."""


class CheckpointNotFound(FileNotFoundError):
  """The checkpoint directory or the step asked for does not exist."""


class CheckpointCorrupt(RuntimeError):
  """A step cannot be read, or does not hold the bytes that were saved."""


class CheckpointMismatch(ValueError):
  """A healthy step belongs to another config, data set, model or method."""


class CheckpointSaveError(OSError):
  """A step could not be written; earlier steps are intact."""


class RunDirError(OSError):
  """A run's directory or file is not one that the runner made."""


class RunExistsError(OSError):
  """The directory already holds a run."""


class RunLockedError(OSError):
  """Another process is writing to the run."""


class NonFiniteError(FloatingPointError):
  """The loss or the gradient stayed NaN or Inf for too long."""


class DataError(RuntimeError):
  """A data source failed; names the source and the record."""


class Interrupted(Exception):
  """The run was asked to leave and has saved its last step."""
