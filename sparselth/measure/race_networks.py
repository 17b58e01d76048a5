"""Whole networks from end to end: dense at its best beside the pruned one, in time, memory and answers.

`bench_run` takes the ticket of a finished run and its test images, `bench_model` a model with a random
mask, both on a CPU or on CUDA; `bench_training` takes one step of training, on a CPU. All in fp32; on CUDA
without TF32, and timed in CUDA graphs where a rival can be captured.

Every time stands beside an error against float64 found in the same run, and a row whose check fails is
marked, is nobody's best and sets `failed`. All rivals see the same images and take turns under one clock,
with torch's number of threads. The dense rivals may have the images in the order of memory they like best,
for nothing; the pruned network gets them as they come.
"""

from __future__ import annotations

import copy
import importlib
import math
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparselth import data, pruning, runs, sparse, tickets, train
from sparselth.clock import Race, Sample, Timing, rounds, warm, warm_wall
from sparselth.config import Recipe, Replica
from sparselth.data.batches import Batches, Resident
from sparselth.engine.break_even import break_even
from sparselth.engine.dense import init_weights
from sparselth.engine.paths import choose
from sparselth.engine.vendor import VendorNetwork
from sparselth.errors import SparselthError, UsageError
from sparselth.machine import cpu_name
from sparselth.measure import energy, memory
from sparselth.measure.floors import precision
from sparselth.measure.memory import Memory, held
from sparselth.measure.rivals import quiet_compiler
from sparselth.models import Model, get_model
from sparselth.models.torch import network, sequential
from sparselth.streams import stream

Say = Callable[[str], None]
Call = Callable[[], object]
TOLERANCE = 1e-5  # largest error of a logit, relative to the largest logit
TOLERANCE_CUDA = 1e-4  # cuDNN may convolve by transforms that lose some digits
GRADIENT, GRADIENT_CONV = 1e-5, 1e-2  # norm of the error; in a pool a near-tie falls either way
CHECKED = 256  # images of a batch that are also computed in float64
EVEN = 0.97, 1.03  # between them nobody wins
REST = 0.005  # seconds; OpenMP's threads go on spinning for a while
STEPS = 20  # batches of training images, over and over
WHO = Replica(0, "ticket", 0)


@dataclass(frozen=True)
class Result:
    """What was measured: rows for JSON, a text for people, and whether a check failed."""

    rows: list[dict[str, Any]]
    text: str
    failed: bool


@dataclass(frozen=True)
class Case:
    """A dense network and its pruned counterpart, buffers [P] of one model."""

    model: Model
    dense: Tensor
    pruned: Tensor
    mask: Tensor  # [M]

    @property
    def sparsity(self) -> float:
        return 1 - sum(self.model.params.kept(self.mask).values()) / self.model.params.prunable


