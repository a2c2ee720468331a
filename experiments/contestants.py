"""What `experiments.bench` times: optimizers alone, whole training steps, torch's."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import lrjax
from lrjax.models.llama import Llama, next_token_loss
from lrjax.models.llama_config import LlamaConfig
from lrjax.models.llama_params import unstack_layers
from lrjax.modules.nnx import split
from lrjax.projected import bases_of, enough
from lrjax.types import Projected
from lrjax.views import leaf_path

STEADY = 3


class Method(NamedTuple):
  """How a model is updated.

  Attributes:
    tx: the transformation.
    stacked: whether it gets the layers stacked; whole steps always do.
    projected: whether gradients are projected in the backward pass between refreshes.
    sketched: whether refreshes form none either.
  """

  tx: optax.GradientTransformation
  stacked: bool = False
  projected: bool = False
  sketched: bool = False


def _bytes(tree: Any) -> int:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


class Contestant(Protocol):
  """One method, and the seconds its steps took.

  Attributes:
    refresh: of each round's first step, which fits the bases.
    steady: of the steps that do not, `STEADY` a round.
    state_bytes: of the optimizer's state.
    moved_bytes: that a steady step must move, None where nobody knows.
    temporary_bytes: of a steady step, None where nobody tells.
    refresh_temporary_bytes: of a refresh.
    compile_seconds: of all programs it needs.
  """

  refresh: list[float]
  steady: list[float]
  state_bytes: int
  moved_bytes: int | None
  temporary_bytes: int | None
  refresh_temporary_bytes: int | None
  compile_seconds: float

  def round(self) -> None:
    """One step with a fresh state, then steady ones."""
    ...


class _Timed:
  """The programs of a method, `(params, state, *args) -> (params, state, ...)`."""

  moved_bytes: int | None = None

  def __init__(self, init: Callable, params: Any, args: tuple):
    self.init, self.params, self.args = jax.jit(init), params, args
    self.refresh: list[float] = []
    self.steady: list[float] = []
    self.compile_seconds = 0.0
    self.state = jax.eval_shape(init, params)
    self.state_bytes = _bytes(self.state)

  def compiled(self, step: Callable, *args: Any) -> tuple[Callable, int | None]:
    """A step that donates, on `args` or those of all steps; bytes of its temporaries."""
    start, args = time.perf_counter(), args or self.args
    lowered = jax.jit(step, donate_argnums=(0, 1))
    program = lowered.lower(self.params, self.state, *args).compile()
    self.compile_seconds += time.perf_counter() - start
    memory = program.memory_analysis()
    run = lambda params, state: program(params, state, *args)
    return run, None if memory is None else memory.temp_size_in_bytes

  def run(self, first: Callable, later: Callable) -> None:
    state = jax.block_until_ready(self.init(self.params))
    for i in range(1 + STEADY):
      start = time.perf_counter()
      step = later if i else first
      self.params, state, *_ = step(self.params, state)
      jax.block_until_ready((self.params, state))
      (self.steady if i else self.refresh).append(time.perf_counter() - start)


class OptimizerStep(_Timed):
  """An update and its application, from gradients at hand."""

  def __init__(self, method: Method, params: Any, grads: Any):
    grads = grads if method.stacked else unstack_layers(grads)
    super().__init__(method.tx.init, jax.tree.map(jnp.zeros_like, grads), (grads,))

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
      updates, state = method.tx.update(grads, state, params)
      return optax.apply_updates(params, updates), state

    self.first, self.refresh_temporary_bytes = self.compiled(step)
    self.later, self.temporary_bytes = self.first, self.refresh_temporary_bytes
    if method.projected:
      grads = _projected(method.tx, grads)
      self.later, self.temporary_bytes = self.compiled(step, grads)
    self.moved_bytes = _bytes(grads) + 2 * (_bytes(self.params) + self.state_bytes)

  def round(self) -> None:
    self.run(self.first, self.later)


def _projected(tx: optax.GradientTransformation, grads: Any) -> Any:
  """What the backward pass leaves of gradients, with other numbers in it."""
  rules = enough(tx, grads)
  thin = lambda p: {n: x for n, (x, _) in bases_of(tx, p, tx.init(p)).items()}
  shapes = jax.eval_shape(thin, grads)

  def one(path: Any, g: jax.Array) -> Any:
    name = leaf_path(path)
    if name not in rules:
      return g
    side = rules[name][0].side or ''
    rows = g if side == 'in' else jnp.swapaxes(g, -1, -2)
    return Projected(rows[..., : shapes[name].shape[-1], :], g.shape, g.dtype, side)

  return jax.tree.map_with_path(one, grads)


class TrainingStep(_Timed):
  """Loss, gradients, update and application on one batch of tokens."""

  def __init__(self, method: Method, config: LlamaConfig, tokens: jax.Array):
    model = lambda: Llama(config, rngs=nnx.Rngs(0))
    graphdef, _, rest = split(nnx.eval_shape(model))
    params = jax.jit(lambda: split(model())[1])()
    super().__init__(method.tx.init, params, (tokens,))

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
      logits = nnx.merge(graphdef, params, rest)(tokens[:, :-1])
      nats, count = next_token_loss(logits, tokens[:, 1:])
      return nats / count

    def training(value_and_grad: Callable) -> Callable:
      def step(params: Any, state: Any, tokens: jax.Array) -> tuple:
        value, grads = value_and_grad(params, state, tokens)
        updates, state = method.tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

      return step

    full = lambda params, state, tokens: jax.value_and_grad(loss)(params, tokens)
    projected = lrjax.projected_value_and_grad(loss, method.tx)
    sketch = lrjax.sketched_refresh(loss, method.tx)

    first = training(full)
    if method.sketched:
      first = lambda params, state, tokens: (params, sketch(params, state, tokens))
    self.first, self.refresh_temporary_bytes = self.compiled(first)
    self.later, self.temporary_bytes = self.first, self.refresh_temporary_bytes
    if method.projected:
      self.later, self.temporary_bytes = self.compiled(training(projected))
    if method.sketched:
      refresh = self.first
      self.first = lambda params, state: self.later(*refresh(params, state))
      if self.temporary_bytes is not None and self.refresh_temporary_bytes is not None:
        more = max(self.temporary_bytes, self.refresh_temporary_bytes)
        self.refresh_temporary_bytes = more

  def round(self) -> None:
    self.run(self.first, self.later)


class TorchStep:
  """An optimizer of torch's world on the same gradients, in eager mode as it comes."""

  moved_bytes: int | None = None
  temporary_bytes: int | None = None
  refresh_temporary_bytes: int | None = None
  compile_seconds: float = 0.0

  def __init__(self, name: str, rank: int, grads: Any):
    import torch  # pyrefly: ignore

    self.refresh: list[float] = []
    self.steady: list[float] = []
    plain, matrices = [], []
    for path, g in jax.tree.leaves_with_path(unstack_layers(grads)):
      # torch's weights are (out, in).
      p = torch.nn.Parameter(torch.zeros(g.T.shape))
      p.grad = torch.from_numpy(np.array(g.T, np.float32))
      hidden = lrjax.hidden_kernels(leaf_path(path), g)
      (matrices if hidden else plain).append(p)
    self.make = lambda: _torch_optimizer(name, rank, plain, matrices)
    self.optimizer = self.make()
    self.optimizer.step()
    state = self.optimizer.state.values()
    tensors = [x for s in state for x in _tensors(s)]
    self.state_bytes = sum(x.numel() * x.element_size() for x in tensors)

  def round(self) -> None:
    self.optimizer = self.make()
    for i in range(1 + STEADY):
      start = time.perf_counter()
      self.optimizer.step()
      (self.steady if i else self.refresh).append(time.perf_counter() - start)


def _torch_optimizer(name: str, rank: int, plain: list, matrices: list) -> Any:
  make: Any
  options = dict(rank=rank, update_proj_gap=10**6, proj_type='std')
  if name == 'galore-torch':
    from galore_torch import GaLoreAdamW as make  # pyrefly: ignore

    options |= dict(scale=0.25)
  else:
    from apollo_torch import APOLLOAdamW as make  # pyrefly: ignore

    options |= dict(scale=1.0, scale_type='channel', proj='random')
  groups: Any = [dict(params=plain), dict(params=matrices, **options)]
  return make(groups, lr=1e-2)


def _tensors(state: Any) -> list:
  """All tensors that one parameter's state holds, projectors included."""
  import torch  # pyrefly: ignore

  if isinstance(state, torch.Tensor):
    return [state]
  if isinstance(state, dict):
    return [x for v in state.values() for x in _tensors(v)]
  if isinstance(state, (list, tuple)):
    return [x for v in state for x in _tensors(v)]
  return _tensors(vars(state)) if hasattr(state, '__dict__') else []
