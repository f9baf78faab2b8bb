"""The default corpus: the running interpreter's own standard library, as a TFDS dataset.

It needs no network and no download, it is on every machine that can run this code, and at 11 MB it
is large enough to tell a good language model from a bad one in minutes on a CPU.

Import this module late: TFDS is slow to import.
"""

import contextlib
import fcntl
import io
import os
import platform
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds
from absl import logging

from lm.data.hashing import fingerprint, held_out

# Tests and the editor repeat themselves; installed packages differ between machines.
_LEFT_OUT = frozenset(
    [
        "test",
        "tests",
        "idlelib",
        "idle_test",
        "site-packages",
        "dist-packages",
        "__pycache__",
        "lib-dynload",
    ]
)


class NibbleStdlib(tfds.core.GeneratorBasedBuilder):
    """One document a source file, split by a hash of its path.

    Args:
      data_dir: the folder that the dataset's own folder is in.
      validation_fraction: the share of files in the split `validation`.
      root: the folder to read.
    """

    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # Nothing is downloaded, so TFDS need not look for checksums beside the code.

    def __init__(self, *, data_dir: str, validation_fraction: float, root: Path):
        self._root = root
        self._fraction = validation_fraction
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Python sources of the standard library.",
            features=tfds.features.FeaturesDict(
                {"name": tfds.features.Text(), "text": tfds.features.Text()}
            ),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager  # Nothing is downloaded.
        members = {"train": [], "validation": []}
        for name in _source_names(self._root):
            split = "validation" if held_out(name.encode(), self._fraction) else "train"
            members[split].append(name)
        # TFDS cannot write a split without examples.
        return {split: self._generate_examples(names) for split, names in members.items() if names}

    def _generate_examples(self, names: list[str]) -> Iterator[tuple[str, dict[str, str | bytes]]]:
        for name in names:
            yield name, {"name": name, "text": (self._root / name).read_bytes()}


def prepare(directory: str, validation_fraction: float, root: str | None = None) -> Path:
    """Returns the folder of the prepared dataset, after preparing it where it is missing.

    The folder's name holds the Python version, a hash of every path and its content, and the held
    out fraction, so that a prepared copy is never used for anything but the very same documents.
    Processes that prepare at once wait for the first of them. TFDS writes beside the folder and
    renames at the end, so that a killed process leaves nothing that could be taken for a dataset;
    what it does leave is removed here.

    Args:
      directory: the folder that holds all corpora; made where it is missing.
      validation_fraction: the share of files held out.
      root: the folder to read; by default the standard library's.
    """
    source = Path(root or sysconfig.get_path("stdlib"))
    identity = fingerprint(
        part
        for name in _source_names(source)
        for part in (name.encode(), (source / name).read_bytes())
    )
    version = f"python{platform.python_version()}_{identity[:16]}_{validation_fraction:g}"
    data_dir = Path(directory) / "stdlib" / version
    data_dir.mkdir(parents=True, exist_ok=True)
    with (data_dir / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # Given back when the file closes, or the process dies.
        builder = NibbleStdlib(
            data_dir=str(data_dir), validation_fraction=validation_fraction, root=source
        )
        path = Path(builder.data_dir)
        if not (path / "dataset_info.json").is_file():
            shutil.rmtree(path.parent, ignore_errors=True)
            logging.info("Preparing the corpus stdlib in %s", path)
            tfds.disable_progress_bar()
            # TFDS greets on standard output, which belongs to the commands that print JSON.
            with contextlib.redirect_stdout(io.StringIO()):
                builder.download_and_prepare()
    return path


def _source_names(root: Path) -> list[str]:
    names = []
    for folder, inner, files in os.walk(root):
        # Not even walked: with site-packages that takes a second.
        inner[:] = [name for name in inner if name not in _LEFT_OUT]
        paths = (Path(folder, name) for name in files if name.endswith(".py"))
        names += [path.relative_to(root).as_posix() for path in paths if path.is_file()]
    return sorted(name for name in names if _LEFT_OUT.isdisjoint(name.split("/")))
