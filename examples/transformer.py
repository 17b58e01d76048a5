"""A transformer that writes characters, on real text: weights are tied, and one mask is for both.

    python examples/transformer.py

The text is Python's own documentation, 465,000 characters that Python brings along (`pydoc_data.topics`,
under the PSF licence); the last tenth is held back. Loss is in nats a character. Two rounds: each prunes half
of every matrix and goes back to the weights of step --rewind; the embedding is the last layer, too.
"""

import argparse
import copy
import time
from math import cos, pi
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import nn

import sparselth

CONTEXT, WIDTH, HEADS, LAYERS = 96, 128, 4, 4


class Transformer(nn.Module):
    def __init__(self, characters):
        super().__init__()
        self.embed, self.place = nn.Embedding(characters, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        more = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, **more)
        self.layers = nn.TransformerEncoder(layer, LAYERS, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, characters, bias=False)
        for embedding in (self.embed, self.place):  # torch's own are too large for a last layer
            nn.init.normal_(embedding.weight, std=0.02)
        self.head.weight = self.embed.weight  # tied

    def forward(self, tokens):
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        x = self.embed(tokens) + self.place(torch.arange(length))
        return self.head(self.layers(x, mask=mask, is_causal=True))


def load(quick):
    """The text as numbers of its characters, training and held back."""
    text = "\n".join(topics.values())[: 20_000 if quick else None]
    characters = sorted(set(text))
    number = {c: i for i, c in enumerate(characters)}
    tokens, cut = torch.tensor([number[c] for c in text]), len(text) * 9 // 10
    return characters, tokens[:cut], tokens[cut:]


def loss(model, tokens, places):
    """Mean cross-entropy of each next character in the pieces of text that begin at `places`."""
    pieces = tokens[places[:, None] + torch.arange(CONTEXT + 1)]
    logits = model(pieces[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), pieces[:, 1:].flatten())


def train(model, masks, tokens, first, last, steps, rate=2e-3, batch=16):
    optimizer = sparselth.MaskedAdamW(model.parameters(), rate, weight_decay=0.01, masks=masks)
    draw = torch.Generator().manual_seed(first)
    for step in range(first, last):
        warm = min(1.0, (step + 1) / (0.05 * steps + 1))
        optimizer.param_groups[0]["lr"] = warm * rate * (1 + cos(pi * step / steps)) / 2
        optimizer.zero_grad()
        loss(model, tokens, torch.randint(len(tokens) - CONTEXT, (batch,), generator=draw)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def held_back(model, tokens):
    places = torch.arange(0, len(tokens) - CONTEXT, CONTEXT)
    return sum(loss(model, tokens, some).item() * len(some) for some in places.split(64)) / len(places)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=2, help="1 or more; each prunes half")
    parser.add_argument("--steps", type=int, default=300, help="of each training")
    parser.add_argument("--rewind", type=int, default=50, help="the step that tickets go back to")
    parser.add_argument("--out", default="transformer.safetensors")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    asked = parser.parse_args()
    steps, rewind = (3, 1) if asked.quick else (asked.steps, asked.rewind)

    torch.manual_seed(0)
    began, (characters, training, test) = time.perf_counter(), load(asked.quick)
    model = Transformer(len(characters))
    train(model, None, training, 0, rewind, steps)
    start, masks, found = sparselth.snapshot(model), None, []
    for level in range(asked.rounds + 1):
        if level:
            share = 1 - 0.5**level
            masks = sparselth.prune(model, share, scope="layer", exclude="place", masks=masks)
            sparselth.rewind(model, masks, start)
        train(model, masks, training, rewind, steps, steps)
        found.append(held_back(model, test))
        took, said = time.perf_counter() - began, repr(masks) if masks else "dense"
        print(f"level {level}: {said}, loss {found[-1]:.3f}, {took:.0f} s")

    # the same start under other masks, of as many weights of each layer
    random = {n: m.flatten()[torch.randperm(m.numel())].view_as(m) for n, m in masks.items()}
    random = sparselth.Masks(random, other := copy.deepcopy(model))
    sparselth.rewind(other, random, start)
    train(other, random, training, rewind, steps, steps)
    control = held_back(other, test)
    print(f"as many weights of each layer at random: loss {control:.3f}")

    notes = {"loss": found[-1], "random_loss": control, "dense_loss": found[0], "steps": steps}
    notes |= {"characters": "".join(characters)}
    file = sparselth.save_ticket(asked.out, model, masks, start, notes)
    size, whole = file.stat().st_size, sparselth.load_ticket(file).dense_bytes
    print(f"{file}: loss {found[-1]:.3f}, {size:,} bytes beside {whole:,} dense, {size / whole:.3f}")


if __name__ == "__main__":
    main()
