"""A model for lm_eval, the evaluation harness of others, 0.4.13 or newer (extra `eval`).

launch.harness says where models come from. lm_eval is imported by `register` alone.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from lm.data.templates import Message
from lm.data.tokenizers import Tokenizer
from lm.errors import InputError, shown
from lm.evaluation.tasks.evaluate import total
from lm.evaluation.tasks.model import Programs, encoder_of
from lm.evaluation.tasks.writing import Asked
from lm.training.experiment import Experiment

# Tokens of an answer of which a task does not say how long it may be: lm_eval's default.
_TOKENS = 256

# Names of the most tokens of an answer, the first of which counts, as in lm_eval.
_MOST_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class Backend:
    """What lm_eval asks of a model, without lm_eval.

    Args:
      run: of the model.
      tokenizer: its tokenizer.
      state: its train state.
      step: that the state is of; 0 for a model that others have trained.
      beginning, max_length: see `encoder_of`.

    Raises:
      InputError: an argument that is not valid.
    """

    def __init__(
        self,
        run: Experiment,
        tokenizer: Tokenizer,
        state: Any,
        step: int,
        beginning: str = "auto",
        max_length: int = 0,
    ):
        self._mesh = run.mesh
        self.encoder = encoder_of(
            run, tokenizer, trained_here=step > 0, beginning=beginning, length=max_length
        )
        with jax.set_mesh(self._mesh):
            trained, quantized = run.stored(state)
            self._machine = Programs(run, quantized, self.encoder).machine(trained)

    @property
    def template(self) -> str:
        """The source of the chat template, for lm_eval's record."""
        return self.encoder.tokenizer.chat.source

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Of each (context, continuation): log p in nats, and whether it would be written."""
        texts = [self.encoder.pair(*pair) for pair in pairs]
        with jax.set_mesh(self._mesh):
            return [(total(one), one.greedy) for one in self._machine.score(texts, True)]

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """Log p of each text in nats, in windows that follow one another."""
        windows = [list(self.encoder.windows(text)) for text in texts]
        with jax.set_mesh(self._mesh):
            scored = iter(self._machine.score([one for each in windows for one in each], False))
        return [sum(total(next(scored)) for _ in each) for each in windows]

    def generate_until(self, asked: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """The greedy answer to each (context, options of generation).

        Raises:
          InputError: the options ask for draws, or leave no room for a context.
        """
        rows = [self._asked(context, options) for context, options in asked]
        with jax.set_mesh(self._mesh):
            return self._machine.write(rows)

    def chat(self, history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a chat by the model's template; from now on contexts are such texts.

        Raises:
          InputError: the template cannot render the messages.
        """
        self.encoder.read_chats()
        messages = [Message(one["role"], one["content"]) for one in history]
        return self.encoder.tokenizer.chat.render(messages, add_generation_prompt)

    def _asked(self, context: str, options: Mapping[str, Any]) -> Asked:
        if options.get("do_sample") or float(options.get("temperature") or 0):
            raise InputError(
                f"generation_kwargs {shown(dict(options))}: the model nibble answers greedily; "
                "valid: do_sample: false, temperature: 0"
            )
        given = (options[name] for name in _MOST_TOKENS if options.get(name) is not None)
        tokens = int(next(given, _TOKENS))
        room = self.encoder.length - tokens
        if room < 1:
            raise InputError(
                f"max_gen_toks={tokens} leaves no room for a context in the {self.encoder.length} "
                "tokens that the model reads; valid: --gen_kwargs max_gen_toks=N, or a larger "
                "max_length of --model_args"
            )
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else until
        ids = self.encoder.prompt(context)[-room:]
        return Asked(ids, tuple(filter(None, until)), tokens)


def register(load: Callable[[str, int | None], Any]) -> type:
    """Makes the model `nibble` known to lm_eval, once; returns its class.

    Args:
      load: (path, step) -> something with the `run`, `tokenizer`, `state` and `step` of a model.

    Raises:
      InputError: lm_eval is not installed.
    """
    try:
        from lm_eval.api.model import LM
        from lm_eval.api.registry import register_model
    except ImportError as error:
        raise InputError(
            f"lm_eval cannot be imported ({error}): pip install 'nibble-lm[eval]'"
        ) from None

    @register_model("nibble")
    class Nibble(LM):
        """`Backend` for lm_eval; of the other arguments that it hands over none is used."""

        def __init__(
            self,
            model: str,
            step: int | None = None,
            beginning: str = "auto",
            max_length: int = 0,
            batch_size: Any = None,
            max_batch_size: Any = None,
            device: Any = None,
        ):
            super().__init__()
            found = load(str(model), step)
            self._name = str(model).replace("/", "__")
            parts = found.run, found.tokenizer, found.state, found.step
            self._backend = Backend(*parts, beginning, max_length)

        def loglikelihood(self, requests, disable_tqdm=False):
            return self._kept(self._backend.loglikelihood, "loglikelihood", requests)

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            texts = [request.args[0] for request in requests]
            found = self._backend.loglikelihood_rolling(texts)
            for request, answer in zip(requests, found, strict=True):
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
            return found

        def generate_until(self, requests, disable_tqdm=False):
            return self._kept(self._backend.generate_until, "generate_until", requests)

        def apply_chat_template(self, chat_history, add_generation_prompt=True):
            return self._backend.chat(chat_history, add_generation_prompt)

        def chat_template(self, chat_template=False):
            return self._backend.template if chat_template else None

        @property
        def tokenizer_name(self):
            return self._name

        def _kept(self, function, name, requests):
            found = function([request.args for request in requests])
            for request, answer in zip(requests, found, strict=True):
                self.cache_hook.add_partial(name, request.args, answer)
            return found

    return Nibble
