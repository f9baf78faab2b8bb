"""Options of the compiler: the table, what users write, and that the train step gets them."""

import re

import jax
import pytest
import tiny

from lm.errors import InputError
from lm.parallel.compiler import OPTIONS, compiler_options
from lm.planning import ahead
from lm.planning.flops import PEAK_FLOPS
from lm.training import experiment


def test_each_kind_of_device_has_its_own_options_and_most_have_none():
    assert set(OPTIONS) <= {*PEAK_FLOPS, "cpu"}  # Another name of a TPU would never be looked up.
    v5p = compiler_options("TPU v5", "auto")
    assert v5p == compiler_options("TPU v5p", "auto") == compiler_options("TPU v6 lite", "auto")
    assert set(v5p) == {
        "xla_enable_async_all_gather",
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
        "xla_enable_async_all_reduce",
        "xla_tpu_enable_async_collective_fusion_fuse_all_reduce",
    }
    # Negative controls: one kind's options are no other's.
    assert not set(v5p) & set(compiler_options("cpu", "auto"))
    for kind in ("TPU v5 lite", "NVIDIA H100 80GB HBM3", "unheard of"):
        assert compiler_options(kind, "auto") == {}
    for kind in OPTIONS:
        assert compiler_options(kind, "auto")
        assert compiler_options(kind, "none") == {}


def test_the_table_is_not_changed_by_who_reads_it():
    compiler_options("TPU v5", "auto").clear()
    assert compiler_options("TPU v5", "auto")


@pytest.mark.parametrize("kind", ["TPU v5", "cpu"])
def test_options_of_ones_own_take_the_place_of_the_tables(kind):
    setting = "xla_a=true, --xla_b=False,xla_c=98304,xla_d=x=y"
    expected = {"xla_a": True, "xla_b": False, "xla_c": "98304", "xla_d": "x=y"}
    assert compiler_options(kind, setting) == expected


@pytest.mark.parametrize("setting", ["", "of course", "Auto", "xla_a", "xla_a=", "=1", "xla_a=1,"])
def test_another_setting_is_refused_with_the_valid_ones(setting):
    with pytest.raises(InputError, match=r"train\.compiler_options=.*valid: auto, none, or"):
        compiler_options("cpu", setting)


def test_an_option_that_is_there_twice_is_refused():
    with pytest.raises(InputError, match="has xla_a twice"):
        compiler_options("cpu", "xla_a=1,--xla_a=2")


def built(setting, devices=1):
    devices = jax.devices()[:devices] if isinstance(devices, int) else devices
    return experiment.build(tiny.config(train__compiler_options=setting), tiny.VOCAB, devices)


def copies(run):
    """How many copies the compiled train step makes."""
    with jax.set_mesh(run.mesh):
        step = run.train_step().lower(run.abstract_state(), ahead.abstract_batch(run))
        return len(re.findall(r" copy\(", step.compile().as_text()))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="counts copies of XLA on CPU")
def test_the_train_step_is_compiled_with_them():
    run = built("auto")
    assert run.compiler_options == OPTIONS["cpu"]
    count = copies(run)
    assert copies(built("none")) > count
    assert copies(built("xla_cpu_copy_insertion_use_region_analysis=true")) == count


@pytest.mark.parametrize(
    "setting",
    [
        "xla_tpu_enable_async_collective_fusion=true",
        "xla_backend_optimization_level=high",
        "xla_cpu_copy_insertion_use_region_analysis=perhaps",
    ],
)
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="names options of XLA on CPU")
def test_what_xla_does_not_know_is_refused_before_the_step_is_compiled(setting):
    name = setting.partition("=")[0]
    with pytest.raises(InputError, match=rf"train\.compiler_options=.*{name}.*; valid: ") as error:
        built(setting)
    assert "\n" not in str(error.value)


def test_a_plan_without_devices_reads_the_setting_alone():
    run = experiment.build(tiny.config(), tiny.VOCAB, 8)
    assert run.compiler_options == {}
    with pytest.raises(InputError, match="valid: auto"):
        experiment.build(tiny.config(train__compiler_options="some"), tiny.VOCAB, 8)
