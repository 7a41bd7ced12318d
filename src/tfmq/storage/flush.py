"""Write to its medium what the system holds of a file."""

import errno
import os

try:
    import fcntl
except ImportError:  # Windows has no such module.
    fcntl = None  # type: ignore[assignment]

__all__ = ["flush"]


def flush(descriptor: int) -> None:
    """Write what the system holds of an open file to its medium.

    Raises:
        OSError: the file system fails.
    """
    # On macOS `fsync` ends while the drive still holds the data, and a file system of others may lack this.
    if full := getattr(fcntl, "F_FULLFSYNC", None):
        try:
            fcntl.fcntl(descriptor, full)
            return
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOTTY):
                raise
    os.fsync(descriptor)
