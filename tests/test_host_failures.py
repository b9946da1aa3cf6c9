"""Foreign code that fails: what the error says, how the original exception is had back, and what goes on after it."""

import concurrent.futures
import contextlib
import itertools
import re
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from failing import (
    F64,
    MESSAGE,
    METHODS,
    VECTOR,
    VECTORISED,
    WAYS,
    XS,
    ReactorError,
    always,
    fails_at,
    near_two,
    nested,
    on_every_dispatch,
    solver,
    through,
    told,
    with_endpoint,
)
from programs import run

import batchrules
from batchrules import finite_difference, host_call, last_error, original_errors

# XLA ends a text at NUL, and cannot hold the half of a surrogate pair, which file names are full of.
MESSAGES = {
    "empty": "", "lines": "two\nlines", "end": "trailing \n", "unicode": "ümläut 🐍", "format": "%s {x} {}",
    "long": "x" * 100_000, "nul": "nul\0inside", "surrogate": "no file \udcff",
}  # fmt: skip


# --- the text ---------------------------------------------------------------------------------------------

STORY = "host_call 'solve' failed{}, with arguments x {}, y {}: ReactorError: the reactor is empty"


@pytest.mark.parametrize("way", WAYS)
class TestText:
    @on_every_dispatch
    def test_of_a_single_call(self, way, dispatch):
        text = told(way, solver(1, **dispatch), 1.0, VECTOR)
        assert text == STORY.format("", "()", "(3,)")

    @on_every_dispatch
    def test_of_an_element(self, way, dispatch):
        text = told(way, jax.vmap(solver(4, **dispatch), (0, None)), XS, VECTOR)
        assert text == STORY.format(" at element (4,)", "()", "(3,)")

    @on_every_dispatch
    def test_of_the_first_element(self, way, dispatch):
        """It runs under the guard of the first call."""
        text = told(way, jax.vmap(solver(0, **dispatch), (0, None)), XS, VECTOR)
        assert text == STORY.format(" at element (0,)", "()", "(3,)")

    @on_every_dispatch
    def test_of_an_element_of_nested_vmaps(self, way, dispatch):
        """One index for each vmap, the outermost first."""
        ys = np.ones((2, 3))
        ys[1] = 5
        call = host_call(
            lambda x, y: fails_at(15)(np.asarray(x * y[0]), y), F64, name="solve", verify=False, **dispatch
        )
        text = told(way, nested(call), XS, ys)
        assert text == STORY.format(" at element (3, 1)", "()", "(3,)")

    def test_of_an_element_mapped_along_another_axis(self, way):
        call = host_call(lambda x: fails_at(7)(x[0], x), F64, name="solve")
        xs = np.arange(12.0).reshape(3, 4)  # column 3 starts with 3, row 1 with 4
        xs[0, 3] = 7
        text = told(way, jax.vmap(call, 1), xs)
        assert "failed at element (3,), with arguments x (3,): ReactorError" in text

    @pytest.mark.parametrize("method", VECTORISED)
    @on_every_dispatch
    def test_of_a_vectorised_call(self, way, method, dispatch):
        text = told(way, jax.vmap(solver(4, method=method, **dispatch), (0, None)), XS, VECTOR)
        shape = {"expand_dims": "(1, 3)", "broadcast_all": "(6, 3)", "legacy_vectorized": "(3,)"}[method]
        assert text == STORY.format(" with the elements from (0,) to (5,), given at once", "(6,)", shape)

    @pytest.mark.parametrize("method", VECTORISED)
    @on_every_dispatch
    def test_of_a_chunk(self, way, method, dispatch):
        text = told(way, jax.vmap(solver(5, method=method, batch_size=4, **dispatch), (0, None)), XS, VECTOR)
        shape = {"expand_dims": "(1, 3)", "broadcast_all": "(2, 3)", "legacy_vectorized": "(3,)"}[method]
        assert text == STORY.format(" with the elements from (4,) to (5,), given at once", "(2,)", shape)

    @on_every_dispatch
    def test_of_a_chunk_of_nested_vmaps(self, way, dispatch):
        call = solver(2, method="expand_dims", batch_size=2, **dispatch)
        text = told(way, nested(call), XS, np.ones((3, 3)))
        if dispatch:
            # Both calls that have a part of row 2 fail, and which comes first is not known.
            text = text.replace("from (2, 2) to (3, 0)", "from (2, 0) to (2, 1)")
        assert text == STORY.format(" with the elements from (2, 0) to (2, 1), given at once", "(2,)", "(2, 3)")

    def test_in_a_scan(self, way):
        call = solver(3)
        scanned = lambda xs: jax.lax.scan(lambda c, x: (c + call(x, VECTOR), None), 0.0, xs)[0]  # noqa: E731
        # A scan is compiled, also outside jit.
        with pytest.raises(jax.errors.JaxRuntimeError) as info:
            through(way, scanned)(XS)
        assert str(info.value).partition("\n---")[0].endswith(STORY.format("", "()", "(3,)"))
        with pytest.raises(jax.errors.JaxRuntimeError) as info:
            through(way, jax.vmap(scanned))(np.stack([XS + 10, XS]))
        assert str(info.value).partition("\n---")[0].endswith(STORY.format(" at element (1,)", "()", "(3,)"))

    def test_of_a_call_without_arguments(self, way):
        def fail():
            raise ReactorError

        text = told(way, host_call(fail, F64))
        assert text == "host_call 'fail' failed, with arguments none: ReactorError: the reactor is empty"

    def test_names_the_leaves_of_containers(self, way):
        def fail(tree, *, scale):
            del tree, scale
            raise ReactorError

        call = host_call(fail, F64, name="solve")
        text = told(way, jax.vmap(lambda xs: call({"a": xs, "b": (VECTOR, XS)}, scale=1.0)), XS)
        assert " at element (0,), with arguments tree.a (), tree.b.0 (3,), tree.b.1 (6,), scale (): " in text

    @pytest.mark.parametrize("message", MESSAGES.values(), ids=MESSAGES)
    def test_with_any_message(self, way, message):
        text = told(way, host_call(always(ReactorError(message)), F64), 1.0)
        shown = message.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")
        assert text == f"host_call 'fail' failed, with arguments x (): ReactorError: {shown}".removesuffix(": ")

    def test_of_an_exception_that_cannot_be_shown(self, way):
        class OddError(ReactorError):
            def __str__(self):
                raise RuntimeError("of __str__")

        text = told(way, host_call(always(OddError()), F64), 1.0)
        assert text.endswith(": OddError: (its __str__ failed)")


