"""An ablation is checked before it starts, matched, paired, and counted."""

import importlib
import json
import math

import pytest
import tiny
from absl import flags

from configs import ablation as form
from launch import quantize_options
from lm.errors import InputError
from lm.planning.flops import parameters_by_group
from lm.studies import ablation, ablation_runs, outcomes
from lm.training.state import parameter_shapes


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return tiny.write_corpus(tmp_path_factory.mktemp("ablation") / "corpus")


def made(corpus, variants, match="tokens", seeds=(0, 1), baseline="a", shared=None, **overrides):
    base = tiny.config(data__corpus=corpus, train__steps=24, optimizer__schedule="wsd", **overrides)
    return form.make(
        base, {"a": {}} | variants, seeds=seeds, baseline=baseline, match=match, shared=shared
    )


def planned(*arguments, rates=None, **options):
    return ablation.make_plan(ablation.read(made(*arguments, **options)), 1, rates)


def test_grid_zip_and_chain():
    grid = form.grid({"a.x": [1, 2], "b.y": [3, 4]}, {"c": 0})
    assert list(grid) == ["x=1,y=3", "x=1,y=4", "x=2,y=3", "x=2,y=4"]
    assert grid["x=2,y=3"] == {"c": 0, "a.x": 2, "b.y": 3}
    zipped = form.zipped({"a.x": [1, 2], "b.y": [3, 4]})
    assert zipped == {"x=1,y=3": {"a.x": 1, "b.y": 3}, "x=2,y=4": {"a.x": 2, "b.y": 4}}
    assert form.chain({"n": {}}, zipped) == {"n": {}} | zipped
    with pytest.raises(ValueError, match="'x=1,y=3'"):
        form.chain(grid, zipped)
    with pytest.raises(ValueError, match="zip"):
        form.zipped({"a.x": [1], "b.y": [3, 4]})


