"""What a user did wrong, or what the machine lacks, said in one sentence."""
import contextlib
import errno
import functools
import os
import signal
import sys
import time
import traceback

REMEDIES = {
    errno.ENOSPC: 'make room on that disk', errno.EDQUOT: 'your quota is used up, make room',
    errno.EFBIG: 'that disk, or `ulimit -f`, allows no larger file', errno.EIO: 'is that disk full, or failing?',
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), 'give yourself the right to it, or choose another place'),
    errno.ENOENT: 'put it back'}


class UserError(Exception):
    """A mistake that the user can mend: one sentence that says what is wrong and what to do."""

    def __str__(self):
        return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in super().__str__())  # names may hold anything


def is_out_of_memory(error):
    """Of the machine or of a GPU, whichever part of torch met it."""
    text = str(error) if isinstance(error, RuntimeError) else ''
    return isinstance(error, MemoryError) or any(sign in text for sign in (
        'out of memory', 'ALLOC_FAILED', "can't allocate memory"))


def explain(error):
    """The sentence about an error that is not a mistake of this code; None for any other."""
    text, kind = str(error) if isinstance(error, RuntimeError) else '', type(error).__name__
    if isinstance(error, UserError):
        return str(error)
    if is_out_of_memory(error):
        return "out of memory: lower batch_size, height and width, or set cache = 'disk'"
    if isinstance(error, OSError) and error.errno:
        return str(UserError(f'{error.filename or "a file or pipe"}: {error.strerror}: {REMEDIES.get(error.errno, "look at it")}'
                             '; what was saved is there, and the same command goes on'))
    if kind in ('DistBackendError', 'DistNetworkError', 'BrokenProcessPool') or 'gloo' in text:
        return 'another process of this command has ended, killed perhaps for want of memory; the same command goes on'
    return None


def raise_if_machines(error):
    """Raise an error again that speaks of the machine and not of a file: of memory, rights, a disk."""
    if not isinstance(error, UserError) and getattr(error, 'errno', 0) not in (errno.EINVAL, errno.ENOENT) and explain(error):
        raise error


def exit_clearly(main):
    """Run a script's `main` so that what `explain` explains ends it with that sentence and exit code 2, without a traceback;
    SIGTERM ends it as Ctrl-C does."""
    @functools.wraps(main)
    def run(*args, **kwargs):
        joined = 'TORCHELASTIC_RUN_ID' in os.environ  # one of torchrun's processes, the first of which speaks
        follows = joined and os.environ.get('RANK') != '0'
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            return main(*args, **kwargs)
        except Exception as error:
            sentence = explain(error)
            if sentence is None and not joined:
                raise
            if follows:  # time to be ended because of the first process; it alone in trouble, this one speaks
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                time.sleep(5)
            print(f'error: {sentence}' if sentence else traceback.format_exc(), file=sys.stderr)
            _leave(2 if sentence else 1, joined)
        except KeyboardInterrupt:  # before or between the places that save; nothing is lost that was written
            if not follows:
                print('stopped', file=sys.stderr)
            _leave(130, joined)
    return run


def _leave(code, joined):
    """End this process; one of several at once, since NCCL's farewell waits for the others, and they for this one's part."""
    if joined:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # a pipe that was closed
                stream.flush()
        os._exit(code)
    sys.exit(code)
