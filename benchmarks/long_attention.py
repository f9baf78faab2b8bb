r"""Attention of one layer with the length over the chips of a TPU slice, compiled ahead of time.

PYTHONPATH=. python benchmarks/long_attention.py --on=v5e:2x4 --length=32768 --shards=8

Takes the extra tpu and no TPU. The program is the gradient of `lm.model.splash` in bfloat16, with
heads of 128; every group of `--shards` chips has a row. Prints what a chip holds and receives.
"""

from absl import flags

from launch import command
from launch.plan import prepare_for_tpu

_ON = flags.DEFINE_string("on", "v5e:2x4", "A slice, as launch.plan --topology takes it.")
_LENGTH = flags.DEFINE_integer("length", 32_768, "Tokens a row.")
_SHARDS = flags.DEFINE_integer("shards", 8, "Chips along the length.")
_TENSOR = flags.DEFINE_integer("tensor", 1, "Chips that share out the heads.")
_HEADS = flags.DEFINE_integer("heads", 32, "Query heads.")
_KV_HEADS = flags.DEFINE_integer("kv_heads", 32, "Heads of keys and values.")

HEAD_WIDTH = 128


def main() -> None:
    """Prints the memory and the collectives of the program."""
    prepare_for_tpu()
    from lm.planning import ahead, hlo

    topology = ahead.load_topology(_ON.value)
    program, shape = compiled(topology)
    memory = program.memory_analysis()
    print(f"temporaries {memory.temp_size_in_bytes / 2**20:,.0f} MiB")
    for kind, axes in hlo.read_program(program.as_text(), shape).collectives.items():
        for axis, one in axes.items():
            print(f"{kind} over {axis}: {one.count} receive {one.received / 2**20:,.0f} MiB")


def compiled(topology):
    """The program, and the sizes of the mesh's axes."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from lm.model import splash
    from lm.parallel.mesh import RULES, make_mesh

    rows = topology.chips // (_SHARDS.value * _TENSOR.value)
    sizes = {"data": rows, "fsdp": 1, "tensor": _TENSOR.value, "sequence": _SHARDS.value}
    mesh = make_mesh(sizes, topology.devices)

    def array(heads):
        place = NamedSharding(mesh, PartitionSpec("data", "tensor", "sequence"))
        shape = (rows, heads, _LENGTH.value, HEAD_WIDTH)
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)

    def total(*arrays):
        with nn.logical_axis_rules(RULES):
            return jnp.sum(splash.splash_attention(*arrays).astype(jnp.float32) ** 2)

    place = NamedSharding(mesh, PartitionSpec("data", "sequence"))
    segments = jax.ShapeDtypeStruct((rows, _LENGTH.value), jnp.int32, sharding=place)
    keys = array(_KV_HEADS.value)
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
        return gradient.lower(array(_HEADS.value), keys, keys, segments).compile(), mesh.shape


if __name__ == "__main__":
    command.run(main)