def bench_run(
    path: Path,
    level: int | None,
    seed: int | None,
    batches: Sequence[int],
    data_dir: Path | None,
    say: Say,
    device: str = "cpu",
) -> Result:
    """The ticket of a level of a run beside the run's dense network, on the test images of its data set.

    `level` is the last finished one unless given, `seed` the first. Checks: the ticket's predictions are
    those of the dense network with its zeros, and its accuracy is the one that the run recorded.
    """
    _check_batches(batches)
    record = runs.read(path)
    who, point = _cell(record, level, seed)
    model, config = get_model(record.config.model), record.config
    images = data.resolve(config.dataset, data_dir, say)
    resident = Resident(images, "cpu", images.spec.n_test)
    (chunk, labels), *_ = resident.test()
    x, labels = chunk[0].T.reshape(-1, *model.input).contiguous(), labels.flatten()
    first = Replica(who.seed, "ticket", 0)
    dense, _, dense_file = _load(path, model, first)
    pruned, mask, file = _load(path, model, who)
    case = Case(model, dense, pruned, mask)

    title = (
        f"{config.model}, seed {who.seed}, ticket of level {who.level} of {path}: "
        f"{_percent(case)} of the weights, on {len(x):,} test images of {images.spec.title}"
    )
    inference = _inference(case, x, batches, (dense_file, file), say, device)
    pairs = inference.memory
    if device == "cpu":
        say("memory of a training step")
        pairs |= _memory_of_training(case, config.recipe, resident)
    right = inference.pruned_logits.argmax(1) == labels
    accuracy = float(right.double().mean())
    with torch.no_grad():
        before = float((_logits(sequential(model, dense), x, 500).argmax(1) == labels).double().mean())
    recorded = point["final_accuracy"]
    as_recorded = abs(accuracy - recorded) <= 1e-3
    sentences = [
        *inference.sentences,
        f"Test accuracy: dense {100 * before:.2f} %, ticket {100 * accuracy:.2f} %"
        + (
            "." if as_recorded else f"; CHECK FAILED: the run recorded {100 * point['final_accuracy']:.2f} %."
        ),
        f"Stored file: the ticket's cell {file:,} bytes, the dense network stored the same way "
        f"{dense_file:,}, {file / dense_file:.3f} of it.",
    ]
    for row in inference.rows:
        row |= {
            "level": who.level,
            "seed": who.seed,
            "test_accuracy": accuracy,
            "dense_test_accuracy": before,
        }
    text = _text(title, _table(inference.rows), memory.table(pairs), sentences, device)
    return Result(inference.rows, text, inference.failed or not as_recorded)


def bench_model(name: str, sparsity: float, batches: Sequence[int], say: Say, device: str = "cpu") -> Result:
    """A model with fresh weights, of which every layer keeps the same share, chosen at random, on noise."""
    _check_batches(batches)
    case = _random_case(get_model(name), sparsity)
    images = torch.randn(
        max(*batches, CHECKED),
        *case.model.input,
        generator=stream(0, "bench", 0, "images"),
        dtype=torch.float32,
        device="cpu",
    )
    files = _stored(case, dense=True), _stored(case, dense=False)
    inference = _inference(case, images, batches, files, say, device)
    title = (
        f"{name}, random mask, {100 * (1 - case.sparsity):.3g} % of every layer's weights, on random images"
    )
    text = _text(title, _table(inference.rows), memory.table(inference.memory), inference.sentences, device)
    return Result(inference.rows, text, inference.failed)


def bench_training(name: str, sparsity: float, batch: int, say: Say) -> Result:
    """One step of training: torch's own with fused Adam and our dense one beside the compressed one.

    The error is that of the first gradient against float64, in norm. Checks: that error, and that pruned
    weights and their moments are exactly zero after all steps.
    """
    _check_batches([batch])
    model = get_model(name)
    case = _random_case(model, sparsity)
    recipe = Recipe(steps=10**9, lr=1e-4, batch_size=batch, eval_every=10**9)
    resident = _training_images(model)
    say(f"{name}: steps of training, batch {batch}")
    steps = _steps(case, recipe, resident)
    first = _first_batch(model, resident, batch)
    reference = [_gradient(model, flat, first) for flat in (case.dense, case.pruned)]
    reference[1][: model.params.mask_size] *= case.mask
    convolves = model.convolves
    limit = GRADIENT_CONV if convolves else GRADIENT
    errors, footprints = {}, {}
    for label, step in steps.items():
        step.run()
        exact = reference[label == "sparselth"]
        errors[label] = float((step.gradient() - exact).norm() / exact.norm())
        footprints[label] = step.memory()
    times = _race({label: step.run for label, step in steps.items()}, "cpu")
    dead = steps["sparselth"].dead_are_zero()

    wrong = {label for label, error in errors.items() if not error <= limit}
    if not dead:
        wrong.add("sparselth")
    best = _best(times, wrong | {"sparselth"})
    rows = []
    for label, step in steps.items():
        ours, footprint = label == "sparselth", footprints[label]
        row = _row(case, label, batch, times, best, ours)
        row |= {
            "weight_bytes": footprint.weights + footprint.indices,
            "dense_weight_bytes": footprints["torch"].weights,
            "gradient_bytes": footprint.gradients,
            "optimizer_bytes": footprint.optimizer,
            "peak_bytes": footprint.peak,
            "max_rel_error": errors[label] if math.isfinite(errors[label]) else None,
            "check": "failed" if label in wrong else "passed",
        }
        if ours:
            row |= _conversion(step.seconds, times, best)
        rows.append(row)
    sentences = [_sentence(rows)]
    if not dead:
        sentences.append("CHECK FAILED: pruned weights or their moments are not zero after these steps.")
    sentences += _failures(rows)
    title = f"{name}, one step of training with Adam, random mask, {_percent(case)} of every layer's weights"
    pair = {f"training, batch {batch}": (footprints["torch"], footprints["sparselth"])}
    if torch.cuda.is_available():
        sentences.append("There is a GPU here, but steps of training are measured on the CPU.")
    text = _text(title, _table(rows), memory.table(pair), sentences)
    return Result(rows, text, bool(wrong))


