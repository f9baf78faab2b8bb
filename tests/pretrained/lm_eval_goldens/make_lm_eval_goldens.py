"""Writes what lm_eval gives on the tasks in `tasks`, with a tiny model of transformers.

    pip install lm_eval==0.4.13 torch transformers
    python tests/pretrained/lm_eval_goldens/make_lm_eval_goldens.py

With a folder of launch.export, smollm2.json and smollm2_chat.json: what it gives on configs/tasks
with that model, and on the first items of them as chats.

    python -m launch.export --model=SmolLM2-135M-Instruct.Q4_1.gguf --format=huggingface --output=F
    python tests/pretrained/lm_eval_goldens/make_lm_eval_goldens.py F

Of every item the requests, the answers of the model and the metrics; of every task its results.
The weights are `random_weights.tensor` of their names, the tokenizer has single characters.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ["DISABLE_MULTIPROC"] = "1"

import numpy as np
import torch
import transformers
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))

from random_weights import golden, tensor, write_tokenizer  # noqa: E402

LENGTH = 48


def tiny_model():
    """The model of pretrained/goldens/llama.npz, and its tokenizer, as lm_eval's `hf`."""
    config, shapes, _, _ = golden("llama")
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(**config), attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(tensor(name, tuple(shapes[name]))))
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder), config["vocab_size"])
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_file=f"{folder}/tokenizer.json", eos_token="</s>"
        )
    return HFLM(
        pretrained=model, tokenizer=tokenizer, max_length=LENGTH, batch_size=4, device="cpu"
    )


def plain(value):
    """A value of results as JSON holds it."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


def answers(model, tasks, **options):
    """Results and items of lm_eval on all tasks of a folder."""
    names = sorted(path.stem for path in Path(tasks).glob("*.yaml"))
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = simple_evaluate(
        model,
        tasks=names,
        task_manager=manager,
        bootstrap_iters=0,
        log_samples=True,
        **options,
    )
    kept = {}
    for name in names:
        results = {k: v for k, v in found["results"][name].items() if "," in k}
        by_item = {}
        for sample in found["samples"][name]:
            item = by_item.setdefault(sample["doc_id"], {"filtered": {}, "metrics": {}})
            item["arguments"] = [list(one) for one in sample["arguments"]]
            item["responses"] = sample["resps"]
            item["filtered"][sample["filter"]] = sample["filtered_resps"]
            item["metrics"][sample["filter"]] = {k: sample[k] for k in sample["metrics"]}
        kept[name] = {"results": results, "items": [by_item[i] for i in sorted(by_item)]}
    return plain(kept)


def write(name, found):
    """Writes a file beside this one."""
    (FOLDER / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")


def main():
    """Writes goldens.json, or the two of SmolLM2."""
    if len(sys.argv) > 1:
        folder = str(Path(sys.argv[1]).absolute())
        os.chdir(FOLDER.parent.parent.parent)
        model = HFLM(pretrained=folder, dtype="float32", batch_size=16, device="cpu")
        write("smollm2", answers(model, "configs/tasks"))
        chats = answers(model, "configs/tasks", apply_chat_template=True, limit=8)
        write("smollm2_chat", chats)
    else:
        os.chdir(FOLDER / "tasks")
        write("goldens", answers(tiny_model(), "."))


if __name__ == "__main__":
    main()
