"""The plan as a user asks for it, in processes of its own."""

import gzip
import json

import pytest
import tiny
from test_commands import TINY, command

from lm.parallel.compiler import compiler_options

WIDTH, LAYERS, VOCAB = 32, 2, 257


def test_json_is_one_object_and_nothing_else():
    out, err = command("plan", *TINY, "--devices=4", "--config.mesh.fsdp=4", "--json")
    assert len(out.splitlines()) == 1
    record = json.loads(out)
    # Attention with half as many key heads is 3 D^2 a layer, an MLP of width 2 D is 4 D^2.
    matrices = LAYERS * 7 * WIDTH**2
    norms = 2 * LAYERS * WIDTH + WIDTH
    assert record["parameters"]["total"] == matrices + 2 * VOCAB * WIDTH + norms
    assert sum(record["parameters"]["by_group"].values()) == record["parameters"]["total"]
    assert record["parameters"]["by_group"]["embedding"] == VOCAB * WIDTH
    assert record["bytes"]["parameters"]["per_device"] == matrices + 2 * VOCAB * WIDTH + 4 * norms
    assert record["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1, "sequence": 1}
    assert record["interfaces"][0]["embedding"] == "learned"
    assert err == ""


def test_the_table_has_the_figures_and_writes_nothing(tmp_path):
    out, err = command(
        "plan",
        *TINY,
        "--config.data.corpus=/nowhere",
        f"--config.data.directory={tmp_path}",
        "--config.data.tokenizer=bpe",
        "--config.data.vocab_size=300",
    )
    assert out.startswith("1 device: data 1 x fsdp 1 x tensor 1 x sequence 1\nvocabulary 300\n")
    assert "learned *" in out
    assert "256 a step, 1,536 in 6 steps" in out
    assert err == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_vocabulary_that_training_refuses_is_planned_with_and_said():
    out, err = command("plan", *TINY, "--devices=1", "--config.data.vocab_size=65536")
    assert "vocabulary 65,536" in out
    assert "launch.train refuses this config: data.vocab_size 65536" in err


BAD = {
    "no config": ([], "--config=FILE.py is missing"),
    "devices": ([*TINY, "--devices=0"], "--devices=0 must be at least 1"),
    "both": ([*TINY, "--devices=4", "--topology=v5e:2x2"], "give one"),
    "mesh": ([*TINY, "--devices=4", "--config.mesh.fsdp=3"], "does not match 4 devices"),
    "search": ([*TINY, "--search"], "--search needs --topology"),
    "profile": ([*TINY, "--profile=/nowhere"], "--profile=/nowhere: no plugins/profile/"),
    "profile, search": ([*TINY, "--profile=x", "--search", "--topology=v5e:2x2"], "ask one"),
    "slices": ([*TINY, "--slices=2"], "--slices needs --topology"),
    "unsharded": (
        [*TINY, "--devices=4", "--config.mesh.data=1", "--config.mesh.tensor=4"],
        "vocab is not divisible by mesh.tensor=4",
    ),
    "options": ([*TINY, "--config.train.compiler_options=fast"], "valid: auto, none, or"),
    "topology": ([*TINY, "--topology=v9:2x2"], "--topology=v9:2x2"),
}


@pytest.mark.parametrize("name", tiny.mostly_slow(BAD, ("mesh",)))
def test_bad_input_is_one_line_and_exit_code_2(name):
    arguments, expected = BAD[name]
    process = command("plan", *arguments, check=False)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    assert len(err.strip().splitlines()) == 1, err
    assert err.startswith("error: ")
    assert expected in err
    assert out == ""


@pytest.mark.slow
def test_a_trace_is_read_beside_the_estimate(tmp_path):
    folder = tmp_path / "plugins" / "profile" / "1"
    folder.mkdir(parents=True)
    names = {1: "XLA Modules", 2: "XLA Ops"}
    events = [{"ph": "M", "pid": 3, "name": "process_name", "args": {"name": "/device:TPU:0"}}]
    for tid, name in names.items():
        events.append({"ph": "M", "pid": 3, "tid": tid, "name": "thread_name"})
        events[-1]["args"] = {"name": name}
    for tid, name, length in ((1, "jit_train_step(1)", 4000), (2, "convolution.1", 1000)):
        events.append({"ph": "X", "pid": 3, "tid": tid, "name": name, "ts": 0, "dur": length})
    with gzip.open(folder / "host.trace.json.gz", "wt") as file:
        json.dump({"traceEvents": events}, file)
    options = [*TINY, f"--profile={tmp_path}", "--devices=1", "--config.train.peak_flops=1e9"]
    out, _ = command("plan", *options, "--json")
    record = json.loads(out)
    rows = {row["name"]: row for row in record["rows"]}
    assert record["measured"]["steps"] == 1
    assert rows["step"]["measured"] == pytest.approx(4e-3)
    assert rows["matrix products"]["measured"] == pytest.approx(1e-3)
    ratio = rows["matrix products"]["measured"] / rows["matrix products"]["estimate"]
    assert rows["matrix products"]["ratio"] == pytest.approx(ratio)
    out, _ = command("plan", *options)
    assert out.startswith("1 step on 1 device; peak and bandwidth: train.peak_flops\n")
    assert "off by most: matrix products, " in out
    assert "the trace names no operation as of: " in out


SLICE = [*TINY, "--topology=v5e:2x2", "--json", "--config.mesh.fsdp=2", "--config.mesh.data=1"]


@pytest.mark.slow
def test_the_train_step_compiles_for_a_tpu_that_is_not_here():
    pytest.importorskip("libtpu")
    out, _ = command("plan", *SLICE, "--config.mesh.tensor=2", "--config.model.dtype=bfloat16")
    record = json.loads(out)
    compiled, memory = record["compiled"], record["compiled"]["memory"]
    assert record["topology"]["memory"] == 16 * 2**30
    assert compiled["fits"]
    # Tiles of at least 8 x 128 make small arrays larger than their elements.
    assert memory["arguments"] >= record["bytes"]["state"]["per_device"]
    assert memory["aliased"] >= record["bytes"]["state"]["per_device"]
    assert memory["temporaries"] > 0
    assert compiled["loops"].count(LAYERS) >= 2  # forward, backward
    assert compiled["collectives"]["all-gather"]["fsdp"]["bytes"] > 0
    assert "tensor" in compiled["collectives"]["all-reduce"]
    assert compiled["model_flops"] == record["flops_per_step"] / 4
    estimate = compiled["estimate"]
    assert 0 < estimate["sequential_mfu"] < estimate["overlapped_mfu"] < 1
    overlap = compiled["overlap"]
    counts = [one["count"] for axes in compiled["collectives"].values() for one in axes.values()]
    assert overlap["count"] == sum(counts)
    assert 0 < overlap["asynchronous"] <= overlap["count"]
    assert overlap["seconds"] == pytest.approx(estimate["communication_seconds"])
    assert 0 < overlap["covered"] <= overlap["seconds"]


@pytest.mark.slow
def test_the_options_of_a_v5p_make_its_all_gathers_asynchronous():
    pytest.importorskip("libtpu")
    v5p = [*TINY, "--topology=v5p:2x2x2", "--json", "--config.mesh.fsdp=8"]
    size = {"width": 512, "heads": 4, "kv_heads": 4, "layers": 2, "dtype": "bfloat16"}
    v5p += [f"--config.model.{key}={value}" for key, value in size.items()]
    found = {}
    for setting in ("auto", "none", "xla_enable_async_all_gather=false"):
        out, _ = command("plan", *v5p, f"--config.train.compiler_options={setting}")
        found[setting] = json.loads(out)["compiled"]
    assert found["auto"]["compiler_options"] == compiler_options("TPU v5", "auto")
    assert found["auto"]["overlap"]["asynchronous"] > 0
    assert found["none"]["compiler_options"] == {}
    for other in ("none", "xla_enable_async_all_gather=false"):
        assert found[other]["overlap"]["asynchronous"] == 0
    assert all(one["cpu_seconds"] > 0 for one in found.values())


@pytest.mark.slow
def test_the_length_over_tpus_gathers_keys_and_values_and_scatters_their_gradients():
    pytest.importorskip("libtpu")
    model = {"width": 256, "heads": 4, "kv_heads": 2, "dtype": "bfloat16", "remat": "full"}
    changes = [f"--config.model.{key}={value}" for key, value in model.items()]
    changes += ["--config.data.sequence_length=2048", "--config.train.batch_size=2"]
    out, _ = command("plan", *SLICE, *changes, "--config.mesh.fsdp=1", "--config.mesh.sequence=4")
    compiled = json.loads(out)["compiled"]
    over = {kind: by_axes.get("sequence") for kind, by_axes in compiled["collectives"].items()}
    # bfloat16 of 2 rows: keys and values, 2 heads of 64. Forward and again in the backward pass;
    # segments, and parameters' own collectives, are less than a tenth of them.
    keys_and_values = LAYERS * 2 * 2048 * 2 * (2 * 64) * 2
    assert 1 < over["all-gather"]["bytes"] / (2 * keys_and_values) < 1.1
    assert over["reduce-scatter"]["bytes"] == keys_and_values
    # A half of the queries and of the outputs of a device, three times each.
    exchanged = LAYERS * 2 * (2048 / 4 / 2) * (4 * 64) * 2
    assert 1 <= over["collective-permute"]["bytes"] / (6 * exchanged) < 1.1
    assert compiled["estimate"]["kernel_seconds"] > 0


@pytest.mark.slow
def test_a_step_that_does_not_fit_a_tpu_says_so():
    pytest.importorskip("libtpu")
    large = ["--config.train.batch_size=65536", "--config.data.sequence_length=1024"]
    out, _ = command("plan", *SLICE, "--config.mesh.data=2", *large)
    compiled = json.loads(out)["compiled"]
    assert not compiled["fits"]
    assert "HBM" in compiled["refused"] or "hbm" in compiled["refused"]
    assert compiled["memory"] is None


@pytest.mark.slow
def test_a_search_names_what_fits_with_the_flags_that_make_it():
    pytest.importorskip("libtpu")
    asked = [*TINY, "--topology=v5e:2x2", "--search", "--json"]
    out, err = command("plan", *asked, "--search_minutes=0.01")
    record = json.loads(out)
    (found,) = record["search"]  # after the first one the time is over
    assert found["compilation"]["fits"]
    assert found["compilation"]["estimate"]["overlapped_mfu"] > 0
    named = [f"--config.{key}={value}" for key, value in found["changes"].items()]
    assert " ".join(named) in err
    assert "not tried" in err
    compiled, _ = command("plan", *TINY, "--topology=v5e:2x2", "--json", *named)
    assert json.loads(compiled)["compiled"]["memory"] == found["compilation"]["memory"]
