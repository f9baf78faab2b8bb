"""benchmarks/gpu.py: its time, what it installs, what it writes; and all of it on CPU, as a toy."""

import argparse
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from jax.profiler import ProfileData

from benchmarks import gpu, gpu_report, gpu_rows, gpu_sections, gpu_tests, kernels
from lm import strict_json
from lm.errors import InputError

ROOT = Path(__file__).resolve().parent.parent

# What a device's stream and the host have in a trace: offsets and durations in picoseconds.
TRACE = """
planes {
  name: "/device:GPU:0"
  lines { name: "Stream #7(Compute)" timestamp_ns: 1000
    events { metadata_id: 1 offset_ps: 0 duration_ps: 3000000 }
    events { metadata_id: 2 offset_ps: 4000000 duration_ps: 1000000 }
    events { metadata_id: 1 offset_ps: 6000000 duration_ps: 2000000 } }
  lines { name: "XLA Modules" timestamp_ns: 1000
    events { metadata_id: 2 offset_ps: 0 duration_ps: 9000000 } }
  event_metadata { key: 1 value { id: 1 name: "nvjet_hsh_128x256" } }
  event_metadata { key: 2 value { id: 2 name: "loop_add_fusion" } }
}
planes {
  name: "/host:CPU"
  lines { name: "tf_XLAEigen" timestamp_ns: 1000
    events { metadata_id: 1 offset_ps: 0 duration_ps: 5000000 } }
  event_metadata { key: 1 value { id: 1 name: "dot" } }
}
"""


def trace(tmp_path, text):
    path = tmp_path / "trace.xplane.pb"
    path.write_bytes(ProfileData.text_proto_to_serialized_xspace(text))
    return kernels.summary(path)


def test_kernels_of_the_streams_are_summed_by_name(tmp_path):
    found = trace(tmp_path, TRACE)
    assert [(k["name"], k["count"]) for k in found["kernels"]] == [
        ("nvjet_hsh_128x256", 2),
        ("loop_add_fusion", 1),
    ]
    assert found["device_seconds"] == pytest.approx(6e-6)
    assert found["busy_share"] == pytest.approx(6 / 8)
    assert found["kinds"] == pytest.approx({"matrix products": 5e-6, "other fusions": 1e-6})
    on_cpu = trace(tmp_path, TRACE.replace("/device:GPU:0", "/host:metadata"))
    assert on_cpu["device_seconds"] == pytest.approx(5e-6)


def test_the_budgets_fit_and_what_is_left_over_goes_to_the_next():
    assert list(gpu.BUDGETS) == list(gpu_sections.SECTIONS)
    assert sum(gpu.BUDGETS.values()) <= gpu._SECONDS <= 480
    later = sum(list(gpu.BUDGETS.values())[1:])
    assert gpu.seconds_for("machine", later + 50) == 50
    # Too late: every section has its share, and none the time of another.
    left = 200.0
    for name in gpu.BUDGETS:
        seconds = gpu.seconds_for(name, left)
        assert 1 <= seconds <= gpu.BUDGETS[name]
        left -= seconds
    assert left == pytest.approx(0)


def test_a_row_that_fails_or_comes_too_late_stops_no_other(tmp_path):
    def fails():
        raise ValueError("no kernel for this")

    path, start = tmp_path / "rows.json", time.monotonic()
    rows = {"a": fails, "b": lambda: time.sleep(0.05) or {"seconds": float("nan")}, "c": dict}
    gpu_rows.measure(rows, path, start + 60)
    found = strict_json.loads(path.read_text())
    assert found["a"]["error"] == "ValueError: no kernel for this"
    assert found["b"]["seconds"] != found["b"]["seconds"]
    assert found["c"].keys() == {"row_seconds"}
    gpu_rows.measure(rows, path, time.monotonic() + 0.06)
    assert "left_out" in strict_json.loads(path.read_text())["c"]