# ---- inference


@dataclass
class _Inference:
    rows: list[dict[str, Any]]
    sentences: list[str]
    memory: dict[str, tuple[Memory, Memory]]
    pruned_logits: Tensor  # of the last batch size, on all images, on the CPU
    failed: bool


@torch.no_grad()
@precision("fp32")
def _inference(
    case: Case, images: Tensor, batches: Sequence[int], files: tuple[int, int], say: Say, device: str
) -> _Inference:
    dense, pruned = (sequential(case.model, flat).to(device) for flat in (case.dense, case.pruned))
    images, most = images.to(device), TOLERANCE if device == "cpu" else TOLERANCE_CUDA
    wait = torch.cuda.synchronize if device == "cuda" else _nothing
    dense_bytes = sum(held([*dense.parameters()]))
    expected = _logits(pruned, images, 500)
    meter = energy.meter(device)
    found = _Inference([], [], {}, expected, False)
    notes = [meter.why]
    for batch in batches:
        x = images[torch.arange(batch, device="cpu") % len(images)]
        say(f"{case.model.name}, batch {batch}: converting")
        began = time.perf_counter()
        try:
            converted = sparse.convert(pruned, None, x)  # type: ignore[arg-type]  # it says what it refuses
        except ValueError as error:
            raise SparselthError(f"{case.model.name} cannot be converted: {error}") from None
        conversion = time.perf_counter() - began
        footprints: dict[str, Memory | None] = {
            "sparselth": memory.running(converted.plan, partial(converted, x), device, files[1])
        }
        say(f"{case.model.name}, batch {batch}: dense at its best")
        calls, why_not = _dense_rivals(dense, x)
        notes += [note for note in why_not if note not in notes]
        errors = {}
        for label, call in calls.items():
            errors[label] = _error(call(), dense, x)
            footprints[label] = None  # not torch's allocator
            if label != "onnxruntime":
                footprints[label] = memory.running([*dense.parameters()], call, device, files[0])
        calls["sparselth"] = partial(converted, x)
        errors["sparselth"] = _error(converted(x), pruned, x)
        say(f"{case.model.name}, batch {batch}: timing")
        times = _race(calls, device)
        wrong = {label for label, error in errors.items() if not error <= most}
        logits = _logits(converted, images, batch)
        found.pruned_logits = logits.cpu()
        differing, ties = _differing(logits, expected, most)
        if differing > ties:
            wrong.add("sparselth")
        best = _best(times, wrong | {"sparselth"})
        rows = []
        for label in calls:
            footprint = footprints[label]
            row = _row(case, label, batch, times, best, label == "sparselth")
            row |= {
                "weight_bytes": footprint.weights + footprint.indices if footprint else None,
                "dense_weight_bytes": dense_bytes,
                "peak_bytes": footprint.peak if footprint else None,
                "file_bytes": files[label == "sparselth"],
                "max_rel_error": errors[label] if math.isfinite(errors[label]) else None,
                "joules": energy.per_call(meter, calls[label], wait)
                if label in (best, "sparselth")
                else None,
                "check": "failed" if label in wrong else "passed",
            }
            if label == "sparselth":
                row |= _conversion(conversion, times, best)
                row |= {"images": len(images), "differing_predictions": differing, "ties": ties}
            rows.append(row)
        found.rows += rows
        found.failed |= bool(wrong)
        before, after = footprints[best], footprints["sparselth"]
        before = before or footprints["dense"]
        assert before is not None
        assert after is not None
        found.memory[f"inference, batch {batch}"] = before, after
        found.sentences += [_sentence(rows), *_failures(rows)]
    found.sentences += [_agreement(found.rows), *notes]
    return found


