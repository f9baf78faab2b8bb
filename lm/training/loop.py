"""Training from the first step to the last, through kills and restarts."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from etils import epath
from ml_collections import ConfigDict

from lm.data import declared, tokenizers
from lm.data.targets import count_without_target
from lm.errors import InputError, StorageError
from lm.evaluation import perplexity, sampling
from lm.evaluation.tasks.in_training import TaskEvaluation, task_evaluation
from lm.model.interface import Model
from lm.parallel.cross_process import CrossProcessAny
from lm.planning.flops import peak_flops
from lm.references.second_models import open_references
from lm.rollouts.held_out import HeldOut
from lm.rollouts.judging import judging
from lm.rollouts.source import make_source
from lm.runs import identity, initialise, parameters_from, run_record
from lm.runs.checkpoints import Checkpoints, saved_steps
from lm.training import events, experiment
from lm.training.interruption import Interrupted
from lm.training.logging import Stopwatch, Writer, write_whole
from lm.training.progress import above, progress_bar
from lm.training.reporting import Logged, describe_change, introduce, log
from lm.training.resume import (
    as_text,
    check_workdir,
    check_writable,
    resolved,
    settle_ends,
    settle_streams,
)
from lm.training.sources import Source, check_keys
from lm.training.stopping import StopRequest, stop_signals
from lm.training.term_evaluation import TermEvaluation, term_evaluation


class Diverged(RuntimeError):
    """Too many steps in a row were skipped."""


class Result(NamedTuple):
    """How a call of `train` ended.

    Attributes:
      step: the last step taken.
      finished: whether it is the last one of the config; otherwise a signal stopped the run.
      validation: of the whole validation split; None when not finished.
      checkpoint: the newest checkpoint's directory.
      baseline: bits per byte of the n-gram model, when the config asks for it.
    """

    step: int
    finished: bool
    validation: perplexity.Evaluation | None
    checkpoint: epath.Path
    baseline: float | None


def train(config: ConfigDict, workdir: str, say: Callable[[str], None]) -> Result:
    """Trains `config` in `workdir`, going on from its newest checkpoint.

    Args:
      config: see configs/base.py.
      workdir: local path or gs:// bucket.
      say: shows one line of progress.

    Raises:
      InputError: before anything is compiled or written.
      Diverged: train.max_skips steps in a row were not finite, spiked or had no weight.
      StorageError: a checkpoint, metrics or a sample could not be written; the newest whole
        checkpoint is as it was.
    """
    workdir = epath.Path(workdir)
    try:
        return _train(config, workdir, say)
    except StorageError as error:
        steps = saved_steps(workdir / "checkpoints")
        newest = f"The newest checkpoint is that of step {steps[-1]}" if steps else "No checkpoint"
        raise StorageError(
            f"{error}. {newest}; when it can be written, the same command goes on from there"
        ) from error


class _Parts(NamedTuple):
    """What a loop is made of.

    Attributes:
      built: functions of the config.
      data: corpora and tokenizer.
      source: of the batches.
      second_models: source of a reference -> its model.
      frozen: source of a reference -> what was trained of it.
      start: the run of which this one takes over the first phase; None for none.
      beginning: the model of which it takes the parameters; None for none.
      terms: see `Loop`.
      run_id: as `lm.runs.identity.run_id`.
      held_out, tasks: see `Loop`.
    """

    built: experiment.Experiment
    data: experiment.Data
    source: Source
    second_models: Mapping[str, Model]
    frozen: Mapping[str, Any]
    start: initialise.Source | None
    beginning: parameters_from.Beginning | None
    run_id: str
    terms: TermEvaluation | None
    held_out: HeldOut | None
    tasks: TaskEvaluation | None


def _train(config: ConfigDict, workdir: epath.Path, say: Callable[[str], None]) -> Result:
    data = experiment.load_data(config.data)
    config = settle_ends(experiment.resolve(config, data.train), data.tokenizer, workdir)
    built = experiment.build(config, experiment.vocabulary(config.data, data.tokenizer))
    config = settle_streams(config, workdir, built.mesh)
    built = built._replace(config=config)
    references = open_references(built, data.tokenizer.fingerprint)
    stored = references.stored(data.train, data.tokenizer.fingerprint)
    usable = experiment.usable_records(config, built.objective, data)
    tasks, dataset = task_evaluation(built, data.tokenizer), None
    if built.objective.advantages is None:
        dataset = experiment.train_batches(config, data, stored, built.mesh, usable)
    record = resolved(config, data.tokenizer, built)
    before = check_workdir(workdir, record)
    with jax.set_mesh(built.mesh):
        frozen, record["references"] = references.restore(say, before.get("references", {}))
    start = None
    if config.quantization["from"] and not saved_steps(workdir / "checkpoints"):
        start = initialise.open_source(built, data.tokenizer.fingerprint)
    beginning = None
    if config.initialise["from"] and not saved_steps(workdir / "checkpoints"):
        beginning = parameters_from.open_parameters(built, data.tokenizer)
    replaced = sum(corpus.replaced for corpus in data.train + data.validation)
    if replaced:
        say(f"replaced invalid UTF-8 in {replaced} documents")

    record["run_id"] = identity.run_id(run_record.read_record(workdir) or {})
    length = config.data.sequence_length
    counted = usable or count_without_target(data.train, data.tokenizer, length)
    if line := counted.describe():
        say(line)
    judged = judging(config, built.objective)
    with jax.set_mesh(built.mesh), stop_signals() as stop, judged as judge:
        second_models = {source: one.run.model for source, one in references.models.items()}
        source = make_source(built, data, dataset, stored, judge, say)
        held_out = HeldOut(built, data, judge) if config.evaluation.problems else None
        check_writable(workdir, record)
        reading = experiment.reading_of(config, data.train)
        terms = term_evaluation(built, reading, stored, second_models, frozen, say)
        run_id = record["run_id"]
        parts = _Parts(
            *(built, data, source, second_models, frozen, start, beginning, run_id, terms),
            *(held_out, tasks),
        )
        loop = Loop(config, workdir, say, parts, stop)
        if change := describe_change(loop, before.get("config", {})):
            loop.say(change)
        if jax.process_index() == 0:
            write_whole(workdir / "config.json", as_text(record))
            _write_tokenizer(workdir, data.tokenizer)
        lost = False
        try:
            return loop.run()
        except jax.errors.JaxRuntimeError:
            lost = jax.process_count() > 1  # To close would be to wait for the others.
            raise
        finally:
            if not lost:
                loop.close()


def _write_tokenizer(workdir: epath.Path, tokenizer: tokenizers.Tokenizer) -> None:
    """Writes the files of a tokenizer that has any, its chat template among them."""
    if isinstance(tokenizer, tokenizers.Subwords):
        write_whole(workdir / "tokenizer.json", tokenizer.definition)
        if tokenizer.chat_template is not None:
            write_whole(workdir / declared.CHAT_TEMPLATE, tokenizer.chat_template)


class Loop:
    """Trains, saves and stops; what else happens at a step is in `lm.training.events`.

    Attributes:
      state: the train state after `step` steps.
      validation: of this step; None where there was none.
      eval_step: the one evaluation step of the run, so that it is compiled once.
      terms: evaluates the terms of its objective; None where there is nothing to add.
      held_out: answers held-out problems; None where none are asked.
      tasks: evaluates tasks; None where there are none.
      samplers: one of each phase, True for the quantized one.
      change_widths: the program that puts layers on other widths, once one has been needed.
      watch: seconds of training.
    """

    def __init__(self, config, workdir, say, parts: _Parts, stop: StopRequest):
        self.config, self.workdir, self.say, self.stop = config, workdir, say, stop
        self.built, self.data, self.source = parts.built, parts.data, parts.source
        self.second_models, self.frozen = parts.second_models, parts.frozen
        self.checkpoints = Checkpoints(
            workdir / "checkpoints",
            say,
            keep=config.checkpoint.keep,
            keep_best=config.checkpoint.keep_best,
            keep_steps=config.checkpoint.at_steps,
        )
        try:
            check_keys(self.source, self.built.objective)
            metadata = self._begin(parts.start, parts.beginning)
        except InputError:
            self.source.close()
            self.checkpoints.close()
            raise
        self.step, self.validation = int(self.state.step), None
        if self.step and not parts.start:
            say(f"resumed at step {self.step}")
        self.watch = Stopwatch(metadata.get("training_seconds", 0.0))
        self.writer = Writer(workdir, config, self.step, parts.run_id)
        self.eval_step, self.train_steps, self.terms = self.built.eval_step(), {}, parts.terms
        self.held_out, self.tasks = parts.held_out, parts.tasks
        self.change_widths = None
        self.samplers = {
            quantized: sampling.Sampler(
                self.built.model,
                self.data.tokenizer,
                loss=self.built.objective.loss,
                quantized=self.built.quantized if quantized else None,
                temperature=0.8,
            )
            for quantized in (False, True)
        }
        self.peak = peak_flops(config.train.peak_flops)
        self.agree, self.time_is_up = CrossProcessAny(self.built.mesh), False
        self.agree_to_interrupt = CrossProcessAny(self.built.mesh)
        self.pending = None  # (step, metrics on the device) of the step before this one
        self.logged = Logged(self.step, self.watch.read(), self.source.spent)
        self.saved_at = self.watch.read()
        self.progress = progress_bar(config.train.steps, self.step)
        self.say = above(self.progress, say)
        introduce(self)

    def _begin(
        self, start: initialise.Source | None, beginning: parameters_from.Beginning | None
    ) -> dict[str, Any]:
        """Sets the state: of the newest checkpoint, from another model, or a fresh one."""
        abstract = self.built.abstract_state()
        restored = self.checkpoints.restore(abstract, self.source)
        if restored is not None:
            self.state, metadata = restored
            return metadata
        if start:
            self.state = initialise.start(self.built, start, self.source, self.say)
        elif beginning:
            self.state = parameters_from.begin(self.built, beginning, self.say)
        else:
            init = jax.jit(
                self.built.init, out_shardings=jax.tree.map(lambda x: x.sharding, abstract)
            )
            self.state = init(jax.random.key(self.config.train.seed))
        return {}

    def run(self) -> Result:
        """Takes all steps that are left, or those before a signal."""
        try:
            self.happen(events.ON_RESUME)
            while self.step < self.config.train.steps:
                self.check_stop()
                self.happen(events.BEFORE_STEP)
                self.take_step()
                self.happen(events.AFTER_STEP)
            self.happen(events.AT_END)
        except Interrupted:
            self.save()
            return Result(self.step, False, None, self.newest(), None)
        return Result(self.step, True, self.validation, self.newest(), events.baseline(self))

    def happen(self, listed: events.Events) -> None:
        """Does what is due of a list of events."""
        for when, what in listed:
            if when(self):
                what(self)

    def take_step(self) -> None:
        """Dispatches one optimizer step, and writes down the one before."""
        self.checkpoints.check()
        batch = self.source.next(self.step, self.state)
        before = self.watch.read()
        quantized = self.step >= self.built.phases.switch
        compiled = quantized in self.train_steps
        if not compiled:
            self.train_steps = {quantized: self.built.train_step(quantized, self.second_models)}
        self.state, values = self.train_steps[quantized](self.state, batch, self.frozen)
        if not compiled:
            jax.block_until_ready(values)
            self.watch.exclude(before)
            self.logged = Logged(self.step + 1, self.watch.read(), self.source.spent)
        self.report()
        self.step += 1
        self.pending, self.validation = (self.step, values | self.source.metrics), None

    def check_stop(self) -> None:
        """Raises Interrupted before a step; also agrees on whether it is time to save."""
        stop, self.time_is_up = self.agree(bool(self.stop), self.minutes_are_over())
        if stop:
            raise Interrupted

    def check_interrupt(self) -> None:
        """Raises Interrupted inside of an event, checkpoint.grace_seconds after a signal.

        All processes call it at the same places, such as between two batches of an evaluation.
        """
        overdue = self.stop.overdue(self.config.checkpoint.grace_seconds)
        if self.agree_to_interrupt(overdue)[0]:
            raise Interrupted

    def report(self) -> None:
        """Writes down the pending step. Reading it one step late lets the device run on."""
        if self.pending is None:
            return
        c, (step, values), self.pending = self.config, self.pending, None
        skips = int(values["skipped_in_a_row"])
        if skips:
            self.say(
                f"skipped step {step}: loss {float(values['loss']):.4g}, gradient norm "
                f"{float(values['grad_norm']):.4g}, weight {float(values['weight_sum']):g}"
            )
            self.writer.write(step, "event", {"event": "skipped"})
        if step % c.train.log_every == 0 or step == c.train.steps:
            log(self, step, {name: value.item() for name, value in values.items()})
        if skips >= c.train.max_skips:
            raise Diverged(
                f"{skips} steps in a row were skipped (train.max_skips={c.train.max_skips}); "
                f"parameters are those of step {step - skips}, the newest checkpoint is "
                f"{self.newest()}"
            )

    def minutes_are_over(self) -> bool:
        """Whether checkpoint.every_minutes have passed since the last checkpoint."""
        minutes = self.config.checkpoint.every_minutes
        return bool(minutes) and self.watch.read() - self.saved_at >= 60 * minutes

    def save(self) -> None:
        """Saves a checkpoint of this step, after the lines that precede it."""
        self.report()
        self.writer.flush()
        before = self.watch.read()
        score = None
        if self.validation is not None:
            # The best checkpoint is that of the lowest loss, the same one in both phases.
            quantized = self.built.quantized is not None
            score = self.validation.quantized_loss if quantized else self.validation.loss
        self.checkpoints.save(
            self.step, self.state, self.source, {"training_seconds": before}, score
        )
        self.watch.exclude(before)
        self.saved_at = self.watch.read()
        self.agree.forget()

    def newest(self) -> epath.Path:
        """The folder of the newest checkpoint."""
        steps = self.checkpoints.steps()
        return self.workdir / "checkpoints" / (str(steps[-1]) if steps else "")

    def close(self) -> None:
        """Closes all, whichever of them fails."""
        with contextlib.ExitStack() as each:
            if self.progress:
                each.callback(self.progress.close)
            each.callback(self.writer.close)
            each.callback(self.checkpoints.close)
            each.callback(self.source.close)
