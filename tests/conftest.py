"""Eight fake CPU devices for the whole suite; must run before JAX is imported."""

import os

# Unoptimized machine code: the suite spends its time in compiling, not in running.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
    ]
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
