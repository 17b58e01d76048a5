"""Experiments: a frozen configuration in, a run folder out. `base` says what one is, `run` runs it."""
