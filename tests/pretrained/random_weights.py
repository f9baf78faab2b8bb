"""Weights that follow from a tensor's name, for tiny models here and in transformers."""

import json
import zlib
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

GOLDENS = Path(__file__).parent / "goldens"


def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A matrix of N(0, 0.2^2), or a vector of N(0.5, 0.3^2): no norm is 1, no bias is 0."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    x = rng.standard_normal(shape, np.float32)
    return 0.5 + 0.3 * x if len(shape) == 1 else 0.2 * x


def golden(name: str):
    """config.json, shapes, tokens and logits of a model of `make_goldens`."""
    with np.load(GOLDENS / f"{name}.npz") as file:
        described = json.loads(str(file["description"]))
        return described["config"], described["shapes"], file["tokens"], file["logits"]


def write_folder(folder: Path, config: dict, shapes: dict, files: int = 1, **changes) -> Path:
    """A Hugging Face folder of a model; with several files there is an index. `changes` replace
    tensors by name, None leaves one out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {n: tensor(n, tuple(s)) for n, s in shapes.items()} | changes
    tensors = {n: np.ascontiguousarray(x) for n, x in tensors.items() if x is not None}
    if files == 1:
        save_file(tensors, folder / "model.safetensors")
    else:
        places = {n: f"model-{i % files + 1}-of-{files}.safetensors" for i, n in enumerate(tensors)}
        for place in set(places.values()):
            part = {n: tensors[n] for n in tensors if places[n] == place}
            save_file(part, folder / place)
        index = {"metadata": {}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    write_tokenizer(folder, config["vocab_size"])
    return folder


def write_tokenizer(folder: Path, entries: int) -> None:
    """A tokenizer of single characters with the end of text </s>."""
    characters = [chr(c) for c in range(33, 33 + entries - 1)]
    vocabulary = {c: i for i, c in enumerate([*characters, "</s>"])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=characters[0]))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.add_special_tokens(["</s>"])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
