"""Annotations are checked while the tests run: types, shapes and dtypes of what goes in and out."""

from __future__ import annotations

import io
from typing import IO, Any, Self, TextIO

import jax
import jaxtyping
import numpy as np
from beartype import BeartypeConf, FrozenDict, beartype
from jaxtyping import Array, Int, Num, install_import_hook

PACKAGES = ("alignps_jax", "data_pipeline")

# NumPy's numbers and those that `jax.jit` traces are numbers; an int is a float, as for every type
# checker; `Self` can be told in a class only, and methods are checked one by one.
_NUMBERS = FrozenDict(
    {
        bool: bool | np.bool,
        int: int | np.integer | Int[Array, ""],
        float: float | int | np.number | Num[Array, ""],
        IO[bytes]: io.IOBase,
        TextIO: io.TextIOBase,
        Self: Any,
    }
)
checked = beartype(conf=BeartypeConf(hint_overrides=_NUMBERS))

_register = jax.tree_util.register_dataclass


def _register_unchecked(cls: Any, *fields: Any, **options: Any) -> Any:
    """As JAX does it, but trees are put together without `__init__`, hence without its check.

    What `jax.tree.map` and the transformations put in the place of arrays (None, axes, specs,
    arrays of other ranks) is none of the annotations' business.
    """
    if not cls.__module__.startswith(PACKAGES):
        return _register(cls, *fields, **options)
    data_fields, meta_fields = fields or (options["data_fields"], options["meta_fields"])

    def flatten(value: Any) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
        leaves = [(jax.tree_util.GetAttrKey(name), getattr(value, name)) for name in data_fields]
        return leaves, tuple(getattr(value, name) for name in meta_fields)

    def unflatten(meta: tuple[Any, ...], leaves: Any) -> Any:
        value = object.__new__(cls)
        fields = zip((*data_fields, *meta_fields), (*leaves, *meta), strict=True)
        for name, field in fields:
            object.__setattr__(value, name, field)
        return value

    jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
    return cls


def check_shapes() -> None:
    """Call it before the packages are imported.

    Functions of JAX take NumPy's arrays and numbers as well, so `Array` means any of these here,
    and templates of a state hold shapes in the place of arrays; the type checker tells all apart.
    """
    jax.tree_util.register_dataclass = _register_unchecked
    jaxtyping.Array = jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct
    install_import_hook(PACKAGES, "tests.shapes.checked")
