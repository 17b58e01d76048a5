"""A lottery ticket in a loop of one's own: a small network of one's own on handwritten digits.

    python examples/own_model.py            # 5,000 real MNIST digits that are inside the package
    python examples/own_model.py --data mnist

Iterative magnitude pruning (Frankle & Carbin 2019): train, prune a third of what is left, go back to the
first weights, again. It ends in a ticket, and in the same mask on other first weights, its control.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from torch import nn

import sparselth
from sparselth.data import resolve


def make():
    return nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))


def load(name):
    """Training images [n, 784] with labels, and test images, pixels from 0 to 1."""
    found = resolve(name, None, print)
    arrays = found.train_images, found.train_labels, found.test_images, found.test_labels
    x, y, test_x, test_y = map(torch.from_numpy, arrays)
    return (x.float() / 255, y.long()), (test_x.float() / 255, test_y.long())


def train(model, masks, data, steps):
    """Adam on batches of 60; pruned weights stay exactly 0."""
    x, y = data
    optimizer = sparselth.MaskedAdam(model.parameters(), lr=1.2e-3, masks=masks)
    draw = torch.Generator().manual_seed(1)
    for _ in range(steps):
        batch = torch.randint(len(x), (60,), generator=draw)
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model, data):
    x, y = data
    return (model(x).argmax(1) == y).float().mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", default="mnist5k", help="mnist5k, mnist or fashion-mnist")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=1000, help="of each training")
    parser.add_argument("--out", default="own_model.safetensors")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    asked = parser.parse_args()
    rounds, steps = (2, 30) if asked.quick else (asked.rounds, asked.steps)

    torch.manual_seed(0)
    began, (training, test) = time.perf_counter(), load(asked.data)
    model, masks = make(), None
    start = sparselth.snapshot(model)
    for level in range(rounds + 1):
        train(model, masks, training, steps)
        found = accuracy(model, test)
        left = 1 if masks is None else 1 - masks.sparsity
        print(f"level {level}: {100 * left:5.1f} % of the weights, test accuracy {100 * found:.2f} %")
        if level < rounds:
            masks = sparselth.prune(model, sparsity=1 - left * 2 / 3, masks=masks)
            sparselth.rewind(model, masks, start)

    other = make()  # the same mask on other first weights
    sparselth.rewind(other, masks, sparselth.snapshot(other))
    train(other, sparselth.Masks(masks, other), training, steps)
    print(f"the same mask, first weights drawn anew: {100 * accuracy(other, test):.2f} %")

    notes = {"accuracy": found, "control": accuracy(other, test), "data": asked.data, "steps": steps}
    file = sparselth.save_ticket(asked.out, model, masks, start, notes)
    size, dense = file.stat().st_size, sparselth.load_ticket(file).dense_bytes
    print(f"{file}: accuracy {100 * found:.2f} %, {size:,} bytes beside {dense:,} dense, {size / dense:.3f}")
    x = test[0][:64]
    fast = sparselth.convert(model.eval(), masks, x)
    with torch.no_grad():
        print(f"converted, the outputs differ by {(fast(x) - model(x)).abs().max():.1e} at most")
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
