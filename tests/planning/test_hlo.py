"""What is read off compiled programs: loops, collectives by mesh axis, cycles and time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lm.parallel.mesh import make_mesh
from lm.planning import ahead, hlo
from lm.planning.hlo import Collective, read_program
from lm.training import experiment

MESH = {"data": 2, "fsdp": 2, "tensor": 2, "sequence": 1}
PROGRAM = """HloModule jit_step

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %x = f32[8,4]{1,0:T(8,128)} parameter(0)
  %all-reduce.1 = f32[8,4]{1,0:T(8,128)S(1)} all-reduce(%x), channel_id=1, to_apply=%add
  %fusion.1 = f32[8,4]{1,0} fusion(%x), kind=kCustom, calls=%start, backend={"estimated_cycles":"7"}
  %fusion.2 = f32[8,4]{1,0} fusion(%x), kind=kCustom, calls=%middle
  %kernel = f32[8,4]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", about={
"block":"512"
}}, metadata={op_name="kernel"}, backend={"estimated_cycles":"2"}
  %after = f32[8,4]{1,0} add(%x), backend={"estimated_cycles":"3"}
}

%start (p.1: bf16[4,4]) -> bf16[8,4] {
  %all-gather.1 = bf16[8,4]{1,0} all-gather(%p.1), channel_id=2, config={"flag_start":"-1"}
  %inside = f32[2]{0} add(%p.1, %p.1), backend={"estimated_cycles":"1000"}
}

%middle (p.2: bf16[4,4]) -> bf16[8,4] {
  %all-gather.2 = bf16[8,4]{1,0} all-gather(%p.2), channel_id=2, config={"flag_start":"2"}
}

