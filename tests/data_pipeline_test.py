"""Batches: their order, their resume, and a validation mean that is exact."""

import dataclasses

import grain
import numpy as np
import pytest

from experiments.data import (
  DataConfig,
  iterator_at,
  load_corpus,
  train_batches,
  valid_batches,
)
from experiments.errors import DataError

CONFIG = DataConfig(
  source='synthetic', synthetic_bytes=1 << 14, seq_len=100, batch_size=4
)


@pytest.fixture(scope='module')
def corpus():
  return load_corpus(CONFIG)


def take(iterator, count):
  return [next(iterator)['tokens'] for _ in range(count)]


def configured(corpus, **fields):
  return dataclasses.replace(corpus, config=dataclasses.replace(CONFIG, **fields))


def rows(batches):
  """The windows of batches, in an order of their own."""
  return sorted(row.tobytes() for batch in batches for row in batch)


def test_windows_are_slices_of_the_corpus(corpus):
  tokens = corpus.tokens['train'].astype(np.int32)
  count = (len(tokens) - 1) // 100
  expected = [tokens[i * 100 : i * 100 + 101] for i in range(count)]
  epoch = take(iter(train_batches(configured(corpus, batch_size=1), 0)), count)
  assert rows([expected]) == rows(epoch)
  assert epoch[0].shape == (1, 101) and epoch[0].dtype == np.int32


def test_every_epoch_has_another_order(corpus):
  one = configured(corpus, batch_size=1)
  count = (len(corpus.tokens['train']) - 1) // 100
  both = take(iter(train_batches(one, 0)), 2 * count)
  first, second = both[:count], both[count:]
  assert rows(first) == rows(second)
  assert not np.array_equal(first, second)


def test_order_depends_on_the_seed(corpus):
  stream = lambda seed: np.stack(take(iter(train_batches(corpus, seed)), 20))
  np.testing.assert_array_equal(stream(0), stream(0))
  assert not np.array_equal(stream(0), stream(1))


