"""What masks add to an optimizer of torch: `sparselth.optim` makes SGD, Adam and AdamW of it.

Masks are kept packed by parameter. A step sets the gradients of pruned weights to 0; since their moments are
0, too, nothing moves them. Before that it looks whether pruned weights are still 0, since others write a
model's weights, too: `load_state_dict`, a cast, a rewind. Torch counts writes to a tensor, and where it lies
is known, so a look costs next to nothing, and weights are read only when they may have changed. What torch
does not count, writes through `.data` or numpy, is seen on a CPU by PROBES pruned weights of each parameter,
which such a write changes unless it picks single weights; what no probe sees is set to 0 within LOOKS steps.
A CUDA graph replays kernels, and looks at nothing.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any
from zlib import crc32

import torch
from torch import Tensor

from sparselth.kernels._choose import use_triton
from sparselth.kernels.bitmask import pack, unpack
from sparselth.kernels.masked_update import alike, is_dense
from sparselth.masks import Masks, by_parameter, checked, refuse_shards

if TYPE_CHECKING:
    from sparselth.masks import AnyMasks

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_BITS = {2: ctypes.c_int16, 4: ctypes.c_int32, 8: ctypes.c_int64}
_VERSION, _VALUE = attrgetter("_version"), attrgetter("value")
_DTYPE, _ON_CPU = attrgetter("dtype"), attrgetter("is_cpu")
PROBES, LOOKS = 2, 32


@dataclass(slots=True)
class _Seen:
    """The masked parameters of a group as the last step left them."""

    writes: int  # as torch counts them, of all together
    places: list[int]
    probes: list[Any]  # the bits of some pruned weights, on a CPU
    left: int = LOOKS  # steps until pruned weights are set to 0 whatever they look like


def _check(param: Tensor) -> None:
    if param.dtype.itemsize not in _INTEGERS or not param.is_floating_point() or not is_dense(param):
        raise ValueError(
            "expected dense parameters of fp64, fp32, fp16 or bf16, got "
            f"{param.dtype} {list(param.shape)} with strides {list(param.stride())}"
        )


@dataclass(slots=True)
class _Met:
    """The parameters and moments of a group's last step, as they lay then."""

    looks: Any = None
    held: Sequence[Any] = ()
    masked: Sequence[int] = ()  # which of the parameters are
    plain: bool = False  # all on a CPU, and torch's kernels step them


def _sum(masks: Iterable[Tensor]) -> int:
    """A checksum of masks in any order."""
    return sum(crc32(bits.cpu().numpy().tobytes()) for bits in masks)


def _refusal(param: Tensor, name: str, t: Tensor) -> ValueError:
    now, then = (f"{x.dtype} {list(x.shape)} on {x.device}" for x in (param, t))
    remedy = "cast the state by optimizer.load_state_dict(optimizer.state_dict())"
    remedy = remedy if t.shape == param.shape else "make a new optimizer"
    return ValueError(f"a parameter is now {now}, its {name} {then}: {remedy}")


