"""Every error that onnx-decompose raises on purpose.

    DecomposeError
    ├── InputError            exit code 2: usage or bad input
    │   ├── OptionError       an option's value
    │   ├── ModelError        a model file, a tensor or a node in it
    │   ├── DataError         calibration or validation inputs
    │   └── OutputError       a path that cannot be written
    ├── ClaimError            exit code 1: a measured claim does not hold
    │   ├── StructuralError   claim A: rewritten == annealed
    │   └── AnnealingError    claim B: rewritten against the original
    ├── ProviderError         exit code 3: the execution provider is not available
    └── PassError             exit code 1: a pass broke its own contract

A message is one line: it names the file and the tensor or node, and says what to do next.
"""

__all__ = [
    "AnnealingError",
    "ClaimError",
    "DataError",
    "DecomposeError",
    "InputError",
    "ModelError",
    "OptionError",
    "OutputError",
    "PassError",
    "ProviderError",
    "StructuralError",
    "interruption",
]


class DecomposeError(Exception):
    """Base class; ``exit_code`` is what the command line returns for it.

    Names come from files that anyone may have made: line breaks and control characters do not get into a message.
    """

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        line = " ".join(message.split())
        super().__init__(
            "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)
        )


class InputError(DecomposeError):
    """Something the user gave cannot be used."""

    exit_code = 2


class OptionError(InputError):
    """An option has a value that cannot be used."""


class ModelError(InputError):
    """A model file is unreadable, invalid or holds values that cannot be analysed."""


class DataError(InputError):
    """Calibration or validation inputs do not fit the model."""


class OutputError(InputError):
    """An output path cannot be written."""


class ClaimError(DecomposeError):
    """A claim was measured and does not hold."""


class StructuralError(ClaimError):
    """Claim A failed: the rewritten model is not the annealed model."""


class AnnealingError(ClaimError):
    """Claim B failed: the rewritten model is farther from the original than the budget."""


class ProviderError(DecomposeError):
    """The execution provider that was asked for cannot run here."""

    exit_code = 3


class PassError(DecomposeError):
    """A graph pass broke its own contract (a defect in onnx-decompose, not in the model)."""


def interruption(error: BaseException) -> BaseException | None:
    """Ctrl-C or the like, where ``error`` was made of it: extension modules of pybind11 turn it into an ImportError."""
    cause: BaseException | None = error
    while cause is not None and isinstance(cause, Exception):
        cause = cause.__cause__ or cause.__context__
    return cause
