"""Files to texts: one reader per format, each yielding UTF-8 in file order.

Every reader takes a path and the key of the text, and raises ValueError with the
file and the place in it for whatever is not as it should be.
"""

import json
from collections.abc import Iterator

_ENDINGS = {
  '.jsonl': 'jsonl',
  '.ndjson': 'jsonl',
  '.parquet': 'parquet',
  '.arrayrecord': 'arrayrecord',
  '.array_record': 'arrayrecord',
}
_BLOCK = 256  # records read at once


def format_of(path: str) -> str:
  """The format that a file name's ending names; 'text' if none.

  >>> format_of('c4/en.jsonl'), format_of('notes.md')
  ('jsonl', 'text')
  """
  name = path.lower()
  return next((f for ending, f in _ENDINGS.items() if name.endswith(ending)), 'text')


def read(path: str, format: str, key: str) -> Iterator[bytes]:
  """The texts of a file.

  Args:
    path: of the file.
    format: 'text', the whole file is one text; 'jsonl', an object in each line that
      is not blank; 'parquet', a string column; 'arrayrecord', JSON objects, or texts
      if `key` is ''.
    key: key or column of the text; not used for 'text'.

  Yields:
    UTF-8.

  Raises:
    ValueError: naming the file and the line, record or byte that cannot be read.
  """
  return _READERS[format](path, key)


def text_field(record, key: str, where: str) -> bytes:
  """`record[key]` as UTF-8, or a ValueError that says what is there instead."""
  if not isinstance(record, dict):
    raise ValueError(f'{where}: expected an object with the key {key!r}, '
                     f'got {type(record).__name__}')  # fmt: skip
  if key not in record:
    raise ValueError(f'{where}: no key {key!r}; there are {sorted(record)}')
  text = record[key]
  if not isinstance(text, str):
    raise ValueError(f'{where}: {key!r} is {type(text).__name__}, not str')
  try:
    return text.encode('utf-8')
  except UnicodeEncodeError as error:  # JSON can hold half of a surrogate pair
    raise ValueError(f'{where}: {key!r} is not valid Unicode: {error}') from error


def _check_utf8(data, where, offset=0):
  try:
    data.decode('utf-8')
  except UnicodeDecodeError as error:
    raise ValueError(f'{where} is not UTF-8 at byte {offset + error.start}: '
                     f'{error.reason}') from error  # fmt: skip


def _json_text(data, key, where):
  try:
    record = json.loads(data)
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{where} is not JSON: {error}') from error
  return text_field(record, key, where)


def _read_text(path, key):
  del key
  with open(path, 'rb') as file:
    data = file.read()
  _check_utf8(data, path)
  yield data


def _read_jsonl(path, key):
  offset = 0
  with open(path, 'rb') as file:
    for number, line in enumerate(file, 1):
      _check_utf8(line, path, offset)
      offset += len(line)
      if line.strip():
        yield _json_text(line, key, f'{path}, line {number}')


def _read_parquet(path, key):
  import pyarrow as pa
  import pyarrow.parquet as pq

  count = 0
  try:
    file = pq.ParquetFile(path, page_checksum_verification=True)
    schema = file.schema_arrow
  except Exception as error:  # pyarrow raises several unrelated types
    raise ValueError(f'{path} is not a whole Parquet file: {error}') from error
  with file:
    if key not in schema.names:
      raise ValueError(f'{path}: no column {key!r}; there are {schema.names}')
    if schema.field(key).type not in (pa.string(), pa.large_string()):
      raise ValueError(
        f'{path}: column {key!r} is {schema.field(key).type}, not string'
      )
    batches = file.iter_batches(columns=[key], batch_size=_BLOCK)
    while (rows := _next(batches, f'{path}, row {count} or after')) is not None:
      for text in rows:
        yield text_field({key: text}, key, f'{path}, row {count}')
        count += 1


def _next(batches, where):
  """The next batch as a list; None at the end."""
  try:
    batch = next(batches, None)
    return None if batch is None else batch.column(0).to_pylist()
  except Exception as error:
    raise ValueError(f'{where}: {error}') from error


def _read_array_record(path, key):
  from array_record.python import array_record_module

  reader = array_record_module.ArrayRecordReader(path)
  # A broken file does not raise here: it has no records and is not ok.
  if not reader.ok():
    raise ValueError(f'{path} is not a whole ArrayRecord file')
  total = reader.num_records()
  for start in range(0, total, _BLOCK):
    stop = min(start + _BLOCK, total)
    try:
      records = reader.read(start, stop)
    except Exception as error:
      raise ValueError(f'{path}, records {start} to {stop - 1}: {error}') from error
    for number, record in enumerate(records, start):
      where = f'{path}, record {number}'
      if key:
        yield _json_text(record, key, where)
      else:
        _check_utf8(record, where)
        yield record
  reader.close()


_READERS = {
  'text': _read_text,
  'jsonl': _read_jsonl,
  'parquet': _read_parquet,
  'arrayrecord': _read_array_record,
}
