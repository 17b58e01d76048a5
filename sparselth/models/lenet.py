"""LeNet-300-100 and LeNet-5, for MNIST (LeCun et al. 1998).

The 2019 paper does not say what its images are given as: replications scale them to [0, 1], which gives its
curve; with standardised images tickets lie below it.
"""

from sparselth.config import Recipe
from sparselth.models.graph import Conv, Linear, MaxPool, Model, ReLU
from sparselth.models.zoo import register

register(
    Model(
        name="lenet-300-100",
        input=(1, 28, 28),
        layers=(Linear(300), ReLU(), Linear(100), ReLU(), Linear(10)),
        recipes={
            "short": Recipe(steps=5000, lr=1.2e-3),
            "paper": Recipe(steps=50_000, lr=1.2e-3, inputs="unit"),  # Frankle & Carbin 2019, Figure 2
        },
        source="LeCun et al. 1998; Frankle & Carbin 2019, Figure 2",
    )
)
register(
    Model(
        name="lenet5",
        input=(1, 28, 28),
        # The ReLU stands behind the pool: the same function, a quarter of the work.
        layers=(
            Conv(6, 5, padding=2),
            MaxPool(2),
            ReLU(),
            Conv(16, 5),
            MaxPool(2),
            ReLU(),
            Linear(120),
            ReLU(),
            Linear(84),
            ReLU(),
            Linear(10),
        ),
        recipes={
            "short": Recipe(steps=1200, lr=1.2e-3),
            "paper": Recipe(steps=50_000, lr=1.2e-3, inputs="unit"),  # the paper's LeNet setup
        },
        source="LeCun et al. 1998, with ReLU and max pooling; trained as the LeNet of the 2019 paper",
    )
)
