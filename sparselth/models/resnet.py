"""ResNet-20 for CIFAR-10 (He et al. 2016, section 4.2), with projections where a shape changes."""

from sparselth.config import Recipe
from sparselth.models.graph import Add, AvgPool, BatchNorm, Conv, Layer, Linear, Model, Node, ReLU
from sparselth.models.zoo import register


def _resnet(widths: tuple[int, ...], blocks: int) -> tuple[Layer | Node, ...]:
    """`blocks` pairs of 3 x 3 convolutions for every width; a new width comes with half the size."""
    layers: list[Layer | Node] = [Conv(widths[0], 3, 1), BatchNorm(), ReLU()]
    before = widths[0]
    for width in widths:
        for _ in range(blocks):
            shortcut, stride = len(layers) - 1, 1 if width == before else 2
            layers += [Conv(width, 3, 1, stride), BatchNorm(), ReLU(), Conv(width, 3, 1), BatchNorm()]
            residual = len(layers) - 1
            if stride > 1:
                layers += [Node(Conv(width, 1, 0, stride), (shortcut,)), BatchNorm()]
                shortcut = len(layers) - 1
            layers += [Node(Add(), (residual, shortcut)), ReLU()]
            before = width
    return (*layers, AvgPool(), Linear(10))


# Of the paper's learning rates, 0.03 with warm-up is the one that finds tickets. Images are neither flipped
# nor shifted here, and the weights of shortcuts and of the output layer, 1.2 % of all, are pruned like the
# others. The short recipe is not the paper's: it takes minutes of a CPU core.
register(
    Model(
        name="resnet20",
        input=(3, 32, 32),
        layers=_resnet((16, 32, 64), 3),
        recipes={
            "short": Recipe(steps=300, lr=0.05, batch_size=64, optimizer="sgd", weight_decay=1e-4),
            "paper": Recipe(
                steps=30_000,
                lr=0.03,
                batch_size=128,
                optimizer="sgd",
                weight_decay=1e-4,
                warmup=20_000,
                lr_drops=(20_000, 25_000),
            ),
        },
        source='He et al. 2016; "ResNet-18" of Frankle & Carbin 2019, Figure 2, pruned under scope global',
        dataset="cifar10",
    )
)
