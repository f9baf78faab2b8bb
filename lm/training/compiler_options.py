"""XLA options that a train step is compiled with: those of the accelerator, and the user's own.

launch.train and launch.plan --topology compile with the same ones, so that a plan describes the
program that will run.
"""

import re
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, SingleDeviceSharding

from lm.errors import InputError, shown
from lm.model import xla_cpu

_AUTO, _NONE = "auto", "none"
_KEY = "train.compiler_options"
_VALID = "auto | none | options of XLA as xla_a=true,xla_b=2 | auto,xla_a=true, which adds to auto"
_OPTION = re.compile(r"(\w+)=([\w.+-]+)")

# By default libtpu (0.0.42.1) makes no all-gather of a step with mesh.fsdp asynchronous on these.
# With both, a part of each is scheduled beside the products of the layer before; a v5e gains
# nothing. docs/planning.md has what the compiler's schedules say.
_ASYNC_ALL_GATHER = {
    "xla_enable_async_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
}
# Names of JAX for a v5p, with and without its letter, and for a v6e.
BY_DEVICE_KIND = {
    "TPU v5": _ASYNC_ALL_GATHER,
    "TPU v5p": _ASYNC_ALL_GATHER,
    "TPU v6 lite": _ASYNC_ALL_GATHER,
}


def of_run(setting: str, mesh: Mesh | AbstractMesh) -> dict[str, Any] | None:
    """What jax.jit takes as `compiler_options`, None for the compiler's own defaults.

    Args:
      setting: the key train.compiler_options.
      mesh: of the run. An abstract one is for plans that compile nothing: it has no options.

    Raises:
      InputError: the setting cannot be read.
    """
    automatic, given = parse(setting)
    if isinstance(mesh, AbstractMesh):
        return None
    device = mesh.devices.flat[0]
    automatic = of_device(device.platform, device.device_kind) if automatic else {}
    return {**automatic, **given} or None


def check(setting: str, mesh: Mesh | AbstractMesh) -> None:
    """Compiles next to nothing with each of the user's own options.

    Raises:
      InputError: the setting cannot be read, or the compiler refuses an option.
    """
    _, given = parse(setting)
    if isinstance(mesh, AbstractMesh):
        return
    device = mesh.devices.flat[0]
    number = jax.ShapeDtypeStruct((), "float32", sharding=SingleDeviceSharding(device))
    for name, value in given.items():
        try:
            jax.jit(lambda x: x).lower(number).compile(compiler_options={name: value})
        except jax.errors.JaxRuntimeError as error:
            reason = shown(str(error).splitlines()[0], 200)
            raise InputError(f"{_KEY}: {name}={value} on {device.device_kind}: {reason}") from None


def of_device(platform: str, kind: str) -> dict[str, Any]:
    """The options of "auto"."""
    return xla_cpu.compiler_options(platform) or BY_DEVICE_KIND.get(kind, {})


def parse(setting: str) -> tuple[bool, dict[str, Any]]:
    """Whether those of the accelerator are asked for, and the user's own.

    Raises:
      InputError: the setting cannot be read.
    """
    if setting == _NONE:
        return False, {}
    first, *rest = parts = setting.split(",")
    automatic = first == _AUTO
    options = {}
    for part in rest if automatic else parts:
        found = _OPTION.fullmatch(part)
        if not found or found[1] in options:
            raise InputError(
                f"{_KEY}={shown(setting, 100)}: {part!r} is not valid; valid: {_VALID}"
            )
        options[found[1]] = _value(found[2])
    return automatic, options


def _value(text: str) -> bool | int | str:
    if text in ("true", "false"):
        return text == "true"
    return int(text) if re.fullmatch(r"-?\d+", text) else text
