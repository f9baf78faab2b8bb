"""Traces read back: real ones of this CPU, and small ones as of TPUs and GPUs."""

import gzip
import json
import math
import shutil

import jax
import pytest
import tiny

from lm.errors import InputError
from lm.planning import benchmark, instructions, profile, trace
from lm.planning.flops import flops_by_part
from lm.planning.instructions import Instruction
from lm.training import experiment
from lm.training.state import parameter_shapes


def named(pid, process, **threads):
    """Metadata of a process, its threads being numbered from 1."""
    events = [{"ph": "M", "name": "process_name", "pid": pid, "args": {"name": process}}]
    for tid, name in enumerate(threads.values(), 1):
        one = {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": name}}
        events.append(one)
    return events


def event(pid, tid, name, start, length, **arguments):
    return {"ph": "X", "pid": pid, "tid": tid, "name": name, "ts": start, "dur": length} | (
        {"args": arguments} if arguments else {}
    )


def tpu(pid=3):
    """Two steps of 100 and 120 us, a loop with a product in it, and another program."""
    found = named(pid, f"/device:TPU:{pid - 3}", a="XLA Modules", b="XLA Ops", c="Steps")
    for start, length in ((0, 100), (200, 120)):
        at, path = start + 1, "jit(train_step)/"
        found += [
            event(pid, 1, "jit_train_step(7)", start, length),
            event(pid, 3, "1", start, length),
            event(pid, 2, "while.1", at, 60),
            event(pid, 2, "fusion.2", at, 30, hlo_category="convolution fusion", tf_op=path),
            event(pid, 2, "fusion.3", at + 30, 20, tf_op=f"{path}while/attend/dot_general"),
            event(pid, 2, "all-reduce.4", at + 60, 8, hlo_category="all-reduce"),
            event(pid, 2, "fusion.5", at + 70, 9, tf_op=f"{path}transpose(jvp(token_statistics))"),
            event(pid, 2, "fusion.6", at + 80, 5, tf_op=f"{path}optimizer/mul"),
        ]
    found += [event(pid, 1, "jit_init(9)", 400, 50), event(pid, 2, "dot.1", 410, 40)]
    return found


TPU = {
    "matrix products": 30e-6,
    "attention": 20e-6,
    "collectives": 8e-6,
    "loss": 9e-6,
    "optimizer": 5e-6,
    profile.OTHER: 10e-6,  # the loop itself
}


def gpu():
    found = named(1, "/device:GPU:0", a="Stream #13(Compute)", b="Stream #14(Memcpy)")
    for run, start in (("a", 0), ("b", 100)):
        also = {"hlo_module": "jit_train_step", "run_id": run}
        found += [
            event(1, 1, "nvjet_hsh_128x256", start, 40, hlo_op="gemm.1", **also),
            event(1, 1, "cudnn_generated_sm90_flash_fprop", start + 40, 20, **also),
            event(1, 2, "ncclDevKernel_AllReduce", start + 10, 30, **also),
            event(1, 1, "loop_add_fusion", start + 70, 10, **also),
        ]
    return [*found, event(1, 1, "gemm", 300, 50, hlo_module="jit_other", run_id="c")]


def write(folder, events, run="2026_01_01"):
    path = folder / "plugins" / "profile" / run / "host.trace.json.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = events if isinstance(events, bytes) else json.dumps({"traceEvents": events}).encode()
    path.write_bytes(gzip.compress(text))
    return path


def measured(folder, name=None):
    return profile.measure(str(folder), name)


def test_the_operations_of_a_tpu_are_told_apart(tmp_path):
    write(tmp_path, [*tpu(3), *tpu(4), {"ph": "C", "name": "memory"}, {}])
    found = measured(tmp_path)
    assert (found.steps, found.devices) == (4, 2)
    assert found.step == pytest.approx(110e-6)
    assert found.seconds == pytest.approx(TPU)


def test_the_kernels_of_a_gpu_are_told_apart_and_the_newest_run_counts(tmp_path):
    write(tmp_path, tpu(), "2025_12_31")
    write(tmp_path, gpu())
    found = measured(tmp_path)
    assert (found.steps, found.devices) == (2, 1)
    assert found.step == pytest.approx(80e-6)
    expected = {"matrix products": 40e-6, "attention": 20e-6, "collectives": 30e-6}
    expected |= {profile.OTHER: 10e-6, "loss": 0, "optimizer": 0}
    assert found.seconds == pytest.approx(expected)


def test_one_of_several_steps_is_chosen_by_its_name(tmp_path):
    host = named(1, "/host:CPU", a="python")
    steps = [event(1, 1, "step a", -5, 110), event(1, 1, "step b", 190, 150)]
    write(tmp_path, [*host, *steps, *tpu()])
    assert measured(tmp_path, "step a").step == pytest.approx(100e-6)
    assert measured(tmp_path, "step b").step == pytest.approx(120e-6)
    with pytest.raises(InputError, match="several steps; choose by --name, one of: step a, step b"):
        measured(tmp_path)
    with pytest.raises(InputError, match=r"--name=step c: not in .*; it has: step a, step b"):
        measured(tmp_path, "step c")
    write(tmp_path, [*host, steps[0], *tpu()])
    assert measured(tmp_path).steps == 1


DEEP = b'{"traceEvents": ' + b"[" * 200_000
BAD = {
    "no JSON": (b"{", "not a trace of events"),
    "no events": (b"{}", "not a trace of events"),
    "a list": (b"[]", "not a trace of events"),
    "deep": (DEEP, "not a trace of events"),
    "no time": ([event(1, 1, "x", math.nan, 1)], "has no time"),
    "text": ([event(1, 1, "x", "then", 1)], "not a trace of events"),
    "numbers": ([3], "not a trace of events"),
    "no step": ([*named(1, "/device:TPU:0", a="XLA Ops"), event(1, 1, "x", 0, 1)], "no train step"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_trace_is_refused_by_name(name, tmp_path):
    events, expected = BAD[name]
    write(tmp_path, events)
    with pytest.raises(InputError, match=expected) as raised:
        measured(tmp_path)
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_damaged_or_swollen_file_is_refused_before_it_takes_memory(tmp_path, monkeypatch):
    path = write(tmp_path, tpu())
    whole = path.read_bytes()
    for damaged in (whole[:-20], b"\x00" + whole, whole[:40] + b"\xff" * 40 + whole[80:]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="cannot be read"):
            measured(tmp_path)
    monkeypatch.setattr(trace, "_MOST_BYTES", 1 << 20)
    write(tmp_path, b" " * (1 << 22))
    with pytest.raises(InputError, match="more than 1 MiB"):
        measured(tmp_path)
    with pytest.raises(InputError, match="no plugins/profile"):
        measured(tmp_path / "elsewhere")


@pytest.fixture(scope="module")
def run():
    return experiment.build(tiny.config(), 257, jax.devices()[:1])


def test_the_estimate_is_the_formulas_over_the_limits(run):
    found = profile.estimate(run, profile.Limits(1e9, 1e8, "here"))
    c = run.config
    tokens = c.train.batch_size * c.data.sequence_length
    products = sum(found[k] for k in ("matrix products", "attention", "loss"))
    assert products == pytest.approx(run.flops_per_token() * tokens / 1e9)
    assert found["loss"] == pytest.approx(6 * 257 * c.model.width * tokens / 1e9)
    weights = sum(4 * x.size for x in jax.tree.leaves(run.abstract_state().trained))
    assert found["optimizer"] == pytest.approx(7 * weights / 1e8, rel=0.01)
    assert found["step"] == pytest.approx(products + found["optimizer"])
    unknown = profile.estimate(run, profile.Limits(None, None, "unknown"))
    assert set(unknown.values()) == {None}


def test_the_largest_deviations_come_first_whether_too_long_or_too_short():
    seconds = {**dict.fromkeys(profile.KINDS, 0.0), "attention": 2.0, "loss": 0.1, "optimizer": 9.0}
    estimates = {"step": 4.0, "attention": 1.0, "loss": 1.0, "optimizer": None, "collectives": 1.0}
    one = profile.Measured(1, 1, 8.0, seconds, {0: 1.0, 1: 7.0}, "", [])
    rows = profile.compare(one, estimates, profile.Limits(1.0, None, "here"))
    assert [(row.name, row.ratio) for row in rows] == [
        ("step", 2.0),
        ("loss", pytest.approx(0.1)),
        ("attention", 2.0),
        ("collectives", None),
        ("optimizer", None),
    ]


@pytest.mark.parametrize("text", ["{", "[]", '{"peak_flops": {"float32": 0}, "bandwidth": 1}'])
def test_limits_beside_a_trace_are_checked(text, tmp_path):
    assert profile.machine_limits(str(tmp_path), "float32") is None
    (tmp_path / "machine.json").write_text('{"peak_flops": {"float32": 3}, "bandwidth": 2}')
    assert profile.machine_limits(str(tmp_path), "float32")[:2] == (3.0, 2.0)
    with pytest.raises(InputError, match=r"machine\.json: no peak_flops of bfloat16"):
        profile.machine_limits(str(tmp_path), "bfloat16")
    (tmp_path / "machine.json").write_text(text)
    with pytest.raises(InputError, match=r"machine\.json: no peak_flops"):
        profile.machine_limits(str(tmp_path), "float32")


STEP = """HloModule jit_train_step

%products (p: f32[8,4], q: f32[4,6]) -> f32[8,6] {
  %p = f32[8,4]{1,0} parameter(0)
  %q = f32[4,6]{1,0} parameter(1)
  ROOT %dot.1 = f32[8,6]{1,0} dot(%p, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (x: f32[8,4], w: f32[4,6]) -> f32[8,6] {
  %x = f32[8,4]{1,0} parameter(0)
  %w = f32[4,6]{1,0} parameter(1)
  %ynn_fusion.1 = f32[8,6]{1,0} fusion(%x, %w), kind=kCustom, calls=%products, \
metadata={op_name="jit(train_step)/layers/mlp/dot_general"}
  %ynn_fusion.2 = f32[8,6]{1,0} fusion(%x, %w), kind=kCustom, calls=%products, \
metadata={op_name="jit(train_step)/layers/attention/attend/dot_general"}
  ROOT %add.3 = f32[8,6]{1,0} add(%ynn_fusion.1, %ynn_fusion.2), \
metadata={op_name="jit(train_step)/layers/attention/attend/add"}
}
"""


def cpu(folder, program=STEP):
    """Two threads: two products, one of them beside another; an addition; one without a place."""
    host = named(1, "/host:CPU", a="python", b="XLAEigen/1", c="XLAEigen/2")
    found = [*host, event(1, 1, "step toy", 0, 200)]
    for tid, name, start, length in (
        (2, "ynn_fusion.1", 10, 40),
        (2, "while.9", 60, 40),
        (2, "ynn_fusion.2", 60, 30),
        (3, "ynn_fusion.1", 70, 20),
        (3, "add.3", 110, 10),
    ):
        also = {"hlo_op": name, "hlo_module": "jit_train_step", "run_id": "1"}
        found.append(event(1, tid, name, start, length, **also))
    write(folder, found)
    if program:
        file = instructions.path(str(folder), "step toy")
        file.parent.mkdir()
        file.write_text(program)


def test_threads_that_share_the_cores_share_the_time(tmp_path):
    cpu(tmp_path, program="")
    found = measured(tmp_path)
    assert found.step == pytest.approx(110e-6)
    # 40 alone, 20 in halves, 10 alone again; the loop has 10 to itself.
    assert sum(found.seconds.values()) == pytest.approx(90e-6)
    assert found.side_by_side == pytest.approx({0: 20e-6, 1: 70e-6, 2: 20e-6})
    assert found.seconds[profile.OTHER] == pytest.approx(90e-6)
    assert found.program == ""


def test_the_program_tells_what_instructions_are_and_do(tmp_path):
    cpu(tmp_path)
    found = measured(tmp_path)
    assert {k: s for k, s in found.seconds.items() if s} == pytest.approx(
        {
            "matrix products": 50e-6,
            "attention, products": 20e-6,
            "attention, rest": 10e-6,
            profile.OTHER: 10e-6,
        }
    )
    flops, read, written = 2 * 8 * 6 * 4, 4 * (8 * 4 + 4 * 6), 4 * 8 * 6
    limits = profile.Limits(1e9, 2e9, "here")
    rows = {row.name: row for row in profile.compare(found, {}, limits)}
    products = rows["matrix products"].reached
    assert products[:2] == (2 * flops, 2 * (read + written))
    assert products.least == pytest.approx(2 * flops / 1e9)
    assert rows["attention, rest"].reached == pytest.approx((0, 3 * written, 3 * written / 2e9))
    whole = 3 * flops / 1e9 + 3 * written / 2e9
    assert rows["step"].reached.least == pytest.approx(whole)
    assert list(rows)[1] == "matrix products"
    assert list(rows)[-1] == profile.NONE
    assert rows[profile.NONE].measured == pytest.approx(20e-6)
    assert profile.compare(found, {}, limits._replace(bandwidth=None))[0].reached.least is None


def test_a_damaged_program_beside_a_trace_is_refused(tmp_path):
    cpu(tmp_path, STEP.replace("calls=%products", "calls=%gone"))
    with pytest.raises(InputError, match=r"programs/step_toy\.hlo\.txt: not a program in HLO"):
        measured(tmp_path)


def test_the_kinds_of_instructions_are_by_place():
    def kind(place, flops=0, opcode="fusion", name="x.1"):
        return profile.kind(name, Instruction(opcode, f"jit(train_step)/{place}", flops, 1))

    assert kind("layers/mlp/dot_general", 8) == "matrix products"
    assert kind("layers/mlp/dot_general") == "MLP, rest"
    assert kind("layers/attention/attend/dot_general") == "attention, rest"
    assert kind("transpose(jvp(token_statistics))/dot_general", 8) == "loss, products"
    assert kind("optimizer/dot_general", 8) == "optimizer"
    assert kind("layers/layers.norm/attention_norm/mul") == "norms"
    assert kind("layers/attention/concatenate") == "projections, rest"
    assert kind("layers/mlp/dot_general", 0, "custom-call") == "matrix products"
    assert kind("add") == kind("", name="dot.1") == profile.OTHER
    assert kind("", name="all-reduce.1") == "collectives"


@pytest.fixture(scope="module")
def real(run, tmp_path_factory):
    """A folder with three steps of this CPU and their program, as launch.benchmark writes it."""
    folder = tmp_path_factory.mktemp("trace")
    with jax.set_mesh(run.mesh):
        step = benchmark.train_step("step tiny", run)
        jax.block_until_ready(step.run())
        with jax.profiler.trace(str(folder)):
            for _ in range(3):
                with jax.profiler.TraceAnnotation(step.name):
                    jax.block_until_ready(step.run())
    file = instructions.path(str(folder), step.name)
    file.parent.mkdir()
    file.write_text(step.program())
    return folder


def test_a_trace_of_this_cpu_is_told_apart_by_its_program(real, run):
    found = measured(real)
    assert (found.steps, found.devices) == (3, 1)
    assert 0 < found.step < 10
    # The program is the one that ran: it has every instruction of the trace.
    assert all(work.instruction for work in found.work)
    named = sum(found.seconds.values())
    assert 0 < named <= sum(found.side_by_side.values()) * 1.0001
    assert found.seconds[profile.OTHER] < 0.2 * named
    assert all(found.seconds[k] for k in ("matrix products", "attention, products", "optimizer"))


def test_the_products_of_the_step_have_the_flops_of_the_formula(real, run):
    found = measured(real)
    limits = profile.Limits(1.0, 1.0, "of 1")
    rows = {row.name: row for row in profile.compare(found, {}, limits)}
    c = run.config
    tokens = c.train.batch_size * c.data.sequence_length
    parts = flops_by_part(run.model.config, parameter_shapes(run.model), c.data.sequence_length)
    assert rows["matrix products"].reached.flops == parts["matrix products"] * tokens
    assert rows["attention, products"].reached.flops == parts["attention"] * tokens
    # The formula has three products of the head; the backward pass takes the logits again.
    assert rows["loss, products"].reached.flops == parts["loss"] * tokens * 4 / 3


def test_the_same_trace_without_its_program_is_read_by_name(real, tmp_path):
    shutil.copytree(real / "plugins", tmp_path / "plugins")
    found, programmed = measured(tmp_path), measured(real)
    assert list(found.seconds) == list(profile.KINDS)
    assert found.seconds[profile.OTHER] > programmed.seconds[profile.OTHER]
    assert sum(found.seconds.values()) == pytest.approx(sum(programmed.seconds.values()))
    assert not any(work.instruction for work in found.work)


@pytest.mark.slow
def test_the_compiled_step_names_attention_loss_and_optimizer(run):
    """The scopes that traces of TPUs and GPUs repeat stand in the program."""
    with jax.set_mesh(run.mesh):
        text = run.train_step(quantized=False).lower(*benchmark.inputs(run)[1:])
        text = text.as_text(debug_info=True)
    found = [profile.kind(line) for line in text.splitlines() if "loc(" in line]
    assert {"attention", "loss", "optimizer", "matrix products", profile.OTHER} <= set(found)
