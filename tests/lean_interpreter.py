"""Triton's interpreter without what it does again and again for nothing: half of its time, and no result.

Its builtins are patched at every launch, where once does. Integers are watched for overflow, and what is
found is dropped, because only `debug` has it said. The table of dtypes is built at every look.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from triton.runtime import interpreter


class _Kept:
    """Patches that stay."""

    def restore(self) -> None:
        pass


def lean() -> None:
    """From here on, in this process and in those it forks; nothing where a Triton has it otherwise."""
    insides = "_patch_lang", "_get_np_dtype", "interpreter_builder"
    if not all(hasattr(interpreter, name) for name in insides):
        return
    patch, dtype_of = interpreter._patch_lang, interpreter._get_np_dtype
    patched = set[str]()
    dtypes: dict[str, np.dtype[Any]] = {}

    def patch_once(fn: Any) -> _Kept:
        if fn.__module__ not in patched:  # the names by which a module knows the language
            patch(fn)
            patched.add(fn.__module__)
        return _Kept()

    def known_dtype(of: Any) -> np.dtype[Any]:
        if of.name not in dtypes:
            dtypes[of.name] = dtype_of(of)
        return dtypes[of.name]

    interpreter._patch_lang = patch_once
    interpreter._get_np_dtype = known_dtype
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=builder.options.debug)
