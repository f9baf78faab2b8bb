"""launch.ablate --fit: laws of known coefficients from results.csv files, and what is refused."""

import numpy as np
import pytest

from launch import records, scaling_report
from lm.errors import InputError
from lm.studies.outcomes import Row


def row(name, parameters, tokens, loss, bits=16.0, quantized=0.0, seed=0):
    flops = float(6 * parameters * tokens)
    return Row(
        "scaling.py", "w", "none", 0.95, name, seed, 1, int(tokens), float(loss), float(loss) / 2,
        1.0, int(parameters), bits, int(quantized), 1, 1, flops, "hash", "metrics.jsonl",
    )  # fmt: skip


def plain(noise=0.0):
    rng = np.random.default_rng(0)
    for size in np.geomspace(3e4, 3e5, 4).round():
        for ratio in (5, 30, 120):
            loss = 1.8 + 30 / size**0.3 + 200 / (size * ratio) ** 0.37
            loss *= np.exp(rng.normal(0, noise))
            yield row(f"{size:.0f},{ratio}", size, size * ratio, loss)


@pytest.mark.slow
def test_laws_are_fitted_and_held_out_runs_predicted(tmp_path):
    rows = list(plain(0.001))
    records.write_csv(tmp_path / "results.csv", rows)
    read = records.read_csv(tmp_path / "results.csv")
    summary = scaling_report.write(read, [], tmp_path / "fit.html")
    assert "on 11 runs that it was fitted to" in summary
    assert "1 that were held out" in summary
    assert "E + (a M^eta + b M^-eta) C^-eta" in summary
    text = (tmp_path / "fit.md").read_text()
    assert text.count("held out |") == 2
    assert "Not fitted: QAT law: there is no run with both phases" in text
    page = (tmp_path / "fit.html").read_text()
    assert page.count("<svg") == 2
    named = scaling_report.write(read, [rows[0].variant, rows[1].variant], tmp_path / "fit.html")
    assert "2 that were held out" in named


def test_the_law_of_quantized_runs_is_fitted_too(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling_report, "_QAT_REPEATS", 2)
    rows = []
    for size in (3e4, 1e5, 3e5):
        for ratio in (20, 100, 400):
            for bits in (2.0, 4.0):
                for share in (0.2, 0.6):
                    s = 8 / bits * ratio
                    loss = 1.8 + 30 / size**0.3 + 200 / (size * ratio) ** 0.37
                    loss += 0.4 * 2 ** (-0.5 * bits) * (share * s) ** -0.4
                    loss += 0.1 * ((1 - share) * s) ** -0.3 * (share * s) ** -0.2
                    tokens = size * ratio
                    rows.append(row("q", size, tokens, loss, bits, share * tokens))
    summary = scaling_report.write(rows, [], tmp_path / "fit.html")
    assert "QAT law (arXiv 2509.22935): mean relative error 0.0" in summary
    assert "4 that were held out" in summary


def test_runs_that_determine_no_law_and_unknown_variants_are_refused(tmp_path):
    few = list(plain())[:2]
    with pytest.raises(InputError, match="no law can be fitted"):
        scaling_report.write(few, [], tmp_path / "fit.html")
    with pytest.raises(InputError, match="--held_out=x is no variant"):
        scaling_report.write(few, ["x"], tmp_path / "fit.html")
    assert not list(tmp_path.iterdir())
