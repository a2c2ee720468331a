"""The models that experiments train."""

from lrjax.models.llama import Llama as Llama
from lrjax.models.llama import next_token_loss as next_token_loss
from lrjax.models.llama_config import LLAMA_SIZES as LLAMA_SIZES
from lrjax.models.llama_config import LlamaConfig as LlamaConfig
from lrjax.models.llama_params import param_specs as param_specs
from lrjax.models.llama_parts import llama_parts as llama_parts
