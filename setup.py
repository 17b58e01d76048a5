"""The native CPU kernels (kernels/native): an optional extension, loaded by kernels/_native.py with ctypes.

Everything else stands in pyproject.toml and setup.cfg. Without a C compiler the installation goes on, and
sparse products on a CPU are torch's.
"""

from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

FLAGS = [
    "-g0",
    "-std=gnu11",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-Wall",
    "-Wextra",
]


class Build(build_ext):
    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except (CompileError, LinkError):  # perhaps for want of OpenMP
            ext.extra_compile_args.remove("-fopenmp")
            ext.extra_link_args.remove("-fopenmp")
            super().build_extension(ext)


setup(
    include_package_data=False,  # the sources go into the sdist alone
    cmdclass={"build_ext": Build},
    ext_modules=[
        Extension(
            "sparselth.kernels._native_lib",
            ["kernels/native/native.c"],
            depends=glob("kernels/native/*"),
            extra_compile_args=[*FLAGS, "-fopenmp"],
            extra_link_args=["-fopenmp"],
            optional=True,
        )
    ],
)
