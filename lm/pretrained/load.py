"""The tensors of a file become the parameters of a model, one at a time.

L layers, V vocabulary, D width.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm.errors import InputError, shown
from lm.model.interface import Model
from lm.model.parameters import LAYERS, is_table, path_of
from lm.parallel.mesh import parameter_shardings
from lm.pretrained.families import FAMILIES
from lm.pretrained.family import Family
from lm.pretrained.source import Pretrained
from lm.pretrained.tensors import Tensor

# Names of a list that are shown.
_SHOWN = 5


def load_params(source: Pretrained, model: Model, mesh: Mesh) -> Any:
    """The parameters of `model` on a mesh, read from the files of `source`.

    A tensor is mapped, cut, converted to `model.param_dtype` and placed before the next is read:
    beside the parameters, host memory holds about two tensors. Each device gets its own part. Rows
    of the table (and of the head) that the files do not have are the mean of those that they have.

    Args:
      source: of `open_pretrained`.
      model: with the section of the source, and a vocabulary that is not smaller.
      mesh: where the parameters go.

    Raises:
      InputError: tensors that are missing, not known, of another shape or not finite.
    """
    config, family = model.config, FAMILIES[source.model_type]
    check_rows(source, model)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    shardings = parameter_shardings(mesh, shapes, model.axes())
    placed = {
        path_of(keys): (leaf, sharding)
        for (keys, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(shardings), strict=True
        )
    }
    tensors = known_tensors(source, family, family.tensors(config), config.layers)
    leaves = {}
    for tensor in tensors:
        layered = tensor.ours[0].startswith(f"{LAYERS}/")
        for layer in range(config.layers if layered else 1):
            parts = _read(source, tensor, layer, placed, config.vocab_size)
            for path, part in zip(tensor.ours, parts, strict=True):
                leaf, sharding = placed[path]
                if not layered:
                    leaves[path] = _place(part, leaf, sharding)
                    continue
                if path not in leaves:
                    leaves[path] = _zeros(leaf.shape, jnp.dtype(leaf.dtype), sharding)
                spec = NamedSharding(mesh, PartitionSpec(*sharding.spec[1:]))
                one = _place(part, leaf, spec)
                # Otherwise layers that are read faster than they are put pile up in host memory.
                leaves[path] = _put(sharding)(leaves[path], one, layer).block_until_ready()
    names = [path_of(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(shapes)]
    return jax.tree.unflatten(jax.tree.structure(shapes), [leaves[name] for name in names])


def check_rows(source: Pretrained, model: Model) -> None:
    """Raises InputError where the files have more rows of the table than the model."""
    rows = model.config.vocab_size
    if rows < source.vocab_size:
        raise InputError(
            f"{source.where}: its table has {source.vocab_size:,} rows, more than the {rows:,} of "
            f"this model; give data.vocab_size={source.vocab_size}"
        )


def grown_vocabulary(params: Any, model: Model, mesh: Mesh) -> Any:
    """`params` with as many rows of table and head as `model` has; new ones are the mean."""
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    shardings = parameter_shardings(mesh, shapes, model.axes())

    def grow(leaf, like):
        for axis, (size, wanted) in enumerate(zip(leaf.shape, like.shape, strict=True)):
            if size != wanted:
                mean = leaf.mean(axis, dtype=jnp.float32, keepdims=True).astype(leaf.dtype)
                leaf = jnp.concatenate([leaf, jnp.repeat(mean, wanted - size, axis)], axis)
        return leaf.astype(like.dtype)

    def grow_all(params):
        return jax.tree.map(grow, params, shapes)

    return jax.jit(grow_all, out_shardings=shardings)(params)


def known_tensors(
    source: Pretrained, family: Family, tensors: Sequence[Tensor], layers: int
) -> list[Tensor]:
    """`tensors` by the names of the source, which has each of them and no others.

    Raises:
      InputError: lists those that are missing and those that are not known.
    """
    if not any(name.startswith(family.prefix) for name in source.tensors):
        tensors = [t._replace(theirs=t.theirs.removeprefix(family.prefix)) for t in tensors]
    expected = {t.theirs.format(i): t for t in tensors for i in range(layers)}
    missing = [name for name in expected if name not in source.tensors]
    unknown = [
        name
        for name in source.tensors
        if name not in expected and not name.endswith((*family.buffers, *_tied(family, source)))
    ]
    if missing or unknown:
        lists = [_list("missing", missing), _list("not known", unknown)]
        raise InputError(f"{source.where}: tensors {'; '.join(filter(None, lists))}")
    return list(tensors)


def _tied(family: Family, source: Pretrained) -> tuple[str, ...]:
    # A copy of the table that some files of tied models have.
    return ("lm_head.weight", "embed_out.weight") if source.section["tied_head"] else ()


def _list(what: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{what}: {', '.join(map(shown, names[:_SHOWN]))}{more}"


def _read(source, tensor: Tensor, layer: int, placed: Mapping[str, Any], vocabulary: int):
    """The parameters in one tensor, each of the shape that the model has in one layer."""
    name = tensor.theirs.format(layer)
    shapes = [placed[path][0].shape for path in tensor.ours]
    if tensor.ours[0].startswith(f"{LAYERS}/"):
        shapes = [shape[1:] for shape in shapes]
    stored = source.tensors[name]
    grown = tensor.ours[0] in ("embedding/table", "head/kernel")
    axis = 0 if is_table(tensor.ours[0]) else 1
    if grown:
        shapes = [(*s[:axis], source.vocab_size, *s[axis + 1 :]) for s in shapes]
    if stored.shape != tensor.shape(shapes):
        raise InputError(
            f"{source.where}: {name} has the shape {list(stored.shape)}, and its config.json says "
            f"{list(tensor.shape(shapes))}"
        )
    whole = stored.read()
    if not np.isfinite(whole).all():
        raise InputError(f"{source.where}: {name} has values that are not finite")
    parts = tensor.split(whole, shapes)
    return [_grow(part, vocabulary, axis) for part in parts] if grown else parts


def _grow(part: np.ndarray, vocabulary: int, axis: int) -> np.ndarray:
    count = vocabulary - part.shape[axis]
    if not count:
        return part
    mean = part.mean(axis, dtype=np.float32, keepdims=True).astype(part.dtype)
    return np.concatenate([part, np.repeat(mean, count, axis)], axis)


def _place(part: np.ndarray, leaf: Any, sharding: NamedSharding) -> jax.Array:
    """One array on the mesh; every process gives its devices their parts."""
    return jax.make_array_from_callback(
        part.shape, sharding, lambda index: np.array(part[index], leaf.dtype, order="C")
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(shape, dtype, sharding):
    return jax.lax.with_sharding_constraint(jnp.zeros(shape, dtype), sharding)


@functools.cache
def _put(sharding: NamedSharding) -> Callable[..., jax.Array]:
    """(stack, one layer, its number) -> stack, in place."""

    def put(stack, one, layer):
        return jax.lax.dynamic_update_index_in_dim(stack, one, layer, 0)

    return jax.jit(put, donate_argnums=0, out_shardings=sharding)