def _dense_rivals(net: nn.Module, x: Tensor) -> tuple[dict[str, Call], list[str]]:
    """The dense network in every way this machine has, and why not in others."""
    calls: dict[str, Call] = {"dense": partial(net, x)}
    notes = []
    if any(isinstance(module, nn.Conv2d) for module in net.modules()):
        turned = copy.deepcopy(net).to(memory_format=torch.channels_last)
        calls["dense channels-last"] = partial(turned, x.contiguous(memory_format=torch.channels_last))
    others = {"dense compiled": _compiled} | ({} if x.is_cuda else {"onnxruntime": _onnx})
    for label, make in others.items():
        try:
            calls[label] = make(net, x)
        except Exception as error:  # whatever stands between a user and a compiler, or a package
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            notes.append(f"{label} is not among the rivals: {reason}")
    return calls, notes


def _compiled(net: nn.Module, x: Tensor) -> Call:
    quiet_compiler()
    torch.compiler.reset()  # or the eighth batch size would no longer be compiled
    call = partial(torch.compile(copy.deepcopy(net), dynamic=False), x)
    call()
    return call


def _onnx(net: nn.Module, x: Tensor) -> Call:
    """ONNX Runtime on the same network, where it and `onnx` are installed."""
    onnx, runtime = importlib.import_module("onnx"), importlib.import_module("onnxruntime")
    make, nodes, constants, name = onnx.helper, [], [], "x"
    for i, module in enumerate(net.children()):
        inputs = [name]
        settings: dict[str, Any] = {}
        for label, parameter in module.named_parameters():
            inputs.append(f"{i}.{label}")
            constants.append(onnx.numpy_helper.from_array(parameter.detach().numpy(), inputs[-1]))
        match module:
            case nn.Linear():
                kind, settings = "Gemm", {"transB": 1}
            case nn.Conv2d():
                pad = int(module.padding[0])
                kind, settings = "Conv", {"pads": [pad] * 4}
            case nn.MaxPool2d():
                size = [int(module.kernel_size)] * 2  # type: ignore[arg-type]
                kind, settings = "MaxPool", {"kernel_shape": size, "strides": size}
            case _:
                kind = {nn.ReLU: "Relu", nn.Flatten: "Flatten"}[type(module)]
        name = f"y{i}"
        nodes.append(make.make_node(kind, inputs, [name], **settings))
    kind = onnx.TensorProto.FLOAT
    ends = [make.make_tensor_value_info(end, kind, None) for end in ("x", name)]
    graph = make.make_graph(nodes, "network", ends[:1], ends[1:], constants)
    file = make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=8)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")  # or its threads slow down others
    session = runtime.InferenceSession(file.SerializeToString(), options, providers=["CPUExecutionProvider"])
    fed = {"x": x.numpy()}
    return lambda: torch.from_numpy(session.run(None, fed)[0])


def _logits(run: Callable[[Tensor], Tensor], images: Tensor, batch: int) -> Tensor:
    return torch.cat([run(chunk) for chunk in torch.split(images, batch)])


def _error(y: object, net: nn.Module, x: Tensor) -> float:
    """The largest error of a logit against float64, relative to the largest logit."""
    assert isinstance(y, Tensor)
    exact: Tensor = copy.deepcopy(net).double()(x[:CHECKED].double())
    return float((y[:CHECKED].double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30))


