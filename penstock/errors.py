"""Every error that a user of Penstock can meet.

    PenstockError
    ├── CheckpointError            the files of a checkpoint (also a ValueError)
    │   ├── HeaderError            a safetensors header breaks the format
    │   ├── IndexFileError         model.safetensors.index.json is wrong or points outside its directory
    │   ├── MissingFileError       a file that the checkpoint needs is not there
    │   ├── TruncatedFileError     a file is shorter or longer than its header says
    │   ├── FileChangedError       a file is not the one whose header was read
    │   ├── ManifestError          a packed checkpoint's manifest is wrong or disagrees with its files
    │   ├── ChecksumError          bytes of a packed checkpoint are not those that were packed
    │   ├── UnsupportedFormatError a checkpoint without safetensors, or one quantised in a way we cannot read
    │   └── MissingWeightError     the model needs a parameter that the checkpoint does not hold
    ├── ModelError                 the model definition (also a ValueError)
    │   ├── UnknownArchitectureError  transformers does not know it, or it is no causal language model
    │   ├── RemoteCodeError        the config asks for Python code from the checkpoint
    │   ├── UnsupportedModelError  known, but it cannot be run layer by layer
    │   └── ModelOutputError       it computed something that is no number
    ├── ConfigError                an option or argument (also a ValueError)
    │   ├── SizeError              a memory size that does not parse
    │   ├── UnsupportedFieldError  a sampling field that Penstock does not have
    │   ├── DeviceError            a device that is not there, or cannot do what is asked
    │   └── LibraryError           an optional library is missing, or does not do what it should
    ├── BudgetError                what was asked for does not fit the memory budget (also a MemoryError)
    ├── RequestError               one prompt or request (also a ValueError)
    │   ├── PromptTooLongError     prompt plus new tokens exceed the model's context
    │   └── PromptFileError        the file of prompts: unreadable, empty, or a bad line (with its number)
    ├── OutputError                a result cannot be written (also an OSError)
    ├── JournalError               a journal is another job's, damaged, or in use (also a ValueError)
    ├── ReadError                  the disk could not deliver bytes (also an OSError)
    ├── WriteError                 the disk could not take bytes (also an OSError)
    ├── TargetError                what was to be profiled or written to cannot be (also an OSError)
    │   └── NoSpaceError           the disk, a quota or a limit has no room for the scratch file
    ├── ProfileError               a stored hardware profile is damaged or of another version (also a ValueError)
    ├── ClosedError                use after close (also a RuntimeError)
    └── VerificationError          tokens differ from those of in-memory Hugging Face

A message says which file, what was wanted, what was got, and what to do.
"""

from __future__ import annotations

from os import PathLike, fspath

__all__ = [
    "BudgetError",
    "CheckpointError",
    "ChecksumError",
    "ClosedError",
    "ConfigError",
    "DeviceError",
    "FileChangedError",
    "HeaderError",
    "IndexFileError",
    "JournalError",
    "LibraryError",
    "ManifestError",
    "MissingFileError",
    "MissingWeightError",
    "ModelError",
    "ModelOutputError",
    "NoSpaceError",
    "OutputError",
    "PenstockError",
    "ProfileError",
    "PromptFileError",
    "PromptTooLongError",
    "ReadError",
    "RemoteCodeError",
    "RequestError",
    "SizeError",
    "TargetError",
    "TruncatedFileError",
    "UnknownArchitectureError",
    "UnsupportedFieldError",
    "UnsupportedFormatError",
    "UnsupportedModelError",
    "VerificationError",
    "WriteError",
]


class PenstockError(Exception):
    """Base of every error that Penstock raises on purpose.

    `what` is the fault in a few words. The rest is optional and kept as attributes: the `file` concerned, what was
    `wanted`, what was `got`, and the `fix`, an imperative sentence.
    """

    def __init__(
        self,
        what: str,
        *,
        file: str | PathLike[str] | None = None,
        wanted: object = None,
        got: object = None,
        fix: str | None = None,
    ) -> None:
        self.what = what
        self.file = None if file is None else fspath(file)
        self.wanted = wanted
        self.got = got
        self.fix = fix
        super().__init__(self._message())

    def _message(self) -> str:
        comparison = ", ".join(
            f"{label} {value}" for label, value in (("wanted", self.wanted), ("got", self.got)) if value is not None
        )
        body = ": ".join(part for part in (self.file, self.what, comparison) if part)
        return f"{body}. {self.fix}" if self.fix else body

    def __str__(self) -> str:
        return self._message()


class CheckpointError(PenstockError, ValueError):
    """The files of a checkpoint are not what they must be."""


class HeaderError(CheckpointError):
    """A safetensors header breaks the format."""


class IndexFileError(CheckpointError):
    """The checkpoint's index file is wrong or points outside its directory."""


class MissingFileError(CheckpointError):
    """A file that the checkpoint needs is not there."""


class TruncatedFileError(CheckpointError):
    """A file's real length is not the one its header describes."""


class FileChangedError(CheckpointError):
    """A file is not, or no longer, the one whose header was read."""


class ManifestError(CheckpointError):
    """A packed checkpoint's manifest is wrong or disagrees with its files."""


class ChecksumError(CheckpointError):
    """Bytes of a packed checkpoint are not those that were packed."""


class UnsupportedFormatError(CheckpointError):
    """A checkpoint in a format that Penstock does not read."""


class MissingWeightError(CheckpointError):
    """The model needs a parameter that the checkpoint does not hold."""


class ModelError(PenstockError, ValueError):
    """The model definition cannot be used."""


class UnknownArchitectureError(ModelError):
    """Transformers does not know the architecture, or it is not a causal language model."""


class RemoteCodeError(ModelError):
    """The config asks for Python code that comes with the checkpoint; Penstock never runs it."""


class UnsupportedModelError(ModelError):
    """A known architecture that cannot be run layer by layer."""


class ModelOutputError(ModelError):
    """The model computed something that is no number."""


class ConfigError(PenstockError, ValueError):
    """An option or argument is wrong."""


class SizeError(ConfigError):
    """A memory size does not parse."""


class UnsupportedFieldError(ConfigError):
    """A sampling field that Penstock does not have."""


class DeviceError(ConfigError):
    """A device that is not there, or cannot do what is asked."""


class LibraryError(ConfigError):
    """An optional library is missing, or does not do what it should."""


class BudgetError(PenstockError, MemoryError):
    """What was asked for does not fit the memory budget."""


class RequestError(PenstockError, ValueError):
    """One prompt or request is wrong."""


class PromptTooLongError(RequestError):
    """Prompt plus new tokens exceed the model's context."""


class PromptFileError(RequestError):
    """The file of prompts is unreadable or empty, or has a bad line."""


class OutputError(PenstockError, OSError):
    """A result cannot be written."""


class JournalError(PenstockError, ValueError):
    """A journal is another job's, damaged, or in use."""


class ReadError(PenstockError, OSError):
    """The disk could not deliver the bytes."""


class WriteError(PenstockError, OSError):
    """The disk could not take the bytes."""


class TargetError(PenstockError, OSError):
    """What was to be profiled or written to cannot be."""


class NoSpaceError(TargetError):
    """The disk, a quota or a limit has no room for the scratch file."""


class ProfileError(PenstockError, ValueError):
    """A stored hardware profile is damaged or of another version."""


class ClosedError(PenstockError, RuntimeError):
    """Something was used after it was closed."""


class VerificationError(PenstockError):
    """The tokens differ from those of in-memory Hugging Face."""
