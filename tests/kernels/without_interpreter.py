"""Python source from stdin, one JSON string a line, each run in a fork of this process: torch, its compiler
and Triton without the interpreter are loaded once, which takes longer than most of the sources.

Answers one line of JSON each: {"code": exit status, "out": stdout, "err": stderr}.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback

import torch._dynamo.backends.debugging
import torch._functorch.aot_autograd
import torch.testing._internal.optests  # noqa: F401

try:
    from triton.runtime.cache import triton_key
except ImportError:  # another release, or none
    pass
else:
    triton_key()  # a hash of all of Triton, which every process that compiles would take

for line in sys.stdin:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if not child:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            code = 1
            try:
                exec(compile(json.loads(line), "<source>", "exec"), {"__name__": "__main__"})
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said = []
        for file in (out, err):
            file.seek(0)
            said.append(file.read().decode(errors="replace"))
    print(json.dumps({"code": status, "out": said[0], "err": said[1]}), flush=True)
