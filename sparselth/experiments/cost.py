"""What a run would cost on GPUs that nothing was measured on: a model, and every number that it assumes.

`8xh100` names eight of them, in machines of eight. FLOPs are counted from the network's layers, decoding is
timed here; all else is the vendor's, or assumed, and is said. Networks are spread over the GPUs first, and a
batch is split only where there are more GPUs than networks that can train at one time, or where it does not
fit one of them. The run goes through the same agenda as always.
"""

from __future__ import annotations

import io
import re
import tempfile
import time
from dataclasses import dataclass, replace
from math import fsum, prod
from pathlib import Path

import numpy as np

from sparselth.data import DatasetSpec, get_dataset
from sparselth.errors import SparselthError, UsageError
from sparselth.experiments.agenda import widest
from sparselth.experiments.price import Price, replica_bytes
from sparselth.experiments.training import Training, evaluated_images
from sparselth.models import BatchNorm, Model

MACHINE = 8  # GPUs of a machine
MOST = 100_000
FULL = 0.9  # of a GPU's memory
LATENCY = 5e-5  # seconds of a sum over GPUs beside its bytes
KERNELS, LAUNCH = 5, 8e-6  # that a node of a network has in a step of autograd's; seconds to start each
SECONDS = 0.5  # that decoding is timed


@dataclass(frozen=True)
class Gpu:
    """A GPU in a machine of eight, by its vendor's data sheets; `share` is an assumption."""

    title: str
    flops: float  # a second, TF32 tensor cores, dense: what torch's convolutions of fp32 take there
    share: float  # of these in a step
    memory: float  # bytes
    cores: int  # of the machine, for each GPU
    near: float  # bytes a second, one way, to the other GPUs of the machine
    far: float  # to those of other machines


# A step of ResNet-50 reaches 15 % on the A100: 938 images a second in TF32, published by NVIDIA
# (DeepLearningExamples, ResNet50 v1.5 for PyTorch, DGX A100). Norms and sums are bound by memory, so those of
# the others are that rate times their bandwidth by the A100's (3.35 and 4.8 by 2.04 TB/s).
# Peaks, memory, NVLink: data sheets of A100 80GB SXM, H100 SXM, H200 SXM. Cores and network: DGX A100 (128
# cores, 200 Gb/s a GPU), DGX H100 and H200 (112 cores, 400 Gb/s a GPU).
GPUS = {
    "a100": Gpu("A100 SXM, 80 GB", 156e12, 0.15, 80e9, 16, 300e9, 25e9),
    "h100": Gpu("H100 SXM, 80 GB", 494.7e12, 0.078, 80e9, 14, 450e9, 50e9),
    "h200": Gpu("H200 SXM, 141 GB", 494.7e12, 0.11, 141e9, 14, 450e9, 50e9),
}


def gpus_named(text: str) -> tuple[int, str] | None:
    """(8, "h100") of 8xh100; None where a text is of another kind. UsageError for GPUs that are not known."""
    if not (found := re.fullmatch(r"(\d+)x([a-z]\w*)", text.lower())):
        return None
    number, name = int(found[1]), found[2]
    if name not in GPUS or not 1 <= number <= MOST:
        raise UsageError(
            f"`price_on` {text:.40}: expected a number of GPUs such as 8xh100; known are {', '.join(GPUS)}"
        )
    return number, name


@dataclass(frozen=True)
class Cost:
    """What a run is expected to cost, and in words what that rests on."""

    gpus: str
    seconds: float  # until the last network is trained
    gpu_hours: float  # of all GPUs, idle or not
    busy: float  # the share of them in which a GPU trains or evaluates
    each: int  # GPUs of a network
    assumptions: dict[str, str]


