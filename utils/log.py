"""What a training shows: a fixed-width table, one row an evaluation, and progress bars."""
import sys
from concurrent.futures import ThreadPoolExecutor
from weakref import WeakSet

from tqdm import tqdm

from utils import ranks

COLUMNS = [  # name, width, format, heading
    ('step', 4, 'd', 'step'), ('iteration', 7, 'd', 'iter'), ('epoch', 6, '.1f', 'epoch'), ('lr', 8, '.1e', 'lr'),
    ('loss', 7, '.3f', 'loss'), ('sigmoid', 8, '.4f', 'sigmoid'), ('triplet', 8, '.4f', 'triplet'),
    ('local', 7, '.4f', 'local'), ('active', 7, '.2f', 'active'),
    ('train_top1', 7, '.3f', 'tr.top1'), ('train_top5', 8, '.3f', 'tr.top5'), ('train_map5', 8, '.3f', 'tr.MAP5'),
    ('valid_top1', 8, '.3f', 'va.top1'), ('valid_top5', 8, '.3f', 'va.top5'), ('valid_map5', 8, '.3f', 'va.MAP5'),
    ('threshold', 7, '.3f', 'thresh'), ('img_s', 7, '.0f', 'img/s'), ('left', 9, 's', 'left')]
HEADER = ' '.join(f'{heading:>{width}}' for _, width, _, heading in COLUMNS)


def format_row(row):
    return ' '.join(f'{row[name]:>{width}{form}}' for name, width, form, _ in COLUMNS)


def duration(seconds):
    """3661 -> '1:01:01'."""
    return f'{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}'


class _Lines(tqdm):
    """A bar for a file or pipe: each state on a line of its own. tqdm.write need not clear it, and does not know it."""
    monitor_interval = 0
    _instances: WeakSet = WeakSet()

    @staticmethod
    def status_printer(file):
        return lambda text: print(text, file=file, flush=True)


def progress_bar(iterable=None, **options):
    """tqdm, redrawn twice a second on a screen; in a file or pipe a line every half minute."""
    options['disable'] = options.get('disable', False) or ranks.rank() > 0
    if sys.stderr.isatty():
        return tqdm(iterable, mininterval=0.5, dynamic_ncols=True, **options)
    return _Lines(iterable, mininterval=30, **options)


def in_threads(function, items, what, few=2000):
    """The function's result of each item, in order, under a bar where they are not few."""
    with ThreadPoolExecutor() as pool:
        return list(progress_bar(pool.map(function, items), total=len(items), desc=what, unit='img', disable=len(items) < few))
