"""Runs a module with everything of ours in float64, to tell rounding from real differences.

python -m tests.parity.in_float64 MODULE ARGUMENT ...

Our code says float32 where it must not be bfloat16. Here every `float32` in the source of our
packages, and of Flax's convolutions, reads `float64` before it is compiled; nothing else changes.
"""

from __future__ import annotations

import importlib.machinery
import runpy
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType

import jax

PACKAGES = ("alignps_jax", "configs", "flax.linen.linear")


class Float64Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        source = self.get_data(self.path).replace(b"float32", b"float64")
        return self.source_to_code(source, self.path)


class Float64Finder(MetaPathFinder):
    def find_spec(self, fullname: str, path=None, target=None) -> ModuleSpec | None:
        if not fullname.startswith(PACKAGES):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = Float64Loader(fullname, spec.loader.path)
        return spec


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    sys.meta_path.insert(0, Float64Finder())
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__")
