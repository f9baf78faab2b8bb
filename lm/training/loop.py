"""Training from the first step to the last, through kills and restarts."""

import contextlib
import importlib.metadata
import itertools
import json
import math
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lm.compression import packed
from lm.compression.phases import FULL_PRECISION
from lm.data import ngram, tokenizers
from lm.errors import InputError, StorageError, writing
from lm.evaluation import perplexity, sampling
from lm.parallel.cross_process import CrossProcessAny, first_message, from_first_process
from lm.parallel.mesh import put_batch, share
from lm.planning.flops import parameters_by_group, peak_flops
from lm.references.second_models import open_references
from lm.runs import initialise, run_record
from lm.runs.checkpoints import Checkpoints, saved_steps
from lm.training import experiment
from lm.training.logging import Stopwatch, Writer, plot_curves, read_metrics, write_whole
from objectives.losses.base import softmax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")

# A work directory keeps what decides its parameters and the order of its data; of these sections
# and keys, only the exceptions may differ at a later start.
_FIXED = (
    "model",
    "data",
    "train.batch_size",
    "train.seed",
    "train.ema_decay",
    "optimizer.name",
    "objective.tempnet.width",
    "objective.harmonic.distance",
    "quantization",
)
_FREE = (
    "model.attention",
    "model.remat",
    "model.unroll",
    "model.dtype",
    "model.plain_autodiff",
    "model.accept_aliasing",
    "quantization.gptq_batches",
    "data.directory",
)


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


def _train(config: ConfigDict, workdir: epath.Path, say: Callable[[str], None]) -> Result:
    data = experiment.load_data(config.data)
    config = experiment.resolve(config, data.train)
    built = experiment.build(config, data.tokenizer.vocab_size)
    config = _settle_streams(config, workdir, built.mesh)
    built = built._replace(config=config)
    references = open_references(built, data.tokenizer.fingerprint)
    stored = references.stored(data.train, data.tokenizer.fingerprint)
    stream = experiment.train_batches(config, data, stored, built.mesh)
    record = resolved(config, data.tokenizer, built)
    before = check_workdir(workdir, record)
    with jax.set_mesh(built.mesh):
        frozen, record["references"] = references.restore(say, before.get("references", {}))
    source = None
    if config.quantization["from"] and not saved_steps(workdir / "checkpoints"):
        source = initialise.open_source(built, data.tokenizer.fingerprint)
    replaced = sum(corpus.replaced for corpus in data.train + data.validation)
    if replaced:
        say(f"replaced invalid UTF-8 in {replaced} documents")

    _check_writable(workdir, record)
    with jax.set_mesh(built.mesh), stop_signals() as stopped:
        second_models = {source: one.run.model for source, one in references.models.items()}
        loop = _Loop(config, workdir, say, built, data, stream, second_models, frozen, source)
        if jax.process_index() == 0:
            write_whole(workdir / "config.json", _as_text(record))
            if isinstance(data.tokenizer, tokenizers.Subwords):
                write_whole(workdir / "tokenizer.json", data.tokenizer.definition)
        lost = False
        try:
            return loop.run(stopped)
        except jax.errors.JaxRuntimeError:
            lost = jax.process_count() > 1  # To close would be to wait for the others.
            raise
        finally:
            if not lost:
                loop.close()


