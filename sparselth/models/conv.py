"""Conv-2 to Conv-8, scaled-down VGGs for CIFAR-10 (Frankle & Carbin 2019; Ramanujan et al. 2020)."""

from sparselth.config import Recipe
from sparselth.models.graph import Conv, Layer, Linear, MaxPool, Model, ReLU
from sparselth.models.zoo import register


def _conv_k(
    name: str,
    widths: tuple[int, ...],
    conv_rate_scale: float,
    short: Recipe,
    paper: Recipe,
    source: str = "Frankle & Carbin 2019, Figure 2",
) -> Model:
    """A scaled-down VGG for CIFAR-10: pairs of 3 x 3 convolutions, a pool behind each pair."""
    layers: list[Layer] = []
    for width in widths:
        layers += [Conv(width, 3, 1), ReLU(), Conv(width, 3, 1), MaxPool(2), ReLU()]
    layers += [Linear(256), ReLU(), Linear(256), ReLU(), Linear(10)]
    return Model(
        name=name,
        input=(3, 32, 32),
        layers=tuple(layers),
        recipes={"short": short, "paper": paper},
        source=source,
        dataset="cifar10",
        conv_rate_scale=conv_rate_scale,
    )


# The paper prunes convolutions of conv2 and conv4 by 10 % a level, those of conv6 by 15 %, and fully
# connected layers by 20 %. The short recipes are not the paper's: less than one epoch (750 steps), four
# to eight minutes of one CPU core a network. They show that a network learns, not what it can reach.
register(_conv_k("conv2", (64,), 0.5, Recipe(steps=500, lr=1e-3), Recipe(steps=20_000, lr=2e-4)))
register(_conv_k("conv4", (64, 128), 0.5, Recipe(steps=400, lr=1e-3), Recipe(steps=25_000, lr=3e-4)))
register(
    _conv_k(
        "conv6",
        (64, 128, 256),
        0.75,
        Recipe(steps=300, lr=1e-3),
        Recipe(steps=30_000, lr=3e-4),
        "Frankle & Carbin 2019, Figure 2; its 1.7M weights are not those of the layers it lists",
    )
)
register(
    _conv_k(
        "conv8",
        (64, 128, 256, 512),
        0.75,
        Recipe(steps=200, lr=1e-3),
        Recipe(steps=30_000, lr=3e-4),
        "Ramanujan et al. 2020, where nothing is trained; trained and pruned as conv6",
    )
)
