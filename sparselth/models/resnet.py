"""ResNets for images of CIFAR-10 (He et al. 2016), with projections where a shape changes.

ResNet-20 and ResNet-56 are those of section 4.2; ResNet-18 is that of ImageNet with a stem of 3 x 3 and no
pool, as it is used on small images.
"""

from collections.abc import Mapping

from sparselth.config import Recipe
from sparselth.models.graph import Add, AvgPool, BatchNorm, Conv, Layer, Linear, Model, Node, ReLU
from sparselth.models.zoo import register


def _layers(widths: tuple[int, ...], blocks: int) -> tuple[Layer | Node, ...]:
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


def _resnet(
    name: str, widths: tuple[int, ...], blocks: int, recipes: Mapping[str, Recipe], source: str
) -> Model:
    """Shortcuts and output layer stay whole under scope global, as in Frankle & Carbin 2019."""
    layers = _layers(widths, blocks)
    ops = [layer.op if isinstance(layer, Node) else layer for layer in layers]
    kernels = [op.kernel for op in ops if isinstance(op, Conv)]
    shortcuts = (f"conv{place}.weight" for place, kernel in enumerate(kernels, 1) if kernel == 1)
    exempt = *shortcuts, "fc1.weight"
    return Model(name, (3, 32, 32), layers, recipes, source, dataset="cifar10", exempt=exempt)


# Of the learning rates of Frankle & Carbin 2019, 0.03 with warm-up is the one that finds tickets. The short
# recipes are not the papers': they take minutes of a CPU core, and in less than an epoch nothing is gained by
# shifting and flipping images.
register(
    _resnet(
        "resnet20",
        (16, 32, 64),
        3,
        {
            "short": Recipe(steps=300, lr=0.05, batch_size=64, optimizer="sgd", weight_decay=1e-4),
            "paper": Recipe(
                steps=30_000,
                lr=0.03,
                batch_size=128,
                optimizer="sgd",
                weight_decay=1e-4,
                warmup=20_000,
                lr_drops=(20_000, 25_000),
                augment="crop-flip",
            ),
        },
        'He et al. 2016; "ResNet-18" of Frankle & Carbin 2019, Figure 2, pruned under scope global',
    )
)
register(
    _resnet(
        "resnet56",
        (16, 32, 64),
        9,
        {
            "short": Recipe(steps=150, lr=0.05, batch_size=64, optimizer="sgd", weight_decay=1e-4),
            "paper": Recipe(
                steps=64_000,
                lr=0.1,
                batch_size=128,
                optimizer="sgd",
                weight_decay=1e-4,
                lr_drops=(32_000, 48_000),
                augment="crop-flip",
            ),
        },
        "He et al. 2016, section 4.2; as resnet20 under scope global",
    )
)
register(
    _resnet(
        "resnet18",
        (64, 128, 256, 512),
        2,
        {
            "short": Recipe(steps=100, lr=0.02, batch_size=32, optimizer="sgd", weight_decay=5e-4),
            "paper": Recipe(  # 100 epochs of 351 steps
                steps=35_100,
                lr=0.1,
                batch_size=128,
                optimizer="sgd",
                weight_decay=5e-4,
                cosine=True,
                augment="crop-flip",
            ),
        },
        "He et al. 2016 with a stem for small images; trained as in Chijiwa et al. 2021",
    )
)
