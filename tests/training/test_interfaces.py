"""Every token interface through training: devices, memory, checkpoints, decoding."""

import functools
import math
import re

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from etils import epath

from configs.papers import binary_codes
from lm.model import decoding, embeddings
from lm.model.config import ModelConfig
from lm.model.interface import Tokens
from lm.model.parameters import parameter_kinds
from lm.model.trained import Trained
from lm.model.transformer import make_model
from lm.parallel.mesh import batch_sharding
from lm.planning.flops import flops_per_token
from lm.runs.checkpoints import Checkpoints
from lm.training import experiment
from lm.training.forward import make_training_statistics
from lm.training.gradients import make_gradients
from lm.training.state import parameter_shapes
from lm.training.step import make_train_step
from objectives.weighted import weighted

VOCAB = 64  # divides over two devices
TABLE_FREE = ("binary", "affine", "random_codes", "gaussian")


def build(devices=1, **overrides):
    overrides = {"mesh__data": 1, "data__sequence_length": 16, "model__layers": 1} | overrides
    return experiment.build(tiny.config(**overrides), VOCAB, jax.devices()[:devices])


def compile_step(run):
    with jax.set_mesh(run.mesh):
        where = batch_sharding(run.mesh)
        b = {
            k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=where)
            for k, v in tiny.batch(rows=8).items()
        }
        step = make_train_step(run.model, run.optimizer, run.schedule, run.objective, run.config)
        return jax.jit(step, donate_argnums=0).lower(run.abstract_state(), b).compile()


def collectives(compiled):
    names = ("all-gather", "all-to-all", "collective-permute")
    text = compiled.as_text()
    return {name: len(re.findall(rf" {name}(?:-start)?\(", text)) for name in names}


def largest_constant(compiled):
    shapes = re.findall(r"= \w+\[([\d,]*)\]\S* constant\(", compiled.as_text())
    return max(math.prod(int(n) for n in shape.split(",") if n) for shape in shapes)


def arrays_of_the_interface(run):
    """Parameters and moments, without the counters that a group has even when it is empty."""
    leaves = jax.tree_util.tree_leaves_with_path(run.abstract_state())
    return sum("embedding" in jax.tree_util.keystr(path) and x.ndim > 0 for path, x in leaves)


MESH = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}


@pytest.fixture(scope="module")
def bare():
    """The step of a model whose input is the id itself: no interface."""

    class Bare(embeddings.TokenCodes):
        def __call__(self, ids_BT):
            return ids_BT[..., None] * jnp.linspace(0.0, 1.0, self.config.width)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(embeddings.INTERFACES, "binary", Bare)
        return compile_step(build(8, model__embedding="binary", **MESH))


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE_FREE)
def test_a_table_free_interface_adds_nothing_to_the_compiled_step(name, bare):
    """No collective, no constant larger than a vector, no parameter and no optimizer state."""
    run = build(8, model__embedding=name, **MESH)
    compiled = compile_step(run)
    assert collectives(compiled) == collectives(bare)
    assert largest_constant(compiled) <= 32 < VOCAB * 32
    assert arrays_of_the_interface(run) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["learned", "learned_low_rank", "projected"])
def test_a_table_is_seen_in_the_compiled_step(name, bare, capfd):
    """Negative control; and XLA does not give up on the sharding of the lookup."""
    run = build(8, model__embedding=name, **MESH)
    compiled = compile_step(run)
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
    assert collectives(compiled)["all-gather"] > collectives(bare)["all-gather"]
    matrices = {"learned": 1, "learned_low_rank": 2, "projected": 1}[name]
    assert arrays_of_the_interface(run) == 3 * matrices
    table = run.abstract_state().trained.params["embedding"]
    spec = next(iter(table.values())).sharding.spec
    assert any(spec), "nothing of the table is sharded"


def test_code_heads_compile_on_a_mesh(capfd):
    run = build(8, model__embedding="affine", model__code_head=True, **MESH)
    compiled = compile_step(run)
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
    assert largest_constant(compiled) <= 32
    assert "head" not in run.abstract_state().trained.params


def state_bytes(run):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(run.abstract_state()))


def test_the_table_is_three_times_in_the_train_state():
    sizes = {
        name: state_bytes(build(model__embedding=name, model__width=48))
        for name in (*TABLE_FREE, "learned")
    }
    assert {sizes["learned"] - sizes[name] for name in TABLE_FREE} == {3 * VOCAB * 48 * 4}


def batch(rows=8):
    b = tiny.batch(rows=rows)
    return {**b, "tokens": b["tokens"] % VOCAB}


@pytest.fixture(
    scope="module", params=tiny.mostly_slow(embeddings.INTERFACES, ("learned", "random_codes"))
)
def run(request):
    return build(model__embedding=request.param, model__embedding_rank=8)


@pytest.fixture(scope="module")
def state(run):
    with jax.set_mesh(run.mesh):
        return jax.jit(run.init)(jax.random.key(0))