%condition (p.3: (s32[], f32[8,4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%all-reduce-scatter.3 (p.4: f32[8,4]) -> f32[4,4] {
  %all-reduce.2 = (f32[8,4]{1,0}, /*index=1*/pred[16]{0}) all-reduce(%p.4, %q), to_apply=%add
}

ENTRY %main (p.5: f32[8,4]) -> f32[8,4] {
  %while.1 = (s32[], f32[8,4]{1,0}) while(%t), condition=%condition, body=%body
  %fusion.3 = f32[4,4]{1,0} fusion(%p.5), kind=kCustom, calls=%all-reduce-scatter.3
  %start.1 = (f32[2]{0}, f32[4]{0}) all-gather-start(%p.5), channel_id=4
  %done.1 = f32[4]{0} all-gather-done(%start.1)
  %copy = f32[4]{0} copy(%done.1), backend={"estimated_cycles":"100"}
}
"""


def test_all_counts_as_often_as_it_runs():
    found = read_program(PROGRAM, MESH)
    assert found.loops == (5,)
    everywhere = "data+fsdp+tensor"
    gathered, scattered = 5 * 8 * 4 * 2 + 4 * 4, 8 * 4 * 4 + 16
    assert found.collectives == {
        "all-gather": {everywhere: Collective(6, gathered, gathered * 7 // 8)},
        "all-reduce": {everywhere: Collective(5, 5 * 128, 5 * 2 * 128 * 7 // 8)},
        "reduce-scatter": {everywhere: Collective(1, scattered, scattered * 7 // 8)},
    }
    # Not what is inside of a fusion, whose own estimate has it.
    assert found.cycles == 5 * (7 + 2 + 3) + 100
    assert found.kernels == 5
    assert read_program(PROGRAM).collectives["all-reduce"][""].bytes == 5 * 128


@pytest.mark.parametrize(
    ("said", "axes"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", "tensor"),
        ("replica_groups={{0,2},{4,6},{1,3},{5,7}}", "fsdp"),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", "data"),
        ("replica_groups={{0,6},{1,7},{2,4},{3,5}}", "data+fsdp (part)"),
        ("replica_groups=[4,2]<=[8]", "tensor"),
        ("replica_groups=[4,2]<=[4,2]T(1,0)", "fsdp"),
        ("replica_groups=[4,2]<=[2,2,2]T(1,0,2)", "tensor"),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", "data+fsdp"),
        ("replica_groups=[1,8]<=[8]", "data+fsdp+tensor"),
        ("replica_groups={}", "data+fsdp+tensor"),
        ("replica_groups=mesh['a'=4,'b'=1,'c'=2] {'a','b'}", "data+fsdp"),
        ("replica_groups=mesh['a'=4,'b'=2] {'b'}", "tensor"),
        ("replica_groups=mesh['a'=4,'b'=2] {'a':(1)2}", "data"),
        ("replica_groups=mesh['a'=4,'b'=2] {'a':(2)2}", "fsdp"),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", "tensor"),
    ],
)
def test_groups_are_named_by_the_axes_along_which_they_lie(said, axes):
    groups = hlo.device_groups(f"all-reduce(%x), {said}, to_apply=%add", 8)
    assert sorted(groups.flatten()) == list(range(8))
    assert hlo.name_axes(groups, MESH) == axes


def test_a_permute_is_along_the_axes_that_source_and_target_differ_in():
    line = "  %p = f32[4]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0},{2,2},{6,7}}"
    text = f"ENTRY %main (x: f32[4]) -> f32[4] {{\n{line}\n}}\n"
    found = read_program(text, MESH).collectives
    assert found == {"collective-permute": {"tensor": Collective(1, 16, 16)}}


def compiled(function, spec):
    """A function of a [64, 32] array on 8 devices, manual over all axes."""
    mesh = make_mesh(MESH, jax.devices())
    mapped = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    shape = jax.ShapeDtypeStruct((64, 32), "float32", sharding=jax.NamedSharding(mesh, spec))
    return read_program(jax.jit(mapped).lower(shape).compile().as_text(), mesh.shape)


@pytest.mark.parametrize("axes", [("data",), ("fsdp",), ("tensor",), ("data", "tensor")])
def test_collectives_compiled_here_run_over_the_axes_that_were_asked_for(axes):
    others = tuple(a for a in ("data", "fsdp", "tensor") if a not in axes)
    n = 2 ** len(axes)
    name, whole = "+".join(axes), 64 * 32 * 4

    def all_kinds(x):
        x = jax.lax.scan(lambda x, _: (jax.lax.psum(jnp.sin(x), axes), None), x, length=3)[0]
        gathered = jax.lax.all_gather(jnp.cos(x), axes, tiled=True)
        return jax.lax.psum_scatter(jnp.sin(gathered), axes, tiled=True)

    found = compiled(all_kinds, jax.P(None, others))
    rows = whole // 2 ** len(others)  # bytes of the array of a device
    assert found.loops == (3,)
    assert found.collectives == {
        "all-reduce": {name: Collective(3, 3 * rows, 3 * 2 * rows * (n - 1) // n)},
        "all-gather": {name: Collective(1, n * rows, rows * (n - 1))},
        "reduce-scatter": {name: Collective(1, n * rows, rows * (n - 1))},
    }
    # Negative control: the groups are others on another mesh.
    if axes == ("fsdp",):
        shuffled = {"data": 2, "tensor": 2, "fsdp": 2, "sequence": 1}
        groups = hlo.device_groups("replica_groups={{0,2},{1,3},{4,6},{5,7}}", 8)
        assert hlo.name_axes(groups, shuffled) == "tensor"


def test_a_permute_compiled_here():
    shift = functools.partial(jax.lax.ppermute, axis_name="fsdp", perm=[(0, 1), (1, 0)])
    found = compiled(shift, jax.P("fsdp"))
    assert found.collectives == {"collective-permute": {"fsdp": Collective(1, 4096, 4096)}}


def test_no_collectives_are_none():
    assert compiled(jnp.sin, jax.P("data")) == hlo.Program((), {}, 0, 0)


CHIP = ahead.Topology("v5e:2x4", 8, [], 2**34, peak_flops=100.0, interconnect=10.0, network=1.0)


def test_the_estimate_is_of_cycles_and_of_bytes_received():
    found = hlo.Program((), {"all-gather": {"fsdp": Collective(3, 0, 40)}}, 50, 2)
    e = ahead.estimate(found, CHIP, model_flops=300.0, kernel_flops=100.0, per_cycle=12.0)
    assert e == ahead.Estimate(6.0, 1.0, 4.0, 3.0 / 7.0, 3.0 / 11.0)
    slow = CHIP._replace(interconnect=1.0)
    assert ahead.estimate(
        found, slow, model_flops=300.0, kernel_flops=100.0, per_cycle=12.0
    ).overlapped_mfu == pytest.approx(3 / 40)
    none = found._replace(cycles=0)
    assert ahead.estimate(none, CHIP, model_flops=1.0, kernel_flops=0.0, per_cycle=1.0) is None


def test_flops_of_kernels_are_those_of_causal_attention():
    c = tiny.config(model__layers=3, train__batch_size=8, mesh__tensor=2, mesh__fsdp=2)
    run = experiment.build(c, tiny.VOCAB, 4)
    length, width = c.data.sequence_length, c.model.width
    pair = 8 * length**2 * width / 4  # of one product, on one of four devices
    assert ahead.kernel_flops(run, 0) == 0
    np.testing.assert_allclose(ahead.kernel_flops(run, 3 * 3), 3 * 9 * pair)
    np.testing.assert_allclose(ahead.kernel_flops(run, 3 * 4), 3 * 11 * pair)


def test_flops_of_kernels_are_those_of_the_busiest_device():
    def flops(length, sequence):
        sizes = {"mesh__fsdp": 4 // sequence, "mesh__sequence": sequence}
        c = tiny.config(train__batch_size=8, data__sequence_length=length, **sizes)
        return ahead.kernel_flops(experiment.build(c, tiny.VOCAB, 4), 6)

    assert flops(512, 2) == flops(512, 1)  # halves of 128 queries are exchanged
    assert flops(512, 4) == flops(512, 1) * 7 / 4  # halves of 64 are not


def test_bytes_between_slices_are_those_that_the_devices_of_a_slice_share_out():
    line = "  %r = f32[100]{0} all-reduce(%x), replica_groups=GROUPS, to_apply=%add"
    text = f"ENTRY %main (x: f32[100]) -> f32[100] {{\n{line}\n}}\n"
    slices = [0, 0, 0, 0, 1, 1, 1, 1]

    def across(groups):
        found = read_program(text.replace("GROUPS", groups), MESH, slices)
        return next(iter(found.collectives["all-reduce"].values())).across

    assert across("{{0,1},{2,3},{4,5},{6,7}}") == 0
    assert across("{{0,4},{1,5},{2,6},{3,7}}") == 2 * 400 // 2
    assert across("[1,8]<=[8]") == 2 * 400 // 8
