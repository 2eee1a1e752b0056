"""Killed anywhere, a training goes on and ends as one that was not; no part of a file is read, nothing is left behind."""
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import train
from data import images
from tests import forks
from tests.conftest import TIME_COLUMNS, assert_refused, cut, interrupt_at
from tests.test_train import assert_same_run

SOAK = bool(os.environ.get('SOAK'))
KILLS = 30 if SOAK else 5
ALL = dict(stages='all', max_iters=4, eval_every=1)  # the fourth evaluation of a step outdates one that was kept


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setenv('PYTHONPATH', str(Path(train.__file__).parent))  # of the process that forks


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def state(path):
    """All of a checkpoint but times and the name of the run."""
    loaded = torch.load(path, weights_only=True)
    for name in ('elapsed', 'mark', 'log'):
        del loaded[name]
    for row in (*loaded['evaluations'], loaded['constants']):
        for name in (*TIME_COLUMNS, 'run', 'cache_dir'):
            row.pop(name, None)
    return loaded


def assert_same_results(one, other):
    """The same files, and in them the same but for times."""
    names = [sorted(str(path.relative_to(folder)) for path in folder.rglob('*')) for folder in (one, other)]
    assert names[0] == names[1]
    assert_same_run(one, other)
    for path in one.glob('*.pth'):
        assert same(state(path), state(other / path.name)), path.name
    assert_nothing_left(one.parent)


def assert_nothing_left(folder):
    assert [str(path) for path in folder.rglob('.*')] == []


def assert_whole(folder):
    """Each file that has its name can be read to its end."""
    for path in folder.glob('[!.]*'):
        if path.suffix == '.pth':
            assert state(path)
        elif path.name == 'log.txt':
            assert path.read_text().endswith('\n')
        elif path.name == 'evaluations.csv':
            assert pd.read_csv(path).notna().all().all()
        elif path.name == 'curves.png':
            assert path.read_text() == 'a picture'


def test_killed_anywhere_it_ends_as_one_that_was_not(drawn, work):
    """A third of the kills at random moments, the others at a write, before, after or amidst it."""
    settings = dict(ALL, data_dir=drawn)
    seed = time.time_ns() % 10 ** 6 if SOAK else 3
    rng = np.random.default_rng(seed)
    assert forks.finish(forks.start(work, dict(settings, run='whole')), work).code == 0
    calls, seconds = map(float, (work / 'calls').read_text().split())
    kills, runs = [], 0
    while len(kills) < KILLS:
        run, runs = f'killed{runs}', runs + 1
        if runs > 1:
            cut_cache(work)  # crops are built anew
        code = None
        while code != 0:
            kind = 'none' if len(kills) == KILLS else ('after', 'moment', 'before')[len(kills) % 3]
            how = dict(at=int(rng.integers(1, calls / 3)), when=kind) if kind in ('after', 'before') else {}
            process = forks.start(work, dict(settings, run=run), **how)
            if kind == 'moment':
                time.sleep(rng.uniform(0, seconds))
                kill(process)
            ended = forks.finish(process, work)
            code = ended.code
            assert code in (0, -signal.SIGKILL), ended.err
            if code:
                kills.append(kind)
                assert_whole(work / 'results' / run)
        assert_same_results(work / 'results/whole', work / 'results' / run)
    print(f'\n{len(kills)} kills (seed {seed}): {kills.count("moment")} at random moments, {kills.count("before")} before and '
          f'{kills.count("after")} after a write; the {runs} trainings ended as the unbroken one')


def cut_cache(work):
    for path in (work / 'results/cache').glob('*/done.u8'):
        cut(path)


def kill(process):
    for function in (os.killpg, os.kill):  # it may not have made its group yet, or have ended
        with suppress(ProcessLookupError):
            function(process.pid, signal.SIGKILL)


def test_killed_before_the_last_line_of_the_log(scripts, monkeypatch):
    """The training is finished as soon as last.pth says so; then the log must be there."""
    whole = scripts.train(run='whole')
    for run, where in [('one', 'plot_curves'), ('two', 'save')]:
        with monkeypatch.context() as patch:
            calls = []

            def stop(*args, real=getattr(train, where)):
                calls.append(1)
                if len(calls) == 2:
                    raise KeyboardInterrupt
                real(*args)

            patch.setattr(train, where, stop)
            assert scripts.train(run=run).code == 130
        assert_same_results(whole.folder, scripts.train(run=run).folder)


def test_a_signal_ends_it_softly(drawn, work):
    """Before the first iteration it ends at once; later it saves first, what it was evaluating included."""
    settings = dict(data_dir=drawn, max_iters=4, eval_every=1)
    assert forks.finish(forks.start(work, dict(settings, run='whole', cache_dir='other')), work).code == 0
    for only, at, number in [('load_tables', 1, signal.SIGTERM), ('_decode', 3, signal.SIGTERM), ('predict', 2, signal.SIGTERM),
                             ('save', 1, signal.SIGINT)]:
        stopped = forks.finish(forks.start(work, settings, at=at, only=only, number=number), work)
        assert stopped.code == 130 and 'stopped' in stopped.err and 'Traceback' not in stopped.err, stopped
        assert_nothing_left(work / 'results')
        assert (work / 'results/r/last.pth').exists() == (only in ('predict', 'save'))
    assert forks.finish(forks.start(work, settings), work).code == 0
    assert_same_results(work / 'results/whole', work / 'results/r')