def test_jax_says_where_in_the_foreign_code_it_was():
    """The line of the user's function, as far as a `JaxRuntimeError` can tell it."""
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"in solve\b"):
        through("jit", solver(1))(1.0, VECTOR)


def test_pytest_sees_the_note():
    with pytest.raises(ReactorError, match=r"'solve' failed at element \(2,\).*y \(3,\).*reactor is empty"):
        jax.vmap(solver(2), (0, None))(XS, VECTOR)


def test_eagerly_it_is_the_original():
    """The object that was raised, with its attributes, traceback and cause."""
    mine = ReactorError("mine", level=3)
    mine.__cause__ = cause = KeyError("before")

    def solve(x):
        del x
        raise mine

    for call in (host_call(solve, F64), jax.vmap(host_call(solve, F64))):
        with pytest.raises(ReactorError) as info:
            call(XS)
        assert info.value is mine
        assert info.value.__cause__ is cause
        assert "solve" in [entry.name for entry in info.traceback]


def test_the_same_exception_raised_again_is_not_noted_twice():
    mine = ReactorError()

    def solve(x):
        del x
        raise mine

    call = host_call(solve, F64)
    for _ in range(3):
        with pytest.raises(ReactorError):
            call(1.0)
    assert len([note for note in mine.__notes__ if "host_call" in note]) == 1


def test_the_same_exception_raised_elsewhere_is_noted_with_its_last_place():
    mine = ReactorError("mine")

    def solve(x, bad):
        if bad:
            raise mine
        return x

    call = jax.vmap(host_call(solve, F64))
    for place in (2, 4):
        with pytest.raises(ReactorError):
            call(XS, np.arange(6) == place)
    (note,) = [note for note in mine.__notes__ if "host_call" in note]
    assert note == "host_call 'solve' failed at element (4,), with arguments x (), bad (): ReactorError: mine"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mapped", [False, True])
