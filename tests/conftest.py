"""Eight fake CPU devices for the whole suite, and one temporary folder that is removed at its end.

NIBBLE_TEST_PLATFORM=cuda,cpu runs tests on the devices of this machine instead, the first platform
being the default one; NIBBLE_TEST_PLATFORM=cpu on one CPU device. Tests of meshes fail there: they
want eight devices. Products of float32 are then formed in float32, as the tolerances expect.

Must run before JAX is imported.
"""

import gc
import os
import shutil
import tempfile
from importlib.metadata import version

# The suite spends its time in compiling, not in running: machine code is not optimized, and the
# older emitter writes fusions, which compiles a training step in 0.3 s rather than in 1 s. Eight
# devices on two busy cores may wait for each other longer than XLA allows by default.
_PLATFORM = os.environ.get("NIBBLE_TEST_PLATFORM", "")
# Later versions end the process at this flag, which they do not know any more.
_JAX = tuple(int(part) for part in version("jax").split(".")[:2])
if _PLATFORM:
    os.environ["JAX_PLATFORMS"] = _PLATFORM
    os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # pytest -n shares the device
if _PLATFORM in ("", "cpu"):
    os.environ["XLA_FLAGS"] = " ".join(
        [
            os.environ.get("XLA_FLAGS", ""),
            *([] if _PLATFORM else ["--xla_force_host_platform_device_count=8"]),
            "--xla_backend_optimization_level=0",
            *(["--xla_cpu_use_fusion_emitters=false"] if _JAX < (0, 11) else []),
            "--xla_cpu_collective_call_terminate_timeout_seconds=300",
        ]
    )
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# The process that starts the workers makes the folder; they, and all commands, inherit it.
_OWN = None
if "PYTEST_XDIST_WORKER" not in os.environ:
    _OWN = os.environ["TMPDIR"] = tempfile.mkdtemp(prefix="nibble_tests_")
    tempfile.tempdir = None

# Workers and subprocesses share what they compile: many tests train the same toy.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(os.environ["TMPDIR"], "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# Tracing makes many objects and no garbage.
gc.set_threshold(100_000, 50, 100)

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache


def pytest_unconfigure(config):
    """Removes everything that the tests have left."""
    if _OWN:
        shutil.rmtree(_OWN, ignore_errors=True)


@pytest.fixture
def compiled_anew():
    """Nothing comes from the cache on disk: the compiler logs, and takes the time that it takes."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()
