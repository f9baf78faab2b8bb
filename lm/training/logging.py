"""The logs of a run: metrics.jsonl, TensorBoard, Weights & Biases, the plot of its losses."""

import io
import os
import time
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from lm import strict_json
from lm.errors import writing


class Stopwatch:
    """Measures seconds of training, without those of compiling, evaluating and saving.

    Args:
      seconds: measured before this start of the run.
    """

    def __init__(self, seconds: float = 0.0):
        self._before = seconds
        self._start = time.perf_counter()

    def read(self) -> float:
        """Returns the seconds of training so far."""
        return self._before + time.perf_counter() - self._start

    def exclude(self, since: float) -> None:
        """Does not count the time since `read` returned `since`, in seconds."""
        self._start += self.read() - since


class Writer:
    """Writes metrics to metrics.jsonl, and to TensorBoard and Weights & Biases if configured.

    Only process 0 writes. TensorBoard's files are written to local work directories only. A line of
    metrics.jsonl is strict JSON, see `lm.strict_json`: null stands for a value that is not finite.

    Args:
      workdir: the work directory. Lines of metrics.jsonl after `step` are dropped: a run that
        resumes at `step` writes them again.
      config: the config of the run; its keys train.tensorboard and train.wandb_* are read.
      step: the last step taken, 0 for a new run.
      run_id: the id of the run at Weights & Biases, which resumes a run whose id it knows; None
        lets it choose one.

    Raises:
      StorageError: a file cannot be written; also raised by the methods.
    """

    def __init__(
        self, workdir: epath.Path, config: ConfigDict, step: int, run_id: str | None = None
    ):
        self._file = self._board = self._wandb = None
        if jax.process_index():
            return
        path = workdir / "metrics.jsonl"
        kept = [line for line in read_metrics(workdir) if line["step"] <= step]
        write_whole(path, "".join(strict_json.dumps(line) + "\n" for line in kept))
        self._file = _Lines(path)
        if config.train.tensorboard and not _is_bucket(workdir):
            self._board = _Board(workdir, step)
        if config.train.wandb_project:
            self._wandb = _start_wandb(workdir, config, run_id)

    def write(self, step: int, kind: str, values: dict[str, Any]) -> None:
        """Adds one line.

        Args:
          step: the step that the values belong to.
          kind: train, validation or event.
          values: name -> value; TensorBoard and Weights & Biases get the numbers among them.
        """
        if self._file is None:
            return
        self._file.add(strict_json.dumps({"step": step, "kind": kind, **values}))
        numbers = {f"{kind}/{k}": v for k, v in values.items() if isinstance(v, int | float)}
        if self._board:
            self._board.add(numbers, step)
        if self._wandb:
            self._wandb.log(numbers, step=step)

    def flush(self) -> None:
        """Waits until all lines are in their files, in a bucket too."""
        for sink in (self._file, self._board):
            if sink:
                sink.flush()

    def close(self) -> None:
        """Flushes and closes all files, and ends the run at Weights & Biases."""
        for sink in (self._file, self._board):
            if sink:
                sink.close()
        if self._wandb:
            self._wandb.finish()


def _start_wandb(workdir: epath.Path, config: ConfigDict, run_id: str | None) -> Any:
    """Starts or resumes the run at Weights & Biases.

    Its name is the last two folders of the work directory, VARIANT/seed_SEED in an ablation. Names
    need not be unique, ids must be.
    """
    import wandb

    return wandb.init(
        project=config.train.wandb_project,
        group=config.train.wandb_group or None,
        name="/".join(part for part in workdir.parts[-2:] if part != "/"),
        dir=None if _is_bucket(workdir) else str(workdir),
        id=run_id,
        resume="allow",
        config=config.to_dict(),
    )


def _is_bucket(path: epath.Path) -> bool:
    return "://" in str(path)


