"""A rewritten model on disk before it is accepted, so that what it stores can be mapped and need not be held.

Only models with external data are staged: in a folder of their own beside the output, which goes when the work is done.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import logging
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from onnx_decompose.errors import OutputError
from onnx_decompose.model.external_data import external_tensors
from onnx_decompose.model.model_io import (
    Model,
    load_model,
    model_files,
    remove_folder,
    save_model,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx

logger = logging.getLogger(__name__)

__all__ = ["Stage", "staging"]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Stage:
    """Where a rewritten model lies while it is checked.

    Attributes:
        folder: for it alone; None where models are kept in memory.
        output: the file that it is meant for.
    """

    folder: Path | None
    output: Path | None

    def put(self, model: Model, data_from: Model) -> Model:
        """``model`` as it lies in the stage, in the place of the one before it; itself where there is no stage.

        Args:
            model: a rewritten model, with its new weights in it.
            data_from: the original, whose external data it refers to.
        """
        if self.folder is None or self.output is None:
            return model
        for old in self.folder.iterdir():
            shutil.rmtree(old, ignore_errors=True)
        path = Path(tempfile.mkdtemp(dir=self.folder)) / self.output.name
        logger.info("writing the rewritten model to %s, to check it from there", path.parent)
        save_model(model.proto, path, data_from=data_from)
        return dataclasses.replace(load_model(path), shown=data_from.label)

    def freed(self) -> None:
        """Let the allocator give back what making, proving or running a staged model took: glibc keeps small pieces.

        A model is many of them: at 0.5 GiB of weights that is 0.09 GiB, of which each block has 1 MiB.
        """
        if self.folder is not None:
            with contextlib.suppress(
                OSError, AttributeError
            ):  # another system, another allocator
                ctypes.CDLL(None).malloc_trim(0)

    def save(self, model: Model, original: Model) -> onnx.ModelProto:
        """Write the output, and give it as it was written; ``model`` is what :meth:`put` gave."""
        assert self.output is not None
        if self.folder is None:
            save_model(model.proto, self.output, data_from=original)
            return model.proto
        save_model(model.proto, self.output, data_from=model, kept=model_files(original))
        return load_model(self.output).proto


@contextlib.contextmanager
def staging(original: Model, output: Path | None) -> Iterator[Stage]:
    """A stage beside ``output`` for rewrites of ``original``; one without a folder where nothing would be gained.

    Raises:
        OutputError: the folder cannot be made.
    """
    if output is None or next(external_tensors(original.proto), None) is None:
        yield Stage(None, output)
        return
    try:
        folder = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}."))
    except OSError as error:
        raise OutputError(
            f"{output.parent}: no folder can be made in it ({error.strerror or error}); choose another output path"
        ) from error
    try:
        yield Stage(folder, output)
    finally:
        remove_folder(folder)
