"""What happens beside the steps, when a signal comes in the middle of it, and what is compiled."""

import jax
import numpy as np
import pytest
import tiny
from short_runs import final_state, lines, train

from lm.training import events
from lm.training.stopping import StopRequest


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return tiny.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def config(corpus):
    return tiny.config(data__corpus=corpus, evaluation__every_steps=3, evaluation__batches=2)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """A run that no signal has stopped."""
    folder = tmp_path_factory.mktemp("whole")
    train(config, folder)
    return folder


@pytest.mark.parametrize("step", tiny.mostly_slow([3, 6], (6,)))
def test_a_signal_ends_an_evaluation_which_is_made_up_on_resume(config, whole, tmp_path, step):
    """Step 3 has the evaluation of a part, step 6 the last one, of all batches."""
    config = config.copy_and_resolve_references()
    config.checkpoint.grace_seconds = 0.0
    # The line of a step is shown by the evaluation that follows it.
    stopped, _ = train(config, tmp_path, stop_after=step)
    assert (stopped.step, stopped.finished) == (step, False)
    assert [line["step"] for line in lines(tmp_path, "validation")] == [3] * (step == 6)
    resumed, _ = train(config, tmp_path)
    assert resumed.finished
    for kind in ("train", "validation"):
        assert lines(tmp_path, kind) == lines(whole, kind)
    (a, at), (b, bt) = (final_state(config, folder) for folder in (tmp_path, whole))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert at == bt


def test_within_the_grace_an_evaluation_goes_on_to_its_end(config, tmp_path):
    """Negative control: the signal is the same."""
    config = config.copy_and_resolve_references()
    config.checkpoint.grace_seconds = 1000.0
    stopped, _ = train(config, tmp_path, stop_after=3)
    assert not stopped.finished
    assert [line["step"] for line in lines(tmp_path, "validation")] == [3]


@pytest.mark.slow
def test_a_signal_ends_gptq_at_the_switch_before_the_state_changes(config, tmp_path):
    config = config.copy_and_resolve_references()
    config.checkpoint.grace_seconds = 0.0
    config.evaluation.every_steps = 0
    config.quantization.update(bits=4.0, fraction="0.5", fused_cooldown=False, warmup_steps=1)
    config.quantization.gptq_batches = 1
    stopped, _ = train(config, tmp_path, stop_after=3)
    assert (stopped.step, stopped.finished) == (3, False)
    assert not lines(tmp_path, "event")
    state, _ = final_state(config, tmp_path)
    assert int(state.step) == 3


def test_a_stop_request_is_overdue_after_its_grace():
    request = StopRequest()
    assert not request
    assert not request.overdue(0)
    request.note()
    assert request
    assert request.overdue(0)
    assert not request.overdue(1000)


def test_events_are_pairs_of_functions_of_the_loop():
    listed = [events.ON_RESUME, events.BEFORE_STEP, events.AFTER_STEP, events.AT_END]
    assert all(callable(f) for each in listed for pair in each for f in pair)


def count_compiles(config, folder):
    """How many programs a run compiles."""
    events_of_run = []

    def note(name, seconds, **options):
        if name == "/jax/core/compile/backend_compile_duration":
            events_of_run.append(name)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        jax.clear_caches()
        train(config, folder)
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    return len(events_of_run)


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_anew")
def test_evaluations_and_samples_are_compiled_once_a_phase(config, tmp_path):
    """Twice as many of both, in both phases, are as many programs."""
    config = config.copy_and_resolve_references()
    config.model.layers = 1
    config.train.steps = 8
    config.evaluation.sample_tokens = 4
    config.quantization.update(bits=4.0, fraction="0.5", fused_cooldown=False, warmup_steps=1)
    counts = []
    for every in (2, 1):
        config.evaluation.every_steps = every
        counts.append(count_compiles(config, tmp_path / str(every)))
    assert counts[1] == counts[0] > 10
