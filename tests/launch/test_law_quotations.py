"""Scaling laws on a page of results: coefficients, errors on the largest runs, refusals."""

import pytest

from launch import quotations, records, result_tables
from lm.errors import InputError
from lm.studies.outcomes import Row

SIZES, LENGTHS = (30_000, 60_000, 120_000), (1e6, 4e6, 16e6)
TRUE = {"E": 1.2, "A": 50.0, "B": 400.0, "alpha": 0.4, "beta": 0.5}


def loss(n, d):
    return TRUE["E"] + TRUE["A"] * n ** -TRUE["alpha"] + TRUE["B"] * d ** -TRUE["beta"]


def study(folder, *, largest=1.0, sizes=SIZES):
    """Runs with the losses of Chinchilla's law; the largest run has `largest` times its own."""
    rows = [
        Row(
            ablation="scaling.py",
            baseline=f"n={sizes[0]},d={LENGTHS[0]:.0f}",
            match="none",
            confidence=0.95,
            variant=f"n={n},d={d:.0f}",
            seed=0,
            steps=10,
            tokens=int(d),
            loss=loss(n, d) * (largest if (n, d) == (SIZES[-1], LENGTHS[-1]) else 1.0),
            bits_per_byte=loss(n, d),
            tokens_per_second=1000.0,
            parameters=n,
            bits=16.0,
            quantized_tokens=0,
            weight_bytes=4 * n,
            state_bytes=12 * n,
            flops=6 * n * d,
            config_hash="0",
            metrics="metrics.jsonl",
        )
        for n in sizes
        for d in LENGTHS
    ]
    records.write_csv(folder / "scaling.csv", rows)
    return result_tables.load(folder)


def test_the_largest_run_is_held_out_and_its_error_is_quoted(tmp_path):
    tables = study(tmp_path, largest=1.25)
    found = quotations.quote("scaling/error of Chinchilla:.1%", tables)
    # Predicted 1 / 1.25 of what was measured; fitted to it, the error would be smaller.
    assert found.text == "20.0%"
    assert "most FLOPs" in found.source
    assert quotations.quote("scaling/error of Chinchilla:.1%", study(tmp_path)).text == "0.0%"


def test_the_table_has_the_coefficients_of_the_law(tmp_path):
    text = quotations.quote("scaling/laws", study(tmp_path, largest=1.25)).text
    (row,) = [line for line in text.splitlines() if "Chinchilla" in line]
    coefficients = row.split("|")[2].strip().split(", ")
    found = {name: float(value) for name, value in map(str.split, coefficients)}
    assert {name: found[name] for name in TRUE} == pytest.approx(TRUE, rel=2e-3)
    assert "0.00% | 20.00%" in row


def test_what_no_law_follows_from_is_refused(tmp_path):
    tables = study(tmp_path)
    with pytest.raises(InputError, match="no law 'kaplan'; valid: Chinchilla, over-training"):
        quotations.quote("scaling/error of kaplan:.1%", tables)
    with pytest.raises(InputError, match="do not determine"):
        quotations.quote("scaling/laws", study(tmp_path, sizes=SIZES[:1]))
