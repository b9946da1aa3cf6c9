"""Tesseracts as JAX functions: vmap, jit and derivatives over any Tesseract, in the fewest and largest calls."""

from batchrules_tesseract._apply import apply_tesseract
from batchrules_tesseract._client import TesseractClient
from batchrules_tesseract._errors import (
    TesseractAnswerError,
    TesseractBatchError,
    TesseractConnectionLostError,
    TesseractError,
    TesseractInputError,
    TesseractServerError,
    TesseractTimeoutError,
    TesseractUnreachableError,
)
from batchrules_tesseract._schema import TesseractSchema, tesseract_schema
from batchrules_tesseract._targets import close_all

__all__ = [
    "TesseractAnswerError",
    "TesseractBatchError",
    "TesseractClient",
    "TesseractConnectionLostError",
    "TesseractError",
    "TesseractInputError",
    "TesseractSchema",
    "TesseractServerError",
    "TesseractTimeoutError",
    "TesseractUnreachableError",
    "apply_tesseract",
    "close_all",
    "tesseract_schema",
]
