"""Loss, perplexity and bits per byte of a trained run on a split of its corpus, or on other text.

python -m launch.evaluate --model=runs/quickstart
python -m launch.evaluate --model=runs/quickstart/int4.safetensors
"""

from launch import command, workdir


def main() -> None:
    """Evaluates and prints one line a figure."""
    split = command.split("validation")
    command.use_compilation_cache()
    import jax

    from lm.data import corpora
    from lm.evaluation import perplexity
    from lm.training import experiment

    loaded = workdir.load_chosen()
    c = loaded.config
    texts = corpora.load(
        command.CORPUS.value or c.data.corpus,
        split,
        directory=c.data.directory,
        validation_fraction=c.data.validation_fraction,
    )
    with jax.set_mesh(loaded.run.mesh):
        trained, quantized = loaded.run.usable(loaded.state)
        score = perplexity.evaluate(
            loaded.run.eval_step(),
            trained,
            experiment.evaluation_batches(c, texts, loaded.tokenizer),
            loaded.run.mesh,
            quantized=quantized,
        )
    print(f"step {loaded.step}, {split} split of {command.CORPUS.value or c.data.corpus}")
    print(f"loss: {score.loss:.4f} nats/token over {score.weight_sum:,.0f} tokens")
    if score.quantized_loss is not None:
        print(f"in full precision: {score.full_precision_loss:.4f}")
        print(f"quantized: {score.quantized_loss:.4f}")
    print(f"perplexity: {score.perplexity:.4f}")
    print(f"bits per byte: {score.bits_per_byte:.4f}")


if __name__ == "__main__":
    command.run(main)