def test_a_section_that_hangs_or_crashes_is_stopped_and_said(tmp_path, monkeypatch):
    package = tmp_path / "benchmarks"
    package.mkdir()
    (package / "gpu_sections.py").write_text(
        "import sys, time, pathlib\n"
        'pathlib.Path(sys.argv[2]).write_text(\'{"one": {"seconds": 1}}\')\n'
        "sys.exit('broken') if sys.argv[1] == 'fp8' else time.sleep(60)\n"
    )
    monkeypatch.setattr(gpu, "_ROOT", tmp_path)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    hung = gpu.run("loss", 1.0, [], tmp_path, environment)
    assert hung["error"].startswith("stopped after 1 s")
    assert hung["rows"] == {"one": {"seconds": 1}}
    assert hung["seconds"] < 30
    assert gpu.run("fp8", 30.0, [], tmp_path, environment)["error"] == "exit code 1: broken\n"


PASSED = {"seconds": 1.0, "error": None, "rows": {"files": {"passed": 3, "failed": 0}}}


def section(error=None, **rows):
    return {"seconds": 1.0, "error": error, "rows": rows}


FAILURES = {
    "nothing": ({}, {"tests": PASSED}, []),
    "left out": ({"a": {"left_out": "no time"}}, {"tests": PASSED}, []),
    "a row": ({"a": {"error": "out of memory"}, "b": {}}, {"tests": PASSED}, ["loss, a"]),
    "a test": ({}, {"tests": section(files={"failed": 1})}, ["tests, files: tests failed"]),
    "pytest": ({}, {"tests": section(files={"failed": 0, "error": "x"})}, ["tests, files"]),
    "no tests": ({}, {"tests": section()}, ["tests: none were run"]),
    "a section": ({}, {"tests": PASSED, "fp8": section("hung")}, ["section fp8"]),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failed_section_row_or_test_is_exit_code_1_with_the_whole_report(
    name, tmp_path, monkeypatch, capsys
):
    rows, others, expected = FAILURES[name]
    sections = {"loss": section(**rows)} | others
    monkeypatch.setattr(gpu, "BUDGETS", dict.fromkeys(sections, 1))
    monkeypatch.setattr(gpu, "run", lambda name, *rest: sections[name])
    record = {"date": "", "commit": "", "toy": True, "python": "", "packages": {}}
    record |= {"installed": [], "sections": {}}
    arguments = argparse.Namespace(toy=True, output=tmp_path)
    code = gpu._measure(record, arguments, tmp_path, {}, time.monotonic() + 9)
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if line.startswith("failed: ")] == [
        f"failed: {line}" for line in expected
    ]
    assert code == bool(expected)
    written = strict_json.loads((tmp_path / "gpu.json").read_text())
    assert written["sections"] == sections


@pytest.mark.parametrize("workers", [False, True])
def test_counts_of_pytest(workers):
    name, other = "tests/a/test_x.py::test_one[1 2]", "tests/test_y.py::test_two"
    lines = [f"[gw0] [ 50%] PASSED {name} ", f"[gw1] [100%] FAILED {other} "]
    if not workers:
        lines = [f"{name} PASSED    [ 50%]", f"{other} FAILED    [100%]"]
    end = [f"FAILED {other} - assert 1 == 2", "== 1 failed, 1 passed in 63.21s (0:01:03) =="]
    out = "\n".join([*lines, *end])
    found = gpu_tests.ended(out)
    assert (found["passed"], found["failed"]) == (1, 1)
    assert found["by_file"] == {
        "tests/a/test_x.py": {"passed": 1},
        "tests/test_y.py": {"failed": 1},
    }
    assert found["failures"] == [f"FAILED {other} - assert 1 == 2"]
    assert "error" not in found
    # A process that is stopped, or ends in the middle of a test.
    assert "error" in gpu_tests.ended("\n".join(lines))


def report(mfu, toy=False):
    rows = {"as configured": {"mfu": mfu, "seconds": 0.2}, "other": {"error": "out of memory"}}
    record = {"date": "", "commit": "", "toy": toy, "python": "", "packages": {}, "installed": []}
    sections = {"step 350m": {"seconds": 9, "error": None, "rows": rows}}
    return "\n".join(gpu_report.lines({**record, "sections": sections}))


def test_the_report_judges_the_goals_but_not_of_a_toy():
    assert "MFU of 350m at least 0.5: met with 0.510 (as configured)" in report(0.51)
    assert "MFU of 350m at least 0.5: missed with 0.490" in report(0.49)
    assert "MFU of 350m at least 0.5: unknown" in report(0.51, toy=True)
    assert "MFU of 1.3b at least 0.5: unknown" in report(0.51)
    assert "other failed:\n  out of memory" in report(0.51)


