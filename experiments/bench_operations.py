"""Operations of lrjax.kernels timed, XLA's form beside the kernel of the device."""

import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from experiments import timing
from experiments.jobs import Job
from lrjax.kernels import tiles

NOTE = (
  'Times are of one matrix in a stack. Bytes are those that must be moved: each argument'
  ' read and each result written once; FLOP those of the products that must be computed.'
)


def measure(
  jobs: Sequence[Job], rounds: int, megabytes: int, ceilings: Mapping[str, Any]
) -> dict[str, dict[str, dict[str, Any]]]:
  """Times the forms of each job in turns.

  Args:
    jobs: what is timed.
    rounds: how often; medians are over them.
    megabytes: MiB that a call must move, in a stack of as many matrices.
    ceilings: see `timing.ceilings`, for all products of the jobs.

  Returns:
    job -> form -> what it reached.
  """
  found = {}
  for job in jobs:
    forms = _samplers(job, megabytes)
    seconds = dict(zip(forms, timing.in_turns([*forms.values()], rounds)))
    found[f'{job.name}, {job.d} x {job.k}, r = {job.r}'] = {
      form: _reached(job, s, seconds['xla'], ceilings) for form, s in seconds.items()
    }
  return found


def _samplers(job: Job, megabytes: int) -> dict[str, timing.Sampler]:
  """XLA's form, and the kernel where the present device has one that fits."""
  found = dict(xla=job.sampler('xla', megabytes))
  platform = tiles.present().platform
  if platform in tiles.PLATFORMS:
    try:
      found[platform] = job.sampler(platform, megabytes)
    except (ValueError, jax.errors.JaxRuntimeError) as e:
      print(f'{job}: {str(e)[:200]}', file=sys.stderr)
  return found


def _reached(
  job: Job, seconds: tuple[float, ...], xla: tuple[float, ...], ceilings: Mapping
) -> dict[str, Any]:
  median = statistics.median(seconds)
  bytes_per_s, flops = job.moved / median, job.flops / median
  return dict(
    microseconds=1e6 * median,
    ratio=timing.ratio(seconds, xla),
    bytes_per_s=bytes_per_s,
    of_copy=bytes_per_s / ceilings['bytes_per_s'],
    flops=flops,
    of_products=flops / ceilings['flops'][job.products],
    products=job.products,
  )


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
  """The results in Markdown."""
  lines = [
    '| operation | form | microseconds | of XLA | GB/s | of the copy | TFLOP/s'
    ' | of products |',
    '|---|---|---|---|---|---|---|---|',
  ]
  for name, forms in found.items():
    for form, f in forms.items():
      work = f'{f["flops"] / 1e12:.3g} | {f["of_products"]:.2f} in {f["products"]}'
      lines.append(
        f'| {name} | {form} | {f["microseconds"]:.1f} | {f["ratio"]:.2f} |'
        f' {f["bytes_per_s"] / 1e9:.1f} | {f["of_copy"]:.2f} |'
        f' {work if f["flops"] else "– | –"} |'
      )
  return '\n'.join(lines)
