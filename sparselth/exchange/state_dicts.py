"""Tensors by name as a file: of safetensors where it is called so, else of `torch.save`, which loads with
`weights_only=True`.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sparselth.files import write_atomically

if TYPE_CHECKING:
    from torch import Tensor


def write_state(state: Mapping[str, Tensor], file: Path) -> None:
    """Write a `state_dict`, atomically; a tensor of two names lies in it once, but in safetensors twice."""
    import torch

    if file.suffix == ".safetensors":
        from safetensors.torch import save

        write_atomically(file, save({name: tensor.clone().contiguous() for name, tensor in state.items()}))
        return
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    write_atomically(file, buffer.getvalue())