class Masked(torch.optim.Optimizer, ABC):
    """What masks add to an optimizer of torch; stands before it in the order of bases."""

    def _begin(self, masks: AnyMasks | None, kernels: str) -> None:
        self._kernels = kernels
        self._masks: dict[Tensor, Tensor] = {}  # packed, in row-major order
        self._forget()
        for param in self._params():
            use_triton(kernels, param)  # says what is wrong with `kernels`
        named = all("param_names" in group for group in self.param_groups)
        names = [name for group in self.param_groups for name in group.get("param_names", ())]
        params = [*zip(names, self._params(), strict=True)] if named else self._params()
        for param, mask in by_parameter(params, masks or {}).items():
            self.set_mask(param, mask)
        self._given = masks if isinstance(masks, Masks) else None  # of parameters that are added later, too

    def _forget(self) -> None:
        """Empty what is made from masks and learning rates on demand, by `id` of parameter or group."""
        # integers, 0 or all ones, that gradients are and-ed with: like torch.where and as fast as a product
        self._integers: dict[int, Tensor | None] = dict.fromkeys(map(id, self._masks))
        # packed [1, bytes], in the order of memory that the strides say
        self._bits: dict[int, tuple[tuple[int, ...], Tensor]] = {}
        self._rates: dict[tuple[int, torch.device], tuple[float | None, Tensor]] = {}
        self._met: dict[int, _Met] = {}
        self._seen: dict[int, _Seen] = {}
        self._under: dict[int, list[Tensor]] = {}  # masked parameters of a group

    def _params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _patch_step_function(self) -> None:
        super()._patch_step_function()
        step = type(self).step
        if not hasattr(step, "_is_ours"):  # the fused kernels are no ops that torch.compile can trace
            step = torch.compiler.disable(step)  # type: ignore[no-untyped-call]
            step._is_ours = True
            type(self).step = step  # type: ignore[method-assign]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            refuse_shards(self.param_groups[-1]["params"])
            for param in self.param_groups[-1]["params"]:
                _check(param)
        except ValueError:
            self.param_groups.pop()
            raise
        self.param_groups[-1].setdefault("masked", 0)
        given = getattr(self, "_given", None)
        if given is not None and given.model is not None:
            added = {*map(id, self.param_groups[-1]["params"])}
            for param, mask in by_parameter(given.model, given).items():
                if id(param) in added:
                    self.set_mask(param, mask)

    @torch.no_grad()
    def set_mask(self, param: Tensor, mask: Tensor | None) -> None:
        """Train `param` under a mask of its shape (True = kept) from now on; None ends that.

        Pruned weights and their moments are set to 0. Weights that are kept go on with the moments they have.
        """
        if not any(param is p for p in self._params()):
            raise ValueError(f"expected a parameter of this optimizer, got a tensor {list(param.shape)}")
        self._integers.pop(id(param), None)
        self._bits.pop(id(param), None)
        for made in (self._met, self._seen, self._under):
            made.clear()
        self._masks.pop(param, None)
        if mask is not None:
            mask = checked(f"a parameter {list(param.shape)}", mask, tuple(param.shape)).to(param.device)
            self._masks[param], self._integers[id(param)] = pack(mask.reshape(-1)), None
            moments = [value for name, value in self.state.get(param, {}).items() if name != "step"]
            for t in (param, *moments):
                if isinstance(t, Tensor):
                    t.masked_fill_(~mask, 0)
        for group in self.param_groups:
            if any(param is p for p in group["params"]):
                group["masked"] = _sum(self._masks[p] for p in group["params"] if p in self._masks)

    def mask(self, param: Tensor) -> Tensor | None:
        """The mask of `param`, bool, or None."""
        return self._mask(param) if param in self._masks else None

    def _mask(self, param: Tensor) -> Tensor:
        mask: Tensor = unpack(self._masks[param].to(param.device), param.numel())
        return mask.view(param.shape)

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Set the gradients of pruned weights to 0 now, as `step` does: before `clip_grad_norm_`, say.

        Without it a norm counts what no step takes, and a NaN there is a NaN everywhere.
        """
        for param in self._masks:
            if param.grad is not None:
                param.grad.masked_fill_(~self._mask(param), 0)

    def state_dict(self) -> dict[str, Any]:
        """As torch's, and "masks": packed bits in row-major order by the parameter's number.

        Each parameter's state holds its bits, too, as "mask", and each group a checksum of its masks as
        "masked": tools such as torch.distributed.checkpoint carry states and groups at most.
        """
        found: dict[str, Any] = super().state_dict()
        masks = {i: self._masks[param] for i, param in enumerate(self._params()) if param in self._masks}
        if not masks:
            return {**found, "masks": masks}
        # torch's Adam takes a state that is not empty for a whole one
        empty = isinstance(self, torch.optim.SGD)
        states = {i: {**found["state"].get(i, {})} for i in range(len(self._params()))}
        states = {i: state for i, state in states.items() if state or empty}
        for i in masks.keys() & states.keys():
            states[i]["mask"] = masks[i]
        return {**found, "state": states, "masks": masks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load moments, options and masks; without any, as in torch's own or dense checkpoints, masks stay.

        Weights that the masks prune are set to 0. ValueError where the state was saved under other masks than
        those it holds or, without any, those that are set.
        """
        params = self._params()
        groups = [{**group, "fused": True} for group in state_dict["param_groups"]]
        numbers = [number for group in groups for number in group["params"]]
        states = {number: {**state} for number, state in state_dict["state"].items()}
        bits = {number: state.pop("mask") for number, state in states.items() if "mask" in state}
        masks = {i: self._masks.get(param) for i, param in enumerate(params)}
        loaded = {i: bits[number] for i, number in enumerate(numbers) if number in bits}
        if state_dict.get("masks"):
            masks, loaded = dict.fromkeys(masks), state_dict["masks"]
        for i, packed in loaded.items():
            size = -(-params[i].numel() // 8) if i in masks else None
            if packed.shape != (size,):
                raise ValueError(f"expected {size} bytes of mask for parameter {i}, got {list(packed.shape)}")
            masks[i] = packed.to(torch.uint8)  # torch's own optimizers cast it to the parameter's type
        said = [int(group["masked"]) for group in groups if "masked" in group]
        if len(said) == len(groups) and sum(said) not in (
            0,
            _sum(packed for packed in masks.values() if packed is not None),
        ):
            raise ValueError(
                f"the optimizer's state was saved under masks that are gone, it holds {len(loaded)}: give "
                "the optimizer its masks, or set_mask, before it loads such a state"
            )
        states = {number: state for number, state in states.items() if state}
        super().load_state_dict({**state_dict, "state": states, "param_groups": groups})
        for param, packed in zip(params, masks.values(), strict=True):
            mask = (
                None if packed is None else unpack(packed.to(param.device), param.numel()).view(param.shape)
            )
            self.set_mask(param, mask)

    def __getstate__(self) -> dict[str, Any]:
        kept: dict[str, Any] = super().__getstate__()
        return kept | {"_masks": self._masks, "_kernels": self._kernels}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    def _look(self, group: dict[str, Any]) -> list[Tensor]:
        """Set the group's pruned weights to 0 where others may have written; its masked parameters."""
        masked = self._under.get(id(group))
        if masked is None:
            masked = [param for param in group["params"] if id(param) in self._integers]
            self._under[id(group)] = masked
        if not masked:
            return masked
        seen = self._seen.get(id(group))
        writes, places = sum(map(_VERSION, masked)), [*map(Tensor.data_ptr, masked)]
        if (
            seen is None
            or writes != seen.writes
            or places != seen.places
            or any(map(_VALUE, seen.probes))
            or not seen.left
        ):
            for param in masked:
                self._hold(param)
            if seen is None or places != seen.places:
                probes = [probe for param in masked for probe in self._make_probes(param)]
                seen = self._seen[id(group)] = _Seen(writes, places, probes)
            seen.left = LOOKS
        seen.left -= 1
        return masked

    def _hold(self, param: Tensor) -> None:
        live = self._integers[id(param)]
        if live is not None and alike(live, self._empty_integers(param)):
            param.view(live.dtype).bitwise_and_(live)
        else:
            param.masked_fill_(~self._mask(param), 0)

    def _make_probes(self, param: Tensor) -> list[Any]:
        if not param.is_cpu or not param.numel():
            return []
        flat = torch.empty_like(param, dtype=torch.bool).copy_(self._mask(param))
        places = torch.arange(64, device="cpu") * (param.numel() - 1) // 63
        places = places[~flat.as_strided((param.numel(),), (1,))[places]]
        spread = places[:: max(1, len(places) // PROBES)][:PROBES].tolist()
        kind, size = _BITS[param.itemsize], param.itemsize
        return [kind.from_address(param.data_ptr() + size * place) for place in spread]

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
        masked = self._look(group)
        if params and ours and (met := self._met[id(group)]).plain:
            for i in met.masked:
                live = self._live(params[i])
                grads[i].view(live.dtype).bitwise_and_(live)
            lists = [entries for entries in (params, grads, *state) if entries]
            self._torch_step(group, *lists)
            for entries in lists:
                entries.clear()
        else:
            self._mixed_step(group, params, grads, state, ours, mixed)
        if masked:  # what torch may go on to do is not counted: its fused kernels are no writes to it
            self._seen[id(group)].writes = sum(map(_VERSION, masked))
        return found

    def _mixed_step(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        state: Sequence[list[Any]],
        ours: bool,
        mixed: bool,
    ) -> None:
        """Of parameters on several devices, of several kernels, or such that are left to torch."""
        asked, on_cpu = self._kernels == "triton", True
        launches: dict[torch.device, list[int]] = {}
        for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
            cpu = param.is_cpu
            if ours and (asked or not cpu) and self._on_triton(param):
                launches.setdefault(param.device, []).append(i)
                continue
            if id(param) in self._integers:
                live = self._live(param)
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

    def _live(self, param: Tensor) -> Tensor:
        live = self._integers[id(param)]
        if live is None:
            live = self._integers[id(param)] = self._make_integers(param)
        return live

    # Kernels run over memory as it lies; `module.to` and `.data` may have laid a parameter out anew.
    def _match(self, group: dict[str, Any], params: list[Tensor], *columns: list[Any]) -> bool:
        """Lay gradients and moments out as their parameters are now; whether they differ in dtype."""
        strides, dtypes = [*map(Tensor.stride, params)], [*map(_DTYPE, params)]
        now = strides, dtypes, [*map(_ON_CPU, params)], [*map(Tensor.numel, params)]
        held = [*params, *chain.from_iterable(columns[1:])]
        met = self._met.get(id(group), _Met())
        same = now == met.looks and len(held) == len(met.held) and all(map(is_, held, met.held))
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
        if mixed:
            self._met[id(group)] = _Met()
        else:
            masked = [i for i, param in enumerate(params) if id(param) in self._integers]
            plain = all(now[2]) and self._kernels != "triton"
            self._met[id(group)] = _Met(now, held, masked, plain)
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
