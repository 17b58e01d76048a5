"""A plain dense `state_dict`: what `model.load_state_dict` takes, pruned weights 0."""

from __future__ import annotations

from pathlib import Path

from sparselth.exchange.state_dicts import write_state
from sparselth.exchange.table import Format, Given, register


def write(given: Given, file: Path) -> str:
    write_state(given.state, file)
    return ""


register(Format("torch", "a dense state_dict, of torch.save or, called X.safetensors, safetensors", write))