def _differing(logits: Tensor, expected: Tensor, most: float = TOLERANCE) -> tuple[int, int]:
    """Images whose predicted class differs, and those of them whose two classes tie within rounding."""
    ours, theirs = logits.argmax(1, keepdim=True), expected.argmax(1, keepdim=True)
    gap = expected.gather(1, theirs) - expected.gather(1, ours)
    tie = (gap <= most * expected.abs().amax(1, keepdim=True)) & logits.isfinite().all(1, keepdim=True)
    return int((ours != theirs).sum()), int(((ours != theirs) & tie).sum())


# ---- training


@dataclass
class _Step:
    """One rival's step of training, on the same batches as the others'."""

    run: Call
    gradient: Callable[[], Tensor]  # after the first step, float64 [P]
    memory: Callable[[], Memory]
    seconds: float = 0.0  # to make it
    dead_are_zero: Callable[[], bool] = lambda: True


def _steps(case: Case, recipe: Recipe, resident: Resident) -> dict[str, _Step]:
    """All rivals; "torch" and "sparselth" are always there."""
    full = case.model.params.full_mask()
    found = {"torch": _torch_step(case, recipe, resident, torch.contiguous_format)}
    if case.model.convolves:
        found["torch channels-last"] = _torch_step(case, recipe, resident, torch.channels_last)
    share = break_even(case.model, recipe.batch_size, choose("auto", "cpu").csr_linear.takes)
    found["sparselth dense"] = _our_step(case.model, case.dense, full, recipe, resident, share)
    found["sparselth"] = _our_step(case.model, case.pruned, case.mask, recipe, resident, share)
    return found


def _torch_step(case: Case, recipe: Recipe, resident: Resident, layout: torch.memory_format) -> _Step:
    """Dense torch: images there as floats, its own autograd and fused optimizer."""
    model, net = case.model, network(case.model, case.dense).to(memory_format=layout)
    optimizer: torch.optim.Optimizer
    if recipe.optimizer == "adam":
        optimizer = torch.optim.Adam(net.parameters(), lr=recipe.lr, fused=True)
    else:
        optimizer = torch.optim.SGD(net.parameters(), lr=recipe.lr, momentum=recipe.momentum, fused=True)
    size, source = recipe.batch_size, Batches(resident, [WHO], recipe.batch_size)
    batches = []
    for step in range(min(STEPS, source.steps_per_epoch)):
        x, y = source.at(step)
        images = x[0].T.reshape(size, *model.input).contiguous(memory_format=layout)
        batches.append((images.clone(memory_format=torch.preserve_format), y.flatten().clone()))
    place = 0

    def run() -> None:
        nonlocal place
        x, y = batches[place % len(batches)]
        place += 1
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(net(x), y))
        optimizer.step()

    def gradient() -> Tensor:
        return _flat(model, [p.grad for p in net.parameters()])

    def measure() -> Memory:
        run()
        weights, gradients = held([*net.parameters()]), held([p.grad for p in net.parameters()])
        optimizer.zero_grad()
        added = memory.peak(run)  # the gradients among it
        moments = held([*optimizer.state.values()])
        return Memory(weights[0], 0, added - gradients[0], gradients[0], sum(moments))

    return _Step(run, gradient, measure)