def modelled(config: Training, number: int, name: str) -> Cost:
    """The cost of a run on so many GPUs, whose data set need not be there.

    UsageError for a network of unknown layers, and for an experiment that does more than train networks;
    SparselthError where a step fits on no number of them.
    """
    if type(config).compute is not Training.compute:
        raise UsageError(
            f"`price_on` {number}x{name}: the model knows what imp computes, not what {config.name} does; "
            "expected a device with recorded results, such as h200"
        )
    gpu, recipe, model = GPUS[name], config.recipe, config.network
    spec = get_dataset(config.dataset or model.dataset)
    forward, training = flops(model)
    speed, rate = gpu.flops * gpu.share, decoding(spec) if spec.pictures else 0.0
    each = _gpus_of_a_network(config, number, name)
    groups, images = number // each, -(-recipe.batch_size // each)
    computing, decoded = images * training / speed, images / (gpu.cores * rate) if rate else 0.0
    launching = KERNELS * LAUNCH * len(model.nodes)
    sums = 1 + 2 * sum(isinstance(node.op, BatchNorm) for node in model.nodes)
    reduced, link = 2 * (each - 1) / each * 4 * model.params.trained_size, gpu.far
    if MACHINE % each == 0:  # else some have their GPUs in two machines
        link = gpu.near
    reducing = reduced / link + sums * LATENCY if each > 1 else 0.0
    looked = max(forward / speed, 1 / (gpu.cores * rate) if rate else 0.0) / each
    most = config.eval_images if config.eval_images is not None else evaluated_images(recipe, spec)
    validated, tested = (min(most or n, n) for n in (spec.n_validation, spec.n_test))
    dense = (1.0,) * len(config.rungs())  # pruned weights are zeros in dense layers
    price = Price(
        {1: max(computing, launching, decoded) + reducing},
        dense,
        {1: validated * looked},
        dense,
        tested / validated,
        0,
        replica_bytes(model, replace(recipe, batch_size=images)),
    )
    cells, giga = config.cells(), 1e9
    seconds = price.run_seconds(config, (), groups, 1)
    busy = fsum(price.batch_seconds(config, [cell]) for cell in cells) * each / (seconds * number)
    gpus = f"{each} GPU{'s' * (each > 1)}"
    said = {
        "step": f"{training / giga:.2f} GFLOPs an image, forward {forward / giga:.2f}: counted from the "
        "layers, 2 a product and its sum, backward twice the forward but for the image's gradient; pruned or "
        "not",
        "GPU": f"{gpu.title}: {gpu.flops / 1e12:g} TFLOPS in TF32 (vendor's peak, dense), of which a step "
        f"reaches {100 * gpu.share:g} % (assumed, see docs/imagenet.md): {speed / training:,.0f} images a "
        "second",
        "decoding": f"{rate:,.0f} images a second and core (timed here, a made-up JPEG of 500 x 375), "
        f"{gpu.cores} cores a GPU (assumed): {gpu.cores * rate:,.0f} images a second and GPU"
        if rate
        else "none: images lie in the GPU's memory",
        "batch": f"{recipe.batch_size:,} images over {gpus}, {images:,} each, "
        f"{price.replica_bytes / giga:.0f} GB of {gpu.memory / giga:.0f}: {1e3 * computing:.1f} ms of "
        f"computing beside {1e3 * decoded:.1f} of decoding and {1e3 * launching:.1f} of launches, "
        "of which the longest counts",
        "launches": f"{KERNELS * len(model.nodes)} kernels, {KERNELS} for each node of the network, "
        f"{1e6 * LAUNCH:g} us each (both assumed)",
        "all-reduce": f"2 (n - 1) / n x 4 bytes x {model.params.trained_size:,} weights, "
        f"{reduced / 1e6:.0f} MB at {link / giga:g} GB/s (vendor's peak, one way), and {1e6 * LATENCY:g} us "
        f"(assumed) for each of {sums} sums, two of each batch norm; nothing hidden: {1e3 * reducing:.1f} ms"
        if each > 1
        else "none: a network has a GPU of its own",
        "evaluation": f"{validated:,} validation images each {recipe.eval_every:,} steps, "
        f"{validated * looked:.1f} s, and {tested:,} test images twice, {tested * looked:.1f} s each time",
        "networks": f"{len(cells)}, of which {widest(config)} can train at one time; {groups} groups of "
        f"{gpus} take them in the order of a run" + f" (`split` {each})" * (each > 1),
        "left out": "masks and updates, copies to the GPU, files and checkpoints, starting, faults, waiting "
        "for the slowest, that small networks train as one batch on a GPU, and that a few images a GPU reach "
        "a smaller share of its peak",
    }
    title = gpu.title.partition(",")[0]
    return Cost(f"{number} {title}", seconds, number * seconds / 3600, busy, each, said)


def flops(model: Model) -> tuple[int, int]:
    """FLOPs of an image: forward, and of a step; a product of two numbers and its sum are two."""
    each = [2 * spec.numel * prod(after[1:]) for spec, _, _, after in model.producers]
    return sum(each), 3 * sum(each) - each[0]


def _gpus_of_a_network(config: Training, number: int, name: str) -> int:
    """As many as are left over, and at least what a step fits."""
    recipe, memory = config.recipe, FULL * GPUS[name].memory
    most = min(number, recipe.batch_size)  # a GPU has one image at least
    for each in range(max(1, min(most, number // widest(config))), most + 1):
        share = replace(recipe, batch_size=-(-recipe.batch_size // each))
        if replica_bytes(config.network, share) <= memory:
            return each
    raise SparselthError(
        f"`price_on` {number}x{name}: a step of {recipe.batch_size:,} images of {config.model} does not fit "
        f"{most} GPUs of {GPUS[name].memory / 1e9:.0f} GB; expected more of them, or a smaller `batch_size`"
    )


def decoding(spec: DatasetSpec) -> float:
    """Images a second that a core of this machine decodes, crops at random and flips."""
    from sparselth.data.streamed import Decoder

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "made-up.jpeg").write_bytes(made_up())
        decode = Decoder(Path(folder), np.array([b"made-up.jpeg"]), spec.shape)
        wanted = [0] * 8, [*range(8)]
        done = decode[wanted]  # imports, and the file into memory
        if isinstance(done, str):
            raise SparselthError(done)
        began, images = time.process_time(), 0
        while time.process_time() - began < SECONDS:
            _ = decode[wanted]
            images += len(wanted[0])
        return images / (time.process_time() - began)


def made_up() -> bytes:
    """A JPEG of about the pixels and the bytes of those of ImageNet, 500 x 375 and 110 kB."""
    from PIL import Image

    draw = np.random.default_rng(0)
    smooth = Image.fromarray(draw.integers(256, size=(24, 32, 3), dtype=np.uint8)).resize((500, 375))
    noise = draw.normal(0, 12, (375, 500, 1))
    pixels = np.clip(np.asarray(smooth) + noise, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=92)
    return file.getvalue()
