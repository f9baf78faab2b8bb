import json
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lm.data import corpora
from lm.data.hashing import held_out
from lm.errors import InputError


def _load(corpus, split="train", directory="", fraction=0.3):
    return corpora.load(str(corpus), split, directory=str(directory), validation_fraction=fraction)


def _texts(corpus):
    return [document.text for document in corpus.documents]


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "folder"
    for i in range(20):
        path = root / f"part{i % 3}" / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text {i}\n")
    return root


def _write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_folder_is_split_into_two_disjoint_parts(folder):
    (train,), (validation,) = _load(folder), _load(folder, "validation")
    assert sorted(_texts(train) + _texts(validation)) == sorted(f"text {i}\n" for i in range(20))
    assert train.fingerprint != validation.fingerprint
    for document in validation.documents:
        assert held_out(document.name.encode(), 0.3)
        assert document.spans == ((document.text, 1.0),)


def test_a_folders_split_does_not_change_as_it_grows(folder):
    before = {d.name for d in _load(folder, "validation")[0].documents}
    (folder / "part0" / "new.txt").write_text("new")
    after = {d.name for d in _load(folder, "validation")[0].documents}
    assert before <= after <= before | {"part0/new.txt"}
    smaller = {d.name for d in _load(folder, "validation", fraction=0.2)[0].documents}
    assert smaller < before | {"part0/new.txt"}


def test_hidden_and_binary_files_are_no_documents(folder):
    names = {d.name for split in ("train", "validation") for d in _load(folder, split)[0].documents}
    (folder / ".hidden").write_text("x")
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("x")
    (folder / "picture.png").write_bytes(b"\x89PNG\0\0")
    (folder / "dangling").symlink_to("nowhere")
    again = {d.name for split in ("train", "validation") for d in _load(folder, split)[0].documents}
    assert again == names


def test_a_fingerprint_is_of_names_and_content(folder):
    (before,) = _load(folder)
    assert _load(folder)[0].fingerprint == before.fingerprint
    name = before.documents[0].name
    (folder / name).write_text("changed")
    assert _load(folder)[0].fingerprint != before.fingerprint


def test_bad_utf8_is_replaced_and_counted(folder):
    (before,) = _load(folder)
    name = before.documents[0].name
    (folder / name).write_bytes(b"caf\xe9")
    (after,) = _load(folder)
    assert (before.replaced, after.replaced) == (0, 1)
    assert after.documents[0].text == "caf\ufffd"


def test_json_lines(tmp_path):
    records = [{"text": f"line {i} — é", "other": i} for i in range(20)]
    path = _write_lines(tmp_path / "a.jsonl", records)
    path.write_bytes(b"\n" + path.read_bytes() + b"  \n\n")
    (train,), (validation,) = _load(path), _load(path, "validation")
    assert sorted(_texts(train) + _texts(validation)) == sorted(r["text"] for r in records)
    document = train.documents[0]
    number = int(document.name.removeprefix("a.jsonl:"))
    assert document.text == records[number - 2]["text"]


def test_prompts_weigh_nothing(tmp_path):
    records = [{"prompt": f"p{i}", "response": f"r{i}"} for i in range(20)]
    (train,) = _load(_write_lines(tmp_path / "a.jsonl", records))
    for document in train.documents:
        (prompt, zero), (response, one) = document.spans
        assert (prompt[0], zero, response[0], one) == ("p", 0.0, "r", 1.0)
        assert document.text == prompt + response