@pytest.mark.slow
def test_missing_packages_come_from_wheels_and_others_stay(tmp_path, monkeypatch):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in ("nibble_wheel_of_a_test", "numpy"):
        with zipfile.ZipFile(wheels / f"{name}-9.0-py3-none-any.whl", "w") as file:
            info = f"{name}-9.0.dist-info"
            file.writestr(f"{name}.py", "")
            file.writestr(
                f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.0\n"
            )
            file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            file.writestr(f"{info}/RECORD", "")
    site = tmp_path / "site"
    environment = {**os.environ, "PYTHONPATH": str(site)}
    monkeypatch.setattr(gpu, "_IMPORTS", "import nibble_wheel_of_a_test")
    found = gpu.install(wheels, site, environment)
    assert found == ["nibble_wheel_of_a_test-9.0-py3-none-any.whl"]
    assert not (site / "numpy.py").exists()
    assert gpu.install(wheels, site, environment) == []
    monkeypatch.setattr(gpu, "_IMPORTS", "import nibble_wheel_that_is_not_there")
    with pytest.raises(InputError, match=r"No module named 'nibble_wheel_that.*--wheels=FOLDER"):
        gpu.install(wheels, tmp_path / "other", environment)


BAD = {
    "flag": (["--toys=3"], "unrecognized arguments: --toys=3"),
    "wheels": (["--wheels=docs"], "--wheels=docs: a folder with .whl files is needed"),
    "device": ([], "JAX finds no GPU here but: cpu; --toy runs toy sizes on CPU"),
}


def script(tmp_path, *arguments, **environment):
    return subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu.sh"), f"--output={tmp_path}", *arguments],
        env={**os.environ, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("name", ["flag", "wheels", pytest.param("device", marks=pytest.mark.slow)])
def test_bad_input_is_one_line_and_exit_code_2(name, tmp_path):
    arguments, expected = BAD[name]
    done = script(tmp_path, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {expected}\n"


@pytest.mark.slow
def test_a_toy_run_writes_the_figures_of_every_section(tmp_path):
    done = script(tmp_path, "--toy")
    assert done.returncode == 0, done.stderr + done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.json", "gpu.txt"]
    assert done.stdout == (tmp_path / "gpu.txt").read_text()
    record = strict_json.loads((tmp_path / "gpu.json").read_text())
    assert list(record["sections"]) == list(gpu.BUDGETS)
    for section in record["sections"].values():
        assert section["error"] is None
        assert not any("error" in row or "left_out" in row for row in section["rows"].values())
    rows = {name: section["rows"] for name, section in record["sections"].items()}
    for name in ("step 350m", "step 1.3b", "variants"):
        for row in rows[name].values():
            assert row["last_loss"] < row["first_loss"]
            assert row["mfu"] == pytest.approx(row["flops"] / row["seconds"] / peak(rows))
            assert row["temporary_bytes"] > 0
    assert len(rows["variants"]) == 8
    blocks = [row for name, row in rows["loss"].items() if name != "dense"]
    assert all(row["temporary_bytes"] < rows["loss"]["dense"]["temporary_bytes"] for row in blocks)
    assert rows["tests"]["files"]["passed"] > 5
    assert all(row["fraction"] > 0 for row in (rows["attention"] | rows["decoding"]).values())
    (profile,) = rows["profile"].values()
    assert profile["kernels"]
    assert profile["device_seconds"] > 0
    assert all(0 < row["relative_error"] < 0.1 for row in rows["fp8"].values())


def peak(rows):
    return rows["machine"]["peaks"]["peak_flops"]


@pytest.mark.slow
def test_the_tests_for_a_device_pass_on_one_cpu_device():
    given = gpu_rows.Given(toy=False, limits=None, deadline=time.monotonic() + 3000)
    found = gpu_tests.run(given, "cpu", gpu_tests.FILES, workers=0)
    assert found["failed"] == 0, found
    assert "error" not in found
    assert set(found["by_file"]) == set(gpu_tests.FILES)
    assert found["passed"] > 100
