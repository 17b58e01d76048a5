"""What a conversion chose for the layers of a network, in a few lines: where sparsity is worth it.

Layers of one shape and one choice are one line; what is not worth it comes with the times that decided.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MOST = 12  # lines of layers that stay dense

Layer = Mapping[str, Any]


def layers(found: Sequence[Layer], whole: str = "") -> list[str]:
    """Lines on the layers that take kept weights alone, and on those that stay dense and why.

    whole: what runs, "original" where the converted network was not faster.
    """
    if not found:
        return []
    dense = [one for one in found if one["dense"]]
    lines = [f"{len(found) - len(dense)} of {len(found)} layers compute with kept weights alone."]
    if whole == "original":
        slower = (
            "Converted, the network as a whole is not faster here, so the original runs. In the converted one"
        )
        lines[0] = f"{slower} {lines[0]}"
    if not dense:
        return lines
    lines[0] += " Not worth it here, so dense:"
    groups: dict[tuple[Any, ...], list[Layer]] = {}
    for one in dense:
        groups.setdefault((one["shape"], one["best_sparse"] is None), []).append(one)
    said = sorted(groups.values(), key=lambda group: -sum(one["dense_s"] for one in group))
    lines += [f"  {_group(group)}" for group in said[:MOST]]
    if len(said) > MOST:
        lines.append(f"  and {len(said) - MOST} more shapes, all under layers in the JSON")
    return lines


def compressed(choices: Sequence[Layer]) -> list[str]:
    """Lines on the layers that train as kept weights alone, and on those that do not and why."""
    if not choices:
        return []
    dense = [one for one in choices if not one["compressed"]]
    lines = [f"{len(choices) - len(dense)} of {len(choices)} layers train as their kept weights."]
    groups: dict[str, list[str]] = {}
    for one in dense:
        groups.setdefault(one["why"], []).append(one["name"])
    for why, names in groups.items():
        more = "" if len(names) < 4 else f" and {len(names) - 3} more"
        lines.append(f"  dense: {', '.join(names[:3])}{more}: {why}")
    return lines


def _group(group: Sequence[Layer]) -> str:
    one = max(group, key=lambda layer: layer["dense_s"])
    name = one["layer"] if len(group) == 1 else f"{one['layer']} and {len(group) - 1} more"
    kept = sum(layer["kept"] for layer in group) / len(group)
    head = f"{name}, {one['shape']}, {100 * kept:.3g} % kept"
    if one["best_sparse"] is None:
        return f"{head}: no sparse form fits it"
    ours, dense = one["best_sparse_s"], one["dense_s"]
    if ours < dense:
        alone = f"{one['best_sparse']} alone {_time(ours)}, dense {_time(dense)}"
        return f"{head}: {alone}; changes of layout eat it up"
    return f"{head}: {one['best_sparse']} {_time(ours)}, dense {_time(dense)}"


def _time(seconds: float) -> str:
    return f"{1e6 * seconds:.3g} us" if seconds < 1e-3 else f"{1e3 * seconds:.3g} ms"
