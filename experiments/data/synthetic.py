"""Seeded text that is the same on every machine and with every Python and numpy."""

from collections.abc import Iterator

import numpy as np

_WORDS = 64
_SUCCESSORS = 4
_WORDS_PER_TEXT = 64
_LETTERS = 'abcdefghijklmnopqrstuvwxyz'


def texts(size: int, seed: int) -> Iterator[bytes]:
  """Texts of a Markov chain over 64 made-up words with 4 successors each.

  A model that knows the chain needs at most 2 bits a word, about 0.4 a byte, and counts
  of byte pairs alone bring a loss to less than half of the uniform 8 bits.

  Args:
    size: bytes in all; the last text may be cut.
    seed: another seed has other words and another chain.

  Yields:
    ASCII.
  """
  # Raw 64-bit words only: numpy promises that a bit generator's stream never changes,
  # but not what its Generator makes of it.
  raw = np.random.Philox(key=seed).random_raw
  words = [_word(raw) for _ in range(_WORDS)]
  successors = (raw(_WORDS * _SUCCESSORS) % _WORDS).reshape(_WORDS, -1).tolist()
  word = 0
  while size > 0:
    chosen = []
    for draw in (raw(_WORDS_PER_TEXT) % _SUCCESSORS).tolist():
      word = successors[word][draw]
      chosen.append(words[word])
    text = (' '.join(chosen) + '.\n').encode('ascii')[:size]
    size -= len(text)
    yield text


def _word(raw):
  length = 2 + int(raw() % 6)
  return ''.join(_LETTERS[i] for i in (raw(length) % len(_LETTERS)).tolist())
