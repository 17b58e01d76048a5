"""One hidden layer, as theorems on strong tickets take it: 784-500-10 is the target of Pensia et al. 2020."""

from sparselth.config import Recipe
from sparselth.models.graph import Linear, Model, ReLU
from sparselth.models.zoo import register

for width in (500, 100):
    register(
        Model(
            name=f"fc-{width}",
            input=(1, 28, 28),
            layers=(Linear(width), ReLU(), Linear(10)),
            recipes={
                "short": Recipe(steps=2000, lr=1.2e-3),
                "paper": Recipe(steps=20_000, lr=1.2e-3),
            },
            source="784-500-10 of Pensia et al. 2020" + ", narrower" * (width < 500),
        )
    )
