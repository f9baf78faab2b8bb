"""From a config to the pure functions and the data of a run; every check happens here, before
anything is compiled or written.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import jax
import optax
from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from lm.compression import phases as compression
from lm.compression.phases import Phases, Quantized, make_quantized, plan_phases
from lm.compression.widths import inline
from lm.data import batches, corpora, corruption, pairs, scores, tokenizers
from lm.model.config import ModelConfig, check_choice
from lm.model.interface import Model
from lm.model.trained import Trained
from lm.model.transformer import make_model
from lm.parallel.compiler import Options, mesh_options
from lm.parallel.mesh import RULES, check_batch, check_unsharded, make_mesh, share
from lm.planning.flops import flops_per_token
from lm.training.checks import (
    check_adaptation,
    check_mask_token,
    check_numbers,
    check_rollouts,
    check_splash,
)
from lm.training.make_objective import make_objective, preference_reading, weighting_names
from lm.training.optimizers import make_optimizer
from lm.training.state import (
    TrainState,
    average_as_model,
    init_loss,
    make_init,
    parameter_shapes,
    state_shardings,
)
from lm.training.step import (
    make_begin_quantized,
    make_change_widths,
    make_eval_step,
    make_train_step,
)
from lm.training.trainable import Trainable, make_packing, make_trainable, split
from objectives import Objective
from objectives.weighting import WEIGHTINGS
from objectives.weighting.base import per_document


class Experiment(NamedTuple):
    """What a config means, without its data.

    `init` makes a fresh train state from a random key, and optionally parameters. Jit it. It is one
    function, not a method, so that it is traced once however often its shapes are asked for.
    """

    config: ConfigDict
    mesh: Mesh | AbstractMesh
    model: Model
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    objective: Objective
    quantized: Quantized | None
    phases: Phases
    init: Callable[..., TrainState]
    trainable: Trainable
    compiler_options: Options

    def abstract_state(self) -> Any:
        """Shapes, dtypes and shardings of the train state, without allocating it."""
        state = jax.eval_shape(self.init, jax.random.key(0))
        shardings = state_shardings(self.mesh, self.model, state)
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
        )

    def train_step(
        self, quantized: bool = False, second_models: Mapping[str, Model] | None = None
    ) -> Any:
        """The train step of a phase: jitted, with the state's shardings, the old state donated."""
        step = make_train_step(
            self.model,
            self.optimizer,
            self.schedule,
            self.objective,
            self.config,
            self.quantized if quantized else None,
            second_models,
            self.trainable,
        )
        return jax.jit(
            step,
            out_shardings=(self._shardings(), None),
            donate_argnums=0,
            compiler_options=self.compiler_options,
        )

    def begin_quantized(self) -> Any:
        """(state) -> state at the start of the quantized phase, jitted, its input donated."""
        begin = make_begin_quantized(self.optimizer, self.quantized, self.config, self.trainable)
        return jax.jit(begin, out_shardings=self._shardings(), donate_argnums=0)

    def change_widths(self) -> Any:
        """(state, indices) -> state with layers on other widths, jitted, its input donated."""
        change = make_change_widths(self.quantized)
        return jax.jit(change, out_shardings=self._shardings(), donate_argnums=0)

    def eval_step(self, plain: bool = False) -> Any:
        """The evaluation step, jitted; with quantization it gives both losses, unless `plain`."""
        block_size = self.config.objective.block_size
        quantized = None if plain else self.quantized
        return jax.jit(make_eval_step(self.model, block_size, quantized, self.objective.loss))

    def usable(self, state: Any) -> tuple[Trained, bool]:
        """What to evaluate, and whether with quantization.

        That is the moving average where there is one. In the first phase the scales are those that
        the quantized phase would begin with now: its quantized loss is that of rounding to nearest.
        """
        trained = state.trained
        if self.config.train.ema_decay:
            trained = average_as_model(self.model, state.ema)
        if self.quantized is None:
            return trained, False
        if int(state.step) > self.phases.switch:
            return trained, True
        scales = compression.first_scales(self.quantized, trained.params)
        return trained._replace(scales=scales), False

    def plain(self, state: Any) -> Trained:
        """What to sample with: parameters on their grids in the quantized phase."""
        trained, quantized = self.usable(state)
        if not quantized:
            return trained
        return trained._replace(params=compression.on_grid(self.quantized, trained))

    def stored(self, state: Any) -> tuple[Trained, Quantized | None]:
        """`plain`, and what a forward pass does besides in the quantized phase.

        That is the rounding of activations, and of keys and values; None where nothing is left.
        """
        if self.quantized is None or not self.usable(state)[1]:
            return self.plain(state), None
        return self.plain(state), self.quantized.of_stored()

    def _shardings(self) -> Any:
        return jax.tree.map(lambda x: x.sharding, self.abstract_state())

    def references(self) -> tuple[str, ...]:
        """Names of the references that a step needs from elsewhere."""
        return tuple(dict.fromkeys((*self.objective.references, *self.objective.teachers)))

    def flops_per_token(self) -> int:
        """Model FLOPs of one training token."""
        shapes = parameter_shapes(self.model)
        return flops_per_token(
            self.model.config, shapes, self.config.data.sequence_length, self.trainable
        )