def _our_step(
    model: Model, flat: Tensor, mask: Tensor, recipe: Recipe, resident: Resident, share: Mapping[str, float]
) -> _Step:
    """What `train.fit` does for a step of one network."""
    began = time.perf_counter()
    state = train.State.start(flat[None], recipe)
    steps = train.prepare(model, resident, [train.Job(WHO, state, mask)], recipe, "auto", share)
    seconds = time.perf_counter() - began
    per_epoch = min(STEPS, Batches(resident, [WHO], recipe.batch_size).steps_per_epoch)

    def run() -> None:
        steps.advance(state.step % per_epoch, 1, lambda: False)
        state.step += 1

    def gradient() -> Tensor:
        return state.expanded().moments[0][0].double() / (0.1 if recipe.optimizer == "adam" else 1)

    def measure() -> Memory:
        inner: Any = getattr(steps, "steps", steps)
        if isinstance(getattr(inner, "network", None), VendorNetwork):
            inner.network.kept = []  # of the last step; the next one finds its own
        images = resident, inner.batches, getattr(getattr(inner, "chain", None), "x", None)
        weights, gradients, moments = (sum(held(part)) for part in (state.weights, inner.grad, state.moments))
        layout = sum(held(state.layout))
        buffers = state.weights, inner.grad, state.moments, state.layout
        of_the_run = state.best_weights, mask  # for its files, not for a step
        kept, bits = held(steps, but=(*buffers, *images, *of_the_run))
        return Memory(weights, layout + bits, kept + memory.peak(run), gradients, moments)

    def dead_are_zero() -> bool:
        whole = state.expanded()
        return not any(
            bool(t[0, : model.params.mask_size][~mask].any()) for t in (whole.weights, *whole.moments)
        )

    return _Step(run, gradient, measure, seconds, dead_are_zero)


