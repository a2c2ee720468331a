"""The command line of an experiment: presets, and options checked by the method."""

import functools
import inspect
import operator
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from experiments import command_line
from experiments.config import Experiment
from experiments.presets import PRESETS
from experiments.schema import Scalar, members, one_of

# Parameters of methods that other keys of a config give.
_COMMON = ('learning_rate', 'weight_decay', 'seed', 'diagnostics')


def parse_args(
  argv: Sequence[str],
  methods: Mapping[str, Callable],
  presets: Mapping[str, tuple[Experiment, ...]] | None = None,
  command: type[command_line.Command] = command_line.Command,
) -> tuple[Any, tuple[Experiment, ...]]:
  """Reads the command line of an experiment; see `command_line.parse`.

  Args:
    argv: arguments without the program's name.
    methods: name -> function; `optimizer.options` are checked against its signature.
    presets: `COMPARISONS`, or None for the single runs `PRESETS`.
    command: the flags of the command itself.

  Returns:
    The command's flags and the runs: one for a single run.

  Raises:
    ConfigError: naming source, key, value, and what is allowed.
  """
  if presets is None:
    presets = {name: (run,) for name, run in PRESETS.items()}
  return command_line.parse(argv, presets, command, functools.partial(_hints, methods))


def option_types(method: Callable) -> dict[str, Any] | None:
  """Names and types of the options of a method that a config can give.

  Returns:
    None where the method takes any keyword.

  >>> def galore(learning_rate: float, rank: int = 1, mask: Callable | None = None):
  ...   pass
  >>> option_types(galore)
  {'rank': <class 'int'>}
  """
  parameters = inspect.signature(method, eval_str=True).parameters
  if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
    return None
  types = {name: _scalars(p.annotation) for name, p in parameters.items()}
  return {name: kind for name, kind in types.items() if kind and name not in _COMMON}


def _scalars(hint):
  """The part of an annotation that a config can express; None if there is none."""
  if hint is inspect.Parameter.empty:
    return Scalar
  kinds = [kind for kind in members(hint) or (hint,) if _is_scalar(kind)]
  if not set(kinds) - {type(None)}:
    return None
  return functools.reduce(operator.or_, kinds)


def _is_scalar(hint):
  return hint in members(Scalar) or typing.get_origin(hint) is Literal


def _hints(methods, tree):
  """Types of the sections that depend on the method or kernel that they name."""
  from experiments.kernels import KERNELS

  hints = {}
  for section, makers in (('optimizer', methods), ('kernel', KERNELS)):
    hints[f'{section}.name'] = one_of(makers)
    name = getattr(tree[section].get('name'), 'value', None)
    options = option_types(makers[name]) if name in makers else None
    if options is not None:
      hints[f'{section}.options'] = options
  return hints