class _Lines:
    """A text file to which lines are appended.

    A file in a bucket cannot be appended to: it is written as a whole, at most every
    `_UPLOAD_SECONDS` and by `flush`.
    """

    _UPLOAD_SECONDS = 30

    def __init__(self, path: epath.Path):
        self._path = path
        self._local = None if _is_bucket(path) else io.FileIO(path, "a")
        self._text = "" if self._local else path.read_text()
        self._uploaded, self._length = time.monotonic(), len(self._text)

    def add(self, line: str) -> None:
        if self._local:
            with writing(self._path):
                _append(self._local, line.encode() + b"\n")
            return
        self._text += line + "\n"
        if time.monotonic() - self._uploaded >= self._UPLOAD_SECONDS:
            self.flush()

    def flush(self) -> None:
        if not self._local and len(self._text) > self._length:
            with writing(self._path):
                self._path.write_text(self._text)
            self._uploaded, self._length = time.monotonic(), len(self._text)

    def close(self) -> None:
        self.flush()
        if self._local:
            self._local.close()


def _append(file: io.FileIO, content: bytes) -> None:
    """Appends the content, or nothing where writing fails in the middle."""
    length, left = os.fstat(file.fileno()).st_size, content
    try:
        while left:
            left = left[file.write(left) :]
    except OSError:
        file.truncate(length)
        raise


class _Board:
    """TensorBoard's event file, written without a thread.

    The SummaryWriter of tensorboardX passes events to a thread. The thread ends when the disk is
    full, and the tenth event after that waits for it forever.
    """

    _FLUSH_SECONDS = 30

    def __init__(self, folder: epath.Path, step: int):
        from tensorboardX.event_file_writer import EventsWriter

        self._folder, self._flushed = folder, time.monotonic()
        with writing(folder):
            self._events = EventsWriter(str(folder / "events"))
        if step:  # TensorBoard then hides later steps, which an earlier start has written.
            self._write(step=step + 1, session_log={"status": "START"})

    def add(self, numbers: dict[str, float], step: int) -> None:
        values = [{"tag": name, "simple_value": value} for name, value in numbers.items()]
        self._write(step=step, summary={"value": values})
        if time.monotonic() - self._flushed >= self._FLUSH_SECONDS:
            self.flush()

    def _write(self, **fields) -> None:
        from tensorboardX.proto.event_pb2 import Event

        with writing(self._folder):
            self._events.write_event(Event(wall_time=time.time(), **fields))

    def flush(self) -> None:
        with writing(self._folder):
            self._events.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        with writing(self._folder):
            self._events.close()


def write_whole(path: epath.Path, content: str) -> None:
    """Replaces the content of a file; if that fails, the file is unchanged.

    Raises:
      StorageError: the file cannot be written.
    """
    scratch = path.with_name(f"{path.name}.new")
    with writing(path):
        scratch.write_text(content)
        scratch.replace(path)


def read_metrics(workdir: epath.Path) -> list[dict[str, Any]]:
    """Reads metrics.jsonl; values that were not finite are floats again.

    Returns:
      One dictionary a line, [] where there is no file. A line that is not JSON, such as the last
      line of a run that was killed while it wrote, is left out.
    """
    path = workdir / "metrics.jsonl"
    lines = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            lines.append(strict_json.loads(line))
        except ValueError:
            continue
    return lines


def plot_curves(workdir: epath.Path) -> epath.Path:
    """Plots training and validation loss by step into curves.png, and returns its path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = read_metrics(workdir)
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for kind, style in (("train", {"alpha": 0.6}), ("validation", {"marker": "o"})):
        points = [(line["step"], line["loss"]) for line in lines if line["kind"] == kind]
        if points:
            axes.plot(*zip(*points, strict=True), label=kind, **style)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=workdir.name)
    axes.grid(alpha=0.3)
    axes.legend()
    path = workdir / "curves.png"
    with path.open("wb") as file:
        figure.savefig(file, format="png", dpi=130)
    plt.close(figure)
    return path
