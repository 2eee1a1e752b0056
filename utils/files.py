"""Files are written whole or not at all."""
import os
import tempfile
from pathlib import Path


def write_whole(path, write):
    """Call `write(temporary_path)`, then put the finished file in `path`'s place in one step.

    A reader, or a run that was killed half-way, sees the old file or the new one and never a part of either.
    `temporary_path` keeps `path`'s suffix, since some writers choose their format by it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.stem}-', suffix=path.suffix)
    os.close(handle)
    try:
        write(temporary)
        with open(temporary, 'rb') as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask
