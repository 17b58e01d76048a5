"""What is shown of the results, whose form bench/results/README.md has: the last screen, tables of times."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

SCREEN = 5800  # characters of the last screen
WIDTH = 118


@dataclass(frozen=True)
class Target:
    """A figure of an op, which should come to at least or at most so much."""

    op: str
    figure: str
    least: float | None = None
    most: float | None = None

    def __str__(self) -> str:
        return f"at least {self.least:g}" if self.least is not None else f"at most {self.most:g}"

    def met(self, measured: float) -> bool:
        return measured >= self.least if self.least is not None else measured <= (self.most or 0)


def screen(data: dict[str, Any], goals: list[Target]) -> str:
    """The device in two lines, targets, failures, and what was cut: at most SCREEN characters."""
    wrong, cut = verdict(data), cuts(data)
    skipped = sum("skipped" in c for c in data["checks"])
    passed = len(data["checks"]) - len(wrong) - skipped
    last = f"{passed} passed, {skipped} skipped, {len(wrong)} failed"
    last += f", in {data['seconds']:.0f} s of {data['budget_s']:.0f}"
    blocks = [[device(data)], targets(data, goals), cut, [last]]
    room = SCREEN - sum(len("\n".join(lines)) + 2 for lines in blocks)
    blocks.insert(2, fitting(["failures", *(f"  {line}" for line in wrong)], room) if wrong else [])
    return "\n\n".join("\n".join(lines) for lines in blocks if lines)


def fitting(lines: list[str], room: int) -> list[str]:
    """As many lines as there is room for, and how many more there are."""
    lines = [shortened(line, WIDTH) for line in lines]
    room -= 40
    shown: list[str] = []
    for line in lines:
        room -= len(line) + 1
        if room < 0:
            return [*shown, f"  and {len(lines) - len(shown)} more, in the JSON file"]
        shown.append(line)
    return shown


def shortened(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def verdict(data: dict[str, Any]) -> list[str]:
    """What has failed."""
    return [named(check) for check in data["checks"] if not check["ok"]]


def named(check: dict[str, Any]) -> str:
    words = [check["stage"], check["op"], check["part"], check["case"].split("/")[-1]]
    if "::" in check["case"]:  # the file says the op
        words = [check["case"].split("/")[-1]]
    return f"{' '.join(word for word in words if word)}: {check['message']}"


def device(data: dict[str, Any]) -> str:
    """Two lines: who it is, and what it can do."""
    d, a = data["device"], data["anchors"]
    versions = d.get("packages", {})
    names = [d.get("name") or d.get("cpu") or "unknown device"]
    names += [f"{name} {versions[name]}" for name in ("torch", "triton") if name in versions]
    names += [str(d["gpu"])] if d.get("gpu") and d.get("gpu") != d.get("name") else []
    rates = [
        f"{word} {a[key] / 1e12:.2f} TB/s"
        for word, key in (("copy", "copy_bytes_per_s"), ("L2", "l2_bytes_per_s"))
        if key in a
    ]
    products = ", ".join(f"{part} {rate / 1e12:.0f}" for part, rate in a.get("flops_per_s", {}).items())
    rates += [f"TFLOP/s {products}"] if products else []
    rates += [f"{name} FAILED" for name in d.get("failed", {})]
    k = data["kernels"]
    bundle = "from the bundle" if data.get("bundle") else "from the cache"
    rates += [f"kernels: {k.get('loaded', 0)} {bundle}, {k.get('compiled', 0)} compiled"]
    if data.get("bundle") and k.get("compiled") and not k.get("loaded"):
        rates[-1] += " (the bundle is of another Triton)"
    return f"{shortened(', '.join(names), WIDTH)}\n{'; '.join(rates)}"


def targets(data: dict[str, Any], goals: list[Target]) -> list[str]:
    lines = ["targets"]
    for goal in goals:
        if goal.op not in data["ops"]:
            continue
        rows = [r for r in data["targets"] if (r["op"], r["figure"]) == (goal.op, goal.figure)]
        measured = [row for row in rows if row["measured"] is not None]
        if not measured:
            lines.append(f"  {'none':<7} {goal.op}: {goal.figure}, {goal}")
            continue
        row = measured[0]
        word = "marked" if "wrong" in row else "pass" if goal.met(row["measured"]) else "MISS"
        line = f"  {word:<7} {goal.op}: {goal.figure} {row['measured']:.2f}, {goal}"
        lines.append(shortened(line + (f"; {row['wrong']}" if "wrong" in row else ""), WIDTH))
    return lines if len(lines) > 1 else []


def cuts(data: dict[str, Any]) -> list[str]:
    """What time has run out for, a line a stage."""
    stages: dict[str, list[str]] = {}
    for row in data["unfinished"]:
        some = "" if row["cases"] is None else f" ({len(row['cases'])} of {row['of']})"
        stages.setdefault(row["stage"], []).append(row["job"] + some)
    lines = [shortened(f"  {stage}: {', '.join(jobs)}", 3 * WIDTH) for stage, jobs in stages.items()]
    return ["cut", *lines] if lines else []


def file_name(data: dict[str, Any]) -> str:
    """nvidia-h200, and what was run where that was not all."""
    words = [data["device"].get("name") or data["device"].get("cpu") or "unknown device", *data["part"]]
    return re.sub(r"[^a-z0-9_]+", "-", " ".join(words).lower()).strip("-")


def tables(data: dict[str, Any]) -> str:
    """Ours in microseconds, three ways; the fastest rival as ours is best taken, and the floor."""
    groups: dict[tuple[str, str, str, str], list[dict[str, Any]]] = {}
    for row in data["times"]:
        groups.setdefault((row["op"], row["stage"], row["part"], row["workload"]), []).append(row)
    lines, last = [device(data)], ""
    for (op, _, part, workload), rows in sorted(groups.items(), key=lambda item: item[0][0]):
        if op != last:
            lines += ["", f"{op + ', microseconds':<62}     cold    graph     warm    floor"]
        last = op
        for row in rows:
            if row["ours"]:
                mine, floor = microseconds(row, "cold") or microseconds(row, "graph"), row["floor_s"] or 0
                of_floor = f"{mine / 1e6 / floor:5.2f}x floor" if floor else ""
                mark = "  WRONG" if "wrong" in row else ""
                lines.append(
                    f"  {part:<5}{workload[:55]:<55}{times(row)}{shown(1e6 * floor):>9} {of_floor}{mark}"
                )
            else:
                lines.append(f"       {row['rival'][:55]:<55}{times(row)}")
    return "\n".join(lines)


def times(row: dict[str, Any]) -> str:
    return "".join(f"{shown(microseconds(row, way)):>9}" for way in ("cold", "graph", "warm"))


def microseconds(row: dict[str, Any], way: str) -> float:
    """0 where a rival was not timed that way."""
    return 1e6 * float(row["ways"].get(way, {}).get("median_s", 0))


def shown(us: float) -> str:
    return "-" if not us else f"{us:.1f}" if us < 1000 else f"{us:.0f}"
