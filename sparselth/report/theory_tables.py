"""The report of a run of subset-sum as text: what each case took, beside what theory says."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import log2
from typing import Any

from sparselth.report.page import Group, fill, side_by_side, width
from sparselth.runs import RunRecord

Points = list[dict[str, Any]]


def said(line: dict[str, Any]) -> str:
    """What a cell found, in a few words."""
    if line["theorem"] == "target":
        return f"test {100 * line['target_accuracy']:.2f} %"
    if "accuracy" in line:
        within, ours, theirs = line["within_epsilon"], line["accuracy"], line["target_accuracy"]
        return f"{_share(within)} of the weights, test {100 * ours:.2f} % of {100 * theirs:.2f} %"
    if "median_error" in line:
        return f"to {line['median_error']:.2g}"
    return f"n {line['n']}"


def of(record: RunRecord, case: str) -> Points:
    """The finished cells of a case."""
    return [one for one in record.points if one["arm"] == case]


def grouped(points: Iterable[dict[str, Any]], *names: str) -> dict[tuple[Any, ...], Points]:
    """Points by what they have under these names, such as those of all seeds together."""
    found: dict[tuple[Any, ...], Points] = {}
    for one in points:
        found.setdefault(tuple(one[name] for name in names), []).append(one)
    return found


def mean(points: Points, name: str) -> float:
    return float(sum(one[name] for one in points) / len(points))


def _share(share: float) -> str:
    """As percent, never rounded to all."""
    if share == 1:
        return "100 %"
    return f"{min(100 * share, 99.9999):.6g} %" if share > 0.999 else f"{100 * share:.1f} %"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value - round(value)) < 0.05 or value >= 100 else f"{value:.1f}"


def table(record: RunRecord) -> str:
    """The whole report as text, as wide as the terminal, without a newline at its end."""
    makers: dict[str, Callable[[RunRecord], str]] = {
        "fixed-size": _fixed,
        "covering": _covering,
        "quantised": _quantised,
        "redraws": _redraws,
        "density": _density,
    }
    parts = [make(record) for case, make in makers.items() if of(record, case)]
    if built := _constructions(record):
        parts.append(built)
    return "\n\n".join(parts) or f"{record.path}: no case is finished yet"


def _titled(title: str, *columns: list[str]) -> str:
    lead, *others = columns
    return fill(title) + "\n" + side_by_side(Group([lead]), [Group([column]) for column in others], width())


def _fixed(record: RunRecord) -> str:
    config = record.config
    found = grouped(of(record, "fixed-size"), "k", "z", "epsilon")
    groups = []
    for epsilon in config.epsilons:
        for top in (False, True):
            columns: list[list[str]] = [["n"], ["law"], ["hit %"]]
            for k in sorted({key[0] for key in found}):
                here = [
                    p for key, p in found.items() if key[0] == k and (key[1] > 0) == top and key[2] == epsilon
                ]
                if not here:
                    for column in columns:
                        column.append("")
                    continue
                columns[0].append(_number(mean(here[0], "n")))
                columns[1].append(_number(here[0][0]["first_moment"]))
                columns[2].append(f"{100 * mean(here[0], 'covered_at_first_moment'):.0f}")
            groups.append(Group(columns, f"{epsilon:g}, z = {'√k' if top else '0'}"))
    lead = Group([["k", *map(str, sorted({key[0] for key in found}))]])
    title = (
        "fixed-size: least n of U[-1, 1] of which k sum to z within epsilon in half of the pools; n by the "
        "law C(n,k) 2 eps f_k(z) = 1, and how many pools hit there (Malach: k = 1; Natale: any k)"
    )
    return fill(title) + "\n" + side_by_side(lead, groups, width())


def _covering(record: RunRecord) -> str:
    found = grouped(of(record, "covering"), "n")
    columns = [["n"], ["epsilon"], ["least"], ["covered %"]]
    for (n,), points in found.items():
        columns[0].append(str(n))
        columns[1].append(f"{mean(points, 'median_error'):.2g}")
        columns[2].append(f"{points[0]['pigeonhole']:.2g}")
        columns[3].append(f"{100 * mean(points, 'covered'):.1f}")
    title = (
        "covering: how near subset sums of n numbers come to every z in [-1/2, 1/2], in the median; the "
        "least that 2^n intervals allow; and pools that cover all of it to "
        f"{record.config.epsilon:g} (Lueker, Pensia)"
    )
    return fill(title) + "\n" + side_by_side(Group(columns[:1]), [Group(columns[1:])], width())


def _quantised(record: RunRecord) -> str:
    found = grouped(of(record, "quantised"), "bits")
    columns = [["bits"], ["n"], ["n - bits"]]
    for (bits,), points in found.items():
        columns[0].append(str(bits))
        columns[1].append(_number(mean(points, "n")))
        columns[2].append(_number(mean(points, "n") - bits))
    title = (
        "quantised: the least n numbers on the grid of 2^-bits whose subset sums are all of the grid in "
        "[-1/2, 1/2], without any error, in half of the pools"
    )
    return fill(title) + "\n" + side_by_side(Group(columns[:1]), [Group(columns[1:])], width())


def _redraws(record: RunRecord) -> str:
    found = grouped(of(record, "redraws"), "k", "redraws")
    rounds = sorted({key[1] for key in found})
    lead, groups = Group([["R", *map(str, rounds)]]), []
    for k in sorted({key[0] for key in found}):
        columns: list[list[str]] = [["n"], ["drawn"]]
        for r in rounds:
            points = found.get((k, r), [])
            columns[0].append(_number(mean(points, "n")) if points else "")
            columns[1].append(_number(mean(points, "drawn")) if points else "")
        groups.append(Group(columns, f"k = {k}"))
    title = (
        f"redraws: least n of which k sum to 0 within {record.config.epsilon:g} in one of R rounds, in half "
        "of the pools; and all numbers drawn (IteRand)"
    )
    return fill(title) + "\n" + side_by_side(lead, groups, width())


def _density(record: RunRecord) -> str:
    columns = [["k"], ["candidates"], ["kept"], ["density %"], ["entropy law"]]
    for (k,), points in grouped(of(record, "density"), "k").items():
        used, n = mean(points, "weights_used"), mean(points, "n")
        columns[0].append("any" if k is None else str(k))
        columns[1].append(_number(n))
        columns[2].append(f"{used:.1f}")
        columns[3].append(f"{100 * used / n:.2g}")
        columns[4].append(f"{n * _entropy(used / n) / log2(used / points[0]['epsilon']):.2f}")
    title = (
        f"density: least candidates, k of them kept, for 99 % of {points[0]['sample']:,} weights of "
        f"{points[0]['model']} to {record.config.epsilon:g}; entropy law: n H2(k/n) / log2(k/epsilon)"
    )
    return fill(title) + "\n" + side_by_side(Group(columns[:1]), [Group(columns[1:])], width())


def _entropy(share: float) -> float:
    from sparselth.theory.laws import entropy

    return entropy(share)


def _constructions(record: RunRecord) -> str:
    built = [one for one in record.points if "accuracy" in one]
    if not built:
        return ""
    heads = ("case", "target", "layers", "n", "kept of n", "within %", "worst", "source", "kept", "a weight")
    columns = [[head] for head in (*heads, "test %", "target %")]
    for (case,), points in grouped(built, "arm").items():
        one = points[0]
        weights = one["target_weights"]
        values = [
            case,
            one["model"],
            str(one["layers"]),
            f"{one['n']}" + f" x {1 + one['redraws']}" * (one["redraws"] > 0),
            "any" if one["k"] is None else str(one["k"]),
            _share(mean(points, "within_epsilon")).removesuffix(" %"),
            f"{max(p['max_error'] for p in points):.2g}",
            f"{one['source_weights'] / 1e6:.1f}M",
            f"{mean(points, 'weights_used') / 1e6:.2f}M",
            f"{mean(points, 'weights_used') / weights:.1f}",
            f"{100 * mean(points, 'accuracy'):.2f}",
            f"{100 * mean(points, 'target_accuracy'):.2f}",
        ]
        for column, value in zip(columns, values, strict=True):
            column.append(value)
    title = (
        "random networks pruned until they compute a trained one: its weights that are met within "
        f"{record.config.epsilon:g} (exact: 0), the worst error, weights of the source, kept, kept for a "
        "weight, and both test accuracies"
    )
    return (
        fill(title)
        + "\n"
        + side_by_side(
            Group(columns[:1]), [Group(columns[1:5]), Group(columns[5:7]), Group(columns[7:])], width()
        )
    )


def summary(record: RunRecord) -> list[dict[str, Any]]:
    """Means over the seeds, a case and level each."""
    found: list[dict[str, Any]] = []
    for (case, level), points in grouped(record.points, "arm", "level").items():
        one: dict[str, Any] = {"case": case, "level": level, "seeds": len(points)}
        for name in ("n", "covered", "weights_used", "max_error", "accuracy"):
            if name in points[0]:
                lacks = any(point[name] is None for point in points)
                one[name] = None if lacks else mean(points, name)
        found.append(one)
    return found
