"""XLA options of the train step: what a setting means, who gets what, and that the step has it."""

from types import SimpleNamespace

import jax
import pytest

from configs.base import get_config
from lm.errors import InputError
from lm.training import compiler_options, experiment

ASYNC = "xla_enable_async_all_gather"
FAST = "xla_cpu_enable_fast_min_max"


def mesh(platform, kind):
    device = SimpleNamespace(platform=platform, device_kind=kind)
    return SimpleNamespace(devices=SimpleNamespace(flat=[device]))


@pytest.mark.parametrize(
    ("setting", "found"),
    [
        ("auto", (True, {})),
        ("none", (False, {})),
        ("xla_a=true,xla_b=2", (False, {"xla_a": True, "xla_b": 2})),
        ("auto,xla_a=false,xla_c=ENABLED", (True, {"xla_a": False, "xla_c": "ENABLED"})),
        ("xla_d=-1.5", (False, {"xla_d": "-1.5"})),
    ],
)
def test_a_setting_is_read(setting, found):
    assert compiler_options.parse(setting) == found


@pytest.mark.parametrize(
    "setting", ["", "all", "auto,", "auto,none", "xla_a", "xla_a=", "xla_a=1,xla_a=2", "a=1,auto"]
)
def test_another_setting_names_the_key(setting):
    with pytest.raises(InputError, match=r"train\.compiler_options=.* valid: auto \| none"):
        compiler_options.parse(setting)


@pytest.mark.parametrize("kind", ["TPU v5", "TPU v5p", "TPU v6 lite"])
def test_all_gathers_are_asynchronous_where_a_schedule_gains(kind):
    assert compiler_options.of_run("auto", mesh("tpu", kind))[ASYNC] is True
    assert compiler_options.of_run(f"auto,{ASYNC}=false", mesh("tpu", kind))[ASYNC] is False
    assert compiler_options.of_run("none", mesh("tpu", kind)) is None


@pytest.mark.parametrize(
    ("platform", "kind"), [("tpu", "TPU v5 lite"), ("tpu", "TPU v4"), ("gpu", "NVIDIA H100")]
)
def test_others_have_the_defaults_of_their_compiler(platform, kind):
    assert compiler_options.of_run("auto", mesh(platform, kind)) is None
    assert compiler_options.of_run("xla_a=1", mesh(platform, kind)) == {"xla_a": 1}


@pytest.mark.parametrize(
    ("setting", "given"),
    [
        ("auto", {"xla_cpu_copy_insertion_use_region_analysis": True}),
        ("none", None),
        (f"{FAST}=true", {FAST: True}),
    ],
)
def test_the_train_step_is_compiled_with_them(monkeypatch, setting, given):
    config = get_config()
    config.model.update(layers=1, width=16, heads=2, kv_heads=2, mlp_width=32)
    config.train.compiler_options = setting
    run = experiment.build(config, 64, jax.devices()[:1])
    seen, jit = [], jax.jit

    def recorded(function, **options):
        seen.append(options.get("compiler_options"))
        return jit(function, **options)

    monkeypatch.setattr(experiment.jax, "jit", recorded)
    run.train_step()
    assert seen == [given]


def test_an_option_that_the_compiler_does_not_have_is_refused_at_once():
    config = get_config()
    config.train.compiler_options = "auto,xla_no_such_option=true"
    with pytest.raises(InputError, match="xla_no_such_option=True on cpu"):
        experiment.build(config, 64, jax.devices()[:1])
