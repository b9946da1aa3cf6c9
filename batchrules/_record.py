"""`record()`: a log of the calls of foreign code on the host."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from batchrules import _record_export, _record_plot
from batchrules._events import RecordedCall, listening
from batchrules._record_report import Summary, summarised

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame


class _Recorder:
    """Listens from its making until it is stopped."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # As they were heard; what they are to the user is worked out when they are asked for.
        self._heard: list[RecordedCall] = []
        self._calls: tuple[RecordedCall, ...] = ()
        self._stopped: float | None = None
        self._began = time.perf_counter()

    def started(self, name: str, elements: int) -> None:
        """Only calls are recorded."""

    def again(self, elements: int, failed: int) -> None:
        """The same."""

    def ended(self) -> None:
        """The same."""

    def heard(self, call: RecordedCall) -> None:
        with self._lock:
            if self._stopped is None:
                self._heard.append(call)

    def stop(self) -> None:
        with self._lock:
            self._stopped = time.perf_counter()

    @property
    def calls(self) -> tuple[RecordedCall, ...]:
        with self._lock:
            if len(self._calls) != len(self._heard):
                by_start = sorted(self._heard, key=lambda call: call.start)
                self._calls = tuple(replace(call, start=call.start - self._began) for call in by_start)
            return self._calls

    @property
    def duration(self) -> float:
        return (self._stopped or time.perf_counter()) - self._began


class Recording:
    """The calls of foreign code made inside a `with batchrules.record()` block; see `record`.

    Example:
        >>> import numpy as np, batchrules
        >>> sine = batchrules.host_call(np.sin, lambda x: x, name="sine")
        >>> with batchrules.record() as log:
        ...     result = sine(np.float32(1.0))
        >>> log
        <Recording of 1 calls>
        >>> log.calls[0].name, log.calls[0].bytes_in, log.duration > 0
        ('sine', 4, True)
    """

    def __init__(self, recorder: _Recorder) -> None:
        self._recorder = recorder

    @property
    def calls(self) -> tuple[RecordedCall, ...]:
        """The calls so far, in the order in which they started."""
        return self._recorder.calls

    @property
    def duration(self) -> float:
        """The seconds from the beginning of the block to its end, or to now."""
        return self._recorder.duration

    def summary(self) -> Summary:
        """Count the calls, and tell how long they took.

        Returns:
            A `Summary`: prints as a table, is one in a notebook, and has `to_dict()`.

        Example:
            >>> import batchrules
            >>> with batchrules.record() as log:
            ...     pass
            >>> log.summary().to_dict()["calls"]
            0
        """
        return summarised(self.calls, self.duration)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the calls over time, with a lane for each worker. Calls that failed have a red edge.

        Args:
            ax: Where to draw; a new figure by default.

        Returns:
            The matplotlib axes.

        Raises:
            ImportError: matplotlib is missing.

        Example:
            >>> import batchrules
            >>> from matplotlib.figure import Figure
            >>> with batchrules.record() as log:
            ...     pass
            >>> log.plot(Figure().add_subplot()).get_xlabel()
            'seconds since the record began'
        """
        return _record_plot.plotted(self.calls, ax)

    def to_perfetto(self, path: str | os.PathLike[str]) -> None:
        """Write a trace for https://ui.perfetto.dev or chrome://tracing, with a track for each worker.

        The format is Chrome's Trace Event Format: complete events, with times in microseconds since the block began.

        Args:
            path: The file to write, such as `"calls.json"`.

        Example:
            >>> import os, batchrules
            >>> with batchrules.record() as log:
            ...     pass
            >>> log.to_perfetto(os.devnull)
        """
        _record_export.write_perfetto(self.calls, path)

    def to_pandas(self) -> DataFrame:
        """Give the calls as a table, one row for each, with a column for each attribute of `RecordedCall`.

        Returns:
            A pandas `DataFrame`.

        Raises:
            ImportError: pandas is missing.

        Example:
            >>> import numpy as np, batchrules
            >>> sine = batchrules.host_call(np.sin, lambda x: x, name="sine")
            >>> with batchrules.record() as log:
            ...     result = sine(np.float32(1.0))
            >>> log.to_pandas()[["name", "elements", "purpose"]].values.tolist()
            [['sine', 1, 'batch']]
        """
        return _record_export.as_frame(self.calls)

    def __repr__(self) -> str:
        """How many calls there are."""
        return f"<Recording of {len(self.calls)} calls>"

    def _repr_html_(self) -> str:
        """The summary, for notebooks."""
        return self.summary()._repr_html_()


@contextlib.contextmanager
def record() -> Iterator[Recording]:
    """Log every call of foreign code on the host that is made inside the block, from any thread.

    That is what `host_call` makes, and all that is built on it: derivatives, finite differences, Tesseracts. Device
    calls and registered primitives run inside XLA's program, where no one can watch.

    JAX runs programs ahead: wait for results inside the block (`jax.block_until_ready`). A call that has not finished
    when the block ends is not in the log, and a batch that was running when it began is not either. Calls that a host
    function makes in another process are seen, but not the host calls inside them.

    Yields:
        A `Recording`, to be read inside the block or after it: `.calls`, `.summary()`, `.plot()`,
        `.to_perfetto(path)`, `.to_pandas()`. Blocks may be nested: each gets everything.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np, batchrules
        >>> @batchrules.host_call(result_shape=jax.ShapeDtypeStruct((), "float32"), method="expand_dims", batch_size=2)
        ... def norm(x):
        ...     return np.sqrt((x * x).sum(-1))
        >>> with batchrules.record() as log:
        ...     norms = jax.block_until_ready(jax.vmap(norm)(jnp.ones((3, 4), "float32")))
        >>> for call in log.calls:
        ...     print(call.name, call.first, call.last, call.elements, call.bytes_in, call.purpose)
        norm (0,) (1,) 2 32 batch
        norm (2,) (2,) 1 16 batch
    """
    recorder = _Recorder()
    try:
        with listening(recorder):
            yield Recording(recorder)
    finally:
        recorder.stop()