def _gradient(model: Model, flat: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Of the mean cross-entropy, by torch's autograd in float64, [P]."""
    net, (x, y) = network(model, flat).double(), batch
    torch.autograd.backward(F.cross_entropy(net(x.double()), y))
    return _flat(model, [p.grad for p in net.parameters()])


def _flat(model: Model, tensors: Sequence[Tensor | None]) -> Tensor:
    """The parameters of a Sequential, layer by layer, as a float64 buffer [P]."""
    found = torch.zeros(model.params.size, dtype=torch.float64, device="cpu")
    specs = [spec for part in model.parts for spec in part[:2]]
    for spec, tensor in zip(specs, tensors, strict=True):
        assert tensor is not None
        found[spec.span] = tensor.detach().flatten()
    return found


def _first_batch(model: Model, resident: Resident, size: int) -> tuple[Tensor, Tensor]:
    x, y = Batches(resident, [WHO], size).at(0)
    return x[0].T.reshape(-1, *model.input), y.flatten()


def _memory_of_training(case: Case, recipe: Recipe, resident: Resident) -> dict[str, tuple[Memory, Memory]]:
    share = break_even(case.model, recipe.batch_size, choose("auto", "cpu").csr_linear.takes)
    pair = (
        _torch_step(case, recipe, resident, torch.contiguous_format),
        _our_step(case.model, case.pruned, case.mask, recipe, resident, share),
    )
    for step in pair:
        step.run()
    return {f"training, batch {recipe.batch_size}": (pair[0].memory(), pair[1].memory())}


# ---- what is measured


def _random_case(model: Model, sparsity: float) -> Case:
    if not 0 <= sparsity < 1:
        raise UsageError(f"--sparsity {sparsity:g}: expected a number from 0 to below 1, the share of zeros")
    dense = init_weights(model, stream(0, "bench", 0, "init"))
    noise = torch.rand(
        model.params.mask_size, generator=stream(0, "bench", 0, "mask"), dtype=torch.float32, device="cpu"
    )
    keep = {spec.name: round((1 - sparsity) * spec.numel) for spec in model.weights}
    mask = pruning.prune(model.params, noise, model.params.full_mask(), keep, "reference")
    pruned = dense.clone()
    pruned[: model.params.mask_size] *= mask
    return Case(model, dense, pruned, mask)


def _training_images(model: Model) -> Resident:
    """The digits inside the package, or as many random images where a model takes others."""
    resident = Resident(data.load(data.FALLBACK, data.ASSETS), "cpu", 100)
    if model.input != data.get_dataset(data.FALLBACK).shape:
        size = len(resident.labels), math.prod(model.input)
        resident.images = torch.randint(
            256, size, dtype=torch.uint8, generator=stream(0, "bench", 0, "images"), device="cpu"
        )
        # bytes from 0 to 255 have a deviation of 74
        resident.scale = torch.full((size[1], 1), 1 / 74, dtype=torch.float32, device="cpu")
        resident.shift = torch.full((size[1], 1), -127.5 / 74, dtype=torch.float32, device="cpu")
    return resident


def _cell(record: runs.RunRecord, level: int | None, seed: int | None) -> tuple[Replica, dict[str, Any]]:
    """The ticket that is asked for and its line."""
    path, config = record.path, record.config
    seed = config.seeds[0] if seed is None else seed
    if seed not in config.seeds:
        raise UsageError(
            f"--seed {seed}: expected one of {', '.join(map(str, config.seeds))}, the seeds of {path}"
        )
    done = {p["level"]: p for p in record.points if p["arm"] == "ticket" and p["seed"] == seed}
    level = max([1, *done]) if level is None else level
    if not 1 <= level <= config.levels:
        raise UsageError(
            f"--level {level}: expected 1 to {config.levels}, the levels of {path} (0 is the dense network)"
        )
    if level not in done:
        raise SparselthError(
            f"{path}: the ticket of seed {seed}, level {level} is not finished; "
            f"go on with `sparselth imp --out {path} --resume`"
        )
    return Replica(seed, "ticket", level), done[level]


def _load(run: Path, model: Model, who: Replica) -> tuple[Tensor, Tensor, int]:
    """Trained weights [P] and mask [M] of a finished cell, and bytes of its file without rewind weights.

    A dense network needs no mask: its file is counted without one.
    """
    file = runs.cell_path(run, who)
    content, header = tickets.read(file, model.params)
    flat, mask = torch.from_numpy(content.weights), torch.from_numpy(content.mask)
    if who.level:
        return flat, mask, file.stat().st_size
    content = tickets.Content(content.mask, content.weights)
    return flat, mask, memory.file_bytes(tickets.arrays(model.params, content, dense=True), header)


def _stored(case: Case, dense: bool) -> int:
    """Bytes of a file as a run writes it."""
    params, full = case.model.params, case.model.params.full_mask()
    mask, weights = (full, case.dense) if dense else (case.mask, case.pruned)
    content = tickets.Content(mask.numpy(), weights.numpy())
    head = tickets.header(params, model=case.model.name)
    return memory.file_bytes(tickets.arrays(params, content, dense), head)


def _check_batches(batches: Sequence[int]) -> None:
    for batch in batches:
        if batch < 1:
            raise UsageError(f"--batch {batch}: expected 1 or more images")


# ---- rows and words


def _row(
    case: Case, label: str, batch: int, times: Mapping[str, Timing], best: str, ours: bool
) -> dict[str, Any]:
    return {
        "implementation": label,
        "network": case.model.name,
        "batch": batch,
        "dtype": "fp32",
        "sparsity": round(case.sparsity, 4) if ours else 0.0,
        "threads": torch.get_num_threads(),
        "median_s": times[label].median,
        "iqr_s": times[label].spread,
        "dense_best": best,
        "dense_median_s": times[best].median,
        "speedup": times[best].median / times[label].median,
    }


def _conversion(seconds: float, times: Mapping[str, Timing], best: str) -> dict[str, Any]:
    """Calls until the conversion has paid for itself against dense at its best; None: never."""
    gain = times[best].median - times["sparselth"].median
    return {"conversion_s": seconds, "pays_after": math.ceil(seconds / gain) if gain > 0 else None}


def _best(times: Mapping[str, Timing], without: set[str]) -> str:
    """The fastest dense rival that is right."""
    right = [label for label in times if label not in without] or ["dense" if "dense" in times else "torch"]
    return min(right, key=lambda label: times[label].median)


def _sentence(rows: Sequence[Mapping[str, Any]]) -> str:
    ours = rows[-1]
    gain, best, times = ours["speedup"], ours["dense_best"], (ours["median_s"], ours["dense_median_s"])
    what = f"Batch {ours['batch']}: sparselth takes {_ms(times[0])} ms, {best} {_ms(times[1])} ms"
    if gain < EVEN[0]:
        return f"{what}; use dense, sparselth takes {1 / gain:.2f} times as long."
    if gain <= EVEN[1] or ours["pays_after"] is None:
        return f"{what}; neither wins."
    made, calls = ours["conversion_s"], ours["pays_after"]
    after = f"{calls:,} call{'s' * (calls != 1)}"
    return f"{what}: {gain:.2f}x; making it took {made:.2g} s, paid back after {after}."


def _failures(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        f"CHECK FAILED: {row['implementation']} at batch {row['batch']} is off by {_off(row)} "
        f"from float64, {row.get('differing_predictions', 0)} predictions differ; it counts for nothing."
        for row in rows
        if row["check"] == "failed"
    ]


def _agreement(rows: Sequence[Mapping[str, Any]]) -> str:
    ours = [row for row in rows if row["implementation"] == "sparselth"]
    images = ours[0]["images"]
    off, ties = (max(row[key] for row in ours) for key in ("differing_predictions", "ties"))
    if not off:
        return f"Predictions are those of the dense network with its zeros on all {images:,} images."
    tied = f"on {ties} of them two classes tie within rounding"
    return f"Predictions differ on {off} of {images:,} images; {tied}."


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        f"{'batch':>5}  {'':<22}{'ms':>10}{'iqr':>9}{'speed-up':>10}{'weights KB':>12}{'peak KB':>12}"
        f"{'error':>10}{'make s':>8}{'pays after':>12}"
    ]
    for row in rows:
        made, pays = (row.get(key, "") for key in ("conversion_s", "pays_after"))
        lines.append(
            f"{row['batch']:>5}  {row['implementation']:<22}{_ms(row['median_s']):>10}{_ms(row['iqr_s']):>9}"
            f"{row['speedup']:>10.2f}{_kb(row['weight_bytes']):>12}{_kb(row['peak_bytes']):>12}"
            f"{_off(row):>10}"
            f"{made if made == '' else f'{made:.2f}':>8}{'never' if pays is None else pays:>12}".rstrip()
            + (" CHECK FAILED" if row["check"] == "failed" else "")
        )
    return "\n".join(lines)


