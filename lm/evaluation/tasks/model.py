"""A model as the tasks ask it: on its mesh, compiled once however many tasks there are."""

from collections.abc import Callable
from typing import Any

from lm.compression.phases import Quantized
from lm.data.tokenizers import Tokenizer
from lm.errors import InputError
from lm.evaluation.tasks.encoding import Encoder, adds_beginning
from lm.evaluation.tasks.evaluate import Machine
from lm.evaluation.tasks.scoring import Scorer
from lm.evaluation.tasks.writing import Writer
from lm.model.trained import Trained
from lm.training.experiment import Experiment

BEGINNINGS = ("auto", "always", "empty")

# Tokens that a model of others reads at most, where it could read more: lm_eval's default.
_LONGEST = 2048


class Programs:
    """The programs of one run in one of its phases; `machine` binds them to parameters.

    Args:
      built: the run.
      quantized: what a forward pass does besides; None is nothing.
      encoder: of its text.
    """

    def __init__(self, built: Experiment, quantized: Quantized | None, encoder: Encoder):
        self._encoder = encoder
        loss, model, mesh = built.objective.loss, built.model, built.mesh
        options = {"loss": loss, "quantized": quantized}
        block_size = built.config.objective.block_size
        self._scorers = {
            greedy: Scorer(model, mesh, block_size=block_size, greedy=greedy, **options)
            for greedy in (False, True)
        }
        self._writer = Writer(model, mesh, encoder.tokenizer, **options)

    def machine(self, trained: Trained, between: Callable[[], Any] = lambda: None) -> Machine:
        """The model with these parameters; `between` is called before each batch."""

        def score(texts, greedy):
            return self._scorers[greedy](trained, texts, between)

        def write(asked):
            return self._writer(trained, asked, between)

        return Machine(self._encoder, score, write)


def encoder_of(
    built: Experiment,
    tokenizer: Tokenizer,
    *,
    trained_here: bool,
    beginning: str = "auto",
    length: int = 0,
) -> Encoder:
    """How the texts of tasks are encoded for a model.

    Args:
      built: the run.
      tokenizer: of its text.
      trained_here: whether it took a step of a training of this repository, where every document
        opens with the beginning of text.
      beginning: `always` opens every prompt with the beginning of text, `empty` only one without
        any tokens; `auto` always for what was trained here, and as its tokenizer.json says for a
        model of others.
      length: tokens that the model reads at most; 0 is data.sequence_length for what was trained
        here, and model.max_positions, at most 2048, for a model of others.

    Raises:
      InputError: another beginning, or a length that the model cannot read.
    """
    if beginning not in BEGINNINGS:
        raise InputError(f"beginning={beginning} is not one of: {', '.join(BEGINNINGS)}")
    config = built.model.config
    if length < 0 or (config.positions == "learned" and length > config.max_positions):
        raise InputError(
            f"length={length} must be from 1 to {config.max_positions}; 0 is automatic"
        )
    if not length:
        whole = min(config.max_positions, _LONGEST)
        length = built.config.data.sequence_length if trained_here else whole
    auto = trained_here or adds_beginning(tokenizer)
    opens = {"always": True, "empty": False, "auto": auto}[beginning]
    return Encoder(tokenizer, opens, length, config.vocab_size)
