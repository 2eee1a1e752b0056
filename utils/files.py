"""Files are written whole or not at all."""
import fcntl
import hashlib
import os
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

from utils.errors import UserError


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


def sha256(path):
    """Of a file's content, as 64 hex digits."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(2 ** 22):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def held(folder):
    """`with held(folder):` it belongs to this process, until that ends, however it ends: the kernel lets go of the lock.

    UserError when another process has it. A folder that is empty in the end is removed.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f'another training writes to {folder}: wait for it, stop it, or choose another run') from None
        yield
    finally:
        os.close(handle)
        with suppress(OSError):
            os.rmdir(folder)


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask
