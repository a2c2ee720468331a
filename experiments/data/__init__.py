"""Text to batches: sources, tokenizers, and a pipeline that resumes exactly.

>>> corpus = load_corpus(DataConfig(source='synthetic', seq_len=32, batch_size=4))
>>> batch = next(iter(train_batches(corpus, seed=0)))
>>> batch['tokens'].shape
(4, 33)
"""

from experiments.data.config import DataConfig as DataConfig
from experiments.data.corpus import Corpus as Corpus
from experiments.data.corpus import load_corpus as load_corpus
from experiments.data.pipeline import fingerprint as fingerprint
from experiments.data.pipeline import iterator_at as iterator_at
from experiments.data.pipeline import train_batches as train_batches
from experiments.data.pipeline import valid_batches as valid_batches
from experiments.data.tokenizers import Tokenizer as Tokenizer
from experiments.data.tokenizers import check_vocab_size as check_vocab_size
from experiments.data.tokenizers import load_tokenizer as load_tokenizer
