"""The base class of curvature matrices of a model's loss."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from eigenfilter import _distributed, _perturbation
from eigenfilter.curvature.engines.automatic import AutomaticEngine, RequestedEngine
from eigenfilter.curvature.engines.memory import default_budget
from eigenfilter.curvature.engines.registry import ENGINE_SPECS, Engines
from eigenfilter.curvature.loss.all_reduce import reduce
from eigenfilter.curvature.loss.batch_sources import source_of
from eigenfilter.curvature.loss.objective import Objective, Outer
from eigenfilter.curvature.loss.slices import ShardSlices, slices_of
from eigenfilter.curvature.loss.snapshot import ParamSnapshot, checksum
from eigenfilter.curvature.loss.vectors import Sums
from eigenfilter.curvature.operators.algebra import SymmetricMatrix
from eigenfilter.curvature.operators.selection import select

_LONGER = (
    "rows of {0} are longer than max_norm, and the forward pass would rewrite them, which would "
    "change x. Let the embedding renormalize all its rows, in a forward pass on "
    "torch.arange(num_embeddings).unsqueeze(0), and then use the operator"
)
_CHANGED = (
    "parameters, buffers or data changed while a solver was using the operator: its products "
    "belong to no single matrix"
)


class CurvatureOperator(SymmetricMatrix):
    """A symmetric matrix C of a model's loss over batches, by products with vectors.

        C = sum_b w_b C_b / sum_b w_b    (reduction="mean")
        C = sum_b C_b                    (reduction="sum")

    The subclass defines C_b, the matrix on batch b. C is taken at x [n], the parameters in the
    order of `params`, each flattened in row-major order. The weight w_b is the number of samples of
    batch b, so that uneven batches give the C of the whole data set if `loss_fn` is a mean over
    samples.

    The loss is one fixed function of x: random numbers are replayed, modes of submodules are set
    for each evaluation and restored, `p.grad` is never changed, and a surrounding `torch.autocast`
    does not apply. The operator follows its model: a change of parameters, buffers or data is
    noticed before the next product, except inside `fixed()`, where it raises. docs/curvature.md
    explains this, the engines, and how to use a model that is distributed over processes.

    Args:
        model: the module.
        loss_fn: function (output, target) -> tensor of one element. If it is a module, its
            parameters and buffers belong to the operator too.
        data: one batch, a list of batches, or a DataLoader. A batch is a pair (input, target); its
            loss is loss_fn(model(input), target) on the device of the model. A loader is read again
            for each pass over data that is not kept, and must give the same batches each time; what
            it draws from torch's global generator is replayed.
        params: parameters of the model (or of loss_fn), each once, or patterns of the model's names
            for them, as "*.h.3.*" or ["*.attn.*", "*.mlp.*"] (shell wildcards, see `fnmatch`); None
            for all. Those that do not require grad are left out.
        engine: how to multiply: "auto" chooses an exact engine by a short timing on the first
            batch, and takes the next one where it fails. "cached_graph", "per_pass_graph", "vmap",
            "microbatched", "forward_over_reverse" or "finite_difference" is used or raises.
        reduction: "mean" or "sum", as above.
        forward: function (model, batch) -> (output, target), for batches of any other layout; it
            moves them to the device itself.
        weight: function batch -> w_b >= 0, for reduction="mean" if `loss_fn` averages over
            something else than the leading dimension of the output: tokens that are not ignored,
            class weights, or an output that is not a tensor. A batch of weight 0 is left out. With
            several batches, each weight is checked once against the loss, see `weights.Weights`.
        process_group: processes that hold data, each its own, and multiply the same vectors at the
            same x. C is that of all data, by one sum over processes for each product. Under
            DistributedDataParallel the module inside is used. None for this process alone, or for
            all processes of the mesh if FSDP2 shards the model.
        mode: "eval" switches dropout off, and batch normalization uses its running statistics. In
            "train" dropout masks are drawn once for each batch, and batch normalization uses the
            statistics of the batch and differentiates through them, so that C depends on how data
            are split into batches. What modules write to their buffers is discarded.
        dtype: torch.float32 or torch.float64: C is that of a copy of the model and the loss in this
            dtype, with batches converted, and vectors have it. Parameters in bfloat16 or float16
            need it. The copy is made again when the model has changed. None uses the model itself.
        autocast: dtype such as torch.bfloat16 in which the model and the loss compute, under
            `torch.autocast`. Vectors keep the dtype of the parameters.
        memory_budget: bytes that kept graphs may take, or the graph of one piece of a batch for
            "microbatched"; None for half of what is free when they are first built.
        seed: seed of the random numbers that the model draws (seed + b on batch b) and the loader.

    Attributes:
        params: the parameters that x consists of.
        slices: how vectors are divided among processes, a `protocol.Slices`; None if they are
            whole. Under FSDP2 every process holds a slice of every vector: its shards of the
            parameters, one after another.

    Raises:
        ValueError: an argument is not as above; the parameters are not real and floating, of one
            dtype, on one device; they are sharded, and not by FSDP2 for the Hessian with
            engine="finite_difference". From a product: batches have other weights than their loss
            averages over, or all weights are 0.
        RuntimeError: from a product: an optimizer holds perturbed parameters; something changed
            inside `fixed()`; a loader gave other batches in a second pass; processes differ in x or
            in the vectors; the loss depends on a parameter that gets no gradient; the engine, or
            with "auto" every engine, cannot differentiate the loss as it needs.
    """

    _through_backward = False  # whether products can be made from gradients by backward() alone

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        data: Any,
        *more: Any,
        params: str | Iterable[str | nn.Parameter] | None = None,
        engine: str = "auto",
        reduction: str = "mean",
        forward: Callable[[nn.Module, Any], tuple[Any, Any]] | None = None,
        weight: Callable[[Any], float] | None = None,
        process_group: dist.ProcessGroup | None = None,
        mode: str = "eval",
        autocast: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        memory_budget: int | None = None,
        seed: int = 0,
    ) -> None:
        if more:
            raise TypeError(
                f"data come as one argument, and {len(more)} more positional ones were given: pass "
                "a batch as the tuple (x, y), batches as a list, and options by name"
            )
        _check_choices(engine=engine, reduction=reduction, mode=mode)
        if reduction == "sum" and weight is not None:
            raise ValueError("weight has no meaning for reduction='sum'")
        if memory_budget is not None and memory_budget < 0:
            raise ValueError(f"memory_budget must be a number of bytes >= 0, not {memory_budget}")
        if autocast is not None and not autocast.is_floating_point:
            raise ValueError(f"autocast must be a floating dtype, not {autocast}")
        if dtype not in (None, torch.float32, torch.float64):
            raise ValueError(f"dtype must be torch.float32 or torch.float64, not {dtype}")
        if not isinstance(model, nn.Module):
            raise ValueError(f"model must be a torch.nn.Module, not {type(model).__name__}")
        self._engine = AutomaticEngine() if engine == "auto" else RequestedEngine(engine)
        self._group = process_group
        self._objective = Objective(
            model.module if isinstance(model, DistributedDataParallel) else model,
            loss_fn,
            self._finish,
            forward=forward,
            weight=weight,
            mean=reduction == "mean",
            train=mode == "train",
            autocast=autocast,
            seed=seed,
            alone=process_group is None,
        )
        self._source = source_of(
            data, pairs=forward is None, alone=process_group is None, seed=seed
        )
        if _distributed.is_fsdp(self._objective.tree):
            _distributed.reshard()  # or the model's parameters may be gathered copies
        self._dtype = dtype
        candidates = self._own_parameters() if params is None else params
        self.params = select(candidates, self._objective.model, dtype)
        self._check_own(ValueError)
        self.slices = slices_of(self._objective.tree, self.params)
        if self.slices is not None:
            self._check_sharded(self.slices)
        else:
            self._objective.watched = self.params
        self._budget = memory_budget
        self._cached: tuple[Engines, ParamSnapshot] | None = None
        self._fixed = False

    @staticmethod
    @abstractmethod
    def _finish(
        loss_fn: Callable[[Any, Any], Tensor], output: Any, target: Any, mean: bool
    ) -> tuple[Tensor, Outer | None]:
        """Return `value` and `outer` of an `Evaluation`."""

    @property
    def shape(self) -> tuple[int, int]:
        """(n, n)."""
        n = sum(p.numel() for p in self.params)
        return n, n

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters or their copies, and of the vectors."""
        return self._dtype or self.params[0].dtype

    @property
    def device(self) -> torch.device:
        """The device of the parameters and of the vectors."""
        return self.params[0].device

    @property
    def engine(self) -> str:
        """The name of the engine; with "auto", of the one that made the last product."""
        return self._engine.name

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The modules whose parameters the loss depends on: the model, and loss_fn if it is one."""
        return tuple(self._objective.tree.members)

    @property
    def leads(self) -> bool:
        """Whether this process is the first, or the only one, of those that share the operator."""
        if self.slices is not None:
            return self.slices.leads
        return self._group is None or dist.get_rank(self._group) == 0

    @property
    def error(self) -> float | None:
        """The largest estimated relative error of a finite difference at this x.

        It is None for the exact engines, and before the first product.
        """
        return None if self._cached is None else self._cached[0].error

    def matvec(self, v: Tensor) -> Tensor:
        """Return C v [n] for v [n], both whole vectors or both slices.

        Raises:
            ValueError: v does not have the operator's shape, dtype and device.
            RuntimeError: see the class.
        """
        self._check_like("v", "[{}]", v, v.ndim == 1)
        return self._multiply(v.unsqueeze(1))[0]

    def matmat(self, V: Tensor) -> Tensor:
        """Return C V [n, b] for V [n, b], b >= 1, all at the same x.

        Raises:
            ValueError: V does not have the operator's shape, dtype and device.
            RuntimeError: see the class.
        """
        self._check_like("V", "[{}, b] with b >= 1", V, V.ndim == 2 and V.shape[1] > 0)
        return self._multiply(V).T

    @contextmanager
    def fixed(self) -> Iterator[None]:
        """A context in which x must not change; a product or the exit raises if it did.

        Raises:
            RuntimeError: parameters, buffers or data changed inside.
        """
        if self._fixed:
            yield
            return
        _, snapshot = self._current()
        self._fixed = True
        try:
            yield
            if self._anywhere(not snapshot.matches(*self._tensors())):
                raise RuntimeError(_CHANGED)
        finally:
            self._fixed = False

    @torch.no_grad()
    def _multiply(self, V: Tensor) -> Tensor:
        """Return (C V)^T [b, n]."""
        engines, _ = self._current()
        with self._raising_everywhere(V, [V]), torch.autocast(self.device.type, enabled=False):
            sums = self._engine.multiply(engines, self._source, self._bytes, V.detach())
        return self._total(sums, [V])

    @contextmanager
    def _raising_everywhere(self, like: Tensor, vectors: list[Tensor]) -> Iterator[None]:
        """A context for this process's sums; if it raises ValueError, all processes raise."""
        try:
            yield
        except ValueError:
            if self._group is not None and self.slices is None:
                none = Sums(like, self.params)
                none.weight = math.nan
                with suppress(RuntimeError):  # which `_total` raises in all processes
                    self._total(none, vectors)
            raise

    def _total(self, sums: Sums, vectors: list[Tensor]) -> Tensor:
        """Return the mean or sum over the batches of all processes.

        Args:
            sums: of this process's batches.
            vectors: what was multiplied, which must be the same in all processes.

        Raises:
            ValueError: all batches have weight 0.
        """
        if self._group is not None and self.slices is None:
            marks = [checksum(tensors) for tensors in (self._tensors()[0], vectors) if tensors]
            reduce(sums, marks, self._group)
        if sums.weight == 0:
            raise ValueError(
                "all batches have weight 0, so that there is no mean: weight= returned 0 for each, "
                "or all outputs are empty, as where every label of a language model is -100"
            )
        if self._objective.mean and sums.weight != 1.0:
            sums.rows.div_(sums.weight)
        return sums.rows

    def _bytes(self) -> int:
        return default_budget(self.device) if self._budget is None else self._budget

    def _current(self) -> tuple[Engines, ParamSnapshot]:
        """Return the engines for the model as it is now, and the snapshot that they belong to."""
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "products need derivatives, and there are none in torch.inference_mode(): use the "
                "operator outside it (torch.no_grad() is fine)"
            )
        holder = _perturbation.holder(self._objective.tree.parameters())
        if holder is not None:
            raise RuntimeError(
                f"{type(holder).__name__} holds perturbed parameters: finish its step(), or call "
                "its restore(), before using the operator"
            )
        if self.slices is not None:
            _distributed.reshard()
        if self._cached is not None:
            _, snapshot = self._cached
            same = snapshot.same_versions() if self._fixed else snapshot.matches(*self._tensors())
            if not self._anywhere(not same):
                return self._cached
            if self._fixed:
                raise RuntimeError(_CHANGED)
        self._cached = None  # frees the old graphs before new ones are built
        self._check_own(RuntimeError)
        if self._anywhere(bool(longer := self._objective.beyond_max_norm())):
            raise RuntimeError(_LONGER.format(", ".join(longer)))
        self._source.forget()
        f = self._objective if self._dtype is None else self._objective.with_dtype(self._dtype)
        params = self.params if self._dtype is None else f.watched
        engines = Engines(f, self._source, params, self._bytes(), self.slices)
        self._cached = engines, ParamSnapshot(*self._tensors())
        return self._cached

    def _check_like(self, name: str, layout: str, v: Tensor, fits: bool) -> None:
        n = self.shape[0] if self.slices is None else self.slices.length
        if v.layout != torch.strided:
            raise ValueError(f"{name} must be dense, not {v.layout}: pass {name}.to_dense()")
        if not fits or v.shape[0] != n or v.dtype != self.dtype or v.device != self.device:
            raise ValueError(
                f"{name} must be {layout.format(n)}, {self.dtype}, on {self.device}; got "
                f"{list(v.shape)}, {v.dtype}, on {v.device}"
            )

    def _check_sharded(self, slices: ShardSlices) -> None:
        if self._dtype is not None:
            raise ValueError(
                "dtype copies the model, and a model that FSDP2 shards cannot be copied: leave it "
                "out, and let fully_shard's mp_policy keep the parameters in float32"
            )
        if not self._through_backward or self.engine != "finite_difference":
            raise ValueError(
                "a model that FSDP2 shards has only the Hessian, with engine='finite_difference', "
                "because FSDP2 cannot be differentiated twice: use these, or an unsharded copy of "
                "the model with process_group"
            )
        if self._group is not None and not slices.spans(self._group):
            raise ValueError("process_group must have the processes of FSDP2's mesh, or be None")

    def _anywhere(self, condition: bool) -> bool:
        """Whether a condition holds in any process that holds a slice, so that all do the same."""
        return condition if self.slices is None else self.slices.sum_of_all(condition) > 0

    def _check_own(self, error: type[Exception]) -> None:
        own = {id(p) for p in self._own_parameters()}
        if any(id(p) not in own for p in self.params):
            raise error(
                "a parameter of the operator is not a parameter of the model: of a copy, or "
                "replaced since? Make a new operator from the model's own parameters"
            )
        if not all(p.requires_grad for p in self.params):
            raise error(
                "a parameter of the operator does not require grad any more: make a new operator, "
                "or call requires_grad_() on it"
            )

    def _own_parameters(self) -> Iterator[nn.Parameter]:
        """Return the parameters that x may consist of."""
        return self._objective.tree.parameters()

    def _tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the tensors that the loss depends on, of the model and of the data."""
        tree = self._objective.tree
        tensors = [*tree.parameters(), *tree.buffers()]
        return [_distributed.local(t) for t in tensors], self._source.tensors()


def _check_choices(*, engine: str, reduction: str, mode: str) -> None:
    if engine != "auto" and engine not in ENGINE_SPECS:
        raise ValueError(f"engine must be 'auto' or one of {list(ENGINE_SPECS)}, not {engine!r}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', not {reduction!r}")
    if mode not in ("eval", "train"):
        raise ValueError(f"mode must be 'eval' or 'train', not {mode!r}")
