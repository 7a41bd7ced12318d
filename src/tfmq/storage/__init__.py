"""Checkpoints on disk: digests, atomic files, the sealed directory, and the errors these raise."""

from .atomic import atomic_write, read_json, read_tensors, write_json, write_tensors
from .checkpoint import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    TENSORS_FILE,
    load_checkpoint,
    prepare_output,
    save_checkpoint,
    seal,
    verify,
)
from .digest import file_digest, tensor_digest
from .errors import (
    CheckpointError,
    ChecksumError,
    ForeignFileError,
    JobMismatchError,
    MissingFileError,
    OutputExistsError,
    StorageFullError,
    TensorMismatchError,
    TruncatedFileError,
    VersionError,
)

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST_FILE",
    "TENSORS_FILE",
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
    "atomic_write",
    "file_digest",
    "load_checkpoint",
    "prepare_output",
    "read_json",
    "read_tensors",
    "save_checkpoint",
    "seal",
    "tensor_digest",
    "verify",
    "write_json",
    "write_tensors",
]
