"""Lottery tickets on sparse kernels: does it still learn, is it really faster, can I use it?

In a loop of your own, on any module: `prune`, `snapshot`, `rewind`, `MaskedSGD`, `MaskedAdam`, `MaskedAdamW`,
`save_ticket`, `load_ticket`, `convert`, and `compress`, which trains kept weights alone; `sparselth.calls`
shows them, `sparselth.own` the whole experiment, `imp`; `sweep` goes over a `Grid` of settings. They are
imported when first asked for.
"""

from importlib import import_module

__version__ = "0.1.0"

_FROM = {
    "Grid": "cluster.grid",
    "Masks": "masks",
    "MaskedAdam": "optim",
    "MaskedAdamW": "optim",
    "MaskedSGD": "optim",
    "compress": "sparse",
    "convert": "sparse",
    "dense": "sparse",
    "explain": "sparse",
    "imp": "own",
    "load_ticket": "tickets",
    "prune": "calls",
    "rewind": "calls",
    "save_ticket": "tickets",
    "snapshot": "calls",
    "sweep": "cluster.sweep",
}
__all__ = [*_FROM]


def __getattr__(name: str) -> object:
    if name not in _FROM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f"{__name__}.{_FROM[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_FROM})
