"""A training step of R networks at once, beside the same work in eager torch and in batched products.

Checked before anything is timed: the whole of `fit` beside the reference path, graphs beside the same
launches one by one, a stop and going on, an idle step, and (part "alone", which is not timed) replicas alone
and in company. Images are made up, in the sizes of MNIST and CIFAR-10: a pattern for each class under noise.

Rows carry what `sparselth imp --price-on` reads: model, optimizer, batch_size, kind and replicas. Of ours
`graph` are replays of many steps in a row, `warm` is the training loop, drawing orders included. Eager torch,
one network after another, is timed for one and counted R times.

Steps need torch, Triton and numpy. The full run (`whole`, by --run) is `sparselth imp` without its command
line and needs safetensors too: a binary wheel without dependencies.
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
from functools import lru_cache, partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gpu.common import Case, Here
from gpu.timing import Run, once, ratio, repeated
from oracle import (
    Wrong,
    graphed,
    must_be_zero,
    must_repeat,
    precision,
    same_bits,
)
from sparselth import pruning
from sparselth.batches import Batches, Gather, Resident
from sparselth.config import ImpConfig, Recipe, Replica
from sparselth.data import Images, MissingData, data_dir, get_dataset, load
from sparselth.dispatch import choose
from sparselth.measure import usual
from sparselth.models import Conv, Linear, MaxPool, Model, ReLU, get_model
from sparselth.nn import Network, cross_entropy_grad, init_weights
from sparselth.replay import Replay
from sparselth.streams import stream
from sparselth.train import Job, State, fit

MODELS = {"fc": "lenet-300-100", "conv2": "conv2", "cnn": "lenet5"}
TITLES = {"fc": "LeNet-300-100", "conv2": "Conv-2", "cnn": "LeNet-5"}
REPLICAS = {"fc": (100, 15, 1), "conv2": (30, 1), "cnn": (15, 1)}
TINY = {
    "fc": Model("fc", (1, 6, 6), (Linear(12), ReLU(), Linear(10)), {}, ""),
    "conv2": Model(
        "conv2", (3, 6, 6), (Conv(4, 3, 1), ReLU(), MaxPool(), Linear(10)), {}, "", dataset="cifar10"
    ),
    "cnn": Model("cnn", (1, 8, 8), (Conv(2, 3), MaxPool(), ReLU(), Linear(12), ReLU(), Linear(10)), {}, ""),
}
NEAR = 1e-4  # relative, of weights and moments after 25 steps, whatever the order of sums
NEAR_TF32 = 2e-2  # after 3 steps, where convolutions multiply in TF32 and the reference does not
LR = 1.2e-3
GRAPH = 20  # steps of a rival's graph
ROUNDS = 14
SAMPLE, SPENT = 5e-3, 1.0  # seconds that a sample lasts at least; after which a rival leaves, if it has 3
PAPER_SECONDS = 470  # after which a full run is stopped

OURS, EAGER = "sparselth", "eager torch, one after another"
VMAP, STACKED = "vmap, torch's fused Adam", "baddbmm, torch's fused Adam"


def never() -> bool:
    return False


# What is trained


def model_of(here: Here, part: str) -> Model:
    return TINY[part] if here.size == "tiny" else get_model(MODELS[part])


def made_up(model: Model, n_train: int, n_test: int) -> Images:
    """Images [n, C * H * W] for a model: a random pattern for each class, half of it noise."""
    numbers, k = np.random.default_rng(0), prod(model.input)
    patterns = numbers.integers(0, 128, (model.classes, k), dtype=np.uint8)

    def some(n: int) -> tuple[Any, Any]:
        labels = numbers.integers(0, model.classes, n)
        return patterns[labels] + numbers.integers(0, 128, (n, k), dtype=np.uint8), labels

    spec = replace(get_dataset(model.dataset), title="made-up images", n_train=n_train, n_test=n_test)
    return Images(spec, *some(n_train), *some(n_test), "made up", "made up")


@lru_cache(maxsize=1)
def data_of(here_size: str, device: str, part: str) -> Resident:
    if here_size == "tiny":
        return Resident(made_up(TINY[part], 64, 10), device, 5)
    model = get_model(MODELS[part])
    spec = get_dataset(model.dataset)
    return Resident(made_up(model, spec.n_train, spec.n_test), device, model.evaluation_batch)


def job(model: Model, recipe: Recipe, device: str, seed: int, keep: float = 1.0, start: int = 0) -> Job:
    """A cell with random weights, of which a random mask keeps about `keep`."""
    weights, mask = init_weights(model, stream(seed, "ticket", 1, "init")), pruning.full_mask(model)
    mask &= torch.rand(model.mask_size, generator=torch.Generator().manual_seed(seed)) < keep
    weights[: model.mask_size] *= mask
    state = State.start(weights[None].to(device), recipe, start)
    return Job(Replica(seed, "ticket", 1), state, mask.to(device), start)


@dataclass
class Setup:
    """A part's model and images, and a recipe that meets graphs of many steps and of one."""

    here: Here
    part: str

    def __post_init__(self) -> None:
        self.model = model_of(self.here, self.part)
        self.data = data_of(self.here.size, self.here.device, self.part)
        steps, every, batch = self.here.pick((2, 2, 3), (50, 25, 60), (50, 25, 60))
        self.recipe = Recipe(steps=steps, lr=LR, batch_size=batch, eval_every=every)

    def jobs(self, cells: Sequence[tuple[int, float, int]]) -> list[Job]:
        return [job(self.model, self.recipe, self.here.device, *cell) for cell in cells]

    def order(self, jobs: Sequence[Job]) -> Tensor:
        """Image indices of an epoch, [steps, R, B]."""
        drawn = Batches(self.data, [one.who for one in jobs], self.recipe.batch_size).draw(0)
        return drawn.transpose(0, 1).contiguous().to(self.here.device)

    def trained(self, cells: Sequence[tuple[int, float, int]], kernels: str, **more: Any) -> list[Job]:
        jobs = self.jobs(cells)
        fit(self.model, self.data, jobs, self.recipe, kernels=kernels, **more)
        return jobs

    def replay(self, jobs: Sequence[Job], kernels: str) -> tuple[Replay, list[Tensor]]:
        """What trains the jobs, and its weights and moments [R, P]."""
        states = [one.state for one in jobs]
        tensors = [torch.cat(rows) for rows in zip(*([s.weights, *s.moments] for s in states), strict=True)]
        mask = torch.stack([one.mask for one in jobs])
        replay = Replay(
            self.model,
            self.data,
            [one.who for one in jobs],
            tensors[0],
            tensors[1:],
            mask,
            self.recipe,
            [one.start_step for one in jobs],
            choose(kernels, self.here.device),
        )
        return replay, tensors