class _Loop:
    """The state of `train`: what is compiled, what is open, and what has been shown."""

    def __init__(self, config, workdir, say, built, data, stream, second_models, frozen, source):
        self.config, self.workdir, self.say = config, workdir, say
        self.built, self.data = built, data
        self.second_models, self.frozen = second_models, frozen
        self.iterator = iter(stream)
        self.checkpoints = Checkpoints(
            workdir / "checkpoints",
            say,
            keep=config.checkpoint.keep,
            keep_best=config.checkpoint.keep_best,
            keep_steps=config.checkpoint.at_steps,
        )
        abstract = built.abstract_state()
        try:
            restored = self.checkpoints.restore(abstract, self.iterator)
            if restored is None and source:
                restored = initialise.start(built, source, self.iterator, say), {}
        except InputError:
            self.iterator.close()
            self.checkpoints.close()
            raise
        if restored is None:
            init = jax.jit(built.init, out_shardings=jax.tree.map(lambda x: x.sharding, abstract))
            self.state, metadata = init(jax.random.key(config.train.seed)), {}
        else:
            self.state, metadata = restored
        self.step = int(self.state.step)
        if self.step and not source:
            say(f"resumed at step {self.step}")
        self.watch = Stopwatch(metadata.get("training_seconds", 0.0))
        self.writer = Writer(workdir, config, self.step)
        self.eval_step = built.eval_step()
        self.sampler = sampling.make_sampler(
            built.model, data.tokenizer, loss=built.loss, temperature=0.8
        )
        self.peak = peak_flops(config.train.peak_flops)
        self.agree, self.time_is_up = CrossProcessAny(built.mesh), False
        self.pending = None  # (step, metrics on the device) of the step before this one
        self.logged = (self.step, self.watch.read())
        self.saved_at = self.watch.read()
        self.progress = _progress_bar(config.train.steps, self.step)
        self.say = say = _above(self.progress, say)
        count = sum(parameters_by_group(abstract.trained.params).values())
        say(
            f"{count:,} parameters, vocabulary {built.model.config.vocab_size:,}, "
            f"{config.train.batch_size * config.data.sequence_length:,} tokens a step, "
            f"{jax.device_count()} {jax.devices()[0].device_kind} device(s)"
        )

    def run(self, stopped: Callable[[], bool]) -> Result:
        c, steps = self.config, self.config.train.steps
        switch, train_step = self.built.phases.switch, None
        while self.step < steps and not self.shall_stop(stopped()):
            self.checkpoints.check()
            batch = put_batch(self.built.mesh, next(self.iterator))
            before = self.watch.read()
            # A checkpoint of the step before the switch is one of the first phase, so that a run
            # that goes on from it passes here, too.
            if self.step == switch:
                self.begin_quantized()
                train_step = None
            compiled = train_step is not None
            train_step = train_step or self.built.train_step(
                self.step >= switch, self.second_models
            )
            self.state, values = train_step(self.state, batch, self.frozen)
            if not compiled:
                jax.block_until_ready(values)
                self.watch.exclude(before)
                self.logged = (self.step + 1, self.watch.read())
            self.report()
            self.step += 1
            self.pending = (self.step, values)
            last = self.step == steps
            validation = None
            if c.evaluation.every_steps and self.step % c.evaluation.every_steps == 0 and not last:
                validation = self.evaluate(c.evaluation.batches or None)
                self.sample()
            if not last and self.due_save():
                self.save(validation)
        if self.step < steps:
            self.save(None)
            return Result(self.step, False, None, self.newest(), None)
        validation = self.recorded_end()
        if validation is None:
            validation = self.evaluate(None)
            if text := self.sample():
                self.say("sample: " + text[:300].replace("\n", "\n        "))
            self.save(validation)
            self.pack()
        baseline = self.baseline()
        if jax.process_index() == 0:
            self.writer.flush()
            with writing(self.workdir):
                plot_curves(self.workdir)
        return Result(self.step, True, validation, self.newest(), baseline)

    def shall_stop(self, signalled: bool) -> bool:
        """Whether to end before the next step; also agrees on whether it is time to save."""
        stop, self.time_is_up = self.agree(signalled, self.minutes_are_over())
        return stop

    def begin_quantized(self) -> None:
        self.report()
        before, bits = self.watch.read(), self.config.quantization.bits
        event = {"event": "quantized", "bits": bits} | self.post_training()
        self.state = self.built.begin_quantized()(self.state)
        shown = "".join(f", {name} {event[name]:.4f}" for name in ("rtn", "gptq") if name in event)
        self.say(f"step {self.step}: the quantized phase begins, {bits:g} bits{shown}")
        self.writer.write(self.step, "event", event)
        self.watch.exclude(before)

    def post_training(self) -> dict[str, float]:
        """Validation losses of quantizing after training from here on: what to be better than.

        Round to nearest and GPTQ at the same widths, calibrated with the first training batches.
        """
        c = self.config.quantization
        if not c.gptq_batches or c.bits >= FULL_PRECISION or jax.process_count() > 1:
            return {}
        from lm.compression import after_training

        trained, _ = self.built.usable(self.state)
        limit = self.config.evaluation.batches or None
        stream = iter(experiment.train_batches(self.config, self.data))
        with contextlib.closing(stream):
            taken = itertools.islice(stream, c.gptq_batches)
            batches = [put_batch(self.built.mesh, batch) for batch in taken]
        rules = self.built.quantized.rules
        results = {"rtn": after_training.round_to_nearest_model(trained.params, rules)}
        try:
            results["gptq"] = after_training.gptq_model(
                self.built.model, trained.params, batches, rules
            )
        except ValueError as error:  # a format that GPTQ has no columns for, or a singular Hessian
            self.say(f"no GPTQ to compare with: {error}")
        plain = self.built.eval_step(plain=True)
        losses = {}
        for name, result in results.items():
            with self.validation_batches() as batches:
                on_grid = trained._replace(params=result.params)
                score = perplexity.evaluate(plain, on_grid, batches, self.built.mesh, limit)
            losses[name] = score.loss
        return losses

    @contextlib.contextmanager
    def validation_batches(self) -> Iterator[Any]:
        texts, tokenizer = self.data.validation, self.data.tokenizer
        mesh = self.built.mesh
        batches = iter(experiment.evaluation_batches(self.config, texts, tokenizer, mesh))
        with contextlib.closing(batches):
            yield batches

    def recorded_end(self) -> perplexity.Evaluation | None:
        """The last evaluation of a run that was finished before this start.

        Process 0 has written it, and may be the only one that sees it.
        """
        found = self.written_end() if jax.process_index() == 0 else None
        if from_first_process(found is not None):
            return found or perplexity.Evaluation(math.nan, math.nan, math.nan, 0.0)
        return None

    def written_end(self) -> perplexity.Evaluation | None:
        for line in reversed(read_metrics(self.workdir)):
            if line["kind"] == "validation" and line["whole"] and line["step"] == self.step:
                known = {f: line[f] for f in perplexity.Evaluation._fields if f in line}
                return perplexity.Evaluation(**known)
        return None

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
            self.log(step, {name: value.item() for name, value in values.items()})
        if skips >= c.train.max_skips:
            raise Diverged(
                f"{skips} steps in a row were skipped (train.max_skips={c.train.max_skips}); "
                f"parameters are those of step {step - skips}, the newest checkpoint is "
                f"{self.newest()}"
            )

    def log(self, step: int, values: dict[str, Any]) -> None:
        c, now = self.config, self.watch.read()
        (since, then), self.logged = self.logged, (step, now)
        tokens = c.train.batch_size * c.data.sequence_length
        line = {**values, "tokens": step * tokens}
        shown = f"step {step}/{c.train.steps}  loss {values['loss']:.4f}"
        if step > since:
            rate = (step - since) * tokens / (now - then)
            line["tokens_per_second"] = rate
            shown += f"  {rate:,.0f} tokens/s"
            if self.peak:
                line["mfu"] = rate * self.built.flops_per_token() / self.peak
                shown += f"  MFU {line['mfu']:.1%}"
            shown += f"  ETA {_duration((c.train.steps - step) * tokens / rate)}"
        self.writer.write(step, "train", line)
        if self.progress:
            self.progress.set_postfix_str(f"loss {values['loss']:.3f}")
            self.progress.update(step - self.progress.n)
        else:
            self.say(shown)

    def evaluate(self, limit: int | None) -> perplexity.Evaluation:
        self.report()
        before = self.watch.read()
        with self.validation_batches() as batches:
            trained, quantized = self.built.usable(self.state)
            result = perplexity.evaluate(
                self.eval_step, trained, batches, self.built.mesh, limit, quantized=quantized
            )
        line = {name: x for name, x in result._asdict().items() if x is not None}
        shown = (
            f"step {self.step}: validation loss {result.loss:.4f} nats/token, "
            f"{result.bits_per_byte:.4f} bits/byte"
        )
        if self.built.quantized:
            line |= self.built.quantized.report(trained)
            shown += (
                f" (full precision {result.full_precision_loss:.4f}, "
                f"quantized {result.quantized_loss:.4f})"
            )
        self.writer.write(self.step, "validation", {**line, "whole": limit is None})
        self.say(shown)
        self.watch.exclude(before)
        return result

    def sample(self) -> str:
        c, before = self.config.evaluation, self.watch.read()
        if not c.sample_tokens:
            return ""
        trained = self.built.plain(self.state)
        text = self.sampler(trained, c.sample_prompt, self.step, c.sample_tokens)
        if jax.process_index() == 0:
            folder = self.workdir / "samples"
            with writing(folder):
                folder.mkdir(exist_ok=True)
                (folder / f"step_{self.step}.txt").write_text(text)
        self.watch.exclude(before)
        return text

    def due_save(self) -> bool:
        c = self.config.checkpoint
        if self.step in c.at_steps or (c.every_steps and self.step % c.every_steps == 0):
            return True
        return self.minutes_are_over() if jax.process_count() == 1 else self.time_is_up

    def minutes_are_over(self) -> bool:
        minutes = self.config.checkpoint.every_minutes
        return bool(minutes) and self.watch.read() - self.saved_at >= 60 * minutes

    def save(self, validation: perplexity.Evaluation | None) -> None:
        self.report()  # a line of metrics.jsonl is written before the checkpoint that skips it
        self.writer.flush()
        before = self.watch.read()
        self.checkpoints.save(
            self.step,
            self.state,
            self.iterator,
            {"training_seconds": before},
            None if validation is None else self.score(validation),
        )
        self.watch.exclude(before)
        self.saved_at = self.watch.read()
        self.agree.forget()

    def score(self, validation: perplexity.Evaluation) -> float:
        """What the best checkpoint has least of: the same loss in both phases."""
        return validation.loss if self.built.quantized is None else validation.quantized_loss

    def newest(self) -> epath.Path:
        steps = self.checkpoints.steps()
        return self.workdir / "checkpoints" / (str(steps[-1]) if steps else "")

    def pack(self) -> None:
        """Writes the quantized weights as one packed file, next to the checkpoints."""
        c = self.config
        trained, quantized = self.built.usable(self.state)
        if not quantized or c.quantization.bits >= FULL_PRECISION:
            return
        if jax.process_count() > 1 or "://" in str(self.workdir):
            self.say("packed weights: from one process, python -m launch.quantize --workdir=...")
            return
        path = self.workdir / "packed.safetensors"
        with writing(path):
            size = packed.write_packed(
                path,
                packed.code_leaves(trained.params, trained.scales, self.built.quantized.rules),
                config=c.to_dict(),
                vocab_size=self.data.tokenizer.vocab_size,
                tokenizer=getattr(self.data.tokenizer, "definition", ""),
                step=self.step,
            )
        self.say(f"packed weights: {path}, {size:,} bytes")

    def baseline(self) -> float | None:
        """Bits per byte of the n-gram model, computed once a work directory."""
        order = self.config.evaluation.ngram_order
        if not order or jax.process_index():
            return None
        for line in read_metrics(self.workdir):
            if line.get("event") == f"{order}-gram":
                return line["bits_per_byte"]
        texts = (
            (document.text.encode() for corpus in split for document in corpus.documents)
            for split in (self.data.train, self.data.validation)
        )
        value = ngram.witten_bell_bits_per_byte(*texts, order)
        self.writer.write(self.step, "event", {"event": f"{order}-gram", "bits_per_byte": value})
        return value

    def close(self) -> None:
        with contextlib.ExitStack() as each:  # Closes all, whichever of them fails.
            if self.progress:
                each.callback(self.progress.close)
            each.callback(self.writer.close)
            each.callback(self.checkpoints.close)
            each.callback(self.iterator.close)


