"""Kinds of parameters: every parameter of every model has one, and a stranger is an error."""

import jax
import pytest
import tiny

from lm.errors import InputError
from lm.model.config import CHOICES
from lm.model.interface import LayerProducts, Tokens
from lm.model.parameters import (
    KINDS,
    LAYERS,
    MATRICES_BY_INPUT,
    is_table,
    layer_matrices,
    parameter_kind,
    parameter_kinds,
    path_of,
)


def shapes(**overrides):
    model = tiny.model(**overrides)
    return jax.eval_shape(model.init, jax.random.key(0))


@pytest.mark.parametrize("embedding", CHOICES["embedding"])
def test_every_parameter_has_a_kind(embedding):
    params = shapes(embedding=embedding, activation="swiglu", qk_norm=True, norm="rmsnorm")
    kinds = parameter_kinds(params)
    assert set(jax.tree.leaves(kinds)) <= set(KINDS)
    assert kinds["head"]["kernel"] == "head"
    assert kinds["layers"]["attention"]["query_norm"]["scale"] == "vector"
    leaves = jax.tree_util.tree_leaves_with_path(params)
    tables = [path_of(keys) for keys, _ in leaves if is_table(path_of(keys))]
    assert bool(tables) == embedding.startswith("learned")
    # Kinds agree with shapes: what is stacked over layers and has two more axes is a matrix.
    for keys, leaf in leaves:
        of_layers = path_of(keys).startswith(f"{LAYERS}/")
        matrix = parameter_kind(path_of(keys)) == "matrix"
        assert matrix == (of_layers and len(leaf.shape) == 3), path_of(keys)


def test_matrices_come_in_the_order_in_which_a_layer_reads_them():
    params = shapes(activation="swiglu")
    seen = []

    def product(path, x_BTI, w_IO, scale):
        seen.append(path.removeprefix("layers/"))
        return x_BTI @ w_IO

    model, batch = tiny.model(activation="swiglu"), tiny.batch(1, 8)
    inputs = Tokens(batch["tokens"], batch["positions"], batch["segment_ids"])
    jax.eval_shape(lambda p: model.apply(p, inputs, products=LayerProducts(product)).hidden, params)
    assert layer_matrices(params["layers"]) == list(dict.fromkeys(seen))
    assert layer_matrices(shapes()["layers"]) == [n for n in seen[:7] if n != "mlp/gate"]
    assert sum(map(len, MATRICES_BY_INPUT)) == len(set(seen))


def test_a_stranger_is_named():
    layers = {"mlp": {"router": jax.ShapeDtypeStruct((2, 32, 4), "float32")}}
    for call in (
        lambda: parameter_kind("layers/mlp/router"),
        lambda: parameter_kinds({"layers": layers}),
        lambda: layer_matrices(layers),
    ):
        with pytest.raises(InputError, match="layers/mlp/router is of no known kind"):
            call()
