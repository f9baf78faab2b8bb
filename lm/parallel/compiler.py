"""Options of XLA that a train step is compiled with, on each kind of device: the table.

A kind has options where they were seen to help, and no others: on TPUs in the compiler's own
schedule (docs/planning.md has figures and commands), on CPUs by copies that are gone.
"""

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, SingleDeviceSharding

from lm.errors import InputError

Options = dict[str, bool | str]

# Without them XLA makes a v5p and a v6e wait for nearly every collective. Of the first pair neither
# does anything without the other.
_ASYNCHRONOUS: Options = {
    "xla_enable_async_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_enable_async_all_reduce": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": True,
}

# By jax device_kind. A v5p calls itself "TPU v5", a v6e "TPU v6 lite". A v5e, "TPU v5 lite", gains
# nothing.
OPTIONS: dict[str, Options] = {
    # XLA on CPU updates the parameters and each moment in loops of their own. Unless it analyses
    # which parts of an array overlap, it first copies the moments, because one loop could overwrite
    # what another still reads. The results are bit-identical.
    "cpu": {"xla_cpu_copy_insertion_use_region_analysis": True},
    "TPU v5": _ASYNCHRONOUS,
    "TPU v5p": _ASYNCHRONOUS,
    "TPU v6 lite": _ASYNCHRONOUS,
}

_VALID = "valid: auto, none, or options of XLA as 'name=value,name=value'"


def compiler_options(device_kind: str, setting: str) -> Options:
    """The options for one kind of device, {} where XLA's own defaults are left as they are.

    Args:
      device_kind: as `jax.Device.device_kind`.
      setting: the key `train.compiler_options`. "auto" takes the table's; "none" leaves all to XLA;
        "name=value,name=value" takes these and none of the table.

    Raises:
      InputError: the setting is none of the three.
    """
    if setting == "auto":
        return dict(OPTIONS.get(device_kind, {}))
    if setting == "none":
        return {}
    options: Options = {}
    for item in setting.split(","):
        name, equals, value = (part.strip() for part in item.partition("="))
        name = name.removeprefix("--")
        if not name or not equals or not value:
            raise InputError(f"train.compiler_options={setting!r}: {item!r} is not one; {_VALID}")
        if name in options:
            raise InputError(f"train.compiler_options={setting!r} has {name} twice")
        # XLA on CPU takes no text for a bool.
        options[name] = {"true": True, "false": False}.get(value.lower(), value)
    return options


def mesh_options(mesh: Mesh | AbstractMesh, setting: str) -> Options:
    """`compiler_options` of the devices of a mesh; an abstract one, to plan with, has none.

    Raises:
      InputError: the setting is invalid, or XLA knows no such option for these devices.
    """
    if isinstance(mesh, AbstractMesh):
        compiler_options("", setting)
        return {}
    ours = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    device = (ours or list(mesh.devices.flat))[0]
    options = compiler_options(device.device_kind, setting)
    if setting not in ("auto", "none"):
        _try(device, options, setting)
    return options


def _try(device: jax.Device, options: Options, setting: str) -> None:
    """Compiles next to nothing, since only XLA itself knows its options."""
    x = jax.ShapeDtypeStruct((), jnp.float32, sharding=SingleDeviceSharding(device))
    try:
        jax.jit(jnp.negative).lower(x).compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"train.compiler_options={setting!r}: {reason}; {_VALID}") from None
