"""What the commands share: handlers first, then exceptions as exit codes."""

import sys
from collections.abc import Callable

from experiments import errors
from experiments.signals import Preemption

_TOLD = (
  errors.CheckpointCorrupt,
  errors.CheckpointMismatch,
  errors.DataError,
  errors.NonFiniteError,
)


def run_command(action: Callable[[Preemption], None]) -> int:
  """Runs a command and returns its exit code.

  What a user can mend (configs, directories, checkpoints of other runs, missing files)
  is told in one line; anything else keeps its traceback.

  Args:
    action: the command; it does its slow imports itself, after the handlers are in
      place, since importing jax takes seconds in which a signal may arrive.

  Returns:
    0 done, 1 error, 2 bad config, 143 interrupted and saved; 144, interrupted before
    there was anything to save, leaves by SystemExit.
  """
  with Preemption() as preemption:
    try:
      action(preemption)
    except errors.Interrupted as e:
      print(e, file=sys.stderr)
      return errors.EXIT_PREEMPTED_SAVED
    except errors.ConfigError as e:
      print(f'error: {e}', file=sys.stderr)
      return errors.EXIT_BAD_CONFIG
    except (OSError, *_TOLD) as e:
      print(f'error: {type(e).__name__}: {e}', file=sys.stderr)
      return errors.EXIT_ERROR
  return errors.EXIT_DONE
