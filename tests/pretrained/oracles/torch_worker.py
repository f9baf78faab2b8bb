"""Times transformers and torch on a model: one line of standard input is one thing to time.

ORACLE_PYTHON torch_worker.py FOLDER, started by compare_speed.py.
"""

import sys
import time

import torch
from transformers import AutoModelForCausalLM

ROWS, LENGTH, PROMPT, TOKENS = 4, 256, 512, 64


def main(folder):
    """Answers each of step, lora, greedy and prefill with its seconds."""
    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    ids = torch.randint(0, model.config.vocab_size, (ROWS, LENGTH))
    prompt = torch.randint(0, model.config.vocab_size, (1, PROMPT))

    def step():
        model.train()
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()

    @torch.no_grad()
    def greedy():
        model.eval()
        model.generate(
            prompt[:, :8],
            attention_mask=torch.ones_like(prompt[:, :8]),
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            do_sample=False,
        )

    @torch.no_grad()
    def prefill():
        model.eval()
        model(prompt, use_cache=True, logits_to_keep=1)

    things = {"step": step, "greedy": greedy, "prefill": prefill}
    for line in sys.stdin:
        begin = time.perf_counter()
        things[line.strip()]()
        print(time.perf_counter() - begin, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
