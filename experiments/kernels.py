"""The parameterizations a config can name."""

import inspect
from collections.abc import Callable

import lrjax
from experiments.config import Experiment
from experiments.errors import ConfigError


def _makes_kernels(x: Callable) -> bool:
  if not inspect.isfunction(inspect.unwrap(x)):
    return False
  return inspect.signature(x).return_annotation is lrjax.Parameterization


# Every function of lrjax that returns a Parameterization.
KERNELS: dict[str, Callable[..., lrjax.Parameterization]] = {
  name: getattr(lrjax, name)
  for name in lrjax.__all__
  if _makes_kernels(getattr(lrjax, name))
}


def make(experiment: Experiment) -> lrjax.Parameterization:
  """The parameterization of an experiment.

  Raises:
    ConfigError: for options that it does not take.
  """
  name, options = experiment.kernel.name, dict(experiment.kernel.options)
  try:
    return KERNELS[name](**options)
  except (TypeError, ValueError) as e:
    raise ConfigError(f'kernel {name}: {e}') from e
