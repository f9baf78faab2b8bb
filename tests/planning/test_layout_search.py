"""The search for what fits and is fast, with a compiler of one line in place of XLA."""

import pytest
import tiny

from lm.errors import InputError
from lm.planning import ahead, layout_search
from lm.training import experiment

CHIP = ahead.Topology("v5e:2x4", 8, [], 2**34, peak_flops=1e12, interconnect=1e9, network=1e8)


def config(**overrides):
    return tiny.config(**({"train__batch_size": 32, "model__heads": 4} | overrides))


def proposed(topology=CHIP, **overrides):
    return layout_search.propose(config(**overrides), tiny.VOCAB, topology)


@pytest.fixture(scope="module")
def candidates():
    return proposed()


def compiled(fits=True, mfu=0.5):
    estimate = ahead.Estimate(1.0, 0.0, 1.0, mfu, mfu / 2)
    return ahead.Compilation(1.0, 1.0, {}, fits, estimate=estimate)


def test_every_candidate_is_another_one_and_has_all_devices(candidates):
    found = candidates
    assert len({tuple(one.changes.values()) for one in found}) == len(found)
    for one in found:
        c = one.config
        assert c.mesh.data * c.mesh.fsdp * c.mesh.tensor == 8
        assert c.train.batch_size == 32
        assert 32 % (c.train.accumulation * c.mesh.data * c.mesh.fsdp) == 0
    assert {one.config.model.remat for one in found} == {"none", "full", "dots"}
    assert {one.config.mesh.tensor for one in found} == {1, 2, 4, 8}
    # Rows of fewer than the devices of data and fsdp are left out.
    few = proposed(train__batch_size=4)
    assert {one.config.mesh.tensor for one in few} == {2, 4, 8}


def test_what_holds_too_much_is_not_proposed(candidates):
    state = 12 * 23_000  # about: AdamW's three numbers a parameter
    small = proposed(CHIP._replace(memory=state // 2))
    assert 0 < len(small) < len(candidates)
    assert min(one.config.mesh.fsdp * one.config.mesh.tensor for one in small) > 1


def test_the_axis_over_slices_is_data():
    found = proposed(CHIP._replace(slices=2))
    assert {one.config.mesh.data for one in found} == {2, 4, 8}


def test_the_cheapest_by_formula_comes_first(candidates):
    first = candidates[0].changes
    # One micro-batch without remat; a slow interconnect asks for the mesh that moves least.
    assert (first["model.remat"], first["train.accumulation"]) in (("none", 1), ("dots", 1))
    assert first["mesh.tensor"] == 1
    seconds = [one.rough_seconds for one in candidates]
    assert seconds == sorted(seconds)


def test_the_length_over_devices_costs_the_bytes_of_keys_values_and_halves_of_queries():
    def received(remat="none", sequence=4, length=1024):
        c = config(
            data__sequence_length=length, mesh__sequence=sequence, mesh__tensor=2, model__heads=4
        )
        return layout_search.sequence_bytes(experiment.build(c, tiny.VOCAB, 8), remat)

    # Two layers of 32 rows of 1,024 tokens; a device has two of the four heads of width 8, one of
    # the two for keys, in float32: 3/4 of its keys and values, forward and backward.
    tokens = 2 * 32 * 1024 * 8 * 4
    exchanged = 2 * 2 * tokens / 4 / 2  # queries and outputs, half of a quarter, in two heads
    assert received() == 2 * (2 * 3 / 4 * tokens + exchanged)
    assert received("full") == received() * 3 / 2  # once more forward
    assert received(length=512) == received() / 2 - exchanged  # halves of 64 queries are no tiles
    assert received(sequence=1) == 0


def test_what_fits_is_given_fastest_first_and_all_are_reported(candidates):
    lines, candidates = [], candidates[:4]
    answers = iter([compiled(mfu=0.2), compiled(fits=False), InputError("no"), compiled(mfu=0.4)])

    def compile_step(changed):
        answer = next(answers)
        if isinstance(answer, InputError):
            raise answer
        return answer

    found = layout_search.search(candidates, compile_step, 60.0, lines.append)
    assert [one.changes for one in found] == [candidates[3].changes, candidates[0].changes]
    assert len(lines) == 4
    assert layout_search.flags(candidates[0].changes) in lines[0]
    assert "does not fit" in lines[1]
    assert "refused: no" in lines[2]
    assert f"--config.mesh.fsdp={candidates[0].config.mesh.fsdp} " in lines[0]


@pytest.mark.parametrize(("seconds", "tried"), [(0.5, 1), (35.0, 3), (1e6, 6)])
def test_none_is_begun_that_would_end_too_late(candidates, seconds, tried):
    now, lines = [0.0], []

    def compile_step(changed):
        now[0] += 10.0
        return compiled()

    found = layout_search.search(
        candidates[:6], compile_step, seconds, lines.append, lambda: now[0]
    )
    assert len(found) == tried
    assert ("not tried" in lines[-1]) == (tried < 6)
