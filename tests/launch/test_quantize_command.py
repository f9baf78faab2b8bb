"""Quantizing a run after training, and what other commands do with the packed file."""

import json
import os
import re
from pathlib import Path

import pytest
import tiny
from test_commands import ROOT, TINY, command


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The work directory of a short run, relative, and its corpus; the tokenizer is trained."""
    folder = tmp_path_factory.mktemp("quantize")
    corpus = tiny.write_corpus(folder / "corpus")
    workdir = Path(os.path.relpath(folder / "run", ROOT))
    more = [f"--config.data.corpus={corpus}", f"--config.data.directory={folder / 'cache'}"]
    more += ["--config.data.tokenizer=bpe", "--config.data.vocab_size=270"]
    out, _ = command("train", *TINY, *more, "--config.train.steps=40", f"--workdir={workdir}")
    return workdir, re.search(r"validation: ([\d.]+) nats", out)[1]


def figure(out, name):
    return re.search(rf"{name}: ([\d.,]+)", out)[1].replace(",", "")


def quantize(run, path, *more):
    out, _ = command("quantize", f"--workdir={run[0]}", f"--output={path}", *more)
    return out


@pytest.fixture(scope="module")
def written(run, tmp_path_factory):
    """A file of 2 bits by GPTQ, and what the command printed."""
    path = tmp_path_factory.mktemp("packed") / "int2.safetensors"
    return path, quantize(run, path, "--bits=2", "--method=gptq", "--calibration_batches=4")


@pytest.mark.slow
def test_it_prints_losses_and_sizes(run, written):
    path, out = written
    assert figure(out, "validation before") == run[1]
    assert figure(out, "validation after") > run[1]
    size, count = path.stat().st_size, int(figure(out, "parameters"))
    assert int(figure(out, "file")) == size
    assert f"{8 * size / count:.2f} bits a weight" in out
    # Embedding and head have 4 bits, the layers 2; scales, tokenizer and header come on top.
    assert 2 < 8 * size / count < 16


@pytest.mark.slow
def test_a_rotated_model_is_read_back(run, tmp_path):
    path = tmp_path / "rotated.safetensors"
    out = quantize(run, path, "--bits=4", "--method=rsq", "--calibration_batches=2")
    read, _ = command("evaluate", f"--model={path}")
    assert figure(read, "loss") == figure(out, "validation after")
    plain = quantize(run, path, "--bits=4", "--method=rsq", "--norotate", "--calibration_batches=2")
    assert figure(plain, "validation after") != figure(out, "validation after")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--method=rtn", "--activations=int8", "--cache=int8"],
        ["--method=outlier_suppression", "--activations=int4", "--cache=int4"],
    ],
    ids=lambda options: options[0],
)
def test_activations_keys_and_values_are_those_of_the_evaluation(run, tmp_path, options):
    path = tmp_path / "all.safetensors"
    out = quantize(run, path, "--bits=8", "--calibration_batches=2", *options)
    read, _ = command("evaluate", f"--model={path}")
    assert figure(read, "loss") == figure(out, "validation after")
    weights = quantize(run, path, "--bits=8", "--calibration_batches=2")
    assert figure(weights, "validation after") != figure(out, "validation after")


@pytest.mark.slow
def test_a_page_shows_it_beside_other_methods(run, tmp_path):
    page = tmp_path / "page.html"
    options = ["--bits=3", "--method=rsq", "--calibration_batches=2", "--validation_batches=1"]
    options += ["--outer_bits=16", f"--report={page}", "--others=rtn,gptq:2,awq"]
    out, _ = command("quantize", f"--workdir={run[0]}", *options)
    assert "file: " not in out  # There is no --output.
    for line in ("rtn, 3 bits: ", "gptq, 2 bits: ", "awq, 3 bits: "):
        assert re.search(rf"{line}([\d.]+) nats", out)[1] in page.read_text()
    assert figure(out, "validation after") in page.read_text()


@pytest.mark.slow
def test_a_packed_file_is_evaluated_without_its_run(written):
    path, printed = written
    out, _ = command("evaluate", f"--packed={path}")
    assert out.startswith("step 40, validation split of ")
    assert figure(out, "loss") == figure(printed, "validation after")
    assert re.search(r"bits per byte: [\d.]+", out)


@pytest.mark.slow
def test_a_packed_file_is_sampled_from(written):
    out, _ = command("generate", f"--packed={written[0]}", "--prompt=alpha", "--tokens=8")
    assert out.startswith("alpha")
    assert len(out) > len("alpha\n")


@pytest.mark.slow
def test_methods_differ(run, written, tmp_path):
    after = {"gptq": figure(written[1], "validation after")}
    for method in ("rtn", "rsq"):
        out = quantize(run, tmp_path / "x.safetensors", "--bits=2", f"--method={method}")
        after[method] = figure(out, "validation after")
    assert len(set(after.values())) == 3


@pytest.mark.slow
def test_a_run_with_quantization_is_written_as_it_was_trained(run, tmp_path):
    """With its own grids, and the loss that training ended with."""
    out = tmp_path / "qat"
    corpus = run[0].parent / "corpus"
    more = [f"--config.data.corpus={corpus}", "--config.quantization.bits=2"]
    more += [
        "--config.quantization.fraction=0.5",
        "--config.train.steps=40",
        "--config.optimizer.schedule=wsd",
    ]
    printed, _ = command("train", *TINY, *more, f"--workdir={out}")
    loss = re.search(r"validation: ([\d.]+) nats", printed)[1]
    printed, _ = command("quantize", f"--workdir={out}", f"--output={tmp_path / 'own'}")
    assert figure(printed, "validation before") == figure(printed, "validation after") == loss
    printed, _ = command("evaluate", f"--packed={tmp_path / 'own'}")
    assert figure(printed, "loss") == loss


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    tiny.rows_mostly_slow(
        [
            ("quantize", ["--output=OUT", "--workdir=RUN"], "--bits=WIDTH is missing"),
            ("quantize", ["--output=OUT", "--method=gptq"], "--method needs --bits=WIDTH"),
            ("quantize", ["--bits=4", "--output=/nowhere/x"], "there is no folder /nowhere"),
            ("quantize", ["--bits=4", "--output=OUT", "--quantizer=int"], "is not one of: paretoq"),
            ("quantize", ["--bits=9", "--output=OUT"], "absmax has 2, 3, 4, 5, 6, 7, 8 bits"),
            (
                "quantize",
                [
                    "--bits=4",
                    "--output=OUT",
                    "--granularity=group",
                    "--group_size=7",
                    "--workdir=RUN",
                ],
                "embedding/table: group_size=7 does not divide",
            ),
            ("evaluate", ["--packed=/nowhere.safetensors"], "/nowhere.safetensors: no such file"),
            ("evaluate", ["--packed=README.md"], "README.md: not a whole safetensors file"),
            (
                "evaluate",
                ["--packed=README.md", "--workdir=RUN"],
                "several models",
            ),
        ],
        (1, 7),
    ),
)
def test_bad_input_is_one_line_and_nothing_is_written(request, name, arguments, expected, tmp_path):
    output = str(tmp_path / "out.safetensors")
    arguments = [a.replace("OUT", output) for a in arguments]
    if any("RUN" in a for a in arguments):  # only then, as a run takes longer than a refusal
        workdir, _ = request.getfixturevalue("run")
        arguments = [a.replace("RUN", str(workdir)) for a in arguments]
    process = command(name, *arguments, check=False)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    assert expected in err
    assert len(err.strip().splitlines()) == 1, err
    assert list(tmp_path.iterdir()) == []


def refused(run, *arguments):
    """The one line of a refusal."""
    process = command("quantize", f"--workdir={run[0]}", *arguments, check=False)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2
    return err


@pytest.mark.slow
def test_widths_within_a_budget_and_from_a_file(run, tmp_path):
    plan, output = tmp_path / "plan.json", tmp_path / "planned.safetensors"
    options = ["--bits=8", "--outer_bits=8", f"--output={output}", "--calibration_batches=1"]
    options += ["--sensitivity=qig", f"--save_widths={plan}"]
    err = refused(run, *options, "--budget=1")
    assert not output.exists()
    least = int(re.search(r"the least is ([\d,]+) bytes", err)[1].replace(",", ""))
    budget = f"--budget={int(1.2 * least)}"
    out, _ = command("quantize", f"--workdir={run[0]}", *options, budget)
    widths = json.loads(plan.read_text())
    assert len({bits for of_layers in widths.values() for bits in of_layers}) > 1
    again = tmp_path / "again.safetensors"
    options = ["--bits=8", "--outer_bits=8", f"--output={again}", f"--widths={plan}"]
    same, _ = command("quantize", f"--workdir={run[0]}", *options)
    assert figure(same, "validation after") == figure(out, "validation after")
    assert again.stat().st_size == output.stat().st_size
    err = refused(run, *options, budget)
    assert "--widths and --budget are two plans" in err
