"""A task: what is asked of a model, and how the answers count."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lm.errors import InputError, shown
from lm.evaluation.tasks.answers import Filters, Matching, read_filters, read_matching
from lm.evaluation.tasks.fields import Reader
from lm.evaluation.tasks.records import find, read_records
from lm.evaluation.tasks.yaml_file import read_yaml

MULTIPLE_CHOICE = "multiple_choice"
LOGLIKELIHOOD = "loglikelihood"
ROLLING = "loglikelihood_rolling"
GENERATE = "generate_until"

# Output type -> the metrics that a metric_list may name. All of them are reported.
METRICS = {
    MULTIPLE_CHOICE: ("acc", "acc_norm", "acc_bytes", "acc_per_token"),
    LOGLIKELIHOOD: ("perplexity", "acc"),
    ROLLING: ("word_perplexity", "byte_perplexity", "bits_per_byte", "token_perplexity"),
    GENERATE: ("exact_match",),
}

# Keys that mean something here, and their types.
_KEYS: dict[str, tuple[type, ...]] = {
    "task": (str,),
    "dataset_path": (str,),
    "dataset_kwargs": (dict,),
    "output_type": (str,),
    "test_split": (str,),
    "validation_split": (str,),
    "training_split": (str,),
    "fewshot_split": (str,),
    "fewshot_config": (dict,),
    "doc_to_text": (str, int),
    "doc_to_target": (str, int, list),
    "doc_to_choice": (str, list, dict),
    "description": (str,),
    "gen_prefix": (str,),
    "target_delimiter": (str,),
    "fewshot_delimiter": (str,),
    "num_fewshot": (int,),
    "generation_kwargs": (dict,),
    "metric_list": (list,),
    "filter_list": (list,),
    "repeats": (int,),
    "metadata": (dict,),
}

# Keys of lm_eval that change no number here.
_IGNORED = (
    "task_alias",
    "tag",
    "group",
    "dataset_name",
    "should_decontaminate",
    "doc_to_decontamination_query",
    "unsafe_code",
)

# Keys of lm_eval that name code, or another file.
_REFUSED = (
    "process_docs",
    "process_results",
    "custom_dataset",
    "use_prompt",
    "include",
    "doc_to_image",
    "doc_to_audio",
    "class",
)


class Shots(NamedTuple):
    """Examples that are shown before a question.

    Attributes:
      count: of each prompt.
      pool: that they are drawn from.
      first: take the first ones, in order; otherwise they are drawn.
      of_evaluated: the pool holds the documents that are asked, of which none may show itself.
    """

    count: int
    pool: Sequence[dict[str, Any]]
    first: bool
    of_evaluated: bool


class Writing(NamedTuple):
    """How an answer is written: the texts that end it, and its tokens at most."""

    until: tuple[str, ...]
    tokens: int


class Task(NamedTuple):
    """A task file, with its documents.

    Attributes:
      name: of the task.
      file: that it was read from.
      output_type: a key of `METRICS`.
      documents: that are asked.
      reader: of the documents.
      shots: examples.
      description: a template in front of everything, "" for none.
      gen_prefix: a template that opens the answer, "" for none.
      target_delimiter: between question and answer.
      fewshot_delimiter: after an example.
      writing: of `GENERATE`.
      filters: name -> functions that an answer passes through.
      matching: how it is compared.
      stride: tokens by which a window over a long text moves; 0 is its length.
    """

    name: str
    file: str
    output_type: str
    documents: list[dict[str, Any]]
    reader: Reader
    shots: Shots
    description: str
    gen_prefix: str
    target_delimiter: str
    fewshot_delimiter: str
    writing: Writing
    filters: Filters
    matching: Matching
    stride: int


def read_tasks(files: Sequence[str], key: str) -> list[Task]:
    """Reads the tasks of several files; no two may have the same name.

    Raises:
      InputError: see `read_task`, or two of one name; the message of that names `key`.
    """
    found: dict[str, Task] = {}
    for file in files:
        task = read_task(file)
        if task.name in found:
            raise InputError(
                f"{key}: {found[task.name].file} and {file} both have task={task.name}; valid: "
                "different names"
            )
        found[task.name] = task
    return list(found.values())


def read_task(file: str) -> Task:
    """Reads a task in the form of lm_eval's local ones, with its documents.

    Raises:
      InputError: the file, a key of it or a file of documents is not valid; one line that names it.
    """
    path = Path(file).expanduser()
    given = {key: value for key, value in read_yaml(path).items() if value is not None}
    _check_keys(given, file)
    kind = given.get("output_type", GENERATE)
    if kind not in METRICS:
        raise InputError(f"{file}: output_type={shown(kind)} is not one of: {', '.join(METRICS)}")
    _check_needed(given, kind, file)
    matching = read_matching(given.get("metric_list"), METRICS[kind], file)
    splits = _splits(given, path)
    asked = given.get("test_split") or given.get("validation_split")
    if not asked:
        raise InputError(f"{file}: test_split is missing; valid: a split of dataset_kwargs")
    texts = (given.get(key) for key in ("doc_to_text", "doc_to_target", "doc_to_choice"))
    delimiter = given.get("fewshot_delimiter", "\n\n")
    documents = _split(splits, asked, "test_split", file)
    return Task(
        name=given["task"],
        file=file,
        output_type=kind,
        documents=documents,
        reader=Reader(file, *texts),
        shots=_shots(given, splits, documents, file),
        description=given.get("description", ""),
        gen_prefix=given.get("gen_prefix", ""),
        target_delimiter=given.get("target_delimiter", " "),
        fewshot_delimiter=delimiter,
        writing=_writing(given.get("generation_kwargs", {}), delimiter, file),
        filters=read_filters(given.get("filter_list"), kind == GENERATE, file),
        matching=matching,
        stride=_stride(given.get("metadata", {}), file),
    )


def _check_keys(given: dict[str, Any], file: str) -> None:
    for key, value in given.items():
        if key in _REFUSED:
            raise InputError(f"{file}: {key} is for lm_eval alone, as it names code or other files")
        if key in _IGNORED:
            continue
        if key not in _KEYS:
            raise InputError(f"{file}: unknown key {shown(key)}; valid: {', '.join(_KEYS)}")
        if not isinstance(value, _KEYS[key]) or isinstance(value, bool):
            names = " or ".join(kind.__name__ for kind in _KEYS[key])
            raise InputError(f"{file}: {key}={shown(value)} must be {names}")
    for key in ("task", "dataset_path", "dataset_kwargs"):
        if key not in given:
            raise InputError(f"{file}: {key} is missing")
    if not given["task"] or not given["task"].isprintable():
        raise InputError(f"{file}: task must be a name")
    if given["dataset_path"] != "json":
        raise InputError(
            f"{file}: dataset_path={shown(given['dataset_path'])} must be json, local files"
        )
    if given.get("repeats", 1) != 1:
        raise InputError(f"{file}: repeats={given['repeats']} must be 1, as answers are greedy")


def _check_needed(given: dict[str, Any], kind: str, file: str) -> None:
    needed = {
        MULTIPLE_CHOICE: ("doc_to_text", "doc_to_target", "doc_to_choice"),
        LOGLIKELIHOOD: ("doc_to_text", "doc_to_target"),
        ROLLING: ("doc_to_target",),
        GENERATE: ("doc_to_text", "doc_to_target"),
    }
    for key in needed[kind]:
        if key not in given:
            raise InputError(f"{file}: {key} is missing, which output_type={kind} needs")
    if kind in (LOGLIKELIHOOD, ROLLING) and "doc_to_choice" in given:
        raise InputError(f"{file}: doc_to_choice is not for output_type={kind}")
    if kind != GENERATE and "generation_kwargs" in given:
        raise InputError(f"{file}: generation_kwargs is for output_type={GENERATE}")


def _splits(given: dict[str, Any], path: Path) -> dict[str, list[Path]]:
    """Split -> its files. A name or a list without splits is the split train, as in `datasets`."""
    options = given["dataset_kwargs"]
    if unknown := [key for key in options if key not in ("data_files", "trust_remote_code")]:
        raise InputError(f"{path}: dataset_kwargs.{shown(unknown[0])}: valid is data_files alone")
    files = options.get("data_files")
    files = files if isinstance(files, dict) else {"train": files}
    found = {}
    for split, names in files.items():
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
            raise InputError(
                f"{path}: dataset_kwargs.data_files must be a file, a list of files, or both by "
                "split, such as {test: FILE.jsonl}"
            )
        found[str(split)] = [find(name, path) for name in names]
    return found


def _split(splits: dict[str, list[Path]], name: str, key: str, file: str) -> list[dict[str, Any]]:
    if name not in splits:
        raise InputError(
            f"{file}: {key}={shown(name)} is no split of dataset_kwargs.data_files; valid: "
            f"{', '.join(splits)}"
        )
    return read_records(splits[name])


def _shots(
    given: dict[str, Any],
    splits: dict[str, list[Path]],
    documents: list[dict[str, Any]],
    file: str,
) -> Shots:
    count, options = given.get("num_fewshot", 0), given.get("fewshot_config", {})
    if unknown := [key for key in options if key not in ("sampler", "split", "samples")]:
        raise InputError(
            f"{file}: fewshot_config.{shown(unknown[0])}: valid are sampler, split and samples"
        )
    sampler = options.get("sampler", "default")
    if sampler not in ("default", "first_n"):
        raise InputError(
            f"{file}: fewshot_config.sampler={shown(sampler)} is not one of: default, first_n"
        )
    split = options.get("split", given.get("fewshot_split"))
    of_evaluated = split == given.get("test_split")
    if count < 0:
        raise InputError(f"{file}: num_fewshot={count} must be at least 0")
    if not count:
        return Shots(0, (), False, False)
    if split is None and "samples" in options:
        pool = options["samples"]
        if not isinstance(pool, list) or not all(isinstance(one, dict) for one in pool):
            raise InputError(f"{file}: fewshot_config.samples must be a list of documents")
    else:
        others = (given.get(f"{name}_split") for name in ("training", "validation", "test"))
        name = split or next(filter(None, others))
        asked = given.get("test_split") or given.get("validation_split")
        pool = documents if name == asked else _split(splits, name, "fewshot_split", file)
    most = len(pool) - (of_evaluated and sampler == "default")
    if count > most:
        raise InputError(f"{file}: num_fewshot={count}: there are {max(most, 0)} examples to show")
    return Shots(count, pool, sampler == "first_n", of_evaluated)


def _writing(options: dict[str, Any], delimiter: str, file: str) -> Writing:
    known = ("until", "max_gen_toks", "do_sample", "temperature")
    if unknown := [key for key in options if key not in known]:
        raise InputError(
            f"{file}: generation_kwargs.{shown(unknown[0])}: valid are {', '.join(known)}"
        )
    if options.get("do_sample") or options.get("temperature"):
        raise InputError(
            f"{file}: generation_kwargs: answers are greedy; valid: do_sample: false, "
            "temperature: 0"
        )
    until, tokens = options.get("until", [delimiter]), options.get("max_gen_toks", 256)
    until = [until] if isinstance(until, str) else until
    if not isinstance(until, list) or not all(isinstance(stop, str) for stop in until):
        raise InputError(f"{file}: generation_kwargs.until must be a text or a list of texts")
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise InputError(
            f"{file}: generation_kwargs.max_gen_toks={shown(tokens)} must be at least 1"
        )
    return Writing(tuple(filter(None, until)), tokens)


def _stride(metadata: dict[str, Any], file: str) -> int:
    stride = metadata.get("stride", 0)
    if isinstance(stride, bool) or not isinstance(stride, int) or stride < 0:
        raise InputError(f"{file}: metadata.stride={shown(stride)} must be a number from 0")
    return stride
