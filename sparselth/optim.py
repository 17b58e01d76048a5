"""SGD, Adam and AdamW of torch under masks: pruned weights are 0 and stay exactly 0, in any model.

Each class is its torch.optim namesake with `fused=True` and two more arguments. Learning-rate schedulers,
parameter groups, closures, hooks, GradScaler, `state_dict` and `load_state_dict` work as they do there; a
checkpoint holds the masks, packed, under "masks", loads into torch's own optimizer, and takes one of its.

    >>> import torch
    >>> from sparselth.optim import MaskedAdam
    >>> model = torch.nn.Sequential(torch.nn.Linear(784, 300), torch.nn.ReLU(), torch.nn.Linear(300, 10))
    >>> masks = {layer.weight: torch.rand(layer.weight.shape) < 0.2 for layer in model[::2]}
    >>> optimizer = MaskedAdam(model.parameters(), lr=1.2e-3, weight_decay=0.01, masks=masks)
    >>> bool(model[0].weight[~masks[model[0].weight]].any())  # zeroed on construction
    False

Neither momentum nor weight decay wakes a pruned weight, its moments are exactly 0, and a gradient of NaN
or infinity there has no effect. On live weights a step is that of torch.optim with `fused=True`, on a CPU to
the bit; on CUDA, fp32 parameters take one Triton launch a group, which skips memory where 8 neighbours are
pruned and rounds like torch's CPU kernels (`kernels/masked_update.py`). Everything else (other dtypes,
amsgrad, maximize, dampening, the steps of a GradScaler) goes through torch's fused kernels on a
gradient whose pruned entries were set to 0, in place; there a mask takes as much memory as its weights,
under Triton an eighth of a byte a weight.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from sparselth.kernels._choose import use_triton
from sparselth.kernels.bitmask import pack, unpack
from sparselth.kernels.masked_update import alike, is_dense, masked_adam_many, masked_sgd_many

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_DTYPE, _ON_CPU = attrgetter("dtype"), attrgetter("is_cpu")
_ONE = torch.ones((), dtype=torch.float32, device="cpu")
Masks = Mapping[Tensor, Tensor]


def _check(param: Tensor) -> None:
    if param.dtype.itemsize not in _INTEGERS or not param.is_floating_point() or not is_dense(param):
        raise ValueError(
            "expected dense parameters of fp64, fp32, fp16 or bf16, got "
            f"{param.dtype} {list(param.shape)} with strides {list(param.stride())}"
        )


def _refusal(param: Tensor, name: str, t: Tensor) -> ValueError:
    now, then = (f"{x.dtype} {list(x.shape)} on {x.device}" for x in (param, t))
    remedy = "cast the state by optimizer.load_state_dict(optimizer.state_dict())"
    remedy = remedy if t.shape == param.shape else "make a new optimizer"
    return ValueError(f"a parameter is now {now}, its {name} {then}: {remedy}")


class _Masked(torch.optim.Optimizer, ABC):
    """What masks add to an optimizer of torch; stands before it in the order of bases."""

    def _begin(self, masks: Masks | None, kernels: str) -> None:
        self._kernels = kernels
        self._masks: dict[Tensor, Tensor] = {}  # packed, in row-major order
        self._forget()
        for param in self._params():
            use_triton(kernels, param)  # says what is wrong with `kernels`
        for param, mask in (masks or {}).items():
            self.set_mask(param, mask)

    def _forget(self) -> None:
        """Empty what is made from masks and learning rates on demand, by `id` of parameter or group."""
        # integers, 0 or all ones, that gradients are and-ed with: like torch.where and as fast as a product
        self._integers: dict[int, Tensor | None] = dict.fromkeys(map(id, self._masks))
        # packed [1, bytes], in the order of memory that the strides say
        self._bits: dict[int, tuple[tuple[int, ...], Tensor]] = {}
        self._rates: dict[tuple[int, torch.device], tuple[float | None, Tensor]] = {}
        self._met: dict[int, tuple[Any, Sequence[Any]]] = {}  # parameters and moments of a group's last step

    def _params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            for param in self.param_groups[-1]["params"]:
                _check(param)
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def set_mask(self, param: Tensor, mask: Tensor | None) -> None:
        """Train `param` under a bool mask of its shape (True = kept) from now on; None ends that.

        Pruned weights and their moments are set to 0. Weights that are kept go on with the moments they have.
        """
        if not any(param is p for p in self._params()):
            raise ValueError(f"expected a parameter of this optimizer, got a tensor {list(param.shape)}")
        self._integers.pop(id(param), None)
        self._bits.pop(id(param), None)
        if mask is None:
            self._masks.pop(param, None)
            return
        if mask.dtype != torch.bool or mask.shape != param.shape:
            raise ValueError(f"expected a mask bool {list(param.shape)}, got {mask.dtype} {list(mask.shape)}")
        mask = mask.to(param.device)
        self._masks[param], self._integers[id(param)] = pack(mask.reshape(-1)), None
        moments = [value for name, value in self.state.get(param, {}).items() if name != "step"]
        for t in (param, *moments):
            if isinstance(t, Tensor):
                t.masked_fill_(~mask, 0)

    def mask(self, param: Tensor) -> Tensor | None:
        """The mask of `param`, bool, or None."""
        return self._mask(param) if param in self._masks else None

    def _mask(self, param: Tensor) -> Tensor:
        mask: Tensor = unpack(self._masks[param].to(param.device), param.numel())
        return mask.view(param.shape)

    def state_dict(self) -> dict[str, Any]:
        """As torch's, and "masks": packed bits in row-major order by the parameter's number."""
        masks = {i: self._masks[param] for i, param in enumerate(self._params()) if param in self._masks}
        return super().state_dict() | {"masks": masks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load moments, options and masks; without "masks", as in torch's own checkpoints, masks stay.

        Weights that the masks prune are set to 0.
        """
        params = self._params()
        masks = {i: self.mask(param) for i, param in enumerate(params)}
        if "masks" in state_dict:
            masks = dict.fromkeys(masks)
            for i, bits in state_dict["masks"].items():
                size = -(-params[i].numel() // 8) if i in masks else None
                if bits.shape != (size,):
                    raise ValueError(
                        f"expected {size} bytes of mask for parameter {i}, got {list(bits.shape)}"
                    )
                masks[i] = unpack(bits, params[i].numel()).view(params[i].shape)
        groups = [{**group, "fused": True} for group in state_dict["param_groups"]]
        super().load_state_dict({**state_dict, "param_groups": groups})
        for param, mask in zip(params, masks.values(), strict=True):
            self.set_mask(param, mask)

    def __getstate__(self) -> dict[str, Any]:
        kept: dict[str, Any] = super().__getstate__()
        return kept | {"_masks": self._masks, "_kernels": self._kernels}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    # torch's step() calls this for every group once the closure has run, then updates what the lists hold.
    # What we update here leaves them, which also saves torch's sorting by device: a third of a small step.
    def _init_group(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], *state: list[Any]
    ) -> Any:
        found = super()._init_group(group, params, grads, *state)  # type: ignore[misc]
        if found:  # says SGD; Adam has raised
            raise ValueError("expected dense gradients, got a sparse one")
        ours = self._prepare(group, params, state) and getattr(self, "found_inf", None) is None
        mixed = self._match(
            group, params, grads, *(column for column in state[:3] if column)
        )  # steps come last
        if mixed:
            ours = group["fused"] = False  # to torch's loop over tensors, which takes them
        asked, on_cpu = self._kernels == "triton", True
        launches: dict[torch.device, list[int]] = {}
        for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
            cpu = param.is_cpu
            if ours and (asked or not cpu) and self._on_triton(param):
                launches.setdefault(param.device, []).append(i)
                continue
            if (place := id(param)) in self._integers:
                live = self._integers[place]
                if live is None:
                    live = self._integers[place] = self._make_integers(param)
                if mixed:
                    grad.masked_fill_(live == 0, 0)
                else:
                    grad.view(live.dtype).bitwise_and_(live)
            on_cpu = on_cpu and cpu
        lists = [entries for entries in (params, grads, *state) if entries]
        for device, places in launches.items():
            self._triton_step(group, [[entries[i] for i in places] for entries in lists], device)
        gone = {i for places in launches.values() for i in places}
        for entries in lists if launches else ():
            entries[:] = [entry for i, entry in enumerate(entries) if i not in gone]
        if ours and on_cpu and params:
            self._torch_step(group, *lists)
            for entries in lists:
                entries.clear()
        return found

    # Kernels run over memory as it lies; `module.to` and `.data` may have laid a parameter out anew.
    def _match(self, group: dict[str, Any], params: list[Tensor], *columns: list[Any]) -> bool:
        """Lay gradients and moments out as their parameters are now; whether they differ in dtype."""
        strides, dtypes = [*map(Tensor.stride, params)], [*map(_DTYPE, params)]
        now = strides, dtypes, [*map(_ON_CPU, params)], [*map(Tensor.numel, params)]
        held = [*params, *chain.from_iterable(columns[1:])]
        before, known = self._met.get(id(group), (None, ()))
        same = now == before and len(held) == len(known) and all(map(is_, held, known))
        if same and ([*map(Tensor.stride, columns[0])], [*map(_DTYPE, columns[0])]) == (strides, dtypes):
            return False
        mixed = False
        for i, param in enumerate(params):
            _check(param)
            for column in columns:
                if column[i] is not None:
                    mixed = self._lay(param, column, i) or mixed
            if (live := self._integers.get(id(param))) is not None:
                if live.shape != param.shape:
                    raise _refusal(param, "mask", live.bool())
                self._integers[id(param)] = live if alike(live, self._empty_integers(param)) else None
        self._met[id(group)] = (None, ()) if mixed else (now, held)
        return mixed

    def _lay(self, param: Tensor, column: list[Tensor], i: int) -> bool:
        t, state = column[i], self.state[param]
        takes = isinstance(self, torch.optim.SGD) and getattr(self, "found_inf", None) is None
        name = next((name for name, value in state.items() if value is t), "gradient")
        if t.shape != param.shape or t.device != param.device or not (takes or t.dtype == param.dtype):
            raise _refusal(param, name, t)
        if t.stride() != param.stride():
            column[i] = torch.empty_like(param, dtype=t.dtype).copy_(t)
            state.update({name: column[i]} if name in state else {})
        return t.dtype != param.dtype

    def _on_triton(self, param: Tensor) -> bool:
        return param.dtype == torch.float32 and use_triton(self._kernels, param)

    def _rate(self, group: dict[str, Any], device: torch.device) -> Tensor:
        """The group's learning rate, fp64 [1] on the device, always the same tensor."""
        lr = group["lr"]
        known, rate = self._rates.get((id(group), device), (None, None))
        if rate is None:
            rate = torch.empty(1, dtype=torch.float64, device=device)
        if isinstance(lr, Tensor):
            rate.copy_(lr)
        elif lr != known:
            rate.fill_(lr)
        self._rates[id(group), device] = (None if isinstance(lr, Tensor) else lr, rate)
        return rate

    def _make_integers(self, param: Tensor) -> Tensor:
        return self._empty_integers(param).copy_(self._mask(param)).neg_()

    def _empty_integers(self, param: Tensor) -> Tensor:
        return torch.empty_like(param, dtype=_INTEGERS[param.itemsize])

    def _make_bits(self, param: Tensor) -> Tensor | None:
        """The mask packed in the order of memory, which a parameter may change."""
        if id(param) not in self._integers:
            return None
        strides, bits = self._bits.get(id(param), ((), None))
        if bits is None or strides != param.stride() or bits.is_cpu is not param.is_cpu:
            laid = torch.empty_like(param, dtype=torch.bool).copy_(self._mask(param))
            bits = pack(laid.as_strided((1, param.numel()), (param.numel(), 1)))
            self._bits[id(param)] = param.stride(), bits
        return bits

    @abstractmethod
    def _prepare(self, group: dict[str, Any], params: list[Tensor], state: Sequence[list[Any]]) -> bool:
        """Whether the two steps below know the group's options; completes the state."""

    @abstractmethod
    def _torch_step(self, group: dict[str, Any], *lists: list[Tensor]) -> None:
        """Parameters, gradients and state, on a CPU."""

    @abstractmethod
    def _triton_step(self, group: dict[str, Any], lists: list[list[Tensor]], device: torch.device) -> None:
        """The same in one launch."""