def build(
    config: ConfigDict, vocab_size: int, devices: Sequence[jax.Device] | int | None = None
) -> Experiment:
    """Checks a config and makes its functions, for all devices or for those given.

    A number of devices instead of a list makes an experiment to plan with, which cannot run.

    Raises:
      InputError: names the key that is wrong and what would be valid.
    """
    check_numbers(config)
    mesh = make_mesh(config.mesh.to_dict(), devices)
    options = mesh_options(mesh, config.train.compiler_options)
    check_batch(
        mesh, config.train.batch_size, config.train.accumulation, config.data.sequence_length
    )
    check_choice("data.packing", config.data.packing, ("concat", "best_fit"))
    objective = make_objective(config)
    check_mask_token(config, vocab_size)
    check_rollouts(config, objective)
    model = make_model(ModelConfig(vocab_size=vocab_size, **config.model), RULES)
    if config.model.attention == "splash":
        check_splash(model.config, mesh, config.data.sequence_length)
    shapes = parameter_shapes(model)
    if mesh.shape["fsdp"] * mesh.shape["tensor"] > 1:
        check_unsharded(mesh, shapes, model.axes(), config.mesh.unsharded_tolerance)
    quantized = make_quantized(config.quantization, shapes, model)
    scales = jax.eval_shape(quantized.first_scales, shapes) if quantized else ()
    check_adaptation(config)
    phases = plan_phases(config, sum(x.size for x in jax.tree.leaves(shapes)))
    loss = objective.loss
    of_loss = jax.eval_shape(lambda key: init_loss(model, loss, key), jax.random.key(0))
    trainable = make_trainable(config, shapes)
    live, _ = split(Trained(shapes, scales, of_loss), trainable)
    optimizer, schedule = make_optimizer(config, phases, live, loss.learning_rate)
    first_scales = quantized.first_scales if quantized else None
    ema = config.train.ema_decay > 0
    packing = make_packing(config, trainable)
    init = make_init(model, optimizer, objective, ema, first_scales, trainable, packing)
    return Experiment(
        config,
        mesh,
        model,
        optimizer,
        schedule,
        objective,
        quantized,
        phases,
        init,
        trainable,
        options,
    )


class Data(NamedTuple):
    """Train and validation text of a run, and the tokenizer of both."""

    train: tuple[corpora.Corpus, ...]
    validation: tuple[corpora.Corpus, ...]
    tokenizer: tokenizers.Tokenizer


def load_data(c: ConfigDict) -> Data:
    """Corpora and tokenizer of the `data` section.

    Raises:
      InputError: unknown or empty corpus, broken file, unknown tokenizer.
    """
    train, validation = (_load(c, split) for split in ("train", "validation"))
    # Of the text as it was: runs on more and on less corrupted text have the same tokens.
    tokenizer = tokenizers.load(
        c.tokenizer,
        c.vocab_size,
        train,
        directory=c.directory,
        end_of_text=c.end_of_text,
        beginning_of_text=c.beginning_of_text,
    )
    train = tuple(corruption.corrupt(corpus, c.corrupted) for corpus in train)
    return Data(train, validation, tokenizer)


