"""One, two and four real processes of the same run: same losses, own documents, no document twice.

A run of one process with four devices is what the others are compared with.
"""

import json
import time

import numpy as np
import pytest
import tiny
from processes import ROOT, finish, lines, losses, saved, start, train, wait_for_step

from lm.data.layout import encode_document
from lm.runs import integrity
from lm.training import experiment

pytestmark = pytest.mark.slow

STEPS, STREAMS = 80, 4
ARGUMENTS = [
    "--config.data.shuffle_rows=1",  # Documents in the order in which a stream reads them.
    f"--config.data.streams={STREAMS}",
    "--config.evaluation.every_steps=0",
    "--config.evaluation.sample_tokens=0",
]

# launch.train, which writes down the step and the document of every token of its own rows.
RECORDED = """
import json, sys
import numpy as np
from lm.training import experiment
make = experiment.Experiment.train_step
def recorded(self, *arguments):
    step = make(self, *arguments)
    def run(state, batch, frozen):
        rows = {s.index[0].start or 0: np.asarray(s.data) for s in
                batch["sample_ids"].addressable_shards}
        with open(path, "a") as file:
            for first, ids in rows.items():
                file.write(json.dumps([int(state.step), first, ids.tolist()]) + "\\n")
        return step(state, batch, frozen)
    return run
experiment.Experiment.train_step = recorded
path = sys.argv.pop(1)
sys.argv[0] = "launch.train"
from launch import command, train
command.run(train.main)
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return tiny.write_corpus(tmp_path_factory.mktemp("corpus"))


def run(workdir, corpus, processes, until, logs, devices=1):
    """Trains up to a step; each process writes the documents that it takes to logs/INDEX."""
    logs.mkdir(parents=True, exist_ok=True)
    (logs / "script.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + RECORDED)
    scripts = [[str(logs / "script.py"), str(logs / str(i))] for i in range(processes)]
    return train(
        workdir,
        corpus,
        processes,
        *ARGUMENTS,
        f"--config.train.steps={until}",
        devices=devices,
        scripts=scripts,
    )


def taken(logs):
    """{(step, first row): documents of the rows' tokens} of each process."""
    found = []
    for path in sorted(path for path in logs.iterdir() if path.name.isdigit()):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        found.append({(step, first): ids for step, first, ids in rows})
        assert len(found[-1]) == len(rows), "a step was taken twice"
    return found


def documents(found):
    return {number for rows in found.values() for row in rows for number in np.ravel(row)} - {-1}


def by_stream(found):
    """The documents of the tokens of each stream, in the order in which it reads them."""
    streams = [[] for _ in range(STREAMS)]
    by_step = {}
    for (step, first), rows in found.items():
        for offset, row in enumerate(rows):
            by_step.setdefault(step, {})[first + offset] = row
    for _, rows in sorted(by_step.items()):
        assert sorted(rows) == list(range(8))
        for number, row in sorted(rows.items()):
            streams[number * STREAMS // 8] += [i for i in row if i != -1]
    return streams


@pytest.fixture(scope="module")
def one(corpus, tmp_path_factory):
    """A single process with four devices."""
    folder = tmp_path_factory.mktemp("one")
    run(folder / "run", corpus, 1, STEPS, folder / "logs", devices=4)
    return folder


def test_four_processes(corpus, one, tmp_path):
    """One run of four, uninterrupted, is what its parts are compared with."""
    run(tmp_path / "four", corpus, 4, STEPS, tmp_path / "logs")
    check_same_losses(one / "run", tmp_path / "four")
    check_own_documents(one / "logs", tmp_path / "logs")
    check_kill_and_restart(corpus, tmp_path / "four", tmp_path / "killed")


def check_same_losses(one, four):
    np.testing.assert_allclose(losses(four), losses(one), rtol=1e-5)
    assert len(losses(four)) == STEPS
    for kind in ("weight_sum", "tokens"):
        found = [[line[kind] for line in lines(each, "train")] for each in (one, four)]
        assert found[0] == found[1]
    # Negative control: neighbouring steps differ by far more.
    assert not np.allclose(losses(four)[1:], losses(one)[:-1], rtol=1e-5)


def check_own_documents(one, four):
    """No process reads the documents of another, and together they read those of a single one."""
    (alone,), parts = taken(one), taken(four)
    assert len(parts) == 4
    read = [documents(part) for part in parts]
    assert sum(map(len, read)) == len(set.union(*read))
    assert set.union(*read) == documents(alone)
    joined = {key: rows for part in parts for key, rows in part.items()}
    assert len(joined) == sum(map(len, parts))
    assert joined == alone


def check_kill_and_restart(corpus, whole, workdir):
    """A killed process ends the others, and all go on bit for bit.

    The newest checkpoint is damaged meanwhile; one process finds it, and all pass over it.
    """
    arguments = [*ARGUMENTS, f"--config.train.steps={STEPS}"]
    started = start(workdir, corpus, 4, *arguments)
    wait_for_step(workdir, 32, started)
    started[2].kill()
    killed = time.time()
    ended = finish(started, timeout=120)
    assert time.time() - killed < 90  # Heartbeats of 10 s, on a machine that may be busy.
    assert all(code not in (0, 2) for code, *_ in ended), ended
    *_, before, newest = saved(workdir)
    folder = workdir / "checkpoints" / str(newest)
    name = sorted(json.loads((folder / integrity.RECORD).read_text()))[3]  # Process 3 checks it.
    path = folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    (_, _, err), *others = train(workdir, corpus, 4, *arguments)
    harm = f"passed over checkpoint {newest}, which cannot be read: {name} has another checksum"
    assert harm in err
    assert f"\nresumed at step {before}\n" in err
    assert [other[2] for other in others] == [""] * 3
    for kind in ("train", "validation"):
        assert lines(workdir, kind) == lines(whole, kind)


def test_from_one_to_two_to_four_to_one(corpus, one, tmp_path):
    """The data goes on where it was, whoever reads it: every document once an epoch."""
    joined = {}
    for phase, processes in enumerate((1, 2, 4, 1)):
        logs = tmp_path / f"logs{phase}"
        until = (phase + 1) * STEPS // 4
        devices = 4 if processes == 1 else 1
        (_, _, err), *_ = run(tmp_path / "run", corpus, processes, until, logs, devices)
        assert (f"resumed at step {until - STEPS // 4}\n" in err) == (phase > 0)
        for part in taken(logs):
            assert not joined.keys() & part.keys()
            joined |= part
    assert {step for step, _ in joined} == set(range(STEPS))
    (alone,) = taken(one / "logs")
    streams = by_stream(joined)
    assert streams == by_stream(alone)
    config = tiny.config(data__corpus=corpus)
    data = experiment.load_data(config.data)
    (split,) = data.train
    lengths = [len(encode_document(each, data.tokenizer)) for each in split.documents]
    check_epochs(streams, lengths)
    # Negative controls: a step that is dropped, and one that is repeated.
    first, *rest = streams
    with pytest.raises(AssertionError):
        check_epochs([first[:64] + first[128:], *rest], lengths)
    with pytest.raises(AssertionError):
        check_epochs([first[:128] + first[64:], *rest], lengths)


def check_epochs(streams, lengths):
    """Each stream reads all its documents, each as long as it is, before it reads one again."""
    for number, tokens in enumerate(streams):
        own = set(range(number, len(lengths), STREAMS))
        assert len(tokens) > sum(lengths[i] for i in own), "less than an epoch was read"
        visits, at = [], 0
        while at < len(tokens):
            document = tokens[at]
            visit = tokens[at : at + lengths[document]]
            assert set(visit) == {document}
            visits.append(document)
            at += lengths[document]
        for epoch in range(0, len(visits), len(own)):
            seen = visits[epoch : epoch + len(own)]
            assert len(set(seen)) == len(seen)
            assert set(seen) <= own
            assert len(seen) == len(own) or epoch + len(own) > len(visits)
