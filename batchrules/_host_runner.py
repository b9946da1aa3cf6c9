"""Execute a recorded batch of a host function with NumPy: all axes flattened to one, one leading dimension.

JAX takes no part. The arrays come with their mapped axes in front, unmapped ones without; the outputs go back with the
axes that they keep in front.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from batchrules import _batch, _host_bare, _host_sequential, _host_vectorised
from batchrules._batch import Axes
from batchrules._events import LISTENERS, telling
from batchrules._failures import OWN_ERRORS
from batchrules._host_context import run_inside, running
from batchrules._host_elements import Array, Chosen, Elements, Outputs
from batchrules._host_frame import Frame, Shapes
from batchrules._host_run import Run
from batchrules._host_site import HostSite
from batchrules._surroundings import EAGER, Surroundings


class Runner:
    """Runs one call site over one recorded batch.

    Args:
        site: The call site.
        axes: The recorded axes; none for a single call.
        shapes: The shape of each operand, with its mapped axes in front.
        around: What surrounds the run.
    """

    def __init__(self, site: HostSite, axes: Axes, shapes: Shapes, around: Surroundings = EAGER) -> None:
        self._site = site
        self._axes = axes
        self._frame = Frame(site, axes, shapes, around)
        self.choice = self._frame.choice
        self._is_plain = not axes and not site.masks and site.conduct.on_error == "raise" and not self._skips_zero
        self._ran = False
        self._bare: Callable[..., tuple[Array, ...]] | None = None

    @property
    def _skips_zero(self) -> bool:
        return self._site.conduct.skip_zero and self._site.linear > 0 and not self.choice.vectorised

    def __call__(self, *arrays: Array) -> tuple[Array, ...]:
        """The outputs, with the axes that they keep in front."""
        if self._bare is not None and not LISTENERS:
            return self._bare(*arrays)
        outputs = run_inside(self._run, arrays, allow_jax=self._site.conduct.allow_jax)
        if self._is_plain and not self._ran:
            self._ran = True
            self._bare = self._bare_call()
        return outputs

    def _bare_call(self) -> Callable[..., tuple[Array, ...]] | None:
        """One call of a function from arrays to one array, with nothing around it that can be done without."""
        bare = _host_bare.bare(self._site)
        if bare is None:
            return None
        function, leaves_of = bare
        promised, numpy_only = self._site.results[0], not self._site.conduct.allow_jax
        shape, dtype, array_type = promised.shape, promised.dtype, np.ndarray

        def call(*arrays: Array) -> tuple[Array, ...]:
            # What run_inside does, without a call more: this is the path of a small function called often.
            before, running.numpy_only = running.numpy_only, numpy_only
            try:
                value = function(*arrays)
                if type(value) is array_type and value.dtype == dtype and value.shape == shape:
                    return (value,)
                return tuple(self._results(leaves_of(value)))
            except BaseException as error:  # noqa: BLE001  # raised again
                self._frame.surface(error)
            finally:
                running.numpy_only = before

        return call

    def _run(self, arrays: Sequence[Array]) -> tuple[Array, ...]:
        try:
            return self._single(arrays) if self._is_plain else self._batch(arrays)
        except BaseException as error:
            # Failures of the foreign code have been told by now, with their element.
            if isinstance(error, OWN_ERRORS) or not isinstance(error, Exception):
                self._frame.surface(error)
            raise

    def _single(self, arrays: Sequence[Array]) -> tuple[Array, ...]:
        tells = telling(self._frame) if LISTENERS else None
        try:
            return tuple(self._results(self._site.body(arrays) if tells is None else tells.alone(arrays)))
        except Exception as error:  # noqa: BLE001  # raised again
            self._frame.surface(error)

    def _results(self, values: Sequence[Any]) -> list[Array]:
        return [self._frame.result(output, value, None) for output, value in enumerate(values)]

    def _batch(self, arrays: Sequence[Array]) -> tuple[Array, ...]:
        chosen = self._chosen(arrays)
        outputs = Outputs(self._site.results, self._axes)
        run = Run(self._frame, arrays[self._site.masks :], chosen, outputs, telling(self._frame))
        if run.count > 0:
            self._call_all(run)
            run.warn()
        return outputs.shaped()

    def _call_all(self, run: Run) -> None:
        if run.telling is None:
            return self._call_chosen(run)
        with run.telling.during(run.count):
            return self._call_chosen(run)

    def _call_chosen(self, run: Run) -> None:
        if self._axes and self.choice.vectorised and not self._site.trust.distrusts(self._site):
            if _host_vectorised.run(run):
                return
            run.start_over()
        _host_sequential.run(run)

    def _chosen(self, arrays: Sequence[Array]) -> Chosen:
        """The elements that have to be called: not those that are masked, nor those that give zero for sure."""
        wanted = np.ones(_batch.count(self._axes), np.bool_)
        if self._site.masks:
            wanted &= self._by_element(0, arrays[0])
        if self._skips_zero:
            wanted &= self._nonzero(arrays)
        return None if wanted.all() else np.flatnonzero(wanted)

    def _by_element(self, operand: int, flags: Array) -> Array:
        """A bool for each element, from one for each that an operand is mapped along."""
        rows: Iterable[Any] = Elements(self._axes).rows(operand, flags)
        count = _batch.count(self._axes)
        return np.fromiter((bool(row) for row, _ in zip(rows, range(count), strict=False)), np.bool_, count)

    def _nonzero(self, arrays: Sequence[Array]) -> Array:
        moving = np.zeros(_batch.count(self._axes), np.bool_)
        for operand in range(len(arrays) - self._site.linear, len(arrays)):
            first = len(_batch.argument_axes(self._axes, operand))
            element = tuple(range(first, arrays[operand].ndim))
            flags = np.asarray(arrays[operand].astype(np.bool_).any(axis=element))
            moving |= self._by_element(operand, flags)
        return moving
