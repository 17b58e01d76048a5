"""ImageNet (ILSVRC 2012) as torchvision's ImageFolder reads it; nobody may pass it on, so it is not fetched.

The 50,000 images of `val` are the test, as in papers; validation images are split from those of `train`.
"""

from sparselth.data.sets import DatasetSpec, register

register(
    DatasetSpec(
        name="imagenet",
        title="ImageNet",
        shape=(3, 224, 224),
        classes=1000,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        n_train=1_281_167,
        n_test=50_000,
        licence="non-commercial research and education; image-net.org",
        folder="imagenet",
        pictures=True,
    )
)
