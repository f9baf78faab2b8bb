r"""Times train steps of another codebase; started by benchmarks/peers.py.

PYTHON peer_worker.py nanodo|nanogpt|nanogpt_compiled CLONE \
    LAYERS WIDTH HEADS VOCABULARY TOKENS ROWS STEPS

Prints the median of seconds a step. Models and optimizers are the clone's, with a constant rate of
1e-4 (nanodo: a schedule of 1,000 steps) and a weight decay of 0.1; the steps around them are those
of its training loop, without logging. The first two steps are not counted.
"""

import statistics
import sys
import time
from collections.abc import Callable


def nanodo(layers, width, heads, vocabulary, length, rows) -> Callable[[], None]:
    """A step of nanodo: its TransformerDo, its optimizer, Optax's cross-entropy, one jax.jit."""
    import jax
    import optax
    from ml_collections import ConfigDict
    from nanodo import model, optimizer

    config = model.DoConfig(D=width, H=heads, L=length, N=layers, V=vocabulary, F=4 * width)
    module = model.TransformerDo(config)
    rates = {"init_learning_rate": 0.0, "peak_learning_rate": 1e-4, "final_learning_rate": 1e-5}
    settings = {"num_train_steps": 1000, "warmup_steps": 10, "weight_decay": 0.1}
    transform = optimizer.get_optimizer(ConfigDict(rates | settings))
    tokens_BL = jax.random.randint(jax.random.key(0), (rows, length), 0, vocabulary)

    def init(key):
        params = module.init(key, tokens_BL[:1])["params"]
        return params, transform.init(params)

    def train(state, tokens_BL):
        params, moments = state

        def loss(params):
            logits_BLV = module.apply({"params": params}, tokens_BL)
            losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits_BLV, tokens_BL)
            return losses.mean()

        value, gradients = jax.value_and_grad(loss)(params)
        updates, moments = transform.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    state = [jax.jit(init)(jax.random.key(1))]
    step = jax.jit(train, donate_argnums=0)

    def once():
        state[0], value = step(state[0], tokens_BL)
        jax.block_until_ready((state[0], value))

    return once


def nanogpt(layers, width, heads, vocabulary, length, rows, compiled=False) -> Callable[[], None]:
    """A step of nanoGPT: its GPT and its AdamW, without biases, on CPU; clipped at 1 as there."""
    import torch
    from model import GPT, GPTConfig

    sizes = {"n_layer": layers, "n_head": heads, "n_embd": width, "block_size": length}
    model = GPT(GPTConfig(**sizes, vocab_size=vocabulary, dropout=0.0, bias=False))
    optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), "cpu")
    model.train()
    run = torch.compile(model) if compiled else model
    tokens_BL = torch.randint(0, vocabulary, (rows, length))

    def once():
        _, loss = run(tokens_BL, tokens_BL)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return once


def main(peer: str, clone: str, *sizes: str) -> None:
    """Prints the median of seconds."""
    *shape, steps = map(int, sizes)
    sys.path.insert(0, clone)
    options = {"compiled": True} if peer == "nanogpt_compiled" else {}
    once = (nanodo if peer == "nanodo" else nanogpt)(*shape, **options)
    seconds = []
    for _ in range(steps + 2):
        begin = time.perf_counter()
        once()
        seconds.append(time.perf_counter() - begin)
    print(statistics.median(seconds[2:]))


if __name__ == "__main__":
    main(*sys.argv[1:])
