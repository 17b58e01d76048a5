"""A training step of R networks at once, beside the same work in eager torch and in batched products.

What trainings must hold is in tests/kernels/trainings.py; tests/engine/test_replay.py checks it. Smoke
trains each kind beside the reference path, in graphs and launch by launch, and over epochs of 8 steps.

Rows carry what `sparselth imp --price-on` reads: model, optimizer, batch_size, kind and replicas. Of ours
`graph` are replays of many steps in a row, `warm` is the training loop, drawing orders included. Eager torch,
one network after another, is timed for one and counted R times.

Steps need torch, Triton and numpy. The full run (`whole`) is `sparselth imp` without its command line and
needs safetensors too: a binary wheel without dependencies.
"""

from __future__ import annotations

import copy
import gc
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import trainings
from gpu.common import Case, Here, judged
from gpu.timing import Run, once, ratio, repeated
from oracle import DEVICE, Wrong, graphed, precision
from sparselth.data import Images, MissingData, data_dir, load
from sparselth.data.batches import Gather
from sparselth.engine.dense import Network, cross_entropy_grad
from sparselth.engine.replay import Replay
from sparselth.engine.state import Job
from sparselth.experiments.imp import ImpConfig
from sparselth.experiments.plan import Watcher
from sparselth.measure import usual
from sparselth.models import Conv, Linear, Model, get_model
from sparselth.models.torch import masks, network
from sparselth.train import fit
from trainings import LR, NEAR, Setup, losses, made_up, must_be_near, never

TITLES = {"fc": "LeNet-300-100", "conv2": "Conv-2", "cnn": "LeNet-5"}
REPLICAS = {"fc": (100, 15, 1), "conv2": (30, 1), "cnn": (15, 1)}
NEAR_TF32 = 2e-2  # after 3 steps, where convolutions multiply in TF32 and the reference does not
GRAPH = 20  # steps of a rival's graph
ROUNDS = 14
SAMPLE, SPENT = 5e-3, 1.0  # seconds that a sample lasts at least; after which a rival leaves, if it has 3
PAPER_SECONDS = 470  # after which a full run is stopped

OURS, EAGER = "sparselth", "eager torch, one after another"
VMAP, STACKED = "vmap, torch's fused Adam", "baddbmm, torch's fused Adam"


# Rivals


class Eager:
    """One network as usual on resident tensors: autograd, torch.optim.Adam, masks multiplied in."""

    def __init__(self, setup: Setup, one: Job) -> None:
        self.model, data = setup.model, setup.data
        self.pixels, self.labels = pixels(setup), data.labels
        self.net = network(setup.model, one.state.weights[0].cpu()).to(DEVICE)
        self.masks = masks(setup.model, self.net, one.mask)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=LR)
        self.order, self.place = setup.order([one])[:, 0], 0
        self.held_out = data.split(one.who.seed)[1].to(DEVICE)

    def __call__(self) -> None:
        index = self.order[self.place % len(self.order)]
        self.place += 1
        usual.step(self.net, self.masks, self.optimizer, self.pixels[index], self.labels[index])

    def evaluate(self) -> Tensor:
        """Loss and accuracy, left on the device."""
        loss, right = [], []
        with torch.no_grad():
            for index in torch.split(self.held_out, 1000):
                y, logits = self.labels[index], self.net(self.pixels[index])
                loss.append(F.cross_entropy(logits, y, reduction="sum"))
                right.append((logits.argmax(1) == y).sum())
        return torch.stack([torch.stack(loss).sum(), torch.stack(right).sum()]) / len(self.held_out)

    def weights(self) -> list[Tensor]:
        return [m.weight.detach()[None] for m in self.net if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]


