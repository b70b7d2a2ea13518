"""Exact search among a million embeddings, against the matrix product that it contains."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from alignps_jax.experiments.benchmark.measure import Timing, peak_memory, time_in_turns
from alignps_jax.gallery.nearest import top_k
from tests.benchmark.measure import Context, Row

GALLERY = 1_000_000
QUERIES = 100
DIM = 256
K = 10


def rows(context: Context) -> Iterator[Row]:
    """The plain product, whose result holds every similarity, and the search."""
    count = 1000 if context.quick else GALLERY
    keys = jax.random.split(jax.random.key(0))
    queries, gallery = unit_rows(keys[0], QUERIES), unit_rows(keys[1], count)
    programs = {
        "product": jax.jit(similarities).lower(queries, gallery).compile(),
        "search": jax.jit(partial(top_k, k=K)).lower(queries, gallery).compile(),
    }
    functions = {name: partial(program, queries, gallery) for name, program in programs.items()}
    if context.torch is not None:
        torch = context.torch
        mine, all_of_them = (torch.from_dlpack(x) for x in (queries, gallery))
        functions["torch"] = context.finished(
            lambda: torch.topk(torch.matmul(mine, all_of_them.T), K)
        )
    times: dict[str, Timing | None] = {"torch": None}
    times |= time_in_turns(functions, runs=context.runs)
    memory = {name: peak_memory(program) for name, program in programs.items()}
    flops = 2.0 * QUERIES * count * DIM
    shape = f"{QUERIES} queries, {count:,} embeddings of {DIM}"
    yield Row(
        "search",
        f"matrix product: {shape}",
        times["product"],
        flops=flops,
        memory=memory["product"],
    )
    yield Row(
        "search",
        f"top {K}: {shape}",
        times["search"],
        floor=times["product"].median,
        torch=times["torch"],
        flops=flops,
        memory=memory["search"],
        goal="≤ 1.3 times the matrix product, memory ≤ 1.5 times the embeddings",
        note=f"memory {memory['search'] / gallery.nbytes:.3f} times the embeddings",
    )


def similarities(queries: Float[Array, "Q D"], gallery: Float[Array, "N D"]) -> jax.Array:
    """All of them, as exactly as `top_k` computes them."""
    return jnp.matmul(queries, gallery.T, precision=lax.Precision.HIGHEST)


@partial(jax.jit, static_argnums=1)
def unit_rows(key: Array, count: int) -> Float[Array, "N D"]:
    """Random embeddings of length one."""
    rows = jax.random.normal(key, (count, DIM))
    return rows / jnp.linalg.norm(rows, axis=1, keepdims=True)
