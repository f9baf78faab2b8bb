"""Sums of two numbers: the prompt `27+15=` has weight 0, its answer `42` weight 1.

A small setting for methods that are about prompts and answers. First, from the top of the
repository, the data: runs/right.jsonl, runs/wrong.jsonl with a wrong answer to every prompt,
runs/noisy.jsonl, where three in ten are wrong, and runs/pairs.jsonl with both answers.

mkdir -p runs && python -c "
import json, random
random.seed(0)
pairs = open('runs/pairs.jsonl', 'w')
files = {name: open(f'runs/{name}.jsonl', 'w') for name in ('right', 'wrong', 'noisy')}
for a, b in (divmod(n, 100) for n in random.sample(range(10000), 5000)):
    right, wrong = a + b, a + b + random.choice((-10, -1, 1, 10))
    answers = right, wrong, wrong if random.random() < 0.3 else right
    for file, answer in zip(files.values(), answers):
        print(json.dumps({'prompt': f'{a}+{b}=', 'response': str(answer)}), file=file)
    both = {'prompt': f'{a}+{b}=', 'chosen': str(right), 'rejected': str(wrong)}
    print(json.dumps(both), file=pairs)
"

Command: python -m launch.train --config=configs/answers.py --workdir=runs/answers
Cost:    1 to 2 minutes on 2 CPU cores.

Documents stay whole in a row and come back every 20 steps. Bits per byte count the bytes of the
answers alone; a uniform guess of one digit is 3.3 bits.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Returns the config."""
    config = base.get_config()
    config.model.update(layers=3, width=96, mlp_width=384, activation="relu2", unroll=3)
    config.data.update(corpus="runs/right.jsonl", sequence_length=64, packing="best_fit")
    config.train.update(steps=600, batch_size=32)
    config.optimizer.update(name="muon", peak_learning_rate=2e-2, adam_learning_rate=5e-3)
    config.optimizer.update(schedule="wsd", decay_fraction=0.3, final_fraction=0.0)
    config.evaluation.update(every_steps=200, batches=0, sample_prompt="27+15=", sample_tokens=8)
    return config
