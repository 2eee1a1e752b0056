"""Files are written whole or not at all."""
import errno
import fcntl
import hashlib
import os
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from utils.errors import UserError

PART = '.part-'  # begins the names of files that are not whole yet


def write_whole(path, write):
    """Call `write(temporary_path)`, then put the finished file in `path`'s place in one step.

    A reader, or a run that was killed half-way, sees the old file or the new one and never a part of either.
    `temporary_path` keeps `path`'s suffix, since some writers choose their format by it.
    """
    path = Path(path)
    temporary = path.with_name(f'{PART}{uuid4().hex}{path.suffix}')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, 'xb') as lock:
            _locked(lock)  # so `sweep` does not take it for one that was left behind
            write(temporary)
            with open(temporary, 'rb') as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError) and 'unexpected pos' not in str(error) and 'StreamWriter' not in str(error):
            raise
        why = getattr(error, 'errno', None) or errno.EIO  # torch and numpy hide it
        raise OSError(why, os.strerror(why), str(path)) from error


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

    UserError when another process has it. What a killed process left half-written is removed, and a folder that is empty
    in the end.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        if not _locked(handle) or not os.fstat(handle).st_nlink:  # the other one may just have removed it
            raise UserError(f'another training writes to {folder}: wait for it, stop it, or choose another run')
        sweep(folder)
        try:
            yield
        finally:
            with suppress(OSError):
                os.rmdir(folder)  # while it is still ours
    finally:
        os.close(handle)


def sweep(folder):
    """Remove the files that killed processes left half-written."""
    for part in Path(folder).glob(f'{PART}*'):
        with suppress(OSError), open(part, 'r+b') as file:  # to be written: NFS locks no other
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()


def _locked(file):
    """Whether the file is this process's now, until it is closed; always so on a disk that knows no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return not isinstance(error, BlockingIOError)
    return True