class Vmapped:
    """R networks by torch.func: vmap of grad, masks multiplied in, torch's fused Adam."""

    def __init__(self, setup: Setup, jobs: Sequence[Job]) -> None:
        device, model = DEVICE, setup.model
        self.shape = len(jobs), setup.recipe.batch_size, *model.input
        self.pixels, self.labels = pixels(setup), setup.data.labels
        nets = [network(model, one.state.weights[0].cpu()) for one in jobs]
        each = [[*masks(model, net, o.mask.cpu()).values()] for net, o in zip(nets, jobs, strict=True)]
        stacked = torch.func.stack_module_state(nets)[0]
        self.parameters = {name: t.detach().to(device) for name, t in stacked.items()}
        self.masks = [torch.stack(rows).to(device) for rows in zip(*each, strict=True)]
        self.masked = [name for name in self.parameters if name.endswith("weight")]
        skeleton = copy.deepcopy(nets[0]).to("meta")

        def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(torch.func.functional_call(skeleton, parameters, (x,)), y)

        self.gradients = torch.func.vmap(torch.func.grad(loss))
        self.optimizer = torch.optim.Adam(
            [*self.parameters.values()], lr=LR, fused=True, capturable=device == "cuda"
        )
        self.order = setup.order(jobs).flatten(1)
        self.clock = torch.zeros(1, dtype=torch.int64, device=device)

    def __call__(self) -> None:
        index = self.order.index_select(0, self.clock % len(self.order)).view(self.shape[:2])
        x, y = self.pixels[index].view(self.shape), self.labels[index]
        gradients = self.gradients(self.parameters, x, y)
        torch._foreach_mul_([gradients[name] for name in self.masked], self.masks)
        for name, parameter in self.parameters.items():
            parameter.grad = gradients[name]
        self.optimizer.step()
        self.clock += 1

    def weights(self) -> list[Tensor]:
        return [self.parameters[name] for name in self.masked]


class Stacked:
    """R networks by torch's batched products and hand-written gradients, a mask, torch's fused Adam."""

    def __init__(self, setup: Setup, jobs: Sequence[Job]) -> None:
        device, model = DEVICE, setup.model
        flat = torch.cat([one.state.weights for one in jobs])
        self.model, self.parameter = model, torch.nn.Parameter(flat)
        self.parameter.grad = self.grad = torch.zeros_like(flat)
        self.network = Network(model, self.parameter.detach(), setup.recipe.batch_size, self.grad)
        self.mask = torch.stack([one.mask for one in jobs]).float()
        self.gather = Gather(setup.data, len(jobs), setup.recipe.batch_size)
        self.optimizer = torch.optim.Adam([self.parameter], lr=LR, fused=True, capturable=device == "cuda")
        self.order = setup.order(jobs).flatten(1)
        self.clock = torch.zeros(1, dtype=torch.int64, device=device)

    def __call__(self) -> None:
        x, y = self.gather(self.order.index_select(0, self.clock % len(self.order)).flatten())
        self.network.backward(cross_entropy_grad(self.network.forward(x), y))
        self.grad[:, : self.model.params.mask_size].mul_(self.mask)
        self.optimizer.step()
        self.clock += 1

    def weights(self) -> list[Tensor]:
        return split(self.model, self.parameter.detach())


def split(model: Model, flat: Tensor) -> list[Tensor]:
    """The weights [R, ...] of flat buffers [R, P]."""
    return [flat[:, s.span].view(-1, *s.shape) for s in model.weights]


def pixels(setup: Setup) -> Tensor:
    """All images scaled, [n, C, H, W] fp32."""
    data = setup.data
    flat = torch.addcmul(data.shift.mT, data.images.float(), data.scale.mT)
    return flat.view(-1, *setup.model.input)


# Floors and times


