"""Conv-2, Conv-4, Conv-6 and VGG-19, for CIFAR-10 (Frankle & Carbin 2019; Simonyan & Zisserman 2014)."""

from sparselth.config import Recipe
from sparselth.models.graph import AvgPool, BatchNorm, Conv, Layer, Linear, MaxPool, Model, ReLU
from sparselth.models.zoo import register


def _conv_k(
    name: str, widths: tuple[int, ...], conv_rate_scale: float, short: Recipe, paper: Recipe, note: str = ""
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
        source=f"Frankle & Carbin 2019, Figure 2{note}",
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
        note="; its 1.7M weights are not those of the layers it lists",
    )
)


def _vgg(widths: tuple[tuple[int, ...], ...]) -> tuple[Layer, ...]:
    """3 x 3 convolutions with batch norm, a pool between the groups, the mean image at the end."""
    layers: list[Layer] = []
    for group in widths:
        for width in group:
            layers += [Conv(width, 3, 1), BatchNorm(), ReLU()]
        layers[-1:] = [MaxPool(2), ReLU()]
    return (*layers[:-2], ReLU(), AvgPool(), Linear(10))


# Of the paper's three learning rates, 0.1 with warm-up is the one that finds the smallest tickets. Images
# are neither flipped nor shifted here. The short recipe is not the paper's: it takes minutes of a CPU core,
# most of them for evaluations.
register(
    Model(
        name="vgg19",
        input=(3, 32, 32),
        layers=_vgg(((64,) * 2, (128,) * 2, (256,) * 4, (512,) * 4, (512,) * 4)),
        recipes={
            "short": Recipe(steps=100, lr=0.02, batch_size=32, optimizer="sgd", weight_decay=1e-4),
            "paper": Recipe(  # 160 epochs of 703 steps
                steps=112_480,
                lr=0.1,
                batch_size=64,
                optimizer="sgd",
                weight_decay=1e-4,
                warmup=10_000,
                lr_drops=(56_240, 84_360),
            ),
        },
        source="Frankle & Carbin 2019, Figure 2, which prunes it under scope global",
        dataset="cifar10",
    )
)
