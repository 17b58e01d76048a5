"""The residual network that the authors of MNIST-1D find tickets in (Greydanus & Kobak 2024)."""

from sparselth.config import Recipe
from sparselth.models.graph import Add, Linear, Model, Node, ReLU
from sparselth.models.zoo import register

# Their notebook on lottery tickets trains it so, with layers of 500 and data in one order.
_RECIPE = Recipe(steps=1500, lr=2e-2, batch_size=100)

register(
    Model(
        name="mnist1d-mlp",
        input=(1, 1, 40),
        layers=(Linear(100), ReLU(), Linear(100), ReLU(), Node(Add(), (1, 3)), Linear(10)),
        recipes={"short": _RECIPE, "paper": _RECIPE},
        source="MLPBase of Greydanus & Kobak 2024",
        dataset="mnist1d",
    )
)
