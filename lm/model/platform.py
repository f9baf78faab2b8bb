"""What kind of device a program is made for."""

import jax


def platform() -> str:
    """Of the devices of the mesh, or else the default ones: "cpu", "gpu" or "tpu".

    Ahead of time, a program is compiled for devices that are not the default ones.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = device.platform if device else jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name