def test_a_function_works_again_after_it_failed(way, mapped):
    state = {"bad": True}

    def solve(x):
        if state["bad"]:
            raise ReactorError
        return 2 * x

    call = host_call(solve, lambda x: x)
    program = through(way, jax.vmap(call) if mapped else call)
    for bad in (True, True, False, True, False):
        state["bad"] = bad
        if bad:
            with pytest.raises((ReactorError, jax.errors.JaxRuntimeError), match=MESSAGE):
                program(XS)
        else:
            np.testing.assert_array_equal(program(XS), 2 * XS)


# --- derivatives ------------------------------------------------------------------------------------------


def over_xs(call):
    return jax.vmap(call, (0, None))


PUSHED = "x (), y (3,), tangent of x ()"
PULLED = "x (), y (3,), cotangent of output 0 ()"
BLOCKS = "x (), y (3,)"
# The endpoint, the derivative, the place, the arguments.
DERIVATIVES = {
    "jvp": ("jvp", lambda f: jax.jvp(f, (2.0, VECTOR), (1.0, VECTOR)), "", f"{PUSHED}, tangent of y (3,)"),
    "jvp in one argument": ("jvp", lambda f: jax.jvp(lambda x: f(x, VECTOR), (2.0,), (1.0,)), "", PUSHED),
    "jvp of vmap": (
        "jvp", lambda f: jax.jvp(lambda xs: over_xs(f)(xs, VECTOR), (XS,), (XS,)), " at element (2,)", PUSHED
    ),
    "jacfwd of vmap": ("jvp", lambda f: jax.jacfwd(over_xs(f))(XS, VECTOR), " at element (0, 2)", PUSHED),
    "grad": ("vjp", lambda f: jax.grad(f, (0, 1))(2.0, VECTOR), "", PULLED),
    "vmap of grad": ("vjp", lambda f: over_xs(jax.grad(f))(XS, VECTOR), " at element (2,)", PULLED),
    "grad of vmap": (
        "vjp", lambda f: jax.grad(lambda y: over_xs(f)(XS, y).sum())(VECTOR), " at element (2,)", PULLED
    ),
    "jacrev of vmap": ("vjp", lambda f: jax.jacrev(over_xs(f))(XS, VECTOR), " at element (0, 2)", PULLED),
    "jacfwd": ("jacobian", lambda f: jax.jacfwd(f, 1)(2.0, VECTOR), "", BLOCKS),
    "jacrev": ("jacobian", lambda f: jax.jacrev(f, (0, 1))(2.0, VECTOR), "", BLOCKS),
    "vmap of jacrev": ("jacobian", lambda f: over_xs(jax.jacrev(f, 1))(XS, VECTOR), " at element (2,)", BLOCKS),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("which", DERIVATIVES)
@on_every_dispatch
def test_failure_of_an_endpoint(way, which, dispatch):
    endpoint, derivative, place, arguments = DERIVATIVES[which]
    text = told(way, lambda: derivative(with_endpoint(endpoint, **dispatch)))
    if dispatch:
        # Every row of a Jacobian fails for this element, and which comes first is not known.
        text = re.sub(r"at element \(\d, 2\)", "at element (0, 2)", text)
    assert text == f"host_call 'solve' ({endpoint}) failed{place}, with arguments {arguments}: ReactorError: {MESSAGE}"


@pytest.mark.parametrize("way", WAYS)
def test_failure_of_a_vectorised_endpoint(way):
    call = with_endpoint("vjp", method="expand_dims", batch_size=4)
    text = told(way, jax.vmap(jax.grad(call), (0, None)), XS, VECTOR)
    place = " (vjp) failed with the elements from (0,) to (3,), given at once, with arguments "
    assert text == f"host_call 'solve'{place}x (4,), y (1, 3), cotangent of output 0 (4,): ReactorError: {MESSAGE}"


@pytest.mark.parametrize("way", WAYS)
def test_failure_of_an_endpoint_of_an_endpoint(way):
    slope = host_call(lambda args, tangents: args[0] * tangents[0], F64, jvp=always(ReactorError))
    call = host_call(lambda x: x * x / 2, F64, jvp=slope, name="solve")
    text = told(way, lambda: jax.jvp(lambda x: jax.jvp(call, (x,), (1.0,))[1], (3.0,), (1.0,)))
    assert text.startswith("host_call 'solve' (jvp) (jvp) failed, with arguments ")
    assert text.endswith(f"ReactorError: {MESSAGE}")


DIFFERENCES = {
    "jvp": (lambda f: jax.jvp(f, (2.0, VECTOR), (1.0, VECTOR)), ""),
    "jvp of vmap": (lambda f: jax.jvp(lambda xs: jax.vmap(f, (0, None))(xs, VECTOR), (XS,), (XS,)), " at element (2,)"),
    "grad": (lambda f: jax.grad(f)(2.0, VECTOR), ""),
    "vmap of grad": (lambda f: jax.vmap(jax.grad(f), (0, None))(XS, VECTOR), " at element (2,)"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scheme", ["central", "forward"])
@pytest.mark.parametrize("which", DIFFERENCES)
def test_finite_difference_that_fails(way, scheme, which):
    """The index is that of the element: the points around it are none of the user's axes."""
    derivative, place = DIFFERENCES[which]
    call = host_call(near_two, F64, name="solve", **finite_difference(near_two, scheme=scheme))
    text = told(way, lambda: derivative(call))
    assert text.startswith(f"host_call 'solve' (finite difference) failed{place}, with arguments x (), y (3,)")
    assert text.endswith(f"ReactorError: {MESSAGE}")


# --- the original exception -------------------------------------------------------------------------------


class TestLastError:
    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("mapped", [False, True])
    def test_is_what_the_foreign_code_raised(self, way, mapped):
        mine = ReactorError(level=3)
        call = host_call(always(mine), F64)
        told(way, jax.vmap(call) if mapped else call, XS)
        assert last_error() is mine
        assert last_error().level == 3

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize(
        ("result", "kind"),
        [
            (lambda x: x.astype("float32"), batchrules.ResultError),
            (lambda x: (x, x), batchrules.ResultError),
            (lambda x: np.zeros((7, 7)), ValueError),  # noqa: ARG005
        ],
    )
    def test_is_a_broken_promise_too(self, way, method, result, kind):
        call = jax.vmap(host_call(result, F64, method=method))
        with pytest.raises((kind, jax.errors.JaxRuntimeError)):
            through(way, call)(XS)
        assert isinstance(last_error(), kind)
        assert "host_call" in str(last_error())

    def test_is_seen_from_all_threads(self):
        with concurrent.futures.ThreadPoolExecutor(1) as pool, pytest.raises(ReactorError):
            pool.submit(solver(1), 1.0, VECTOR).result()
        assert isinstance(last_error(), ReactorError)

    def test_stays_when_something_succeeds(self):
        told("eager", solver(1), 1.0, VECTOR)
        mine = last_error()
        solver()(1.0, VECTOR)
        assert last_error() is mine

    def test_is_none_at_first(self):
        assert run("print(batchrules.last_error())") == ["None"]


@contextlib.contextmanager
def raises_original(kind=ReactorError, **matching):
    with pytest.raises(kind, **matching) as info, original_errors():
        yield info


class TestOriginalErrors:
    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("method", METHODS)
    @on_every_dispatch
    def test_raise_the_original(self, way, method, dispatch):
        program = through(way, jax.vmap(solver(2, method=method, **dispatch), (0, None)))
        with raises_original() as info:
            program(XS, VECTOR)
        assert info.value is last_error()
        assert info.value.level == 7

    def test_of_a_program_that_was_compiled_outside(self):
        program = through("jit", solver(2))
        program(1.0, VECTOR)
        with raises_original():
            program(2.0, VECTOR)

    @pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit])
    @pytest.mark.parametrize("mapped", [False, True])
    @pytest.mark.parametrize("options", [{}, {"executor": 2}, {"on_error": "nan"}], ids=str)
    def test_what_is_no_exception(self, kind, mapped, options):
        call = host_call(always(kind("out of here")), F64, **options)
        with raises_original(kind, match="out of here"):
            through("jit", jax.vmap(call) if mapped else call)(XS)
        assert isinstance(last_error(), kind)

    def test_keep_the_cause_that_the_foreign_code_gave(self):
        def fail(x):
            del x
            raise ReactorError from KeyError("before")

        with raises_original() as info:
            through("jit", host_call(fail, F64))(1.0)
        assert isinstance(info.value.__cause__, KeyError)

    def test_say_which_element_it_was(self):
        with raises_original(match=r"'solve' failed at element \(2,\)"):
            through("jit", jax.vmap(solver(2), (0, None)))(XS, VECTOR)

    @pytest.mark.parametrize("message", MESSAGES.values(), ids=MESSAGES)
    def test_with_any_message(self, message):
        with raises_original() as info:
            through("jit", host_call(always(ReactorError(message)), F64))(1.0)
        assert str(info.value) == message

    def test_of_a_broken_promise(self):
        with raises_original(batchrules.ResultError, match="dtype float32"):
            through("jit", jax.vmap(host_call(lambda x: x.astype("float32"), F64, method="expand_dims")))(XS)

    def test_of_a_broken_contract(self):
        call = host_call(lambda x: x / x.sum(), F64, method="expand_dims")
        with raises_original(batchrules.BatchContractError, match="one by one"):
            through("jit", jax.vmap(call))(XS + 1)

    def test_the_one_that_the_program_failed_with(self):
        """Not one whose text is the beginning of it."""
        call = host_call(self._numbered, F64)
        with raises_original(match=r"^number 10$|^number 10\n"):
            with pytest.raises(jax.errors.JaxRuntimeError) as first:
                through("jit", call)(10.0)
            with pytest.raises(jax.errors.JaxRuntimeError):
                through("jit", call)(1.0)
            raise first.value

    def test_of_two_that_say_the_same_the_last(self):
        raised = []

        def solve(x):
            del x
            raised.append(ReactorError("again"))
            raise raised[-1]

        program = through("jit", host_call(solve, F64))
        with raises_original(match="again") as caught:
            with pytest.raises(jax.errors.JaxRuntimeError):
                program(1.0)
            program(1.0)
        assert caught.value is raised[1]

    @staticmethod
    def _numbered(x):
        raise ReactorError(f"number {int(x)}")

    def test_nested(self):
        program = through("jit", solver(2))
        with raises_original(), original_errors():
            program(2.0, VECTOR)
        with original_errors():
            with raises_original():
                program(2.0, VECTOR)
            np.testing.assert_array_equal(program(1.0, VECTOR), 6)

    def test_after_an_inner_one_has_ended(self):
        with raises_original():
            with original_errors():
                pass
            through("jit", solver(2))(2.0, VECTOR)

    def test_outside_all_is_as_always(self):
        with original_errors():
            pass
        told("jit", solver(2), 2.0, VECTOR)

    def test_many_failures_inside(self):
        """More than are kept: the last is known."""
        call = through("jit", host_call(self._numbered, F64))
        with raises_original(match="number 99"):
            for number in range(100, 199):
                with pytest.raises(jax.errors.JaxRuntimeError):
                    call(float(number))
            call(99.0)

    def test_an_early_one_after_many_of_others(self):
        """Other threads may fail a lot before this one gets to look for its own."""
        call = through("jit", host_call(self._numbered, F64))
        with raises_original(match="number 99"):
            with pytest.raises(jax.errors.JaxRuntimeError) as first:
                call(99.0)
            for number in range(100, 300):
                with pytest.raises(jax.errors.JaxRuntimeError):
                    call(float(number))
            raise first.value

    def test_in_threads_each_its_own(self):
        program = through("jit", jax.vmap(host_call(self._numbered, F64)))

        def work(number):
            texts = set()
            for _ in range(10):
                with raises_original() as info:
                    program(np.full(3, float(number)))
                texts.add(str(info.value))
            return texts

        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            assert list(pool.map(work, range(10, 16))) == [{f"number {n}"} for n in range(10, 16)]

    def test_of_a_nested_host_call(self):
        inner = solver(2)
        outer = host_call(lambda x: inner(x, VECTOR), F64)
        with raises_original(match="'solve' failed, with arguments"):
            through("jit", outer)(2.0)

    @pytest.mark.parametrize("way", WAYS)
    def test_errors_of_others_pass_through(self, way):
        with raises_original(TypeError, match="(?i)shape"):
            through(way, jnp.add)(np.ones(2), np.ones(3))
        with raises_original(ZeroDivisionError):
            _ = 1 / 0
        told("jit", solver(2), 2.0, VECTOR)
        with raises_original(jax.errors.JaxRuntimeError, match="of another callback"):
            through(way, self._pure)(1.0)

    @staticmethod
    def _pure(x):
        return jax.pure_callback(always(LookupError("of another callback")), F64, x)

    def test_errors_while_tracing_are_as_they_are(self):
        with raises_original(batchrules.MissingEndpointError):
            through("jit", jax.grad(solver(2)))(2.0, VECTOR)


# --- a host call inside a host function -------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mapped", [False, True])
@on_every_dispatch
def test_a_failing_host_call_inside_another_names_both(way, mapped, dispatch):
    inner = host_call(fails_at(2), F64, name="inner")
    outer = host_call(lambda x: inner(x, VECTOR), F64, name="outer", **dispatch)
    kind = jax.errors.JaxRuntimeError if way == "jit" else ReactorError
    with pytest.raises(kind) as info:
        through(way, jax.vmap(outer) if mapped else outer)(XS if mapped else 2.0)
    text = "\n".join([str(info.value), *getattr(info.value, "__notes__", ())])
    place = " at element (2,)" if mapped else ""
    assert f"host_call 'outer' failed{place}, with arguments x ()" in text
    assert "host_call 'inner' failed, with arguments x (), y (3,)" in text
    assert MESSAGE in text


def test_the_notes_of_a_failing_host_call_inside_another_are_those_of_both():
    inner = host_call(fails_at(2), F64, name="inner")
    outer = host_call(lambda x: inner(x, VECTOR), F64, name="outer")
    with pytest.raises(ReactorError) as info:
        outer(2.0)
    starts = [note.partition(", with")[0] for note in info.value.__notes__ if "host_call" in note]
    assert starts == ["host_call 'inner' failed", "host_call 'outer' failed"]


def test_an_outer_function_may_catch_what_the_inner_one_raises():
    inner = host_call(fails_at(2), F64)

    def robust(x):
        try:
            return inner(x, VECTOR)
        except ReactorError:
            return np.float64(-1)

    for way in WAYS:
        result = through(way, jax.vmap(host_call(robust, F64)))(XS)
        np.testing.assert_array_equal(result, np.where(XS == 2, -1, 6 * XS))


# --- what a failure stops ---------------------------------------------------------------------------------


def our_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("batchrules")]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mine", [True, False])
def test_the_first_failure_stops_the_batch_and_leaves_no_thread(way, mine):
    started, running = itertools.count(), set()

    def solve(x):
        number = next(started)
        running.add(number)
        try:
            if x == 8:
                raise ReactorError
            time.sleep(0.02)
            return x
        finally:
            running.discard(number)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        call = host_call(solve, F64, executor=pool if mine else 4, name="solve")
        text = told(way, jax.vmap(call), np.arange(400.0))
        # All that ran was waited for, and what was queued never starts.
        assert not running
        count = next(started)
        assert pool.submit(int, "3").result() == 3
        assert next(started) == count + 1
    assert " at element (8,)" in text
    assert count < 200
    assert not our_threads()


