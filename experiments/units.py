"""Numbers as people read them."""

import math
from typing import TypeGuard

MISSING = '–'


def known(x: float | None) -> TypeGuard[float]:
  """Whether there is a finite number to show; the others print as a dash."""
  return x is not None and math.isfinite(x)


def count(n: float | None) -> str:
  """A number with a metric prefix.

  >>> count(5961.3), count(870_000), count(42), count(float('nan'))
  ('5.96k', '870k', '42', '–')
  """
  if not known(n):
    return MISSING
  for limit, prefix in ((1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
    # Beyond 999.5 the next smaller prefix would show four digits.
    if abs(n) >= limit * 0.9995:
      return f'{_three(n / limit)}{prefix}'
  return _three(n)


def size(n: float | None) -> str:
  """Bytes with a binary prefix.

  >>> size(2.7 * 2**20), size(640), size(float('nan'))
  ('2.70 MiB', '640 B', '–')
  """
  if not known(n):
    return MISSING
  for power, prefix in ((40, 'Ti'), (30, 'Gi'), (20, 'Mi'), (10, 'Ki')):
    if abs(n) >= 2**power:
      return f'{_three(n / 2**power)} {prefix}B'
  return f'{n:.0f} B'


def duration(seconds: float | None) -> str:
  """A time span by its two largest units.

  >>> duration(7.25), duration(83), duration(3600), duration(float('nan'))
  ('7.2 s', '1 min 23 s', '1 h 00 min', '–')
  """
  if not known(seconds):
    return MISSING
  if seconds < 59.95:
    return f'{seconds:.1f} s'
  minutes, rest = divmod(round(seconds), 60)
  if minutes < 60:
    return f'{minutes} min {rest:02d} s'
  hours, minutes = divmod(minutes, 60)
  return f'{hours} h {minutes:02d} min'


def milliseconds(ms: float | None) -> str:
  """Milliseconds to three digits.

  >>> milliseconds(317.42), milliseconds(2.5), milliseconds(3019.2)
  ('317 ms', '2.50 ms', '3019 ms')
  """
  return f'{_three(ms)} ms' if known(ms) else MISSING


def fixed(x: float | None, digits: int = 3, sign: bool = False) -> str:
  """A number with so many decimals, with a real minus sign.

  >>> fixed(1.5523), fixed(-0.064, sign=True), fixed(float('nan'))
  ('1.552', '−0.064', '–')
  """
  if not known(x):
    return MISSING
  text = f'{x:+.{digits}f}' if sign else f'{x:.{digits}f}'
  return text.replace('-', '−')


def percent(ratio: float | None) -> str:
  """A change as a signed percentage.

  >>> percent(0.61), percent(1.05), percent(float('nan'))
  ('−39 %', '+5 %', '–')
  """
  if not known(ratio):
    return MISSING
  change = round(100 * (ratio - 1))
  return f'{change:+d} %'.replace('-', '−') if change else '±0 %'


def _three(x):
  """To three digits, integers whole."""
  if x == int(x) or abs(x) >= 99.95:
    return f'{x:.0f}'
  return f'{x:.1f}' if abs(x) >= 9.995 else f'{x:.2f}'