# Checks


def named(one: Job) -> dict[str, Tensor]:
    state = one.state
    moments = {f"moment {i}": moment for i, moment in enumerate(state.moments)}
    return {"weights": state.weights, "best weights": state.best_weights} | moments


def must_be_near(found: Mapping[str, Tensor], right: Mapping[str, Tensor], bound: float) -> float:
    """The largest relative error; Wrong beyond `bound`."""
    errors = {
        name: float((found[name].double() - r.double()).norm() / r.double().norm().clamp(min=1e-30))
        for name, r in right.items()
    }
    worst = max(errors, key=lambda name: errors[name])
    if not max(errors.values()) <= bound:
        raise Wrong(f"{worst}: off by {errors[worst]:.1e}, allowed {bound:.0e}")
    return errors[worst]


def losses(one: Job) -> dict[str, Tensor]:
    found = [e["validation_loss"] for e in one.state.evaluations]
    return {"validation losses": torch.tensor(found, dtype=torch.float64)}


def cells_of(here: Here) -> list[tuple[int, float, int]]:
    """Seeds, shares kept and first steps: dense, pruned, nearly empty, and one that comes in late."""
    late = here.pick(1, 7, 7)
    return [(0, 1.0, 0), (1, 0.3, 0), (2, 0.05, 0), (3, 0.5, late)][: here.pick(2, 4, 4)]


