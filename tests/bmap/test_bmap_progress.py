"""progress=True: a bar that counts each chunk once."""

import sys

import jax
import jax.numpy as jnp
import pytest
from bmap_cases import assert_close, random

from batchrules._bmap import bmap

SIZE, BATCH = 13, 5  # 3 and twice 5


def finish(result):
    jax.block_until_ready(result)
    jax.effects_barrier()
    return result


def check(counting_bars, number):
    assert [(bar.n, bar.total, bar.closed) for bar in counting_bars] == [(3, 3, True)] * number


@pytest.mark.parametrize("jit", [False, True])
def test_each_chunk_counts_once(counting_bars, jit):
    ours = bmap(jnp.sin, batch_size=BATCH, progress=True)
    ours = jax.jit(ours) if jit else ours
    for number in (1, 2):  # the second run has a bar of its own
        assert_close(finish(ours(random(SIZE))), jnp.sin(random(SIZE)))
        check(counting_bars, number)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("transform", [jax.grad, jax.value_and_grad])
def test_under_grad(counting_bars, transform, checkpoint):
    ours = bmap(jnp.sin, batch_size=BATCH, progress=True, checkpoint=checkpoint)
    finish(jax.jit(transform(lambda a: jnp.sum(ours(a))))(random(SIZE)))
    check(counting_bars, 1)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_what_is_linear_has_no_bar(counting_bars, checkpoint):
    ours = bmap(jnp.sin, batch_size=BATCH, progress=True, checkpoint=checkpoint)
    _, linear = jax.linearize(jax.jit(ours), random(SIZE))
    assert_close(finish(linear(jnp.ones(SIZE))), jnp.cos(random(SIZE)))
    check(counting_bars, 1)


def test_under_vmap(counting_bars):
    finish(jax.jit(jax.vmap(bmap(jnp.sin, batch_size=BATCH, progress=True)))(random((4, SIZE))))
    check(counting_bars, 1)


def test_with_a_reduction_and_a_description(counting_bars):
    finish(bmap(jnp.sin, batch_size=BATCH, progress="rendering", reduce="sum")(random(SIZE)))
    check(counting_bars, 1)
    assert (counting_bars[0].desc, counting_bars[0].unit) == ("rendering", "chunk")


def test_one_chunk(counting_bars):
    assert_close(finish(bmap(jnp.sin, batch_size=100, progress=True)(random(SIZE))), jnp.sin(random(SIZE)))
    assert [(bar.n, bar.total, bar.closed) for bar in counting_bars] == [(1, 1, True)]


@pytest.mark.usefixtures("counting_bars")
def test_it_costs_nothing_when_off():
    with_bar, without = (
        jax.jit(bmap(jnp.sin, batch_size=BATCH, progress=progress)).lower(random(SIZE)).as_text()
        for progress in (True, False)
    )
    assert "callback" in with_bar
    assert "callback" not in without


def test_without_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match=r"pip install 'batchrules\[progress\]'"):
        bmap(jnp.sin, batch_size=BATCH, progress=True)
    with pytest.raises(ImportError, match=r"pip install 'batchrules\[progress\]'"):
        bmap(batch_size=BATCH, progress="rendering")
