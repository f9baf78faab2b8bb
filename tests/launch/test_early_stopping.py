"""launch.ablate --stop_early: what is trained, what is decided, and the same after a cut."""

import json
from types import SimpleNamespace

import pytest

from configs import ablation as form
from configs import small
from launch import early_stopping, records, report
from lm.errors import InputError
from lm.studies import ablation, outcomes, sequential

SEEDS = (0, 1, 2, 3, 4, 5)
# bits per byte of a, and of the others minus it.
BASE = [3.0, 3.2, 3.1, 2.9, 3.05, 3.15]
DIFFERENCES = {
    "worse": [1.0, 1.01, 0.99, 1.0, 1.02, 1.0],
    "better": [-1.0, -1.01, -0.99, -1.0, -1.02, -1.0],
    "nothing": [0.1, -0.11, 0.09, -0.08, 0.12, -0.1],
}
NEEDS = {"after": {"quantization.from": "{worse}"}}


def asked(seeds=SEEDS, **variants):
    names = {"a": {}} | {name: {} for name in DIFFERENCES} | variants
    return ablation.read(form.make(small.get_config(), names, seeds=seeds, baseline="a"))


def bits(name, index):
    return BASE[index] + DIFFERENCES.get(name, [0.0] * 6)[index]


class Study:
    """Runs that write their result at once; no training takes place."""

    def __init__(self, folder, study):
        self.folder, self.study, self.started = folder, study, []
        self.runs = [
            SimpleNamespace(
                planned=SimpleNamespace(variant=variant, steps=6),
                seed=seed,
                folder=folder / name / f"seed_{seed}",
                name=f"{name}/seed_{seed}",
            )
            for seed in study.seeds
            for name, variant in study.variants.items()
        ]

    def start(self, chosen, fails=(), most=1000):
        for run in chosen:
            if records.is_done(run) or run.name in fails:
                continue
            if len(self.started) == most:
                return None
            self.started.append(run.name)
            run.folder.mkdir(parents=True)
            value = bits(run.planned.variant.name, self.study.seeds.index(run.seed))
            line = {"step": 6, "kind": "validation", "loss": value, "bits_per_byte": value}
            (run.folder / "metrics.jsonl").write_text(json.dumps(line | {"whole": True}) + "\n")
        return [run.name for run in chosen if run.name in fails]

    def run(self, **options):
        return early_stopping.run(self.study, self.runs, lambda some: self.start(some, **options))

    def rows(self):
        return early_stopping.mark(self.study, records.rows(self.study, self.runs, "f.py"))


def _row(study, name, run, state):
    value = state.result["bits_per_byte"]
    return outcomes.Row(
        name, study.baseline, study.match, study.confidence, run.planned.variant.name, run.seed, 6,
        60, value, value, 123.4, 10, 16.0, 0, 40, 120, 1e3, "hash", f"{run.name}/metrics.jsonl",
    )  # fmt: skip


@pytest.fixture(autouse=True)
def plain_rows(monkeypatch):
    monkeypatch.setattr(outcomes, "row", _row)


def counts(study):
    return {
        name: sum(one.startswith(f"{name}/") for one in study.started)
        for name in study.study.variants
    }


def test_what_is_decided_is_not_trained_further(tmp_path):
    study = Study(tmp_path, asked())
    assert study.run() == []
    at = {name: sequential.stopped_at(values, 6, 3) or 6 for name, values in DIFFERENCES.items()}
    assert at["worse"] < 6
    assert 3 <= at["nothing"] < 6
    assert at["better"] == 6
    assert counts(study) == {"a": 6} | at
    found = {one.variant: one for one in outcomes.outcomes(study.rows())}
    assert found["worse"].row.stopped == at["worse"]
    assert found["better"].row.stopped == 0
    assert [found[n].comparison.verdict for n in DIFFERENCES] == ["worse", "better", "not resolved"]
    # The interval is that of all looks together, wider than one without looks.
    half = found["better"].comparison.high - found["better"].comparison.difference
    bound = sequential.study_bounds(6, 3)[6]
    assert half == pytest.approx(bound * found["better"].comparison.standard_error)
    text = outcomes.in_words(found["worse"])
    assert text.endswith(f"stopped at the look after {at['worse']} of 6 seeds")
    table = report.table(list(found.values()))
    assert f"worse, stopped after {at['worse']} of 6" in table.rows[1]
    assert "looked at one by one" in report.how_to_read(list(found.values()))


def test_a_study_that_was_cut_decides_the_same(tmp_path):
    whole, cut = Study(tmp_path / "whole", asked()), Study(tmp_path / "cut", asked())
    whole.run()
    for most in range(1, 30, 5):
        if cut.run(most=most) is not None:
            break
    assert cut.run() == []
    assert sorted(cut.started) == sorted(whole.started)
    assert cut.rows() == whole.rows()
    before = list(cut.started)
    assert cut.run() == []
    assert cut.started == before


def test_a_run_that_failed_is_looked_at_when_it_has_a_result(tmp_path):
    study, whole = Study(tmp_path / "a", asked()), Study(tmp_path / "b", asked())
    whole.run()
    failed = study.run(fails=("worse/seed_1",))
    assert failed == ["worse/seed_1"]
    assert counts(study)["worse"] == 5  # no look, so nothing has ended early
    assert study.run() == []
    # Now the looks are taken in their order; what came after the stop does not count.
    assert study.rows() == whole.rows()


def test_what_others_need_is_trained_and_not_compared_further(tmp_path):
    study = Study(tmp_path, asked(**NEEDS))
    study.run()
    at = sequential.stopped_at(DIFFERENCES["worse"], 6, 4)
    after = sequential.stopped_at([0.0] * 6, 6, 4)
    assert counts(study)["worse"] == max(at, after)
    rows = [row for row in study.rows() if row.variant == "worse"]
    assert len(rows) == at


def test_rows_keep_the_design(tmp_path):
    study = Study(tmp_path / "runs", asked())
    study.run()
    rows = study.rows()
    records.write_csv(tmp_path / "results.csv", rows)
    assert records.read_csv(tmp_path / "results.csv") == rows
    # A file of an older commit has no such columns.
    lines = (tmp_path / "results.csv").read_text().splitlines()
    older = "".join(line.rsplit(",", 2)[0] + "\n" for line in lines)
    (tmp_path / "older.csv").write_text(older)
    plain = [row._replace(planned_seeds=0, stopped=0) for row in rows]
    assert records.read_csv(tmp_path / "older.csv") == plain


def test_only_the_design_of_the_start_goes_on(tmp_path):
    early_stopping.check(asked(), tmp_path, True)
    early_stopping.check(asked(), tmp_path, False)
    early_stopping.write(asked(), tmp_path, False)
    assert list(tmp_path.iterdir()) == []
    early_stopping.write(asked(), tmp_path, True)
    early_stopping.check(asked(), tmp_path, True)
    for study, wanted, message in (
        (asked(), False, "was started with --stop_early: give it again"),
        (asked(seeds=(0, 1, 2)), True, r"and seeds=\[0, 1, 2, 3, 4, 5\], not \[0, 1, 2\]"),
        (asked(more={}), True, "compared="),
        (asked(seeds=(0, 1)), True, "needs at least 3 seeds"),
    ):
        with pytest.raises(InputError, match=message):
            early_stopping.check(study, tmp_path, wanted)
    for content in ("[" * 100_000, "[]", "{}", "\xff"):
        (tmp_path / early_stopping.DESIGN).write_bytes(content.encode("latin-1"))
        with pytest.raises(InputError, match="no design of --stop_early"):
            early_stopping.check(asked(), tmp_path, True)