def floor(model: Model, replicas: int, images: int, training: bool) -> dict[str, int]:
    """Least bytes and FLOPs, those of convolutions beside, of a step or an evaluation over `images` each.

    A step reads weights twice, before and after the gradient is known, moments once, and writes all three.
    """
    weights = sum(s.numel for s in (*model.weights, *model.biases))
    bits = sum(s.matrix[0] * -(-s.matrix[1] // 8) for s in model.weights)
    work = {Conv: 0, Linear: 0}
    for i, (spec, layer, _, after) in enumerate(model.producers):
        products = 1 + training * (2 if i else 1)  # the first layer needs no dx
        work[type(layer)] += 2 * products * images * spec.numel * prod(after[1:])  # type: ignore[index]
    shown = images * prod(model.input)
    return {
        "bytes": replicas * ((28 * weights + bits if training else 4 * weights) + shown),
        "flops": replicas * sum(work.values()),
        "conv_flops": replicas * work[Conv],
    }


def floor_seconds(here: Here, least: Mapping[str, int]) -> float | None:
    """At the measured rates; convolutions in TF32 where torch's are."""
    rates, copying = here.anchors.get("flops_per_s", {}), here.copying(least["bytes"])
    if copying is None or not {"tf32", "ieee"} <= rates.keys():
        return None
    conv, rest = least["conv_flops"], least["flops"] - least["conv_flops"]
    products = conv / rates["tf32" if tf32() else "ieee"] + rest / rates["ieee"]
    return float(max(copying, products))


def tf32() -> bool:
    """Whether convolutions multiply in TF32: torch's default."""
    return bool(torch.backends.cudnn.conv.fp32_precision == "tf32")  # type: ignore[attr-defined]


@dataclass
class Rival:
    """Something that takes `steps` steps a call; its seconds count `times`."""

    run: Run
    steps: int = 1
    times: int = 1
    before: Run | None = None
    repeats: bool = True  # short calls are timed in a row
    holds: object = None  # what a graph reads

    def sample(self) -> float:
        return once(self.before, self.run) * self.times / self.steps

    def warm_up(self) -> None:
        self.run()
        if self.repeats:
            calls = max(1, min(50, round(SAMPLE / max(once(self.before, self.run), 1e-7))))
            self.run, self.steps = repeated(self.run, calls), calls * self.steps


def race(here: Here, rivals: Mapping[tuple[str, str], Callable[[], Rival]]) -> dict[str, dict[str, Any]]:
    """Rivals by name and way, in turn, as {name: {way: timing or {none: why}}}; ours must run.

    On a CPU all run once, untimed.
    """
    found: dict[str, dict[str, Any]] = {name: {} for name, _ in rivals}
    ready: dict[tuple[str, str], tuple[Rival, list[float]]] = {}
    for (name, way), prepare in rivals.items():
        try:
            rival = prepare()
            if here.device == "cpu":
                rival.run()
                continue
            rival.warm_up()
            ready[name, way] = rival, []
        except Exception as error:
            if name == OURS or here.device == "cpu":
                raise
            torch.cuda.synchronize()
            found[name][way] = {"none": (str(error) or type(error).__name__).splitlines()[0]}
    for _ in range(here.pick(0, ROUNDS)):
        for rival, taken in ready.values():
            if len(taken) < 3 or sum(taken) * rival.steps / rival.times < SPENT:
                taken.append(rival.sample())
    for (name, way), (_, taken) in ready.items():
        low, median, high = statistics.quantiles(taken, n=4)
        found[name][way] = {"median_s": median, "q1_s": low, "q3_s": high, "samples": len(taken)}
    return found


def graph_of(replay: Replay, stretch: int) -> Rival:
    """Graphs of many steps, `stretch` steps in a row; none enters a new epoch."""
    graphs = max(1, stretch // replay.many)
    run = repeated(replay.run[replay.many], graphs)
    return Rival(run, graphs * replay.many, before=lambda: replay.clock.fill_(0), repeats=False)


def loop_of(replay: Replay, first: int, stretch: int) -> Rival:
    """The training loop from step `first` on, `stretch` steps a call."""
    place = [first]

    def run() -> None:
        if place[0] + stretch > replay.recipe.steps:
            raise Wrong(f"no learning rates behind step {replay.recipe.steps}")
        place[0] += replay.advance(place[0], stretch, never)

    return Rival(run, stretch, repeats=False)


def rows(
    here: Here, setup: Setup, what: str, kind: str, replicas: int, found: Mapping[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    training = kind.startswith("step")
    least = floor(
        setup.model, replicas, setup.recipe.batch_size if training else setup.data.n_validation, training
    )
    shared = {
        "workload": f"{TITLES[setup.part]}, R{replicas}, {what}",
        "floor_s": floor_seconds(here, least),
        **least,
        "model": setup.model.name,
        "optimizer": setup.recipe.optimizer,
        "batch_size": setup.recipe.batch_size,
        "kind": kind,
        "replicas": replicas,
    }
    return [shared | {"rival": name, "ours": name == OURS, "ways": ways} for name, ways in found.items()]


def seconds(found: Mapping[str, dict[str, Any]], name: str, way: str) -> float | None:
    value: float | None = found.get(name, {}).get(way, {}).get("median_s")
    return value


class Right:
    """What 3 steps on the reference path come to."""

    def __init__(self, setup: Setup, jobs: Sequence[Job]) -> None:
        self.allowed = NEAR_TF32 if tf32() and setup.part != "fc" else NEAR
        setup = copy.copy(setup)
        setup.recipe = replace(setup.recipe, steps=3, eval_every=3)
        trained = setup.jobs([(one.who.seed, 1.0, 0) for one in jobs])
        fit(setup.model, setup.data, trained, setup.recipe, kernels="reference")
        self.weights = split(setup.model, torch.cat([one.state.weights for one in trained]))
        self.losses = torch.cat([*(losses(one)["validation losses"] for one in trained)])

    def compare(self, weights: Sequence[Tensor], losses: Tensor | None = None) -> None:
        """Weights [R, ...] of every layer and validation losses [R], or those of the first replica alone."""
        found = {f"layer {i}": t for i, t in enumerate(weights)}
        right = {f"layer {i}": t[: len(weights[i])] for i, t in enumerate(self.weights)}
        must_be_near(found, right, self.allowed)
        if losses is not None:
            must_be_near({"loss": losses}, {"loss": self.losses[: len(losses)]}, self.allowed)


def benchmark(here: Here, part: str, replicas: int, kernels: str, target: bool = False) -> dict[str, Any]:
    """A step and an evaluation, dense, all replicas active; rivals where `kernels` is the default.

    Of a `target` with no rival but a step of eager torch on LeNet-300-100.
    """
    setup = Setup(part, images=here.pick(64, None))
    an_epoch = setup.data.n_train // setup.recipe.batch_size
    setup.recipe = replace(setup.recipe, steps=2 * (ROUNDS + 4) * an_epoch)
    cells = [(seed, 1.0, 0) for seed in range(replicas)]
    jobs = setup.jobs(cells)  # as they begin: rivals start from them
    right = Right(setup, jobs)
    replay, (weights, *_) = setup.replay(setup.jobs(cells), kernels if here.device == "cuda" else "triton")
    replay.advance(0, 3, never)
    measured = torch.tensor(replay.measure()[0], dtype=torch.float64)
    wrong = judged(right.compare, split(setup.model, weights), measured)

    def eager(evaluates: bool) -> Rival:
        rival = Eager(setup, jobs[0])
        for _ in range(3):
            rival()
        right.compare(rival.weights(), rival.evaluate().cpu()[:1])
        return Rival(rival.evaluate if evaluates else rival, times=replicas)

    def captured(kind: type[Vmapped] | type[Stacked]) -> Rival:
        rival = kind(setup, jobs)
        for _ in range(3):
            rival()
        right.compare(rival.weights())
        if here.device == "cpu":
            return Rival(rival)
        return Rival(graphed(rival, GRAPH).replay, GRAPH, holds=rival)

    by_default = kernels == "auto"
    stretch = 1 if here.device == "cpu" else 40 if part == "conv2" else 200
    rivals: dict[tuple[str, str], Callable[[], Rival]] = {(OURS, "graph"): lambda: graph_of(replay, stretch)}
    if by_default and (part == "fc" or not target):
        rivals[EAGER, "warm"] = partial(eager, evaluates=False)
    if by_default and not target:
        rivals[VMAP, "graph"] = partial(captured, Vmapped)
        if part == "fc":
            rivals[STACKED, "graph"] = partial(captured, Stacked)
    step = race(here, rivals)
    mine = seconds(step, OURS, "graph")
    more, n = "" if by_default else ", --deterministic", setup.data.n_validation
    if target:
        of_floor = {"fc": "times its floor", "conv2": "times the better of FLOP and byte floors"}[part]
        timed = rows(here, setup, "a step", "step", replicas, step)
        evaluation = race(here, {(OURS, "graph"): lambda: Rival(replay.evaluate)})  # a price needs both
        timed += rows(here, setup, f"evaluation of {n:,}", "evaluation", replicas, evaluation)
        figures: dict[str, float | None] = {of_floor: ratio(mine, timed[0]["floor_s"])}
        if part == "fc":
            of_eager = ratio(seconds(step, EAGER, "warm"), mine)
            figures["times the sequential eager loop per replica-step"] = of_eager
        return {"times": timed, "figures": figures} | wrong
    if by_default:  # two epochs, or a second
        many = 1 if mine is None else max(replay.many, min(2 * an_epoch, int(1 / mine)))
        step[OURS] |= race(here, {(OURS, "warm"): lambda: loop_of(replay, 3, many)})[OURS]
    rivals = {(OURS, "graph"): lambda: Rival(replay.evaluate)}
    if by_default:
        rivals[EAGER, "warm"] = partial(eager, evaluates=True)
    evaluation = race(here, rivals)

    timed = rows(here, setup, f"a step{more}", f"step{more}", replicas, step)
    timed += rows(here, setup, f"evaluation of {n:,}{more}", f"evaluation{more}", replicas, evaluation)
    figures = {}
    name = f"R{replicas} {TITLES[part]}"
    if by_default:
        batched = [t for rival in (VMAP, STACKED) if (t := seconds(step, rival, "graph"))]
        figures[f"{name}, the loop, times its graphs"] = ratio(seconds(step, OURS, "warm"), mine)
        figures[f"{name}, times the best of torch's batched"] = ratio(min(batched, default=None), mine)
    return {"times": timed, "figures": figures} | wrong


def case(name: str, part: str, took: float, run: Callable[..., dict[str, Any] | None], *args: Any) -> Case:
    """`run(*args)`; what captured graphs hold goes with them."""

    def guarded() -> dict[str, Any] | None:
        try:
            return run(*args)
        finally:
            gc.collect()

    return Case(name, part, guarded, took)


def smoke(here: Here) -> Iterator[Case]:
    """A training of each kind beside the reference, and graphs beside the launches that they hold."""

    def exact(run: Callable[..., Any], *args: Any) -> Any:
        with precision("ieee"):
            return run(*args)

    def smoked(name: str, part: str, took: float, check: Callable[..., Any], *args: Any) -> Case:
        return case(f"{TITLES[part]}, {name}", part, took, exact, check, part, *args)

    kernels = here.pick("triton", "auto")
    for part in ("fc", "conv2"):
        yield smoked("a training beside the reference", part, 10, trainings.beside_the_reference, kernels)
    yield smoked("graphs beside single launches", "fc", 10, trainings.beside_single_launches, "triton")
    yield smoked("graphs beside single launches", "conv2", 15, trainings.beside_single_launches, kernels)
    yield smoked("five epochs of 8 steps", "fc", 8, trainings.short_epochs)


def targets(here: Here) -> Iterator[Case]:
    for part, took in (("fc", 25.0), ("conv2", 30.0)):
        r = here.pick(2, REPLICAS[part][0])
        yield case(f"{TITLES[part]}, R{r}, a step", part, took, benchmark, here, part, r, "auto", True)


def benchmarks(here: Here) -> Iterator[Case]:
    for part, replicas in REPLICAS.items():
        for r in here.pick((2,), replicas):
            yield case(f"{TITLES[part]}, R{r}, auto", part, 30.0, benchmark, here, part, r, "auto")
    for part, replicas in here.pick({}, REPLICAS).items():
        r = replicas[0]
        yield case(f"{TITLES[part]}, R{r}, triton", part, 20.0, benchmark, here, part, r, "triton")


# A full run


class Watch(Watcher):
    """Stops a run after some seconds, as a user would: once, since a second signal ends the process."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def tick(self) -> None:
        if time.monotonic() > self.end:
            self.end = float("inf")
            signal.raise_signal(signal.SIGTERM)


def imp(config: ImpConfig, images: Images, seconds: float) -> dict[str, Any]:
    """`sparselth imp` without its screens: wall time beside the plan's, in a folder that goes.

    Stopped `seconds` after it began, pricing included.
    """
    from sparselth.errors import Interrupted
    from sparselth.experiments.agenda import widest
    from sparselth.experiments.pool import Pool
    from sparselth.runs import open_run

    total = len(config.cells())
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "run"
        with (
            open_run(path, config, {"break_even": {}}, resume=False) as folder,
            Pool(config, images, path, 1, {}) as pool,
        ):
            began, watch = time.perf_counter(), Watch(seconds)
            price, limit = pool.price(widest(config))
            priced = time.perf_counter()
            try:
                pool.run(folder, watch, limit)
            except Interrupted:
                if time.perf_counter() - began < seconds:
                    raise
            wall, done = time.perf_counter() - priced, len(folder.finished)
            steps = config.recipe.steps * done
    return {
        "seconds": wall,
        "networks": done,
        "of": total,
        "together": limit,
        "predicted_seconds": price.run_seconds(config, (), 1, limit),
        "pricing_seconds": priced - began,
        "steps_per_second": steps / wall,
        "images": images.spec.title,
    }


def paper(here: Here) -> dict[str, Any]:
    """imp --model lenet-300-100 --recipe paper --seeds 0-4 --levels 20, and what eager torch would take."""
    model = get_model("lenet-300-100")
    try:
        images = load("mnist", data_dir(None))
    except MissingData:
        images = made_up(model, 60_000, 10_000)
    config = ImpConfig(
        model=model.name,
        dataset="mnist",
        seeds=(0, 1, 2, 3, 4),
        arms=("ticket", "reinit", "random-mask"),
        levels=20,
        rate=0.2,
        scope="layer",
        one_shot=False,
        rewind=0,
        reinits=1,
        device="cuda",
        kernels="auto",
        recipe=model.recipes["paper"],
    )
    setup = Setup("fc", images=None)
    eager = Eager(setup, setup.jobs([(0, 1.0, 0)])[0])
    rival = Rival(eager)
    rival.warm_up()
    usually = statistics.median(rival.sample() for _ in range(20))
    found = imp(config, images, PAPER_SECONDS)
    steps = config.recipe.steps * found["of"]
    title = f"{found['networks']} of {found['of']} networks of {config.recipe.steps:,} steps"
    found["eager_seconds"] = usually * steps
    found["said"] = (
        f"{title} in {found['seconds']:.0f} s, up to {found['together']} at once, on {found['images']}; "
        f"all were priced at {found['predicted_seconds']:.0f} s; steps of all by eager torch, one after "
        f"another, extrapolated: {found['eager_seconds'] / 3600:.1f} h"
    )
    if found["networks"] < found["of"]:
        return found
    minutes = found["seconds"] / 60
    return found | {"figures": {"minutes of imp --recipe paper, 5 seeds, 3 arms, 20 levels": minutes}}


def whole(here: Here) -> Iterator[Case]:
    yield Case("imp --recipe paper --seeds 0-4 --levels 20", "fc", partial(paper, here), PAPER_SECONDS + 30)