def test_in_order_nothing_is_called_after_the_failure():
    seen = []

    def solve(x):
        seen.append(float(x))
        if x == 3:
            raise ReactorError
        return x

    told("eager", jax.vmap(host_call(solve, F64)), XS)
    assert seen == [0, 1, 2, 3]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", ["sequential", "expand_dims"])
@pytest.mark.parametrize("on_error", ["raise", "nan"])
def test_an_executor_that_was_shut_down(way, method, on_error):
    pool = concurrent.futures.ThreadPoolExecutor(2)
    pool.shutdown()
    call = solver(executor=pool, method=method, batch_size=2 if method != "sequential" else None, on_error=on_error)
    kind = jax.errors.JaxRuntimeError if way == "jit" else batchrules.DispatchError
    with pytest.raises(kind) as info:
        through(way, jax.vmap(call, (0, None)))(XS, VECTOR)
    text = str(info.value).splitlines()[-1]
    for part in ("host_call 'solve'", "ThreadPoolExecutor", "0 of ", "shut down too early", "block_until_ready"):
        assert part in text
    assert isinstance(last_error(), batchrules.DispatchError)


def test_an_executor_that_is_shut_down_in_mid_batch():
    pool = concurrent.futures.ThreadPoolExecutor(1)

    def solve(x):
        if x == 3:
            pool.shutdown(wait=False, cancel_futures=True)
        return x

    call = jax.vmap(host_call(solve, F64, executor=pool, max_in_flight=2, name="solve"))
    with raises_original(batchrules.DispatchError, match="'solve'.*(too early|keep the executor open)"):
        through("jit", call)(np.arange(5000.0))
    pool.shutdown()


