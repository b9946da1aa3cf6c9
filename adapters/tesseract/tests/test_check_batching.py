"""Tesseracts under the kit that users get: batches, nested batches and derivatives against single calls."""

import pytest
from twins import NUMBERS, SS, XS, call

from batchrules.testing import BatchDisagreement, check_batching


@pytest.mark.parametrize("method", ["auto", "expand_dims"])
def test_a_recipe(recipe, method):
    function = call(recipe.url, vmap_method=method)
    report = check_batching(function, XS[0], SS[0], in_axes=[(0, None), (0, 0)], endpoints=("vjp",))
    assert report.counts["nested vmap"] > 0


def test_one_in_this_process(local):
    function = call(local("recipe"), vmap_method="auto")
    check_batching(function, XS[0], SS[0], in_axes=[(None, 0)], endpoints=("jvp", "vjp"))


def test_a_number_that_lines_up_with_the_wrong_axis_is_found(recipe):
    function = call(recipe.url, vmap_method="broadcast_all", verify=False)
    with pytest.raises(BatchDisagreement, match="lines up with the wrong axis"):
        check_batching(function, XS[0], NUMBERS[0], in_axes=[(0, 0)], endpoints=())


def test_auto_never_lines_it_up_wrongly(recipe):
    check_batching(call(recipe.url, vmap_method="auto"), XS[0], NUMBERS[0], in_axes=[(0, 0), (0, None)], endpoints=())
