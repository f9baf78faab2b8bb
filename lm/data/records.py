"""Corpora that TFDS has prepared as ArrayRecord files: the standard library, and its catalogue.

No TensorFlow is needed or imported.
"""

import contextlib
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm.data.documents import Corpus, Document, decode, span_fields
from lm.data.hashing import fingerprint
from lm.errors import InputError

# TFDS is imported inside functions: half a second that a run on local files need not pay.


def load_stdlib(split: str, directory: Path, validation_fraction: float) -> Corpus:
    """Loads the corpus `stdlib` from `directory`, preparing it where it is missing."""
    from lm.data import stdlib

    folder = stdlib.prepare(str(directory), validation_fraction)
    documents = _Records(str(folder), split, (("text", 1.0),), "name")
    # The folder two above names the content; the rest of the path is this machine's.
    digest = fingerprint([folder.parents[1].name.encode(), split.encode()])
    return Corpus("stdlib", documents, digest, documents.count_replaced())


def load_tfds(name: str, split: str, directory: Path, validation_fraction: float) -> Corpus:
    """Loads `tfds:NAME[/config]` from `directory`, preparing it where it is missing.

    Raises:
      InputError: TFDS does not know the name, cannot prepare the dataset, or its features or
        splits do not fit.
    """
    builder = _prepared(name, directory)
    sizes = {key: info.num_examples for key, info in builder.info.splits.items()}
    if not sizes.get("train"):
        raise InputError(f"data.corpus {name!r}: needs a split train; it has {', '.join(sizes)}")
    held = next((key for key in ("validation", "test") if sizes.get(key)), None)
    if held is None:
        cut = sizes["train"] - round(sizes["train"] * validation_fraction)
        part = f"train[:{cut}]" if split == "train" else f"train[{cut}:]"
    else:
        part = "train" if split == "train" else held
    fields = span_fields(list(builder.info.features), f"data.corpus {name!r}")
    digest = fingerprint([builder.info.full_name.encode(), part.encode()])
    return Corpus(name, _Records(str(builder.data_dir), part, fields), digest, replaced=0)


class _Records(Sequence):
    """The documents of a prepared dataset; every process that reads them opens it by itself.

    `split` may be one that does not exist, or a slice that is empty: TFDS can neither write nor
    open what has no records.
    """

    def __init__(
        self, folder: str, split: str, fields: tuple[tuple[str, float], ...], name_field: str = ""
    ):
        self._folder = folder
        self._split = split
        self._fields = fields
        self._name_field = name_field
        self._source = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_source": None}

    def __len__(self) -> int:
        return len(self._open())

    def __getitem__(self, index: int) -> Document:
        if not 0 <= index < len(self):
            raise IndexError(index)  # Which ends iteration.
        record = self._open()[index]
        name = record[self._name_field].decode() if self._name_field else f"{self._split}:{index}"
        spans = tuple((decode(record[field])[0], weight) for field, weight in self._fields)
        return Document(name, spans)

    def count_replaced(self) -> int:
        """Returns how many documents are not valid UTF-8; reads all of them."""
        source = self._open()
        return sum(
            any(decode(record[field])[1] for field, _ in self._fields)
            for record in (source[index] for index in range(len(source)))
        )

    def _open(self) -> Sequence:
        if self._source is None:
            import tensorflow_datasets as tfds

            builder = tfds.builder_from_directory(self._folder)
            splits = builder.info.splits
            exists = self._split.partition("[")[0] in splits and splits[self._split].num_examples
            self._source = builder.as_data_source(self._split) if exists else ()
        return self._source


def _prepared(name: str, directory: Path) -> Any:
    """Returns the builder of a dataset whose files are there."""
    import tensorflow_datasets as tfds

    known = name.removeprefix("tfds:")
    try:
        builder = tfds.builder(known, data_dir=directory, try_gcs=False, file_format="array_record")
        # TFDS greets on standard output, which belongs to the commands that print JSON.
        with contextlib.redirect_stdout(sys.stderr):
            builder.download_and_prepare()
        # Of files in a format without random access, this is where TFDS says so.
        builder.as_data_source()
    except tfds.core.DatasetNotFoundError as error:
        names = tfds.list_builders(with_community_datasets=False)
        names += [path.name for path in directory.glob("*/")]
        near = difflib.get_close_matches(known.partition("/")[0], names, n=1)
        hint = f"; did you mean 'tfds:{near[0]}'?" if near else ""
        raise InputError(
            f"data.corpus {name!r}: TFDS has no dataset of this name, nor has {directory}{hint}"
        ) from error
    except Exception as error:  # A dataset's own code may raise anything, on import as well.
        cause = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(
            f"data.corpus {name!r}: TFDS cannot read or prepare it in {directory}: {cause}"
        ) from error
    return builder