BAD = {
    "key": ({"b": {"train.stepz": 1}}, {}, "variant 'b': no such key train.stepz"),
    "section": ({"b": {"data.width": 1}}, {}, "did you mean model.width"),
    "type": ({"b": {"quantization.fraction": 0.5}}, {}, "quantization.fraction=0.5 is float"),
    "steps": ({"b": {"train.steps": 3}}, {}, "match='tokens' decides train.steps"),
    "seed": ({"b": {"train.seed": 3}}, {}, "variant 'b': train.seed"),
    "place": ({"b": {"quantization.from": "{c}"}}, {}, "{c} is no variant"),
    "circle": ({"b": {"quantization.from": "{b}"}}, {}, "needs itself: b > b"),
    "name": ({"b/c": {}}, {}, "variant 'b/c': a name has letters"),
    "twice": ({"b": {}}, {"shared": {"b": {}}}, "'b' is in variants and in shared"),
    "baseline": ({"b": {}}, {"baseline": "c"}, "baseline='c' is no variant; valid: a, b"),
    "match": ({"b": {}}, {"match": "token"}, "did you mean 'tokens'"),
    "seeds": ({"b": {}}, {"seeds": (1, 1)}, "must be different whole numbers"),
    "quantize": ({"b": {"quantize.run": "{a}"}}, {}, "needs quantize.run='{VARIANT}' and"),
    "flag": (
        {"b": {"quantize.run": "{a}", "quantize.bit": 4}},
        {},
        "did you mean 'quantize.bits'",
    ),
    "value": ({"b": {"model.heads": 5}}, {}, "variant 'b': "),
    "loss": ({"b": {"objective.weighting": "rho1"}}, {}, "objective.references.reference_nll"),
    "source": (
        {
            "b": {
                "quantization.bits": 4.0,
                "quantization.fraction": "0.5",
                "quantization.from": "{a}",
                "optimizer.weight_decay": 0.3,
            }
        },
        {},
        "quantization.from={a} was trained with optimizer.weight_decay=0.1, not 0.3",
    ),
    "width": (
        {"b": {"quantize.run": "{a}", "quantize.bits": 9}},
        {},
        "variant 'b': quantization.bits=9",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_variant_is_refused_in_one_line_before_anything_runs(case, corpus):
    variants, options, message = BAD[case]
    with pytest.raises(InputError) as error:
        planned(corpus, variants, **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_config_of_a_run_is_no_ablation(corpus):
    with pytest.raises(InputError, match=r"launch\.train"):
        ablation.read(tiny.config(data__corpus=corpus))


def test_variants_get_the_same_tokens(corpus):
    found = planned(corpus, {"long": {"data.sequence_length": 64}, "wide": {"model.width": 64}})
    assert {name: one.tokens for name, one in found.items()} == dict.fromkeys(found, 24 * 8 * 32)
    assert found["long"].steps == 12
    free = planned(corpus, {"long": {"data.sequence_length": 64}}, match="none")
    assert free["long"].steps == 24


def test_variants_get_the_same_flops(corpus):
    found = planned(corpus, {"wide": {"model.mlp_width": 256}}, match="flops")
    assert found["wide"].steps < 24
    assert found["wide"].flops == pytest.approx(found["a"].flops, rel=0.5 / found["wide"].steps)
    assert found["wide"].tokens < found["a"].tokens


def test_a_second_model_costs_a_forward_pass(corpus):
    rho1 = {"objective.weighting": "rho1", "objective.references.reference_nll": "{a}"}
    found = planned(corpus, {"rho1": rho1})
    assert found["rho1"].flops_per_token == pytest.approx(4 / 3 * found["a"].flops_per_token)
    average = rho1 | {"objective.references.reference_nll": "ema", "train.ema_decay": 0.9}
    found = planned(corpus, {"rho1": average})
    assert found["rho1"].flops_per_token == pytest.approx(4 / 3 * found["a"].flops_per_token)


def test_variants_get_the_same_time(corpus):
    rates = {"a": 1000.0, "fast": 1500.0}
    found = planned(corpus, {"fast": {"model.mlp_width": 32}}, match="time", rates=rates)
    assert found["fast"].steps == 36
    times = [found[name].tokens / rates[name] for name in rates]
    assert times[0] == times[1]


@pytest.mark.parametrize(
    ("rate", "hours", "rows", "steps"),
    [
        (55_416, 6, 128, 18_265),
        (55_416, 12, 128, 36_529),
        (16_618, 48, 256, 21_908),
        (16_618, 96, 256, 43_817),
    ],
)
def test_the_published_steps_of_languini(rate, hours, rows, steps, corpus):
    # arXiv 2309.11197: tokens per second and hours on the reference device, rows of 512 tokens.
    one = planned(corpus, {})["a"]
    config = one.config.copy_and_resolve_references()
    config.train.steps = 3600 * hours
    clock = one._replace(config=config, tokens_per_step=1)  # one token a second
    variant = one._replace(variant=one.variant._replace(name="b"), tokens_per_step=rows * 512)
    assert ablation.matched_steps("time", clock, variant, {"a": 1.0, "b": rate}) == steps


def test_a_run_that_is_not_compared_may_be_longer(corpus):
    found = planned(corpus, {"b": {"model.width": 64}}, shared={"teacher": {"train.steps": 60}})
    assert (found["teacher"].steps, found["b"].steps) == (60, 24)


def test_runs_of_a_seed_are_paired_and_come_after_what_they_need(corpus, tmp_path):
    qat = {"quantization.bits": 4.0, "quantization.fraction": "0.5", "quantization.from": "{late}"}
    after = {"quantize.run": "{late}", "quantize.bits": 4}
    found = planned(corpus, {"qat": qat, "rtn": after}, shared={"late": {}})
    assert found["late"].config.checkpoint.at_steps == (12,)
    assert found["rtn"].weight_bytes == found["qat"].weight_bytes < found["a"].weight_bytes / 4
    runs = ablation_runs.runs(found, (3, 5), tmp_path)
    places = [run.folder for run in runs]
    for i, run in enumerate(runs):
        assert all(need in places[:i] for need in run.needs)
        assert run.config.train.seed == run.seed
    by_name = {run.name: run for run in runs}
    late, qat = by_name["late/seed_5"], by_name["qat/seed_5"]
    assert qat.config.quantization["from"] == str(tmp_path / "late" / "seed_5")
    differing = [
        key
        for key, value in ablation.leaves(qat.config)
        if value != dict(ablation.leaves(late.config))[key]
    ]
    expected = ["quantization.bits", "quantization.fraction", "quantization.from"]
    assert [k for k in differing if not k.startswith("checkpoint")] == expected


def test_the_hash_of_a_run_is_of_its_numbers_only(corpus, tmp_path):
    one, other = (
        ablation_runs.runs(planned(corpus, {}, data__directory=d), (0, 1), tmp_path / d)
        for d in ("x", "y")
    )
    assert [run.digest for run in one] == [run.digest for run in other]
    changed = ablation_runs.runs(planned(corpus, {}, optimizer__beta2=0.9), (0, 1), tmp_path)
    assert len({run.digest for run in (*one, *changed)}) == 4


def test_what_is_counted_agrees_with_the_model(corpus):
    from lm.training import experiment

    one = planned(corpus, {})["a"]
    run = experiment.build(one.config, 257, 1)
    shapes = parameter_shapes(run.model)
    assert one.parameters == sum(parameters_by_group(shapes).values())
    assert one.flops == 24 * 8 * 32 * run.flops_per_token()
    assert one.weight_bytes == 4 * one.parameters


def test_measuring_runs_have_the_share_of_quantized_steps_and_nothing_else(corpus, tmp_path):
    qat = {"quantization.bits": 4.0, "quantization.fraction": "0.25", "quantization.from": "{a}"}
    found = planned(corpus, {"qat": qat})
    plain, quantized = ablation_runs.measuring_runs(found, tmp_path, steps=40)
    assert quantized.folder == tmp_path / "rates" / "qat" / "seed_0"
    assert float(quantized.config.quantization.fraction) == pytest.approx(0.25)
    assert quantized.config.quantization["from"] == ""
    assert plain.config.evaluation.every_steps == plain.config.checkpoint.every_steps == 0


def test_the_time_of_a_variant_comes_from_its_rate_or_from_that_of_others(corpus):
    found = planned(corpus, {"wide": {"model.mlp_width": 256}})
    assert ablation_runs.estimate_seconds(found, {}) == {"a": None, "wide": None}
    seconds = ablation_runs.estimate_seconds(found, {"a": 100.0})
    assert seconds["a"] == found["a"].tokens / 100
    ratio = found["wide"].flops_per_token / found["a"].flops_per_token
    assert seconds["wide"] == pytest.approx(seconds["a"] * ratio)


def test_the_rate_of_a_run_is_all_tokens_by_all_time():
    lines = [
        {"kind": "train", "tokens": 100 * (i + 1), "tokens_per_second": rate}
        for i, rate in enumerate((100.0, 50.0, 100.0))
    ]
    assert outcomes.rate(lines) == pytest.approx(300 / (1 + 2 + 1))
    # A run that begins at another one's step 90 has not trained those tokens.
    later = [line | {"tokens": line["tokens"] + 9000} for line in lines]
    assert outcomes.rate(later) == pytest.approx(300 / (1 + 2 + 1))
    # A policy gradient that spends half of its time on drawing, and a quarter on judging.
    drawing = {"sampling_share": 0.5, "judging_share": 0.25}
    slower = [line | drawing for line in lines]
    assert outcomes.rate(slower) == pytest.approx(outcomes.rate(lines) / 4)
    assert outcomes.rate([{"kind": "event"}]) is None


ARGUMENTS = {
    "qat_fraction": ["4,800", "2,200"],
    "cooldown_fusion": ["4"],
    "after_training": ["4", "2"],
    "weighting": ["0", "0.3"],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["codes", *ARGUMENTS, "together", "scaling"],
)
def test_the_ablations_of_this_repository_can_be_run(name, corpus):
    module = importlib.import_module(f"configs.ablations.{name}")
    for argument in ARGUMENTS.get(name, [None]):
        config = module.get_config() if argument is None else module.get_config(argument)
        config.base.data.update(
            corpus=corpus, tokenizer="bytes", vocab_size=0, validation_fraction=0.3
        )
        found = ablation.make_plan(ablation.read(config), 1)
        assert len(config.seeds) >= 2
        assert config.baseline in found


def lines(folder, steps, loss, speed=100.0):
    folder.mkdir(parents=True)
    written = [
        {
            "step": steps // 2,
            "kind": "train",
            "loss": 4.0,
            "tokens": 50,
            "tokens_per_second": speed,
        },
        {"step": steps // 2, "kind": "validation", "loss": 3.9, "whole": False},
        {
            "step": steps,
            "kind": "validation",
            "loss": loss,
            "bits_per_byte": loss / 2,
            "whole": True,
        },
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in written))


def test_progress_reads_how_far_a_run_is(tmp_path):
    nothing = outcomes.progress(tmp_path, 6)
    assert (nothing.step, nothing.result, nothing.curve) == (0, None, ())
    lines(tmp_path / "run", 6, 3.0)
    found = outcomes.progress(tmp_path / "run", 6)
    assert found.curve == ((3, 3.9), (6, 3.0))
    assert found.result["loss"] == 3.0
    assert outcomes.progress(tmp_path / "run", 7).result is None


def rows(losses, baseline="a", confidence=0.95):
    return [
        outcomes.Row(
            "f.py", baseline, "tokens", confidence, name, seed, 6, 60, loss, loss / 2, math.nan,
            10, 16.0, 0, 40, 120, 1e3, "0", f"{name}/seed_{seed}/metrics.jsonl",
        )
        for name, values in losses.items()
        for seed, loss in enumerate(values)
    ]  # fmt: skip


def test_verdicts_in_words():
    losses = {
        "a": [3.0, 3.2, 3.1],
        "same": [3.0, 3.2, 3.1],
        "good": [2.0, 2.21, 2.09],
        "bad": [4.0, 4.21, 4.09],
        "unclear": [3.1, 3.1, 3.15],
    }
    words = [outcomes.in_words(one) for one in outcomes.outcomes(rows(losses))]
    assert words[0] == "a: the baseline"
    assert words[1].startswith("same: not resolved at 3 seeds, +0.0000 bits/byte")
    assert "no number of seeds" in words[1]
    assert words[2].startswith("good: better, -0.5000 bits/byte")
    assert words[3].startswith("bad: worse, +0.5000 bits/byte")
    assert "unclear: not resolved at 3 seeds" in words[4]
    assert "seeds would resolve a difference of this size" in words[4]
    (_, one) = outcomes.outcomes(rows({"a": [3.0], "b": [1.0]}))
    assert "at one seed, with which nothing can be resolved" in outcomes.in_words(one)
    (alone,) = outcomes.outcomes(rows({"b": [1.0, 2.0]}))
    assert outcomes.in_words(alone) == "b: not compared"


def test_intervals_are_wider_with_more_comparisons():
    pair = {"a": [3.0, 3.2, 3.1], "b": [2.9, 3.15, 3.0]}
    (_, one) = outcomes.outcomes(rows(pair))
    many = outcomes.outcomes(rows(pair | {name: pair["b"] for name in "cdef"}))
    assert many[1].comparison.high > one.comparison.high
    assert many[1].comparison.difference == one.comparison.difference


def test_the_keys_of_a_quantized_variant_are_flags_of_launch_quantize():
    own = flags.FLAGS.flags_by_module_dict()[quantize_options.__name__]
    assert set(ablation.QUANTIZE) <= {flag.name for flag in own}