def test_ctrl_c_does_not_wait_for_all_crops(scripts, work, monkeypatch):
    decoded = []

    def slowly(*args, real=images.read_image):
        decoded.append(1)
        time.sleep(0.01)
        return real(*args)

    def bar(rows, **_):
        yield next(iter(rows))
        raise KeyboardInterrupt

    monkeypatch.setattr(images, 'read_image', slowly)
    monkeypatch.setattr(images, 'progress_bar', bar)
    assert scripts.train().code == 130
    assert len(decoded) < 30  # of 40
    done, = (np.fromfile(path, np.uint8) for path in (work / 'results/cache').glob('*/done.u8'))
    assert done.sum() == 1


def test_crops_are_done_only_when_their_pixels_are_on_the_disk(scripts, monkeypatch):
    """Else a power cut could leave black ones that count as done."""
    marked, flush = [], np.memmap.flush

    def flushed(array):
        done, = (np.fromfile(path, np.uint8) for path in Path('results/cache').glob('*/done.u8'))
        marked.append(done.any())
        flush(array)

    monkeypatch.setattr(np.memmap, 'flush', flushed)
    assert scripts.train(max_iters=1).code == 0
    assert marked == [False, False]


# Two trainings in one folder

def test_the_second_training_in_a_folder_is_refused_until_the_first_is_killed(drawn, work):
    settings = dict(data_dir=drawn, max_iters=100000, eval_every=3)
    first = forks.start(work, settings)
    while not (work / 'results/r/last.pth').exists():
        time.sleep(0.05)
        assert first.is_alive()
    assert_refused(forks.finish(forks.start(work, settings), work), 'another training', 'results/r')
    kill(first)
    first.join()
    done = int(torch.load(work / 'results/r/last.pth', weights_only=True)['iteration'])
    assert forks.finish(forks.start(work, dict(settings, max_iters=done + 3)), work).code == 0


def sleep_instead(*_, **__):
    Path('asleep').touch()
    time.sleep(600)


def fall_asleep():
    train.TrainingSet = sleep_instead


def test_the_third_training_is_refused_too_while_the_folder_is_empty(drawn, work):
    settings = dict(data_dir=drawn)
    first = forks.start(work, settings, prepare=fall_asleep)
    while not (work / 'asleep').exists():
        time.sleep(0.05)
        assert first.is_alive()
    for _ in range(2):
        assert_refused(forks.finish(forks.start(work, settings), work), 'another training', 'results/r')
    kill(first)
    first.join()


def test_crops_whose_file_is_made_anew_are_not_done(scripts, work, monkeypatch):
    whole = scripts.train(run='whole')
    crops = next((work / 'results/cache').rglob('crops.u8'))
    crops.unlink()

    def killed(path, shape, real=images.Crops._open):
        if path.name == 'masks.u8':
            raise KeyboardInterrupt
        return real(path, shape)

    with monkeypatch.context() as patch:
        patch.setattr(images.Crops, '_open', staticmethod(killed))
        scripts.train()
    assert_same_run(whole.folder, scripts.train().folder)
    assert np.fromfile(crops, np.uint8).any()


def test_a_cache_that_another_training_has_is_not_emptied(tmp_path):
    first = images.Crops._open(tmp_path / 'crops.u8', (10,))
    first[:] = 7
    first.flush()
    os.truncate(tmp_path / 'crops.u8', 5)
    images.Crops._open(tmp_path / 'crops.u8', (10,))
    assert first[:5].tolist() == [7] * 5 and first[5:].tolist() == [0] * 5


def test_a_file_that_another_process_is_writing_is_left_alone(scripts, work):
    """test.py may write its answers while a training starts in the same folder."""
    folder = scripts.train().folder
    names = []

    def write(path):
        Path(path).write_text('half')
        scripts.train(max_iters=9)
        names.extend(part.name for part in folder.glob('.*'))
        Path(path).write_text('whole')

    (folder / '.part-abandoned.csv').write_text('half')
    train.write_whole(folder / 'submission.csv', write)
    assert len(names) == 1 and names[0].endswith('.csv') and 'abandoned' not in names[0]
    assert (folder / 'submission.csv').read_text() == 'whole'
    assert_nothing_left(folder)


# Somewhere else

def test_moved_results_go_on(scripts, work, monkeypatch):
    whole = scripts.train(run='whole')
    with monkeypatch.context() as patch:
        interrupt_at(patch, 'joint_loss', 4)
        assert scripts.train().code == 130
    (work / 'elsewhere').mkdir()
    (work / 'results').rename(work / 'elsewhere/results')
    monkeypatch.chdir(work / 'elsewhere')
    assert scripts.train().code == 0
    assert_same_run(work / 'elsewhere/results/whole', work / 'elsewhere/results/r')
    assert whole.code == 0


def test_what_a_gpu_saved_goes_on_without_one(scripts, monkeypatch):
    whole = scripts.train(run='whole')
    with monkeypatch.context() as patch:
        interrupt_at(patch, 'joint_loss', 4)
        folder = scripts.train().folder
    saved = torch.load(folder / 'last.pth', weights_only=True)
    saved['constants'].update(device='cuda', precision='auto', cache='device')
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, 'location_tag', lambda storage: 'cuda:0')
        torch.save(saved, folder / 'last.pth')
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match='CUDA'):
            torch.load(folder / 'last.pth', weights_only=True)
    assert scripts.train().code == 0
    assert_same_run(whole.folder, folder)
