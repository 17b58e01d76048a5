"""Strong tickets by theorem: subset sums solved exactly, the laws they follow, networks built of them."""