@lru_cache(maxsize=1)
def fused_loses_gradients() -> bool:
    """Whether torch's fused SGD on a CPU takes gradients of 16 bits for 0 (2.11, 16 numbers at a time)."""
    weights = torch.zeros(64, dtype=torch.bfloat16, device="cpu")
    gradient = torch.ones_like(weights)
    numbers: dict[str, Any] = {"weight_decay": 0.0, "momentum": 0.5, "lr": 1.0, "dampening": 0.5}
    flags: dict[str, Any] = {"nesterov": False, "maximize": False, "is_first_step": True}
    torch._fused_sgd_([weights], [gradient], [torch.zeros_like(weights)], **numbers, **flags)
    return bool((weights == 0).any())


class MaskedSGD(_Masked, torch.optim.SGD):
    """`torch.optim.SGD` whose pruned weights and their momentum are exactly 0.

    >>> model = torch.nn.Linear(4, 2)
    >>> keep = torch.tensor([[True, False, True, False], [False, True, False, True]])
    >>> optimizer = MaskedSGD(model.parameters(), lr=0.1, momentum=0.9, masks={model.weight: keep})
    >>> model(torch.ones(1, 4)).sum().backward()
    >>> optimizer.step()
    >>> (model.weight != 0).equal(keep)
    True

    `masks` maps parameters to bool tensors of their shape, True = kept; parameters without one train as
    ever. `kernels` is "auto" (Triton on CUDA, torch elsewhere), "triton" or "reference" (torch).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        masks: Masks | None = None,
        kernels: str = "auto",
    ) -> None:
        torch.optim.SGD.__init__(
            self, params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize, fused=True
        )
        self._begin(masks, kernels)

    def _prepare(self, group: dict[str, Any], params: list[Tensor], state: Sequence[list[Any]]) -> bool:
        # torch's fused step makes all buffers at once; without dampening one of zeros does the same
        for i, buffer in enumerate(state[0] if group["dampening"] == 0 else ()):
            if buffer is None:
                state[0][i] = self.state[params[i]]["momentum_buffer"] = torch.zeros_like(params[i])
        loses = any(p.is_cpu and p.itemsize < 4 for p in params) and fused_loses_gradients()
        group["fused"] = not (loses and getattr(self, "found_inf", None) is None)
        return bool(group["dampening"] == 0 and not group["maximize"] and group["fused"])

    def _torch_step(self, group: dict[str, Any], *lists: list[Tensor]) -> None:
        params, grads, *buffers = lists
        hyper: dict[str, Any] = {k: group[k] for k in ("lr", "momentum", "weight_decay", "nesterov")}
        hyper |= {
            "dampening": 0.0,
            "maximize": False,
            "is_first_step": False,
        }  # _prepare has made the buffers
        torch._fused_sgd_(params, grads, buffers[0] if buffers else [], **hyper)

    def _triton_step(self, group: dict[str, Any], lists: list[list[Tensor]], device: torch.device) -> None:
        params, grads, *buffers = lists
        masked_sgd_many(
            params,
            grads,
            [self._make_bits(param) for param in params],
            buffers[0] if buffers else None,
            self._rate(group, device),
            momentum=group["momentum"],
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            kernels=self._kernels,
        )


class _MaskedAdam(_Masked):
    def _prepare(self, group: dict[str, Any], params: list[Tensor], state: Sequence[list[Any]]) -> bool:
        return not (group["amsgrad"] or group["maximize"])

    def _torch_step(self, group: dict[str, Any], *lists: list[Tensor]) -> None:
        params, grads, first, second, steps = lists
        torch._foreach_add_(steps, _ONE, alpha=1)  # torch's own `1` takes several times as long
        update = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
        hyper: dict[str, Any] = {k: group[k] for k in ("lr", "eps", "weight_decay")}
        hyper |= {"beta1": group["betas"][0], "beta2": group["betas"][1], "amsgrad": False, "maximize": False}
        update(params, grads, first, second, [], steps, **hyper)

    def _triton_step(self, group: dict[str, Any], lists: list[list[Tensor]], device: torch.device) -> None:
        params, grads, first, second, steps = lists
        torch._foreach_add_(steps, 1)
        masked_adam_many(
            params,
            grads,
            [self._make_bits(param) for param in params],
            (first, second),
            steps,
            self._rate(group, device),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            decoupled=group["decoupled_weight_decay"],
            kernels=self._kernels,
        )


class MaskedAdam(_MaskedAdam, torch.optim.Adam):
    """`torch.optim.Adam` whose pruned weights and their moments are exactly 0.

    >>> model = torch.nn.Linear(4, 2)
    >>> optimizer = MaskedAdam(model.parameters(), lr=1e-3, masks={model.weight: model.weight.abs() > 0.2})
    >>> scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
    >>> optimizer.set_mask(model.weight, model.weight.abs() > 0.3)  # the next level of pruning

    For `masks` and `kernels` see `MaskedSGD`. For a CUDA graph give `capturable=True`, keep the gradients
    (`zero_grad(set_to_none=False)`) and take a step before capture.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        capturable: bool = False,
        masks: Masks | None = None,
        kernels: str = "auto",
    ) -> None:
        flags: dict[str, bool] = {"maximize": maximize, "capturable": capturable, "fused": True}
        torch.optim.Adam.__init__(self, params, lr, betas, eps, weight_decay, amsgrad, **flags)
        self._begin(masks, kernels)


class MaskedAdamW(_MaskedAdam, torch.optim.AdamW):
    """`torch.optim.AdamW` whose pruned weights and their moments are exactly 0; see `MaskedAdam`.

    >>> model = torch.nn.Linear(4, 2)
    >>> keep = model.weight.abs() > 0.2
    >>> groups = [{"params": [model.weight]}, {"params": [model.bias], "weight_decay": 0.0}]
    >>> optimizer = MaskedAdamW(groups, lr=1e-3, weight_decay=0.1, masks={model.weight: keep})
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        capturable: bool = False,
        masks: Masks | None = None,
        kernels: str = "auto",
    ) -> None:
        flags: dict[str, bool] = {"maximize": maximize, "capturable": capturable, "fused": True}
        torch.optim.AdamW.__init__(self, params, lr, betas, eps, weight_decay, amsgrad, **flags)
        self._begin(masks, kernels)
