"""Settings of all tests, in place before JAX starts; subprocesses inherit them."""

import atexit
import gc
import os
import shutil
import tempfile
from importlib import metadata

import pytest

# Four simulated devices. Compilation takes most of the time of these tests and running next to
# none, so code is compiled quickly instead of well.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=4",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_parallel_codegen_split_count=1",  # the cores are busy with other tests
        # Newer ones end where they meet it.
        *["--xla_cpu_use_fusion_emitters=false"] * metadata.version("jaxlib").startswith("0.10."),
    ]
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Else the folder of compiled programs is part of each program's key, and runs that share them by
# links compile everything anew.
os.environ.setdefault("JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES", "none")

# Compiled programs of evaluation and search: for all processes of these tests, and gone with them.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="alignps-tests-")
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

import jaxtyping

from tests.shapes import check_shapes

# Tracing makes many objects that stay; looking through all of them for garbage is slow.
gc.set_threshold(100_000, 20, 20)

# `make shapes` asks for it. It makes some tests several times as long, so `make test` does not.
if os.environ.get("CHECK_SHAPES"):
    check_shapes()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that no core waits for another one at the end."""
    items.sort(key=lambda item: "training" not in item.path.parts)


@pytest.fixture
def unchecked():
    """For tests that hand over what annotations rule out, to read what the code itself says."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