def vocabulary(c: ConfigDict, tokenizer: tokenizers.Tokenizer) -> int:
    """Rows of the table: `data.vocab_size` where it is more than the tokenizer has entries."""
    return max(c.vocab_size, tokenizer.vocab_size)


def _load(c: ConfigDict, split: str) -> tuple[corpora.Corpus, ...]:
    return corpora.load(
        c.corpus,
        split,
        directory=c.directory,
        validation_fraction=c.validation_fraction,
    )


def resolve(config: ConfigDict, train: Sequence[corpora.Corpus] | None = None) -> ConfigDict:
    """The config with what only files say: the lengths of tables of documents, and widths.

    Without `train` the corpus is loaded where it is asked.

    Raises:
      InputError: unknown or empty corpus, or a broken file.
    """
    plan = inline(config.quantization.widths)
    if plan != config.quantization.widths:
        config = config.copy_and_resolve_references()
        config.quantization.widths = plan
    names = [name for name in weighting_names(config) if name in WEIGHTINGS]
    open_keys = [
        (name, key)
        for name in names
        for key in per_document(WEIGHTINGS[name])
        if not config.objective[name][key]
    ]
    if not open_keys:
        return config
    train = _load(config.data, "train") if train is None else train
    resolved = config.copy_and_resolve_references()
    for name, key in open_keys:
        resolved.objective[name][key] = sum(len(corpus.documents) for corpus in train)
    return resolved


def usable_records(config: ConfigDict, objective: Objective, data: Data) -> pairs.Usable | None:
    """The records of training that an objective of preferences can use; None for other objectives.

    Raises:
      InputError: there are none, or none in the validation split, or the corpora are others.
    """
    reading = preference_reading(config, objective)
    if reading is None:
        return None
    length = config.data.sequence_length
    for texts in (data.train, data.validation):
        pairs.check_kinds(texts, reading)
    found = pairs.usable(data.train, data.tokenizer, reading, length)
    pairs.usable(data.validation, data.tokenizer, reading, length)
    return found


def reading_of(config: ConfigDict, texts: Sequence[corpora.Corpus]) -> pairs.Reading | None:
    """How these texts are read; None where they, or the objective, are no preferences.

    So a model that was trained on preferences can be evaluated and quantized on other text.
    """
    if not any(corpus.preferences for corpus in texts):
        return None
    return preference_reading(config, make_objective(config))


def train_batches(
    config: ConfigDict,
    data: Data,
    stored: Mapping[str, Sequence[scores.Stored]] | None = None,
    mesh: Mesh | None = None,
    found: pairs.Usable | None = None,
) -> grain.IterDataset:
    """The endless stream of this process's training rows, with stored references by name.

    Without a mesh, this process reads all of them; without `found`, of `usable_records`, it looks
    for usable records itself.
    """
    c = config.data
    index, count = share(mesh) if mesh else (0, 1)
    return batches.train_batches(
        data.train,
        data.tokenizer,
        batch_size=config.train.batch_size,
        sequence_length=c.sequence_length,
        packing=c.packing,
        seed=config.train.seed,
        mixture_weights=tuple(c.mixture_weights),
        shuffle_rows=c.shuffle_rows,
        scores=stored,
        workers=c.workers,
        process_index=index,
        process_count=count,
        streams=c.streams,
        reading=reading_of(config, data.train),
        found=found,
    )


def evaluation_batches(
    config: ConfigDict,
    texts: tuple[corpora.Corpus, ...],
    tokenizer: tokenizers.Tokenizer,
    mesh: Mesh | None = None,
) -> grain.IterDataset:
    """Every target of the given corpora once, in order; of them, this process's rows.

    Without a mesh, those are all.
    """
    index, count = share(mesh) if mesh else (0, 1)
    return batches.evaluation_batches(
        texts,
        tokenizer,
        batch_size=config.train.batch_size // config.train.accumulation,
        sequence_length=config.data.sequence_length,
        packing=config.data.packing,
        process_index=index,
        process_count=count,
        reading=reading_of(config, texts),
    )