@pytest.mark.slow
def test_accumulation_gives_the_same_gradients(run, state):
    b, grads = batch(), {}
    for accumulation in (1, 4):
        objective = weighted(z_loss=0.1)
        statistics = make_training_statistics(run.model, 32, objective)
        compute = make_gradients(statistics, objective, accumulation)
        with jax.set_mesh(run.mesh):
            grads[accumulation], _, _ = jax.jit(compute)(state.trained, b, (), jnp.zeros((), int))
    for x, y in zip(*(jax.tree.leaves(g) for g in grads.values()), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 * np.abs(y).max())
        assert np.abs(y).max() > 0


@pytest.mark.slow
def test_decoding_continues_as_the_whole_text_would(run, state):
    prompt = batch()["tokens"][:2, :5]
    generate = functools.partial(decoding.generate, run.model, steps=4, temperature=0)
    params = state.trained.params
    with jax.set_mesh(run.mesh):
        out = jax.jit(generate)(params, prompt, jnp.ones_like(prompt), jax.random.key(0))
        text = jnp.concatenate([prompt, out], axis=1)
        positions = jnp.broadcast_to(jnp.arange(9), text.shape)
        forward = jax.jit(
            lambda p: run.model.apply(p, Tokens(text, positions, jnp.ones_like(text))).hidden
        )
        logits = forward(params) @ run.model.head(params)
    np.testing.assert_array_equal(out, jnp.argmax(logits[:, 4:-1], axis=-1))


def test_a_checkpoint_restores_the_state(run, state, tmp_path):
    def iterator():
        return iter(grain.MapDataset.range(3).to_iter_dataset())

    written = Checkpoints(epath.Path(tmp_path), print)
    written.save(1, state, iterator(), {})
    written.close()
    read = Checkpoints(epath.Path(tmp_path), print, read_only=True)
    with jax.set_mesh(run.mesh):
        restored, _ = read.restore(run.abstract_state(), iterator())
    read.close()
    jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_every_parameter_has_an_optimizer(run, state):
    groups = parameter_kinds(state.trained.params)
    assert set(jax.tree.leaves(groups.get("embedding", {}))) <= {"embedding"}
    assert ("embedding" in groups) == (run.model.config.embedding not in TABLE_FREE)


def test_muon_leaves_the_matrices_of_an_interface_to_adam():
    """Their update is near the sign of the gradient; Muon's would have singular values of one."""
    options = {"model__embedding": "learned_low_rank", "model__embedding_rank": 8}
    run = build(**options, optimizer__name="muon")
    params = jax.eval_shape(run.model.init, jax.random.key(0))
    params = Trained(jax.tree.map(lambda x: jnp.zeros(x.shape), params))
    grads = jax.tree.map(
        lambda x: jnp.asarray(np.random.default_rng(0).normal(size=x.shape), jnp.float32), params
    )
    updates, _ = jax.jit(run.optimizer.update)(grads, run.optimizer.init(params), params)
    for update, grad in zip(
        *(jax.tree.leaves(t.params["embedding"]) for t in (updates, grads)), strict=True
    ):
        signs = -np.sign(grad)
        assert np.corrcoef(signs.ravel(), np.asarray(update).ravel())[0, 1] > 0.98
    assert optax.tree.norm(updates.params["layers"]) > 0


MATRICES = 32 * 12 * 1024**2 + 65_536 * 1024


@pytest.mark.parametrize(
    ("arm", "count"),
    [("learned", MATRICES + 67_108_864), ("binary", MATRICES), ("affine", MATRICES)],
)
def test_the_paper_s_models_have_its_number_of_parameters(arm, count):
    assert MATRICES == 469_762_048
    c = binary_codes.get_config(arm)
    config = ModelConfig(vocab_size=c.data.vocab_size, **c.model)
    shapes = parameter_shapes(make_model(config))
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    assert sum(math.prod(x.shape) for p, x in leaves if p[-1].key != "scale") == count
    assert config.num_bits == 16
    # The table is looked up, not multiplied: the FLOPs of a token are the same.
    assert flops_per_token(config, shapes, 1024) == 6 * MATRICES + 12 * 32 * 1024 * 1024
    tokens = c.train.steps * c.train.batch_size * c.data.sequence_length
    assert tokens == pytest.approx(17e9, rel=1e-3)


@pytest.mark.parametrize("arm", binary_codes.ARMS)
def test_the_paper_s_configs_build(arm):
    for argument in (arm, f"{arm},small"):
        config = binary_codes.get_config(argument)
        assert config.model.embedding == arm
        run = experiment.build(config, config.data.vocab_size, jax.devices())
        assert run.model.config.own_head
    with pytest.raises(LookupError, match="learned, binary, affine"):
        binary_codes.get_config(arm + ",tiny")


def test_flops_count_what_is_multiplied():
    def flops(**overrides):
        model = tiny.model(**overrides)
        return flops_per_token(model.config, parameter_shapes(model), 16)

    head = tiny.VOCAB * 32
    plain = flops(embedding="binary")
    assert flops() == flops(tied_head=True) == plain
    assert flops(embedding="binary", code_head=True) == plain - 2 * head
    assert flops(embedding="projected") == plain + 6 * 6 * 32
    assert flops(embedding="learned_low_rank", embedding_rank=8) == plain + 6 * 8 * 32
