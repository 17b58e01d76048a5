"""ResNets (He et al. 2016), with projections where a shape changes.

ResNet-20 and ResNet-56 are those of section 4.2, for images of CIFAR-10; ResNet-18 is that of ImageNet with a
stem of 3 x 3 and no pool, as it is used on small images. ResNet-50 is that of ImageNet, with the stride in
the 3 x 3 convolutions (v1.5), as torchvision has it.
"""

from collections.abc import Mapping

from sparselth.config import Recipe
from sparselth.models.graph import Add, AvgPool, BatchNorm, Conv, Layer, Linear, MaxPool, Model, Node, ReLU
from sparselth.models.zoo import register


def _layers(widths: tuple[int, ...], blocks: int) -> tuple[Layer | Node, ...]:
    """`blocks` pairs of 3 x 3 convolutions for every width; a new width comes with half the size."""
    layers: list[Layer | Node] = [Conv(widths[0], 3, 1), BatchNorm(), ReLU()]
    before = widths[0]
    for width in widths:
        for _ in range(blocks):
            shortcut, stride = len(layers) - 1, 1 if width == before else 2
            layers += [Conv(width, 3, 1, stride), BatchNorm(), ReLU(), Conv(width, 3, 1), BatchNorm()]
            _add(layers, shortcut, Conv(width, 1, 0, stride) if stride > 1 else None)
            before = width
    return (*layers, AvgPool(), Linear(10))


def _bottlenecks(blocks: tuple[int, ...]) -> tuple[Layer | Node, ...]:
    """The network for ImageNet: so many blocks of 1 x 1, 3 x 3 and 1 x 1 for every width, from 64 on."""
    layers: list[Layer | Node] = [Conv(64, 7, 3, 2), BatchNorm(), ReLU(), MaxPool(3, 2, 1)]
    for stage, count in enumerate(blocks):
        width = 64 << stage
        for block in range(count):
            shortcut, stride = len(layers) - 1, 2 if stage and not block else 1
            layers += [Conv(width, 1), BatchNorm(), ReLU(), Conv(width, 3, 1, stride), BatchNorm(), ReLU()]
            layers += [Conv(4 * width, 1), BatchNorm()]
            _add(layers, shortcut, None if block else Conv(4 * width, 1, 0, stride))
    return (*layers, AvgPool(), Linear(1000))


def _add(layers: list[Layer | Node], shortcut: int, projection: Conv | None) -> None:
    """Add what is at `shortcut`, through a projection if there is one, to the last layer's output."""
    residual = len(layers) - 1
    if projection is not None:
        layers += [Node(projection, (shortcut,)), BatchNorm()]
        shortcut = len(layers) - 1
    layers += [Node(Add(), (residual, shortcut)), ReLU()]


def _resnet(
    name: str,
    layers: tuple[Layer | Node, ...],
    recipes: Mapping[str, Recipe],
    source: str,
    input: tuple[int, ...] = (3, 32, 32),
    classes: int = 10,
    dataset: str = "cifar10",
) -> Model:
    """Shortcuts and output layer stay whole under scope global, as in Frankle & Carbin 2019."""
    convs = [layer for layer in layers if isinstance(layer.op if isinstance(layer, Node) else layer, Conv)]
    shortcuts = (f"conv{place}.weight" for place, conv in enumerate(convs, 1) if isinstance(conv, Node))
    return Model(name, input, layers, recipes, source, classes, dataset, exempt=(*shortcuts, "fc1.weight"))


# Of the learning rates of Frankle & Carbin 2019, 0.03 with warm-up is the one that finds tickets. The short
# recipes are not the papers': they take minutes of a CPU core, and in less than an epoch nothing is gained by
# shifting and flipping images.
register(
    _resnet(
        "resnet20",
        _layers((16, 32, 64), 3),
        {
            "short": Recipe(
                steps=240, lr=0.05, batch_size=64, optimizer="sgd", weight_decay=1e-4, cosine=True
            ),
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
        _layers((16, 32, 64), 9),
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
        _layers((64, 128, 256, 512), 2),
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
EPOCH = 1_281_167 // 1024  # steps, of all training images of ImageNet
register(
    _resnet(
        "resnet50",
        _bottlenecks((3, 4, 6, 3)),
        {
            "short": Recipe(
                steps=60, lr=0.02, batch_size=16, optimizer="sgd", weight_decay=1e-4, eval_every=30
            ),
            "paper": Recipe(
                steps=90 * EPOCH,
                lr=0.4,
                batch_size=1024,
                optimizer="sgd",
                weight_decay=1e-4,
                warmup=5 * EPOCH,
                lr_drops=(30 * EPOCH, 60 * EPOCH, 80 * EPOCH),
                eval_every=EPOCH,
                augment="crop-flip",
            ),
        },
        "He et al. 2016, v1.5 as torchvision's; trained as in Frankle et al. 2020, rewound to epoch 5 there",
        input=(3, 224, 224),
        classes=1000,
        dataset="imagenet",
    )
)
