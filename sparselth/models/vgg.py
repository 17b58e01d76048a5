"""VGG-16 and VGG-19 with batch norms, for CIFAR-10 (Simonyan & Zisserman 2014; Frankle & Carbin 2019)."""

from sparselth.config import Recipe
from sparselth.models.graph import AvgPool, BatchNorm, Conv, Layer, Linear, MaxPool, Model, ReLU
from sparselth.models.zoo import register


def _layers(widths: tuple[tuple[int, ...], ...]) -> tuple[Layer, ...]:
    """3 x 3 convolutions with batch norm, a pool between the groups, the mean image at the end."""
    layers: list[Layer] = []
    for group in widths:
        for width in group:
            layers += [Conv(width, 3, 1), BatchNorm(), ReLU()]
        layers[-1:] = [MaxPool(2), ReLU()]
    return (*layers[:-2], ReLU(), AvgPool(), Linear(10))


def _vgg(name: str, deep: int, paper: Recipe, source: str) -> Model:
    """The network whose last three groups are `deep` layers each; its output layer stays whole."""
    groups = (64,) * 2, (128,) * 2, (256,) * deep, (512,) * deep, (512,) * deep
    short = Recipe(steps=100, lr=0.02, batch_size=32, optimizer="sgd", weight_decay=1e-4)
    recipes = {"short": short, "paper": paper}
    exempt = ("fc1.weight",)
    return Model(name, (3, 32, 32), _layers(groups), recipes, source, dataset="cifar10", exempt=exempt)


# Of the learning rates of Frankle & Carbin 2019 for VGG-19, 0.1 with warm-up is the one that finds the
# smallest tickets. The short recipe is not the papers': it takes minutes of a CPU core, most of them for
# evaluations.
register(
    _vgg(
        "vgg16",
        3,
        Recipe(  # 160 epochs of 351 steps
            steps=56_160,
            lr=0.1,
            batch_size=128,
            optimizer="sgd",
            weight_decay=1e-4,
            lr_drops=(28_080, 42_120),
            augment="crop-flip",
        ),
        "Simonyan & Zisserman 2014; trained as in Frankle et al. 2020, who rewind to step 1,000",
    )
)
register(
    _vgg(
        "vgg19",
        4,
        Recipe(  # 160 epochs of 703 steps
            steps=112_480,
            lr=0.1,
            batch_size=64,
            optimizer="sgd",
            weight_decay=1e-4,
            warmup=10_000,
            lr_drops=(56_240, 84_360),
            augment="crop-flip",
        ),
        "Frankle & Carbin 2019, Figure 2, which prunes it under scope global",
    )
)
