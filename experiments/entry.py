"""What the commands share: handlers first, then exceptions as exit codes."""

import os
import sys
import threading
import traceback
from collections.abc import Callable

from experiments import errors
from experiments.signals import Preemption

_TOLD = (
  errors.CheckpointCorrupt,
  errors.CheckpointMismatch,
  errors.DataError,
  errors.NonFiniteError,
)
# Seconds a process that failed waits for others that fail of the same.
PATIENCE = 5


def run_command(action: Callable[[Preemption], None]) -> int:
  """Runs a command and returns its exit code.

  What a user can mend (configs, directories, checkpoints of other runs, missing files)
  is told in one line; anything else keeps its traceback.

  One of several processes that fails does not wait for the others, which may be dead or
  wait for it: it ends the process here, and jax's coordination ends theirs.

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
      code = errors.EXIT_BAD_CONFIG
    except (OSError, *_TOLD) as e:
      print(f'error: {type(e).__name__}: {e}', file=sys.stderr)
      code = errors.EXIT_ERROR
    except Exception:
      if not _is_one_of_several():
        raise
      traceback.print_exc()
      code = errors.EXIT_ERROR
    else:
      return errors.EXIT_DONE
  if _is_one_of_several():
    _leave(code)
  return code


def _is_one_of_several() -> bool:
  # A command that has not come to import jax has no peers either.
  jax = sys.modules.get('jax')
  return jax is not None and jax.distributed.is_initialized()


def _leave(code: int) -> None:
  """Ends this process, whatever has become of the others."""
  import jax

  print(
    f'process {jax.process_index()} of {jax.process_count()} leaves; the log of the one'
    f' that failed first has the cause; go on with --resume',
    file=sys.stderr,
  )
  # Where all fail together each gets to say why; the first to go would abort the rest.
  goodbye = threading.Thread(target=jax.distributed.shutdown, daemon=True)
  goodbye.start()
  goodbye.join(PATIENCE)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)