def _settle_streams(config: ConfigDict, workdir: epath.Path, mesh: Mesh) -> ConfigDict:
    """The config with its number of data streams: that of the run in `workdir`, else one a share.

    So the run goes on with the same data on another number of processes.
    """
    if config.data.streams:
        return config
    settled = config.copy_and_resolve_references()
    record = run_record.read_record(workdir)
    recorded = record["config"]["data"] if record else {}
    settled.data.streams = recorded.get("streams") or share(mesh)[1]
    return settled


def resolved(config: ConfigDict, tokenizer: Any, built: experiment.Experiment) -> dict[str, Any]:
    """What config.json holds: the config, its vocabulary, and the packages that ran."""
    carried = jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", built.abstract_state().weighting)
    return {
        "config": config.to_dict(),
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": tokenizer.fingerprint,
        "weighting_state": str(carried),
        "prediction": "softmax" if built.loss.predict is softmax else config.objective.loss,
        "versions": {
            "python": ".".join(map(str, sys.version_info[:3])),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
    }


def _as_text(record: dict[str, Any]) -> str:
    return json.dumps(record, indent=2) + "\n"


def _check_writable(workdir: epath.Path, record: dict[str, Any]) -> None:
    """Makes the folder and tries, on process 0, to write what the run will begin with.

    Raises:
      InputError: on all processes, if that fails.
    """
    refusal = ""
    if jax.process_index() == 0:
        probe = workdir / "config.json.new"
        try:
            with writing(f"--workdir={workdir}"):
                workdir.mkdir(parents=True, exist_ok=True)
                probe.write_text(_as_text(record))
        except StorageError as error:
            refusal = str(error)
        with contextlib.suppress(OSError):
            probe.unlink()
    if refusal := first_message(refusal):
        raise InputError(refusal)


def check_workdir(workdir: epath.Path, record: dict[str, Any]) -> dict[str, Any]:
    """The record of the run in `workdir`, {} where there is none.

    Raises:
      InputError: it holds checkpoints that this config cannot go on from.
    """
    if workdir.exists() and not workdir.is_dir():
        raise InputError(f"--workdir={workdir} is a file; give a folder")
    recorded = run_record.read_record(workdir)
    if not recorded or not (workdir / "checkpoints").exists():
        return {}
    old, new = (_flat(r) for r in (recorded, record))
    for key in sorted(old.keys() | new.keys()):
        fixed = key in ("vocab_size", "tokenizer") or any(
            key == f"config.{name}" or key.startswith(f"config.{name}.") for name in _FIXED
        )
        if (
            fixed
            and key not in {f"config.{name}" for name in _FREE}
            and old.get(key) != new.get(key)
        ):
            raise InputError(_other(workdir, key, old, new))
    # Losses whose head is the same can be exchanged: a trained run may go on to forget.
    if old.get("prediction", "softmax") != new["prediction"]:
        raise InputError(_other(workdir, "config.objective.loss", old, new))
    # Weightings that carry nothing can be exchanged; the state of others is in the checkpoints.
    carries = "weighting_state"
    if old.get(carries, "()") != new[carries]:
        names = ("config.objective.weighting", "config.objective.glow.samples", carries)
        key = next(key for key in names if old.get(key) != new[key])
        raise InputError(_other(workdir, key, old, new))
    return recorded


def _other(workdir: epath.Path, key: str, old: dict[str, Any], new: dict[str, Any]) -> str:
    return (
        f"{workdir} holds checkpoints with {key.removeprefix('config.')}={old.get(key)}, not "
        f"{new.get(key)}: give the same, or another --workdir"
    )


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: list(tree) if isinstance(tree, tuple) else tree}
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else key)
    return flat


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Within it the first SIGTERM or SIGINT is only noted; a second one acts as usual."""
    received = []
    previous = {}

    def note(number, frame):
        received.append(number)
        for each, handler in previous.items():
            signal.signal(each, handler)

    for number in (signal.SIGTERM, signal.SIGINT):
        previous[number] = signal.signal(number, note)
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _progress_bar(total: int, done: int) -> Any:
    if not sys.stderr.isatty() or jax.process_index():
        return None
    from tqdm import tqdm

    return tqdm(total=total, initial=done, unit="step", dynamic_ncols=True)


def _above(progress: Any, say: Callable[[str], None]) -> Callable[[str], None]:
    """Makes lines appear above the progress bar, where there is one."""
    if progress is None:
        return say

    def shown(line):
        with progress.external_write_mode(file=sys.stderr):
            say(line)

    return shown


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"