@pytest.mark.parametrize('hosts', [2, 4])
@pytest.mark.parametrize('start', [0, 7, 1000])
def test_global_batches_are_the_same_for_every_number_of_hosts(corpus, hosts, start):
  whole = take(iterator_at(train_batches(corpus, 3), start), 50)
  parts = [
    take(iterator_at(train_batches(corpus, 3, host=h, hosts=hosts), start), 50)
    for h in range(hosts)
  ]
  for step in range(50):
    assert parts[0][step].shape == (4 // hosts, 101)
    assert rows([whole[step]]) == rows([part[step] for part in parts])
  # Not merely the same set: row h of each group of rows is host h's.
  np.testing.assert_array_equal(whole[0][1::hosts], parts[1][0])


def test_resume_is_exact(corpus):
  batches = train_batches(corpus, 0)
  whole = take(iter(batches), 120)  # three epochs
  for step in (1, 39, 40, 100):
    np.testing.assert_array_equal(
      take(iterator_at(batches, step), 20), whole[step:][:20]
    )
  iterator = iter(batches)
  take(iterator, 17)
  assert iterator.get_state() == {'next_index': 17}


def test_every_checkpoint_gives_the_same_output(corpus):
  check = grain.experimental.assert_equal_output_after_checkpoint
  for host in range(2):
    train = train_batches(corpus, 0, host=host, hosts=2)
    check(grain.experimental.LimitIterDataset(train, 12))
    check(valid_batches(corpus, host=host, hosts=2))


def mean_over(corpus, **split):
  """Token-weighted mean of a made-up loss, summed in exact integers."""
  hosts = split.pop('hosts', 1)
  total = count = 0
  lengths = set()
  for host in range(hosts):
    batches = list(valid_batches(corpus, host=host, hosts=hosts, **split))
    lengths.add(len(batches))
    for batch in batches:
      mask = batch['mask'].astype(np.int64)
      loss = batch['tokens'][:, 1:].astype(np.int64) * 7 + batch['tokens'][:, :-1]
      total, count = total + (loss * mask).sum(), count + mask.sum()
  assert len(lengths) == 1  # or a collective would wait for ever
  return int(total), int(count)


@pytest.mark.parametrize('seq_len', [100, 64, 3000])
def test_validation_mean_is_exact_for_all_batch_sizes_and_hosts(corpus, seq_len):
  tokens = corpus.tokens['valid'].astype(np.int64)
  expected = (int((tokens[1:] * 7 + tokens[:-1]).sum()), len(tokens) - 1)
  corpus = configured(corpus, seq_len=seq_len)
  for size, hosts in [(1, 1), (4, 1), (7, 1), (2, 2), (4, 2), (14, 2), (40, 4)]:
    assert mean_over(corpus, batch_size=size, hosts=hosts) == expected


def test_validation_shapes_and_order(corpus):
  batches = list(valid_batches(corpus))
  tokens = corpus.tokens['valid']
  assert {b['tokens'].shape for b in batches} == {(4, 101)}
  assert {b['mask'].shape for b in batches} == {(4, 100)}
  assert batches[0]['mask'].dtype == np.float32
  np.testing.assert_array_equal(batches[0]['tokens'][1], tokens[100:201])
  last = batches[-1]
  filled = int(last['mask'][-1].sum())
  assert (len(tokens) - 1) % 100 == filled < 100
  assert last['mask'][-1, :filled].all() and not last['tokens'][-1, filled + 1 :].any()


def test_fixed_validation_windows(corpus):
  few = configured(corpus, valid_windows=3)
  (batch,) = valid_batches(few)
  total = -(-(len(corpus.tokens['valid']) - 1) // 100)
  for row, window in enumerate([0, total // 3, 2 * total // 3]):
    expected = corpus.tokens['valid'][window * 100 : window * 100 + 101]
    np.testing.assert_array_equal(batch['tokens'][row], expected)
  assert batch['mask'].sum(axis=1).tolist() == [100, 100, 100, 0]
  assert mean_over(configured(corpus, valid_windows=10_000)) == mean_over(corpus)


def test_hosts_that_do_not_divide_the_batch(corpus):
  for batches in (lambda **h: train_batches(corpus, 0, **h),
                  lambda **h: valid_batches(corpus, **h)):  # fmt: skip
    with pytest.raises(ValueError, match='batch_size=4 must be a multiple of hosts=3'):
      batches(host=0, hosts=3)
    with pytest.raises(ValueError, match=r'host=2 must be .* less than hosts=2'):
      batches(host=2, hosts=2)


def test_seeds(corpus):
  with pytest.raises(ValueError, match='seed=-1 must be at least 0'):
    train_batches(corpus, -1)
  for seed in (1.5, True):
    with pytest.raises(TypeError, match='must be int'):
      train_batches(corpus, seed)


def test_a_failing_read_stops_the_run(corpus):
  class Failing:
    def __len__(self):
      return 1001

    def __getitem__(self, index):
      if index.start == 300:
        raise OSError('bad sector')
      return np.zeros(101, np.uint16)

  broken = dataclasses.replace(corpus, tokens={'train': Failing(), 'valid': Failing()})
  message = "source='synthetic': (train|valid) window 3 cannot be read: bad sector"
  for batches in (train_batches(broken, 0), valid_batches(broken)):
    with pytest.raises(DataError, match=message) as caught:
      list(batches)
    assert isinstance(caught.value.__cause__, OSError)


def test_synthetic_text_is_learnable(corpus):
  """Byte pairs alone predict it with less than half the bits of a uniform guess."""
  tokens = corpus.tokens['train'].astype(int)
  counts = np.zeros((256, 256))
  np.add.at(counts, (tokens[:-1], tokens[1:]), 1)
  given = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
  bits = -(counts[counts > 0] * np.log2(given[counts > 0])).sum() / counts.sum()
  assert 2 < bits < 4
