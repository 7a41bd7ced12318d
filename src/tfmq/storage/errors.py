"""Everything that can go wrong with a checkpoint on disk: a closed set, one class per thing the reader can do
about it.
"""

__all__ = [
    "CheckpointError",
    "ChecksumError",
    "ForeignFileError",
    "JobMismatchError",
    "MissingFileError",
    "OutputExistsError",
    "StorageFullError",
    "TensorMismatchError",
    "TruncatedFileError",
    "VersionError",
]


class CheckpointError(ValueError):
    """Base of the set; never raised itself, so catching it catches exactly what is below."""


class MissingFileError(CheckpointError):
    """Raised when a file to read, or the directory of a file to write, does not exist."""


class ForeignFileError(CheckpointError):
    """Raised when a file is whole but not ours: not safetensors, not JSON, not a tfmq manifest or list, or
    not a regular file.
    """


class TruncatedFileError(CheckpointError):
    """Raised when a file ends before the length its own header declares."""


class ChecksumError(CheckpointError):
    """Raised when the tensors, other fields of the manifest, or the parts of a pipeline are not those that
    were sealed and listed together.
    """


class VersionError(CheckpointError):
    """Raised when the manifest declares a format version this tfmq does not read."""


class TensorMismatchError(CheckpointError):
    """Raised when tensors are missing, unexpected, or not what the manifest describes, in dtype, shape or
    value; names them.
    """


class OutputExistsError(CheckpointError):
    """Raised when an output directory already holds files, or its path is taken by something that is no
    directory.
    """


class StorageFullError(CheckpointError):
    """Raised when the disk or the quota is full; names the path and the bytes needed, the `OSError` is its
    cause.
    """


class JobMismatchError(CheckpointError):
    """Raised when a job is resumed with another model, recipe, seed or version than it was started with;
    names what differs.
    """