# --- in processes of their own ----------------------------------------------------------------------------


def test_ctrl_c_stops_a_long_batch():
    """A real signal, from another thread and from within, eagerly and compiled, in order and by an executor."""
    out = run("""
        # An interrupt that falls into a callback of the garbage collector is lost: Python ignores what that raises.
        gc.disable()
        # A shell that starts the tests in the background has them ignore interrupts.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        calls = [0]

        def solve(x):
            calls[0] += 1
            if calls[0] == 20:
                if threading.current_thread() is threading.main_thread() and how == "within":
                    signal.raise_signal(signal.SIGINT)
                else:
                    threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGINT)).start()
            time.sleep(0.005)
            return x + number

        pool = concurrent.futures.ThreadPoolExecutor(3)
        number = 0
        for how in ("within", "timer"):
            for executor in (None, 3, pool):
                for method, size in (("sequential", None), ("expand_dims", 1)):
                    for way in ("eager", "jit", "original"):
                        number += 1
                        call = batchrules.host_call(
                            solve, lambda x: x, method=method, batch_size=size, executor=executor, verify=False,
                            on_error=["raise", "nan"][number % 2],
                        )
                        program = jax.vmap(call) if way == "eager" else jax.jit(jax.vmap(call))
                        if way == "original":
                            program = original(program)
                        calls[0] = 0
                        name, _, text = outcome(program, jnp.arange(3000.0)).partition(": ")
                        assert name == ("JaxRuntimeError" if way == "jit" else "KeyboardInterrupt"), (name, text)
                        assert way != "jit" or "KeyboardInterrupt" in text, text
                        assert isinstance(batchrules.last_error(), KeyboardInterrupt)
                        before = calls[0]
                        assert before < 1500, before
                        pool.submit(len, "").result()
                        assert calls[0] == before and not ours(), (calls, ours())
                        print("stopped")
    """)  # fmt: skip
    assert out == ["stopped"] * 36


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_on_several_devices_all_fail_together_and_the_process_lives_on(kind):
    out = run(f"""
        class Simulator(Exception):
            pass

        def solve(x):
            if np.any(x == 5):
                raise Simulator("the reactor is empty")
            return 2 * x

        XS = np.arange(8.0)
        xs = on(XS, {kind!r})
        pool = concurrent.futures.ThreadPoolExecutor(2)
        pool.shutdown()
        for options in ({{}}, {{"executor": 2}}, {{"method": "expand_dims", "verify": False}}):
            call = batchrules.host_call(solve, lambda x: x, name="solve", **options)
            program = jax.jit(lambda x: jax.vmap(call)(x).sum())
            print(outcome(program, xs))
            print(outcome(original(program), xs))
            print(program(xs * 0))
        shut = batchrules.host_call(solve, lambda x: x, name="shut", executor=pool)
        print(outcome(jax.jit(jax.vmap(shut)), xs))
        print(outcome(original(jax.jit(jax.vmap(shut))), xs))
    """)
    # A device knows the elements of its own shard only.
    one, several = {
        "Auto": (" at element (5,)", " with the elements from (0,) to (7,), given at once"),
        "Explicit": (
            " at element (1,) of its device's shard",
            " with the elements from (0,) to (1,) of its device's shard, given at once",
        ),
    }[kind]
    for place, first, second, third in zip((one, one, several), out[0:9:3], out[1:9:3], out[2:9:3], strict=True):
        assert first.startswith("JaxRuntimeError: ")
        assert f"host_call 'solve' failed{place}, with arguments x (" in first
        assert first.endswith("): Simulator: the reactor is empty")
        assert second == "Simulator: the reactor is empty"
        assert third == "0.0"
    assert "host_call 'shut'" in out[9]
    assert "shut down too early" in out[9]
    assert out[10].startswith("DispatchError: ")


def test_a_program_that_failed_leaves_a_clean_exit():
    """Neither the failure nor its exception is raised again when the interpreter ends."""
    out = run("""
        def fail(x):
            raise ValueError("the reactor is empty")

        call = batchrules.host_call(fail, lambda x: x, executor=2)
        print(outcome(jax.jit(jax.vmap(call)), np.arange(4.0)).endswith("ValueError: the reactor is empty"))
        jax.effects_barrier()
        sys.stdout.flush()
        sys.exit(0)
    """)
    assert out == ["True"]