def test_json_lines_with_bytes_and_escapes_that_are_no_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a\xff"}\n{"text": "\\ud800b"}\n{"text": "\\ud83c\\udf89"}\n')
    loaded = [_load(path, split, fraction=0.5)[0] for split in ("train", "validation")]
    assert sorted(_texts(loaded[0]) + _texts(loaded[1])) == sorted(["a\ufffd", "\ufffdb", "🎉"])
    assert sum(corpus.replaced for corpus in loaded) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', r"a\.jsonl:3: not a line of JSON"),
        ('["text"]', r"a\.jsonl:3: must be a JSON object, got list"),
        (
            '{"body": "a"}',
            r":3: needs text, or prompt and response, or messages, .*; it has body",
        ),
        (
            '{"prompt": "a"}',
            r":3: needs text, or prompt and response, or messages, .*; it has prompt",
        ),
        ('{"text": 5}', r"a\.jsonl:3: text must be a string, got int"),
        ('{"prompt": "a", "response": null}', r"a\.jsonl:3: response must be a string"),
    ],
)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_bad_line_is_named_in_either_split(tmp_path, line, message, split):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n' + line + '\n{"text": "b"}\n')
    with pytest.raises(InputError, match=message) as caught:
        _load(path, split)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("stdlb", r"data\.corpus 'stdlb'.*did you mean 'stdlib'"),
        ("", r"data\.corpus ''.*valid are stdlib, tfds:NAME"),
        ("{}/folder,,", r"data\.corpus ''"),
        ("{}/foldr", r"data\.corpus .*foldr'.*did you mean '.*/folder'"),
        ("{}/folder/part0/0.txt", r"data\.corpus .*not a file of records"),
        ("tfds:tiny_shakespear", r"data\.corpus.*did you mean 'tfds:tiny_shakespeare'"),
        ("tfds:tiny_shakespeare/xx", r"data\.corpus .*prepare it.*BuilderConfig xx not found"),
        ("tfds:", r"data\.corpus 'tfds:'"),
    ],
)
def test_unknown_names_are_refused(folder, tmp_path, name, message):
    with pytest.raises(InputError, match=message) as caught:
        _load(name.format(folder.parent), directory=tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_splits_without_text_are_refused(tmp_path, folder):
    with pytest.raises(InputError, match=r"data\.corpus.*no text in its validation split"):
        _load(folder, "validation", fraction=1e-9)
    empty = _write_lines(tmp_path / "a.jsonl", [{"text": ""}] * 3)
    with pytest.raises(InputError, match=r"data\.corpus.*no text in its train split"):
        _load(empty)
    with pytest.raises(InputError, match=r"data\.validation_fraction.*between 0 and 1"):
        _load(folder, fraction=1.0)


def test_commas_mix(tmp_path, folder):
    path = _write_lines(tmp_path / "a.jsonl", [{"text": str(i)} for i in range(9)])
    assert [corpus.name for corpus in _load(f"{folder}, {path}")] == [str(folder), str(path)]


def test_corpora_are_pickled_for_worker_processes(tmp_path, folder):
    path = _write_lines(tmp_path / "a.jsonl", [{"text": str(i)} for i in range(9)])
    for corpus in _load(f"{folder},{path}"):
        copy = pickle.loads(pickle.dumps(corpus))
        assert _texts(copy) == _texts(corpus)


def test_the_cache_is_where_the_user_wants_it(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert corpora.cache_directory("") == tmp_path / "nibble"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert corpora.cache_directory("") == Path.home() / ".cache" / "nibble"
    assert corpora.cache_directory("~/x") == Path.home() / "x"


def _python_sources(root, count=12):
    for i in range(count):
        path = root / ("tests" if i == 0 else "package") / f"module{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"x = {i}\n")
    (root / "package" / "data.txt").write_text("no source")
    return root


@pytest.fixture
def sources(tmp_path, monkeypatch):
    root = _python_sources(tmp_path / "sources")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(root))
    return root


def test_the_real_standard_library(tmp_path):
    (train,) = _load("stdlib", "train", tmp_path, 0.05)
    (validation,) = _load("stdlib", "validation", tmp_path, 0.05)
    names = [d.name for d in train.documents] + [d.name for d in validation.documents]
    assert len(set(names)) == len(names) > 400
    assert not [n for n in names if "test" in n.split("/") or "site-packages" in n.split("/")]
    assert 0 < len(validation.documents) < 0.15 * len(names)
    assert sum(len(text.encode()) for text in _texts(train)) > 5_000_000
    copy = pickle.loads(pickle.dumps(train))
    assert copy.documents[3] == train.documents[3]


def test_a_prepared_corpus_is_not_prepared_again(tmp_path, sources, capsys):
    (train,) = _load("stdlib", "train", tmp_path)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.array_record*")}
    (again,) = _load("stdlib", "train", tmp_path)
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.array_record*")}
    assert again.fingerprint == train.fingerprint
    assert "package/module0.py" not in [d.name for d in train.documents]
    assert capsys.readouterr().out == ""  # Standard output is for JSON.


def test_a_changed_library_and_another_fraction_are_prepared_anew(tmp_path, sources):
    (before,) = _load("stdlib", "train", tmp_path)
    name = before.documents[0].name
    (sources / name).write_text("changed\n")
    (changed,) = _load("stdlib", "train", tmp_path)
    assert "changed\n" in _texts(changed)
    assert changed.fingerprint != before.fingerprint
    (other,) = _load("stdlib", "train", tmp_path, fraction=0.6)
    assert len(other.documents) < len(changed.documents)


def test_latin_sources_are_counted(tmp_path, sources):
    for i in range(1, 4):
        (sources / "package" / f"module{i}.py").write_bytes(b"# -*- latin-1 -*-\n'\xe9'\n")
    loaded = [_load("stdlib", split, tmp_path)[0] for split in ("train", "validation")]
    assert sum(corpus.replaced for corpus in loaded) == 3


def test_half_prepared_folders_are_not_used(tmp_path, sources):
    (whole,) = _load("stdlib", "train", tmp_path)
    expected = sorted(_texts(whole))
    (info,) = tmp_path.rglob("dataset_info.json")
    # Killed while it was writing beside the folder, or by a file system without atomic renames.
    info.unlink()
    shard = next(info.parent.glob("*train.array_record*"))
    shard.write_bytes(shard.read_bytes()[:10])
    leftover = info.parent.parent / "incomplete.ABCDEF_1.0.0"
    leftover.mkdir()
    (again,) = _load("stdlib", "train", tmp_path)
    assert sorted(_texts(again)) == expected
    assert not leftover.exists()


def _preparing(root, directory):
    """A process of its own that prepares the folder `root`, and prints where."""
    code = (
        "import sys; from lm.data import stdlib;"
        "print(stdlib.prepare(sys.argv[1], 0.3, sys.argv[2]))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, str(directory), str(root)], stdout=subprocess.PIPE, text=True
    )


def test_two_processes_prepare_at_once(tmp_path, sources):
    processes = [_preparing(sources, tmp_path / "cache") for _ in range(2)]
    folders = {process.communicate(timeout=60)[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert len(folders) == 1
    assert len(_load("stdlib", "train", tmp_path / "cache")[0].documents) > 3


def test_a_killed_process_leaves_nothing_behind_that_is_used(tmp_path):
    root = _python_sources(tmp_path / "sources", 300)
    cache = tmp_path / "cache"
    process = _preparing(root, cache)
    deadline = time.monotonic() + 60
    while not list(cache.rglob("incomplete.*")):
        assert time.monotonic() < deadline
        assert process.poll() is None, "it was done before it could be killed"
        time.sleep(0.001)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    assert list(cache.rglob("incomplete.*"))
    assert not list(cache.rglob("dataset_info.json"))
    from lm.data import stdlib

    folder = stdlib.prepare(str(cache), 0.3, str(root))
    import tensorflow_datasets as tfds

    info = tfds.builder_from_directory(folder).info
    assert sum(split.num_examples for split in info.splits.values()) == 299
    assert not list(cache.rglob("incomplete.*"))


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory):
    """Two datasets of a TFDS catalogue, prepared elsewhere."""
    import tensorflow_datasets as tfds

    def define(name, splits, features):
        def info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(
                    {feature: tfds.features.Text() for feature in features}
                ),
            )

        def split_generators(self, manager):
            return {split: self._generate_examples(split) for split in splits}

        def examples(self, split):
            for i in range(20):
                yield i, {feature: f"{split} {feature} {i}" for feature in features}

        attributes = {
            "VERSION": tfds.core.Version("1.0.0"),
            "code_path": None,
            "_info": info,
            "_split_generators": split_generators,
            "_generate_examples": examples,
        }
        return type(name, (tfds.core.GeneratorBasedBuilder,), attributes)

    directory = tmp_path_factory.mktemp("catalogue")
    define("NibbleOneSplit", ["train"], ["text"])
    define("NibbleTwoSplits", ["train", "test"], ["prompt", "response"])
    define("NibbleNoText", ["train"], ["label"])
    return directory


def test_a_tfds_dataset_without_validation_split_is_split(catalogue):
    (train,) = _load("tfds:nibble_one_split", "train", catalogue, 0.25)
    (validation,) = _load("tfds:nibble_one_split", "validation", catalogue, 0.25)
    assert (len(train.documents), len(validation.documents)) == (15, 5)
    assert len(set(_texts(train) + _texts(validation))) == 20
    assert train.fingerprint != validation.fingerprint
    assert _texts(pickle.loads(pickle.dumps(train))) == _texts(train)


def test_a_tfds_dataset_keeps_its_own_split(catalogue):
    (train,) = _load("tfds:nibble_two_splits", "train", catalogue)
    (validation,) = _load("tfds:nibble_two_splits", "validation", catalogue)
    assert (len(train.documents), len(validation.documents)) == (20, 20)
    (prompt, zero), (response, one) = validation.documents[0].spans
    assert prompt.startswith("test prompt")
    assert response.startswith("test response")
    assert (zero, one) == (0.0, 1.0)


def test_tfds_reads_from_its_own_folder(catalogue, monkeypatch):
    _load("tfds:nibble_one_split", "train", catalogue)
    monkeypatch.setenv("TFDS_DATA_DIR", str(catalogue))
    assert len(_load("tfds:nibble_one_split")[0].documents) == 14


def test_a_tfds_dataset_without_text_is_refused(catalogue):
    with pytest.raises(InputError, match=r"data\.corpus 'tfds:nibble_no_text'.*it has label"):
        _load("tfds:nibble_no_text", "train", catalogue)


def test_a_dataset_that_cannot_be_prepared_says_why(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    def fail(*args, **kwargs):
        raise OSError("the network\nis unreachable")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
    with pytest.raises(InputError, match=r"data\.corpus.*prepare it.*network is unreachable"):
        _load("tfds:tiny_shakespeare", "train", tmp_path)