def _text(title: str, table: str, footprints: str, sentences: Sequence[str], device: str = "cpu") -> str:
    where = f"{cpu_name()}, threads {torch.get_num_threads()}"
    if device == "cuda":
        where = torch.cuda.get_device_name()
    where += f", torch {torch.__version__}, fp32"
    legend = (
        "speed-up: against dense at its best. peak: weights, indices and activations; for a step gradients "
        "and moments too. error: against float64, of the logits relative to the largest, of a step that of "
        "the gradient's norm. make: conversion, and measuring what this machine had not measured before."
    )
    said = "\n".join(textwrap.fill(line, 100, subsequent_indent="  ") for line in sentences)
    return "\n".join([title, where, "", table, textwrap.fill(legend, 100), "", footprints, "", said])


def _off(row: Mapping[str, Any]) -> str:
    error = row["max_rel_error"]
    return "NaN" if error is None else f"{error:.1e}"


def _percent(case: Case) -> str:
    return f"{100 * (1 - case.sparsity):.3g} %"


def _race(calls: Mapping[str, Call], device: str) -> dict[str, Timing]:
    sample = warm if device == "cuda" else _rested
    race = Race({label: sample(call) for label, call in calls.items()})
    rounds(race)
    return race.timings()


def _rested(call: Call) -> Sample:
    """`warm_wall` once the threads of the rival before have gone to sleep."""
    sample = warm_wall(call)

    def rested() -> float:
        time.sleep(REST)
        call()
        return sample()

    return rested


def _nothing() -> None:
    pass


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3f}"


def _kb(size: int | None) -> str:
    return "–" if size is None else f"{size / 1e3:,.1f}"
