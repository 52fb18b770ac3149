"""Curvature of a model's loss as a linear operator. Operators see models; solvers do not."""

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

_LONGER = (
    "rows of {0} are longer than max_norm, and the forward pass would rewrite them, so that x "
    "would not stay where it is. Let the embedding renormalize all its rows, in a forward pass "
    "on torch.arange(num_embeddings).unsqueeze(0), and then use the operator"
)
_CHANGED = (
    "parameters, buffers or data changed while a solver was using the operator: its products "
    "belong to no single matrix"
)


class CurvatureOperator(SymmetricMatrix):
    """A symmetric matrix C of a model's loss over some batches, by products with vectors.

        C = sum_b w_b C_b / sum_b w_b    (reduction="mean")
        C = sum_b C_b                    (reduction="sum")

    What C_b is, on batch b, the subclass says. It is taken at x [n], which holds the parameters in
    the order given, each flattened in row-major order. w_b is the number of samples of batch b, so
    that uneven batches give the C of the whole data set when `loss_fn` is a mean over samples.

    The loss is one fixed function of x. Random numbers of torch's generators are replayed, those of
    batch b from seed + b, and the generators left as they were. The mode of every submodule is put
    back, also after an error, and holds in backward too, where torch.utils.checkpoint runs modules
    again. A surrounding `torch.autocast` does not apply; `p.grad` is never
    touched; results carry no graph.

    The operator follows its model. Version counters show that parameters, buffers or data were
    changed in place or replaced; because torch's fused optimizers and writes through `.data` leave
    no trace there, the sum of every parameter and buffer is compared as well, once a product (one
    pass over the parameters and one synchronisation). What was kept is then rebuilt. Inside
    `fixed()`, which solvers use, a change raises instead, and the sums are compared at the end
    only. Data changed through `.data` or NumPy, or in a loader's data set, is not noticed.

    Engines, in which U is one product through a graph built for it alone:

    - "cached_graph": keeps the graph of the first derivative of each batch, as far as
      `memory_budget` goes, and builds the rest in every pass over the data.
    - "per_pass_graph": builds each graph once a pass, for all vectors of a block, and keeps none.
    - "vmap": as "cached_graph", with one vectorized backward pass for up to 32 vectors of a block:
      faster where operations are small, at the memory of as many graphs more.
    - "forward_over_reverse": forward mode over the gradient; keeps nothing, and needs less memory.
    - "finite_difference": two first derivatives a product, not exact; for compiled models,
      reentrant checkpointing, and whatever cannot be differentiated twice. See `error`.
    - "microbatched": as "per_pass_graph", in pieces of each batch whose graph fits
      `memory_budget`. Refused where f on a batch is not the mean (or sum) of f on its pieces.
    - "auto": chooses once an exact one, for single vectors and for blocks apart, by a graph's size
      and a timing on the first batch; logs its choice. Where it fails, the next one is taken,
      finite differences last, and the log says why.

    Exact engines run fused attention in its math backend. A parameter that moves f, and that no
    gradient reaches, is an error, which the first evaluation tells.

    Under FSDP2 (`fully_shard`) every process has its own data and holds a slice of every vector:
    its shards of the parameters, each flattened, one after another (see `slices`). That works for
    the Hessian on "finite_difference" alone, since FSDP2 cannot be differentiated twice. All
    processes must do the same; `p.grad` is put back; parameters are resharded, so that FSDP2 sees
    every move.

    Args:
        model: the module.
        loss_fn: (output, target) -> tensor of one element. Its own parameters and buffers count too
            if it is a module.
        data: one batch, a list of batches, or a DataLoader. A batch is a pair (input, target),
            evaluated as loss_fn(model(input), target) on the device of the model. A loader is read
            anew for what is not kept, and must give the same batches each time: what it draws from
            torch's global generator is replayed; another order or content of the batches, which
            their sums tell, raises.
        params: parameters of the model (or of loss_fn), each once; None for all. Those that do not
            require grad are left out.
        engine: see above.
        reduction: "mean" or "sum".
        forward: (model, batch) -> (output, target), for batches of any other layout; moves them to
            the device itself.
        weight: batch -> w_b >= 0, for reduction="mean" where the number of samples, taken to be the
            leading dimension of the output, is not what `loss_fn` averages over: ignored tokens,
            class weights, or an output that is not a tensor. A batch that weighs 0 is left out. Of
            several batches all are checked, each once, by the derivative of the loss with regard to
            the output: see `weights.Weights`.
        process_group: of the processes that hold data, each its own, when they all multiply by the
            same vectors at the same x: C is that of all data, by one sum over processes a product.
            Under DistributedDataParallel the module inside is used. None for this process alone,
            or for all processes of the mesh where FSDP2 shards the model.
        mode: "eval": dropout is off, and batch normalisation uses its running statistics. "train":
            dropout masks are drawn once for each batch and the same in every product; batch
            normalisation uses the statistics of the batch and differentiates through them, so that
            C depends on the split into batches. Whatever modules write to their buffers goes to
            copies, made anew for each pass over a batch.
        dtype: torch.float32 or torch.float64: C is that of a copy of the model and the loss in this
            dtype, with batches converted, and vectors have it. Parameters in bfloat16 or float16
            need it. The copy is made again where the model has changed. None: the model itself.
        autocast: torch.bfloat16 or another dtype: what the model and loss compute in, under
            `torch.autocast`. Vectors keep the dtype of the parameters.
        memory_budget: bytes that kept graphs may take, or that of a piece on "microbatched"; None
            for half of what is free when they are first built.
        seed: of the random numbers drawn in the model and by a loader.

    Attributes:
        params: the parameters x consists of.
        slices: how vectors are cut among processes, a `protocol.Slices`; None where they are whole.

    Raises:
        ValueError: an argument is not as above; the parameters are not real and floating, of one
            dtype, on one device; they are sharded, and not as above. From a product, when batches
            weigh something else than their loss averages over, or nothing at all.
        RuntimeError: from a product, when an optimizer holds the parameters away from x, when
            something changed inside `fixed()`, when a loader gives other batches in a second pass,
            when processes differ in x or in the vectors, when a parameter moves f and gets no
            gradient, or when the loss cannot be differentiated as the engine needs: by any, "auto".
    """

    _through_backward = False  # whether products come of first derivatives by backward() alone

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        data: Any,
        *more: Any,
        params: Iterable[nn.Parameter] | None = None,
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
        self.params = _selected(self._owned() if params is None else params, dtype)
        self._check_owned(ValueError)
        self.slices = slices_of(self._objective.tree, self.params)
        if self.slices is not None:
            self._check_sharded(self.slices)
        else:
            self._objective.watched = self.params
        self._budget = memory_budget
        self._kept: tuple[Engines, ParamSnapshot] | None = None
        self._fixed = False

    @staticmethod
    @abstractmethod
    def _finish(
        loss_fn: Callable[[Any, Any], Tensor], output: Any, target: Any, mean: bool
    ) -> tuple[Tensor, Outer | None]:
        """Return the value and the outer function of an `Evaluation`."""

    @property
    def shape(self) -> tuple[int, int]:
        """(n, n)."""
        n = sum(p.numel() for p in self.params)
        return n, n

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters or of their copies, and of the vectors taken and given."""
        return self._dtype or self.params[0].dtype

    @property
    def device(self) -> torch.device:
        """The device of the parameters, and of the vectors taken and given."""
        return self.params[0].device

    @property
    def engine(self) -> str:
        """The engine asked for; with "auto", the one of the last product."""
        return self._engine.name

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The modules whose parameters f depends on: the model, and loss_fn if it is a module."""
        return tuple(self._objective.tree.members)

    @property
    def leads(self) -> bool:
        """Whether this process is the first of those that share the operator, or has it alone."""
        if self.slices is not None:
            return self.slices.leads
        return self._group is None or dist.get_rank(self._group) == 0

    @property
    def error(self) -> float | None:
        """The largest estimate of a finite difference's relative error at this point.

        None for the exact engines, and before the first product.
        """
        return None if self._kept is None else self._kept[0].error

    def matvec(self, v: Tensor) -> Tensor:
        """Return C v [n] for v [n], of the operator's dtype and on its device; or slices of them.

        Raises:
            ValueError: v is not such a vector.
            RuntimeError: see the class.
        """
        self._check_like("v", "[{}]", v, v.ndim == 1)
        return self._multiply(v.unsqueeze(1))[0]

    def matmat(self, V: Tensor) -> Tensor:
        """Return C V [n, b] for V [n, b]: b >= 1 products, all at the same x; or slices of them.

        Raises:
            ValueError: V is not such a matrix.
            RuntimeError: see the class.
        """
        self._check_like("V", "[{}, b] with b >= 1", V, V.ndim == 2 and V.shape[1] > 0)
        return self._multiply(V).T

    @contextmanager
    def fixed(self) -> Iterator[None]:
        """A context in which x must not change: a product or the exit raises if it did.

        Raises:
            RuntimeError: parameters, buffers or data changed inside.
        """
        if self._fixed:
            yield
            return
        _, point = self._current()
        self._fixed = True
        try:
            yield
            if self._anywhere(not point.holds(*self._tensors())):
                raise RuntimeError(_CHANGED)
        finally:
            self._fixed = False

    @torch.no_grad()
    def _multiply(self, V: Tensor) -> Tensor:
        """Return (C V)^T [b, n]."""
        made, _ = self._current()
        with self._refusing_together(V, [V]), torch.autocast(self.device.type, enabled=False):
            sums = self._engine.multiply(made, self._source, self._bytes, V.detach())
        return self._total(sums, [V])

    @contextmanager
    def _refusing_together(self, like: Tensor, given: list[Tensor]) -> Iterator[None]:
        """A context of this process's sums; what it refuses, the others of its group learn of."""
        try:
            yield
        except ValueError:
            if self._group is not None and self.slices is None:
                none = Sums(like, self.params)
                none.weight = math.nan
                with suppress(RuntimeError):  # which `_total` raises in all processes
                    self._total(none, given)
            raise

    def _total(self, sums: Sums, given: list[Tensor]) -> Tensor:
        """Return the mean or sum over all processes' batches, which were given the same vectors.

        Raises:
            ValueError: no batch weighs anything.
        """
        if self._group is not None and self.slices is None:
            marks = [checksum(tensors) for tensors in (self._tensors()[0], given) if tensors]
            reduce(sums, marks, self._group)
        if sums.weight == 0:
            raise ValueError("no batch weighs anything: weight gave 0 for all of them")
        if self._objective.mean and sums.weight != 1.0:
            sums.rows.div_(sums.weight)
        return sums.rows

    def _bytes(self) -> int:
        return default_budget(self.device) if self._budget is None else self._budget

    def _current(self) -> tuple[Engines, ParamSnapshot]:
        """Return the engines for the model as it is now, and where that is."""
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "products need derivatives, and there are none in torch.inference_mode(): use the "
                "operator outside it (torch.no_grad() is fine)"
            )
        holder = _perturbation.holder(self._objective.tree.parameters())
        if holder is not None:
            raise RuntimeError(
                f"{type(holder).__name__} holds the parameters away from x: finish its step(), or "
                "call its restore(), before using the operator"
            )
        if self.slices is not None:
            _distributed.reshard()
        if self._kept is not None:
            _, point = self._kept
            same = point.unmarked() if self._fixed else point.holds(*self._tensors())
            if not self._anywhere(not same):
                return self._kept
            if self._fixed:
                raise RuntimeError(_CHANGED)
        self._kept = None  # frees the old graphs before new ones are built
        self._check_owned(RuntimeError)
        if self._anywhere(bool(longer := self._objective.longer())):
            raise RuntimeError(_LONGER.format(", ".join(longer)))
        self._source.forget()
        f = self._objective if self._dtype is None else self._objective.copied(self._dtype)
        params = self.params if self._dtype is None else f.watched
        made = Engines(f, self._source, params, self._bytes(), self.slices)
        self._kept = made, ParamSnapshot(*self._tensors())
        return self._kept

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
                "dtype makes copies, and of a model that FSDP2 shards there are none: leave it "
                "out, and let fully_shard's mp_policy keep the parameters in float32"
            )
        if not self._through_backward or self.engine != "finite_difference":
            raise ValueError(
                "of a model that FSDP2 shards there is only the Hessian, and only by "
                "engine='finite_difference', for FSDP2 cannot be differentiated twice: use these, "
                "or an unsharded copy of the model with process_group"
            )
        if self._group is not None and not slices.spans(self._group):
            raise ValueError("process_group must be of the processes of FSDP2's mesh, or None")

    def _anywhere(self, found: bool) -> bool:
        """Whether `found` in any process that holds a slice: all must do the same."""
        return found if self.slices is None else self.slices.sum_of_all(found) > 0

    def _check_owned(self, error: type[Exception]) -> None:
        owned = {id(p) for p in self._owned()}
        if any(id(p) not in owned for p in self.params):
            raise error(
                "a parameter of the operator is not a parameter of the model: of a copy, or "
                "replaced since? Make a new operator from the model's own parameters"
            )
        if not all(p.requires_grad for p in self.params):
            raise error(
                "a parameter of the operator does not require grad any more: make a new operator, "
                "or call requires_grad_() on it"
            )

    def _owned(self) -> Iterator[nn.Parameter]:
        """Return the parameters that C may be taken in."""
        return self._objective.tree.parameters()

    def _tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return what f depends on: the model's tensors and the data's."""
        tree = self._objective.tree
        held = [*tree.parameters(), *tree.buffers()]
        return [_distributed.local(t) for t in held], self._source.tensors()


def _check_choices(*, engine: str, reduction: str, mode: str) -> None:
    if engine != "auto" and engine not in ENGINE_SPECS:
        raise ValueError(f"engine must be 'auto' or one of {list(ENGINE_SPECS)}, not {engine!r}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', not {reduction!r}")
    if mode not in ("eval", "train"):
        raise ValueError(f"mode must be 'eval' or 'train', not {mode!r}")


def _selected(
    params: Iterable[nn.Parameter], dtype: torch.dtype | None
) -> tuple[nn.Parameter, ...]:
    """Return those of `params` that require grad, checked to be of one real dtype and device."""
    if isinstance(params, Tensor):
        raise ValueError("params must be parameters in a list or iterator: pass [p] for one")
    given = list(params)
    if not all(isinstance(p, Tensor) for p in given):
        kinds = ", ".join(sorted({type(p).__name__ for p in given}))
        raise ValueError(f"params must be parameters, as model.parameters() gives, not {kinds}")
    selected = tuple(p for p in given if p.requires_grad)
    if not selected:
        raise ValueError(
            f"no parameter requires grad, of {len(given)}: call p.requires_grad_() on those that "
            "the matrix is of"
        )
    if len({id(p) for p in selected}) < len(selected):
        raise ValueError("params lists a parameter twice")
    held = {(p.dtype if dtype is None else dtype, p.device) for p in selected}
    if len(held) > 1 or not all(p.dtype.is_floating_point for p in selected):
        raise ValueError(
            "parameters must be real and floating, of one dtype and on one device; got "
            + ", ".join(sorted(f"{kind} on {device}" for kind, device in held))
            + ": pass dtype=torch.float32 for one dtype, params=... or model.to(device) for one "
            "device"
        )
    if selected[0].device.type == "meta":
        raise ValueError(
            "parameters on the meta device hold no numbers: load the weights first, as by "
            "model.to_empty(device=...) and load_state_dict"
        )
    if dtype is None and selected[0].dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"parameters are {selected[0].dtype}, too coarse to multiply by their curvature: pass "
            "dtype=torch.float32, for that of a float32 copy of the model"
        )
    return selected
