"""Times one thing of transformers and torch on a model; started by compare_speed.py.

ORACLE_PYTHON torch_worker.py FOLDER step|greedy|prefill
"""

import statistics
import sys
import time

import torch
from transformers import AutoModelForCausalLM

ROWS, LENGTH, PROMPT, TOKENS, ROUNDS = 4, 256, 512, 64, 5


def main(folder, name):
    """Prints the median of seconds, after one that is not counted."""
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

    one, seconds = {"step": step, "greedy": greedy, "prefill": prefill}[name], []
    for _ in range(ROUNDS + 1):
        begin = time.perf_counter()
        one()
        seconds.append(time.perf_counter() - begin)
    print(statistics.median(seconds[1:]))


if __name__ == "__main__":
    main(*sys.argv[1:])
