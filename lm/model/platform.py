"""The kind of device that a program is compiled for."""

import jax


def platform() -> str:
    """The platform of the mesh's devices, or of the default devices: "cpu", "gpu" or "tpu".

    They differ where a program is compiled ahead of time for devices that are not at hand.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = device.platform if device else jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name
