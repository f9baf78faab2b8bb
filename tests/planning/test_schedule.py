"""How much communication a schedule hides: small modules by hand, and a piece of a real one."""

import pathlib

import pytest

from lm.planning.hlo import read_program
from lm.planning.schedule import Overlap, overlap

MESH = {"data": 2, "fsdp": 8, "tensor": 1, "sequence": 1}
GROUPS = "replica_groups=[2,8]<=[16]"
# A second a byte: an all-gather of f32[8] receives 32 * 7 / 8 = 28 of them.
GATHER = f"f32[8]{{0}} all-gather(%x), channel_id=1, {GROUPS}, dimensions={{0}}"
START = f"(f32[1]{{0}}, f32[8]{{0}}) all-gather-start(%x), channel_id=1, {GROUPS}"


def work(cycles):
    told = f'backend_config={{"estimated_cycles":"{cycles}"}}'
    return f"%work.{cycles} = f32[2]{{0}} add(%y, %y), {told}"


def found(*lines, more="", **arguments):
    """The overlap of an entry with these instructions, in this order."""
    body = "\n".join(f"  {line}" for line in lines)
    text = f"HloModule m\n\n{more}\nENTRY %main (x: f32[1]) -> f32[8] {{\n{body}\n}}\n"
    received = sum(
        one.received
        for axes in read_program(text, MESH).collectives.values()
        for one in axes.values()
    )
    result = overlap(text, MESH, lambda received, across: received, 1.0, **arguments)
    assert result.seconds == received  # two readers agree
    return result


def test_work_between_start_and_end_covers_as_much_as_it_lasts():
    end = "%done = f32[8]{0} all-gather-done(%start)"
    start = f"%start = {START}"
    assert found(start, work(10), end) == Overlap(1, 1, 28, 10)
    assert found(start, work(10), work(50), end) == Overlap(1, 1, 28, 28)
    # Negative controls: work before or after it, none, and what nothing can run beside.
    assert found(work(10), start, end, work(50)) == Overlap(1, 1, 28, 0)
    assert found(work(10), f"%all = {GATHER}", work(10)) == Overlap(1, 0, 28, 0)


def test_collectives_in_flight_share_the_links_first_come_first_served():
    lines = [
        f"%first = {START}",
        f"%second = {START.replace('channel_id=1', 'channel_id=2')}",
        work(30),
        "%done.1 = f32[8]{0} all-gather-done(%first)",
        work(7),
        "%done.2 = f32[8]{0} all-gather-done((f32[1]{0}, f32[8]{0}) %second)",
        work(100),
    ]
    assert found(*lines) == Overlap(2, 2, 56, 28 + 2 + 7)
    # To wait for the second is to wait for the first, which then has nothing left to cover.
    lines[3], lines[5] = lines[5], lines[3]
    lines[2] = work(10)
    assert found(*lines) == Overlap(2, 2, 56, 10)


def test_an_async_start_is_of_what_it_calls():
    wrapped = f"%wrapped (x: f32[1]) -> f32[8] {{\n  ROOT %all = {GATHER}\n}}\n"
    start = "%start = ((f32[1]), f32[8], u32[]) async-start(%x), calls=%wrapped"
    end = "%done = f32[8]{0} async-done(%start)"
    assert found(start, work(5), end, more=wrapped) == Overlap(1, 1, 28, 5)
    assert found("%copy = (f32[2], f32[2]) copy-start(%x)", work(5)) == Overlap(0, 0, 0, 0)


def test_loops_count_as_often_as_they_run_and_cover_what_is_in_flight_around_them():
    loop = (
        "%condition (p: s32[]) -> pred[] {\n  %n = s32[] constant(3)\n}\n\n"
        f"%body (p: s32[]) -> s32[] {{\n  %inner = {START}\n  {work(20)}\n"
        f"  %inner.1 = f32[8]{{0}} all-gather-done(%inner)\n  {work(5)}\n}}\n"
    )
    turn = "%loop = s32[] while(%i), condition=%condition, body=%body"
    assert found(turn, more=loop) == Overlap(3, 3, 3 * 28, 3 * 20)
    outer = [f"%start = {START}", turn, "%done = f32[8]{0} all-gather-done(%start)"]
    # What covers the collectives of the loop covers no other: 5 cycles a turn are left.
    assert found(*outer, more=loop) == Overlap(4, 4, 4 * 28, 3 * 20 + 3 * 5)


def test_a_collective_that_never_ends_is_covered_by_what_follows_in_its_computation():
    assert found(f"%start = {START}", work(3)) == Overlap(1, 1, 28, 3)


def test_calls_and_conditionals_are_followed():
    branches = f"%a (x: f32[1]) -> f32[8] {{\n  %all = {GATHER}\n}}\n\n%b () -> f32[8] {{\n}}\n"
    line = "%if = f32[8] conditional(%p, %x, %x), branch_computations={%a, %b}"
    assert found(line, more=branches) == Overlap(1, 0, 28, 0)
    assert found("%c = f32[8] call(%x), to_apply=%a", more=branches) == Overlap(1, 0, 28, 0)


def test_a_piece_of_a_program_for_tpu():
    """Of a train step of configs/scale/1b3.py:v5e on v5e:4x4 with two layers, libtpu 0.0.42.1.

    It begins where a layer gathers three matrices of 16 x 128 x 2048 in bfloat16, one before it
    goes on and two while other products run, and ends with the sum of a gradient over the chips,
    an array of the same size. Metadata, settings and instructions without cycles are left out.
    """
    text = (pathlib.Path(__file__).parent / "scheduled_v5e.hlo").read_text()
    received = 16 * 128 * 2048 * 2 * 7 / 8
    work = (538_544, 540_676 + 699_660)
    seen = overlap(text, MESH, lambda received, across: received, 1.0)
    assert seen == Overlap(4, 2, 4 * received, sum(work))
    # With links ten times as fast the third matrix is covered as a whole, the second still not.
    fast = overlap(text, MESH, lambda received, across: received / 10, 1.0)
    assert fast.covered == pytest.approx(work[0] + received / 10)
    assert work[0] < received / 10 < work[1]
    assert overlap(text.replace("AsyncCollectiveStart", "Other"), MESH, lambda r, a: r, 1.0)[1] == 0
