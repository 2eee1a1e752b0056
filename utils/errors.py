"""What a user did wrong, or what the machine lacks, said in one sentence."""
import errno
import functools
import os
import signal
import sys
import time

REMEDIES = {
    errno.ENOSPC: 'make room on that disk', errno.EDQUOT: 'your quota is used up, make room',
    errno.EFBIG: 'that disk, or `ulimit -f`, allows no larger file', errno.EIO: 'is that disk full, or failing?',
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), 'give yourself the right to it, or choose another place'),
    errno.ENOENT: 'put it back'}


class UserError(Exception):
    """A mistake that the user can mend: one sentence that says what is wrong and what to do."""

    def __str__(self):
        return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in super().__str__())  # names may hold anything


def explain(error):
    """The sentence about an error that is not a mistake of this code; None for any other."""
    text, kind = str(error) if isinstance(error, RuntimeError) else '', type(error).__name__
    if isinstance(error, UserError):
        return str(error)
    if kind == 'OutOfMemoryError' or isinstance(error, MemoryError) or "can't allocate memory" in text:  # the first is torch's
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
        follows = os.environ.get('RANK', '0') != '0'  # a process of torchrun, the first of which speaks
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            return main(*args, **kwargs)
        except Exception as error:
            sentence = explain(error)
            if sentence is None:
                raise
            if follows:  # time to be ended because of the first process; it alone in trouble, this one speaks
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                time.sleep(5)
            print(f'error: {sentence}', file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:  # before or between the places that save; nothing is lost that was written
            if not follows:
                print('stopped', file=sys.stderr)
            sys.exit(130)
    return run