def beside_the_reference(here: Here, part: str, kernels: str) -> dict[str, float]:
    """All of `fit`, evaluations too, beside plain torch, whose gradients are products written out."""
    setup, cells = Setup(here, part), cells_of(here)
    setup.recipe = replace(setup.recipe, steps=here.pick(2, 25, 25))
    found, right = (setup.trained(cells, k) for k in (kernels, "reference"))
    errors = [0.0]
    for ours, theirs in zip(found, right, strict=True):
        pruned = ~ours.mask[None, : setup.model.mask_size] & pruning.full_mask(setup.model).to(here.device)
        must_be_zero(ours.state.weights[:, : setup.model.mask_size], pruned, "pruned weights")
        wanted = {k: t for k, t in named(theirs).items() if k != "best weights"}
        errors += [must_be_near(named(ours), wanted, NEAR), must_be_near(losses(ours), losses(theirs), NEAR)]
    return {"error": max(errors)}


def beside_single_launches(here: Here, part: str, kernels: str) -> None:
    """Graphs beside the launches that they hold: our kernels to the bit, the vendor's near."""
    setup = Setup(here, part)
    steps = setup.recipe.eval_every
    found = []
    for graphs in (True, False):
        replay, tensors = setup.replay(setup.jobs([c for c in cells_of(here) if c[2] == 0]), kernels)
        if graphs:
            replay.advance(0, steps, never)
            measured = replay.measure()
        else:
            replay.clock.zero_()
            for step in range(steps):
                replay.orders.enter(step // replay.batches.steps_per_epoch)
                replay._step()
            replay._evaluate()
            measured = replay.means()
        losses = torch.tensor(measured[0], dtype=torch.float64)
        found.append(dict(zip(("weights", "first", "second", "loss"), (*tensors, losses), strict=True)))
    if kernels == "triton":
        must_repeat(found[1], found[0], "launches one by one")
    else:
        must_be_near(found[0], found[1], NEAR)


def stopped(here: Here, part: str) -> None:
    """Stopped and gone on with, to the bits of a training that was not stopped."""
    setup, cells = Setup(here, part), cells_of(here)
    whole = setup.trained(cells, "triton")
    left = [here.pick(1, 3, 3)]

    def enough() -> bool:
        left[0] -= 1
        return left[0] < 0

    jobs = setup.trained(cells, "triton", should_stop=enough)
    if all(one.state.step == setup.recipe.steps for one in jobs):
        raise Wrong("was not stopped")
    fit(setup.model, setup.data, jobs, setup.recipe, kernels="triton")
    for one, other in zip(jobs, whole, strict=True):
        must_repeat(named(one), named(other), "a stop")
        if one.state.evaluations != other.state.evaluations:
            raise Wrong("evaluations differ after a stop")


def idle(here: Here, part: str, kernels: str) -> None:
    """Capturing graphs, and a step in which nobody is active, leave all weights and moments as they are."""
    setup = Setup(here, part)
    jobs = setup.jobs([(0, 1.0, 0), (1, 0.3, 0)])
    for one in jobs:
        for moment in one.state.moments:
            moment.fill_(0.1)[:, : setup.model.mask_size] *= one.mask
    states = [[one.state.weights, *one.state.moments] for one in jobs]
    before = [torch.cat(rows) for rows in zip(*states, strict=True)]
    replay, tensors = setup.replay(jobs, kernels)
    for when in ("graphs were captured", "an idle step"):
        for t, old in zip(tensors, before, strict=True):
            if not same_bits(t, old):
                raise Wrong(f"weights or moments changed: {when}")
        replay.pulse.active.zero_()
        replay.clock.zero_()
        replay.run[1]()
        replay.evaluate()


def alone(here: Here, part: str, kernels: str, replicas: int) -> dict[str, float]:
    """A replica in company and alone: through our kernels the same bits, through the vendor's near."""
    setup = Setup(here, part)
    cells = [(seed, (1.0, 0.3, 0.05)[seed % 3], 0) for seed in range(replicas)]
    together = setup.trained(cells, kernels)
    errors, differing = [0.0], []
    for i in sorted({0, replicas // 2, replicas - 1}):
        (one,) = setup.trained([cells[i]], kernels)
        found, right = named(together[i]), named(one)
        if kernels == "triton":
            must_repeat(found, right, f"company of {replicas}")
            if not same_bits(*(losses(x)["validation losses"] for x in (together[i], one))):
                differing.append(i)
        else:
            found.pop("best weights")  # of another evaluation where two losses are nearly equal
            right.pop("best weights")
            errors += [must_be_near(found, right, NEAR)]
            errors += [must_be_near(losses(together[i]), losses(one), NEAR)]
    if differing:
        raise Wrong(f"the weights are equal, but validation losses of replicas {differing} are not")
    return {"error": max(errors)}


def checks(part: str, here: Here) -> Iterator[Case]:
    def case(name: str, run: Any, *args: Any) -> Case:
        def guarded() -> Any:
            try:
                with precision("ieee"):
                    return run(here, *args)
            finally:
                gc.collect()  # what captured graphs hold goes with them

        return Case(name, part, guarded)

    if part == "alone":
        for of in here.pick(("fc", "cnn"), MODELS, MODELS):
            few = here.pick(2, 3, {"fc": 100, "cnn": 15, "conv2": 7}[of])
            yield case(f"{TITLES[of]}, {few} and one, our kernels", alone, of, "triton", few)
            if here.size != "tiny":
                yield case(f"{TITLES[of]}, {few} and one, by default", alone, of, "auto", few)
        return
    for kernels in here.pick(("triton",), ("auto", "triton"), ("auto", "triton")):
        yield case(f"beside the reference, {kernels}", beside_the_reference, part, kernels)
        yield case(f"graphs beside single launches, {kernels}", beside_single_launches, part, kernels)
        yield case(f"an idle step, {kernels}", idle, part, kernels)
    yield case("stopped and gone on with", stopped, part)


# Rivals


class Eager:
    """One network as usual on resident tensors: autograd, torch.optim.Adam, masks multiplied in."""

    def __init__(self, setup: Setup, one: Job) -> None:
        self.model, data = setup.model, setup.data
        self.pixels, self.labels = pixels(setup), data.labels
        self.net = usual.network(setup.model, one.state.weights[0].cpu()).to(setup.here.device)
        self.masks = usual.masks(setup.model, self.net, one.mask)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=LR)
        self.order, self.place = setup.order([one])[:, 0], 0
        self.held_out = data.split(one.who.seed)[1].to(setup.here.device)

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
        device, model = setup.here.device, setup.model
        self.shape = len(jobs), setup.recipe.batch_size, *model.input
        self.pixels, self.labels = pixels(setup), setup.data.labels
        nets = [usual.network(model, one.state.weights[0].cpu()) for one in jobs]
        masks = [[*usual.masks(model, net, o.mask.cpu()).values()] for net, o in zip(nets, jobs, strict=True)]
        stacked = torch.func.stack_module_state(nets)[0]
        self.parameters = {name: t.detach().to(device) for name, t in stacked.items()}
        self.masks = [torch.stack(rows).to(device) for rows in zip(*masks, strict=True)]
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
        device, model = setup.here.device, setup.model
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
        self.grad[:, : self.model.mask_size].mul_(self.mask)
        self.optimizer.step()
        self.clock += 1

    def weights(self) -> list[Tensor]:
        return split(self.model, self.parameter.detach())


def split(model: Model, flat: Tensor) -> list[Tensor]:
    """The weights [R, ...] of flat buffers [R, P]."""
    return [flat[:, s.offset : s.offset + s.numel].view(-1, *s.shape) for s in model.weights]


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
    if not here.anchors:
        return None
    rates = here.anchors["flops_per_s"]
    conv, rest = least["conv_flops"], least["flops"] - least["conv_flops"]
    products = conv / rates["tf32" if tf32() else "ieee"] + rest / rates["ieee"]
    return float(max(least["bytes"] / here.anchors["copy_bytes_per_s"], products))


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
    for _ in range(here.pick(0, 7, ROUNDS)):
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
    setup: Setup, what: str, kind: str, replicas: int, found: Mapping[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    training = kind.startswith("step")
    least = floor(
        setup.model, replicas, setup.recipe.batch_size if training else setup.data.n_validation, training
    )
    shared = {
        "workload": f"{TITLES[setup.part]}, R{replicas}, {what}",
        "floor_s": floor_seconds(setup.here, least),
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


def benchmark(here: Here, part: str, replicas: int, kernels: str) -> dict[str, Any]:
    """A step and an evaluation, dense, all replicas active; rivals where `kernels` is the default."""
    setup = Setup(here, part)
    an_epoch = setup.data.n_train // setup.recipe.batch_size
    setup.recipe = replace(setup.recipe, steps=2 * (ROUNDS + 4) * an_epoch)
    jobs = setup.jobs([(seed, 1.0, 0) for seed in range(replicas)])
    right = Right(setup, jobs)
    replay, (weights, *_) = setup.replay(jobs, kernels if here.device == "cuda" else "triton")
    replay.advance(0, 3, never)
    right.compare(split(setup.model, weights), torch.tensor(replay.measure()[0], dtype=torch.float64))

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

    with_rivals = kernels == "auto"
    stretch = 1 if here.device == "cpu" else 40 if part == "conv2" else 200
    rivals: dict[tuple[str, str], Callable[[], Rival]] = {(OURS, "graph"): lambda: graph_of(replay, stretch)}
    if with_rivals:
        rivals[EAGER, "warm"] = partial(eager, evaluates=False)
        rivals[VMAP, "graph"] = partial(captured, Vmapped)
        if part == "fc":
            rivals[STACKED, "graph"] = partial(captured, Stacked)
    step = race(here, rivals)
    mine = seconds(step, OURS, "graph")
    if with_rivals:  # two epochs, or a second
        many = 1 if mine is None else max(replay.many, min(2 * an_epoch, int(1 / mine)))
        step[OURS] |= race(here, {(OURS, "warm"): lambda: loop_of(replay, 3, many)})[OURS]
    rivals = {(OURS, "graph"): lambda: Rival(replay.evaluate)}
    if with_rivals:
        rivals[EAGER, "warm"] = partial(eager, evaluates=True)
    evaluation = race(here, rivals)

    more = "" if with_rivals else ", --deterministic"
    timed = rows(setup, f"a step{more}", f"step{more}", replicas, step)
    n = setup.data.n_validation
    timed += rows(setup, f"evaluation of {n:,}{more}", f"evaluation{more}", replicas, evaluation)
    figures: dict[str, float | None] = {}
    if replicas == REPLICAS[part][0] and here.anchors:
        of_floor, of_eager = ratio(mine, timed[0]["floor_s"]), ratio(seconds(step, EAGER, "warm"), mine)
        if part == "conv2":
            figures[f"times the better of FLOP and byte floors{more}"] = of_floor
        elif part == "fc":
            figures[f"times its floor{more}"] = of_floor
        if with_rivals:
            loop = ratio(seconds(step, OURS, "warm"), mine)
            figures |= {
                f"R{replicas} {TITLES[part]}, the loop, times its graphs": loop,
                f"R{replicas} {TITLES[part]}, times the best of torch's batched": ratio(
                    min((t for name in (VMAP, STACKED) if (t := seconds(step, name, "graph"))), default=None),
                    mine,
                ),
            }
            if part == "fc":
                figures["times the sequential eager loop per replica-step"] = of_eager
    return {"times": timed, "figures": figures}


def benchmarks(part: str, here: Here) -> Iterator[Case]:
    if part == "alone":
        return

    def case(replicas: int, kernels: str) -> Case:
        def run() -> dict[str, Any]:
            try:
                return benchmark(here, part, here.pick(2, replicas, replicas), kernels)
            finally:
                gc.collect()

        return Case(f"{TITLES[part]}, R{replicas}, {kernels}", part, run)

    most, *fewer = REPLICAS[part]
    yield case(most, "auto")
    for replicas in here.pick((), (), fewer):
        yield case(replicas, "auto")
    if here.size == "full":
        yield case(most, "triton")


# A full run


class Watch:
    """Stops a run after some seconds, as a user would."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def started(self, *_: object) -> None: ...
    def evaluated(self, *_: object) -> None: ...
    def finished(self, *_: object) -> None: ...
    def halved(self, *_: object) -> None: ...

    def tick(self) -> None:
        if time.monotonic() > self.end:
            signal.raise_signal(signal.SIGTERM)


def imp(config: ImpConfig, images: Images, seconds: float) -> dict[str, Any]:
    """`sparselth imp` without its screens: wall time beside the plan's, in a folder that goes.

    Stopped `seconds` after it began, pricing included.
    """
    from sparselth.errors import Interrupted
    from sparselth.experiments.plan import widest
    from sparselth.experiments.workers import Pool
    from sparselth.runs import open_run

    total = len(config.replicas())
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
    setup = Setup(here, "fc")
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


def whole(part: str, here: Here) -> Iterator[Case]:
    yield Case("imp --recipe paper --seeds 0-4 --levels 20", part, partial(paper, here))
