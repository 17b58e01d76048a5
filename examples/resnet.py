"""torchvision's ResNet-18 on CIFAR-10: prune, go back to the weights of an early step, train again.

    python examples/resnet.py

Large networks have tickets only from a few hundred steps of training on (Frankle et al. 2020): the snapshot
is taken at step --rewind. Images of 32 x 32 go through torchvision's stem as it is, which leaves 8 x 8: quick
on a CPU, and less accurate than a stem made for them.
"""

import argparse
import copy
import time
from math import cos, pi

import torch
import torch.nn.functional as F
from torchvision.models import resnet18

import sparselth
from sparselth.data import resolve

MEAN, STD = (torch.tensor(v).view(3, 1, 1) for v in ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)))


def load(quick):
    """CIFAR-10 as bytes [n, 3, 32, 32] with labels, training and test; with --quick, noise."""
    if quick:
        draw = torch.Generator().manual_seed(0)
        x = torch.randint(256, (300, 3, 32, 32), generator=draw, dtype=torch.uint8)
        return (x[:200], torch.arange(200) % 10), (x[200:], torch.arange(100) % 10)
    found = resolve("cifar10", None, print)
    arrays = found.train_images, found.train_labels, found.test_images, found.test_labels
    x, y, test_x, test_y = map(torch.from_numpy, arrays)
    return (x.view(-1, 3, 32, 32), y.long()), (test_x.view(-1, 3, 32, 32), test_y.long())


def scaled(images):
    return (images.float() / 255 - MEAN) / STD


def train(model, masks, data, first, last, steps, rate=0.05, batch=128):
    """SGD from step `first` up to `last`, the rate along a cosine; half of the images mirrored."""
    optimizer = sparselth.MaskedSGD(model.parameters(), rate, momentum=0.9, weight_decay=5e-4, masks=masks)
    draw = torch.Generator().manual_seed(first)
    model.train()
    for step in range(first, last):
        optimizer.param_groups[0]["lr"] = rate * (1 + cos(pi * step / steps)) / 2
        index = torch.randint(len(data[1]), (batch,), generator=draw)
        images, mirrored = data[0][index], torch.rand(batch, generator=draw) < 0.5
        images[mirrored] = images[mirrored].flip(-1)
        optimizer.zero_grad()
        F.cross_entropy(model(scaled(images)), data[1][index]).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model, data):
    model.eval()
    chunks = zip(data[0].split(250), data[1].split(250), strict=True)
    return sum(int((model(scaled(x)).argmax(1) == y).sum()) for x, y in chunks) / len(data[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--steps", type=int, default=300, help="of each training")
    parser.add_argument("--rewind", type=int, default=50, help="the step that the ticket goes back to")
    parser.add_argument("--out", default="resnet.safetensors")
    parser.add_argument("--quick", action="store_true", help="a few steps on noise, to see that it runs")
    asked = parser.parse_args()
    steps, rewind = (3, 1) if asked.quick else (asked.steps, asked.rewind)

    torch.manual_seed(0)
    began, (training, test) = time.perf_counter(), load(asked.quick)
    model = resnet18(num_classes=10).to(memory_format=torch.channels_last)
    train(model, None, training, 0, rewind, steps)
    start = sparselth.snapshot(model)
    train(model, None, training, rewind, steps, steps)
    dense = accuracy(model, test)
    print(f"dense: test accuracy {100 * dense:.2f} %, {time.perf_counter() - began:.0f} s")

    masks = sparselth.prune(model, asked.sparsity, exclude=("conv1", "fc"))  # first and last layer stay
    sparselth.rewind(model, masks, start)
    train(model, masks, training, rewind, steps, steps)
    found = accuracy(model, test)
    print(f"ticket: {masks!r}, test accuracy {100 * found:.2f} %")
    # the same start under other masks, of as many weights of each layer
    random = {n: m.flatten()[torch.randperm(m.numel())].view_as(m) for n, m in masks.items()}
    random = sparselth.Masks(random, other := copy.deepcopy(model))
    sparselth.rewind(other, random, start)
    train(other, random, training, rewind, steps, steps)
    control = accuracy(other, test)
    print(f"as many weights of each layer at random: test accuracy {100 * control:.2f} %")

    notes = {"accuracy": found, "random_accuracy": control, "dense_accuracy": dense}
    notes |= {"steps": steps, "rewind_step": rewind}
    file = sparselth.save_ticket(asked.out, model, masks, start, notes)
    size, whole = file.stat().st_size, sparselth.load_ticket(file).dense_bytes
    print(f"{file}: accuracy {100 * found:.2f} %, {size:,} bytes beside {whole:,} dense, {size / whole:.3f}")
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
