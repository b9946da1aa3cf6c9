"""Arrays in files of a folder that the Tesseract and this program share (`json+binref`)."""

from __future__ import annotations

import contextlib
import os
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

_REFERENCE = re.compile(r"(?P<path>.+?)(?::(?P<offset>\d+))?")


@dataclass(frozen=True)
class SharedFolders:
    """The folders of one request.

    Attributes:
        inputs: The Tesseract's input path, as this program sees it.
        outputs: The Tesseract's output path, as this program sees it.
    """

    inputs: Path
    outputs: Path
    _written: list[Path] = field(default_factory=list, compare=False)
    _read: set[Path] = field(default_factory=set, compare=False)

    def for_request(self) -> SharedFolders:
        """The same folders, with the files of one request counted apart."""
        return SharedFolders(self.inputs, self.outputs)

    def write(self, array: Array) -> dict[str, Any]:
        """Write an array's elements to a file, and say where they are."""
        name = f"{uuid.uuid4()}.bin"
        target = self.inputs / name
        self._written.append(target)
        np.ascontiguousarray(array).tofile(target)
        return {"buffer": f"{name}:0", "encoding": "binref"}

    def read(self, reference: str, size: int, wrong: Callable[[str], Exception]) -> Any:
        """That many bytes from where a reference points to, which must be inside the folder, links resolved."""
        match = _REFERENCE.fullmatch(reference)
        if match is None:
            raise wrong(f"has the reference {reference!r}; expected '<path>:<offset>'")
        folder = self.outputs.resolve()
        target = (folder / match["path"]).resolve()
        if not target.is_relative_to(folder):
            raise wrong(f"refers to {match['path']!r}, which lies outside the shared folder {str(self.outputs)!r}")
        if not target.is_file():
            raise wrong(f"refers to {match['path']!r}, which is no file of the shared folder {str(self.outputs)!r}")
        self._read.add(target)
        start = int(match["offset"] or 0)
        # Before any memory is taken: the sizes in an answer are only claims.
        there = max(0, target.stat().st_size - start)
        if there < size:
            raise wrong(f"has a buffer of {there} bytes, but its shape and dtype need {size}")
        try:
            return _bytes_of(target, start, size)
        except OSError as error:
            raise wrong(f"refers to {match['path']!r}, which cannot be read ({error.strerror})") from error

    def clear(self) -> None:
        """Remove the files of this request, so that the folder, often in memory, does not fill up."""
        for path in (*self._written, *self._read):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()


def _bytes_of(target: Path, start: int, size: int) -> bytearray:
    raw = bytearray(size)
    view = memoryview(raw)
    total = 0
    with target.open("rb", buffering=0) as source:
        source.seek(start)
        while total < size and (count := source.readinto(view[total:])):
            total += count
    return raw[:total] if total < size else raw


def shared_folders(
    input_folder: str | os.PathLike[str] | None, output_folder: Any, encoding: str
) -> SharedFolders | None:
    """The folders for `encoding="binref"`, which needs both; None for the other encodings.

    Raises:
        ValueError: A folder that is missing, or given without need.
    """
    if encoding != "binref":
        if input_folder is not None or output_folder is not None:
            raise ValueError(f"input_folder and output_folder are for encoding='binref'; got encoding={encoding!r}.")
        return None
    if input_folder is None or output_folder is None:
        raise ValueError(
            "encoding='binref' needs input_folder and output_folder: the Tesseract's own input and output paths "
            "(TESSERACT_INPUT_PATH and TESSERACT_OUTPUT_PATH), as this program sees them."
        )
    folders = SharedFolders(Path(input_folder), Path(output_folder))
    for name, folder in (("input_folder", folders.inputs), ("output_folder", folders.outputs)):
        if not folder.is_dir():
            raise ValueError(f"{name} must be an existing folder; got {str(folder)!r}.")
    return folders
