"""What a user did wrong, said in one sentence."""
import functools
import sys


class UserError(Exception):
    """A mistake that the user can mend: one sentence that says what is wrong and what to do."""

    def __str__(self):
        return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in super().__str__())  # names may hold anything


def exit_clearly(main):
    """Run a script's `main` so that a UserError ends it with that sentence and exit code 2, without a traceback."""
    @functools.wraps(main)
    def run(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UserError as error:
            print(f'error: {error}', file=sys.stderr)
            sys.exit(2)
        except Exception as error:
            if type(error).__name__ != 'OutOfMemoryError':  # torch's, which is not imported for this alone
                raise
            print("error: out of memory: lower batch_size, height and width, or set cache = 'memory'", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:  # before or between the places that save; nothing is lost that was written
            print('stopped', file=sys.stderr)
            sys.exit(130)
    return run
