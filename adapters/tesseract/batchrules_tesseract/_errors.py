"""The errors of a Tesseract's calls, under names of their own. Each text names the Tesseract and the endpoint."""

from __future__ import annotations

from batchrules import BatchContractError


class TesseractError(RuntimeError):
    """A call of a Tesseract failed."""


class TesseractInputError(TesseractError, ValueError):
    """The Tesseract refused its input (status 422): the text names each field and what is wrong with it."""


class TesseractServerError(TesseractError):
    """The Tesseract answered with an error, such as status 500 for an exception inside it. Carries its text."""


class TesseractBatchError(TesseractServerError, BatchContractError):
    """The Tesseract refused a batch, or failed with it. Either it takes no batches, or one of the elements is bad.

    With `vmap_method="auto"` it is called with one element at a time from then on; else this error is raised.
    """


class TesseractUnreachableError(TesseractError, ConnectionError):
    """No server could be reached, so no worker has seen the request."""


class TesseractConnectionLostError(TesseractError, ConnectionError):
    """The connection broke after the request was sent: a worker may have run it, so it was not sent again."""


class TesseractTimeoutError(TesseractError, TimeoutError):
    """The Tesseract did not answer within the timeout."""


class TesseractAnswerError(TesseractError):
    """The Tesseract answered with something that cannot be trusted: the text names the field."""
