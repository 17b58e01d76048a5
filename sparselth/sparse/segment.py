"""Layers that follow each other, each in its form, as one module: any batch, any size of images."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sparselth.sparse.forms import FORMS, Formed, Stage
from sparselth.sparse.network import BATCHES, network


class Segment(nn.Module):
    """A plan of forms on [B, ...], or on [..., K] with `tokens`; inputs in the dtype that it was made for.

    Its state is that of dense layers with zeros, by the names of the layers: `load_state_dict` forms them
    again. A copy, and what pickle reads back, forms them again too. Images of another size than those it was
    made for are computed by the same forms, made once more for that size.
    """

    def __init__(self, plan: list[Formed], tokens: bool = False) -> None:
        super().__init__()
        self.plan, self.tokens = plan, tokens
        self._link()
        self.eval()

    def _link(self) -> None:
        self.run, self.before, self.after = (
            network(self.plan),
            self.plan[0].place.before,
            self.plan[-1].place.after,
        )
        self.others: dict[tuple[int, ...], tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {}
        self.lock = threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        device = self.plan[0].device
        if x.dtype is not device.dtype or x.device != device.at:
            raise ValueError(
                f"layer {self.plan[0].place.name!r}: expected {device.dtype} on {device.at}, "
                f"got {x.dtype} on {x.device}"
            )
        if self.tokens:
            rows = x.reshape(-1, x.shape[-1])
            y = self.run(rows) if len(rows) else x.new_empty(0, *self.after)
            return y.view(*x.shape[:-1], *self.after)
        run, after = (self.run, self.after) if x.shape[1:] == self.before else self.sized(tuple(x.shape[1:]))
        return run(x) if len(x) else x.new_empty(0, *after)

    def sized(self, shape: tuple[int, ...]) -> tuple[Callable[[Tensor], Tensor], tuple[int, ...]]:
        """What computes inputs of this shape, and the shape of its outputs; made at the first use."""
        with self.lock:
            if shape not in self.others:
                if len(self.others) == BATCHES:
                    del self.others[next(iter(self.others))]
                plan = self._resized(shape)
                self.others[shape] = network(plan), plan[-1].place.after
            return self.others[shape]

    def _resized(self, shape: tuple[int, ...]) -> list[Formed]:
        plan = []
        for form in self.plan:
            stage, before = form.stage(), shape
            select, pool = stage.select, stage.pool
            if select:
                shape = (stage.part.before[0], *shape[1:])
                select = replace(select, before=before, after=shape)
            x = torch.zeros(1, *shape, dtype=form.device.dtype, device=form.device.at)
            y = stage.part.module(x)
            part = replace(stage.part, before=shape, after=tuple(y.shape[1:]))
            shape = part.after
            if pool:
                pool = replace(pool, before=shape, after=tuple(pool.module(y).shape[1:]))
                shape = pool.after
            stage = replace(stage, part=part, pool=pool, select=select)
            plan.append(_formed(form, stage))
        return plan

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for form in self.plan:
            stage = form.stage()
            if stage.product:
                destination[f"{prefix}{form.place.name}.weight"] = stage.own_weight.clone()
                if stage.bias is not None:
                    destination[f"{prefix}{form.place.name}.bias"] = stage.bias.clone()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        known, plan = set(), []
        for form in self.plan:
            stage = form.stage()
            if stage.product:
                own = {"weight": stage.own_weight, "bias": stage.bias}
                for what, old in own.items():
                    key = f"{prefix}{form.place.name}.{what}"
                    if old is None:
                        continue
                    known.add(key)
                    new = state_dict.get(key)
                    if new is None:
                        missing_keys.append(key)
                    elif new.shape != old.shape:
                        error_msgs.append(f"{key}: expected {list(old.shape)}, got {list(new.shape)}")
                    else:
                        own[what] = new.detach().to(old).contiguous()
                weight = own["weight"]
                assert weight is not None
                form = _formed(form, stage.dressed(weight, own["bias"]))
            plan.append(form)
        if strict:
            unexpected_keys += [k for k in state_dict if k.startswith(prefix) and k not in known]
        self.plan = plan
        self._link()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("run", "others", "lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._link()


def _formed(like: Formed, stage: Stage) -> Formed:
    """A stage in the form of another where that fits it, else dense."""
    form = FORMS[like.name]
    fits = form.fits(stage, like.device, like.batch) and form.layout == like.layout
    return (form if fits else FORMS["dense"]).of(stage, like.device, like.batch)
