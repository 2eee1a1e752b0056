"""What a machine does to a training: one sentence, exit code 2, and the last good checkpoint as it was."""
import errno
import functools
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

import train
import utils.learn
from data import images
from tests import forks
from tests.conftest import SETTINGS, arguments, assert_refused, assert_same_weights, snapshot
from tests.test_killed import SOAK, assert_nothing_left, importable  # noqa: F401, a fixture that all need
from tests.test_train import assert_same_run
from utils import checkpoint
from utils.errors import exit_clearly
from utils.files import write_whole

REPO = Path(__file__).parent.parent
LONG = dict(max_iters=8, eval_every=4, lr=1e-4, checkPoint_start='last')  # a second step, after that of `trained`


def raising(error):
    def call(*_, **__):
        raise error
    return call


# The sentence

@pytest.mark.parametrize('number, remedy', [
    (errno.ENOSPC, 'make room'), (errno.EDQUOT, 'quota'), (errno.EFBIG, 'larger'), (errno.EROFS, 'another place'),
    (errno.EACCES, 'another place'), (errno.ENOENT, 'put it back'), (errno.EIO, 'full, or failing'),
    (errno.EMFILE, 'look at it')])
@pytest.mark.parametrize('name', ['results/r/last.pth', None])
def test_an_error_of_the_system_is_a_sentence_with_the_files_name(capsys, number, remedy, name):
    assert_fails_clearly(OSError(number, os.strerror(number), name), capsys, remedy, os.strerror(number), name or 'a file')


def assert_fails_clearly(error, capsys, *words):
    with pytest.raises(SystemExit) as stop:
        exit_clearly(raising(error))()
    assert_refused(SimpleNamespace(code=stop.value.code, err=capsys.readouterr().err), *words)


@pytest.mark.parametrize('make', [
    lambda: torch.empty(1 << 50), lambda: np.empty(1 << 50), lambda: bytearray(1 << 62),
    raising(torch.OutOfMemoryError('CUDA out of memory. Tried to allocate')), raising(RuntimeError('CUDA error: out of memory')),
    raising(RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`')),
    raising(RuntimeError('cuDNN error: CUDNN_STATUS_ALLOC_FAILED'))])
def test_memory_that_is_used_up_is_a_sentence(capsys, make):
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        make()
    assert_fails_clearly(caught.value, capsys, 'memory', 'lower batch_size')


def test_a_helper_that_was_killed_is_a_sentence(capsys):
    assert_fails_clearly(BrokenProcessPool('A process was terminated abruptly'), capsys, 'another process', 'ended')


@pytest.mark.parametrize('error', [ValueError('x'), RuntimeError('x'), OSError('x'), ZeroDivisionError()])
def test_a_mistake_of_the_code_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        exit_clearly(raising(error))()


@pytest.mark.parametrize('error, code, said', [
    ('utils.errors.UserError("no")', 2, 'error: no'), ('ValueError("odd")', 1, 'Traceback'),
    ('KeyboardInterrupt', 130, 'stopped')])
def test_a_process_of_torchrun_that_fails_goes_at_once(error, code, said):
    """Its farewell, here one that never ends, would wait for processes that wait for it."""
    script = (f'import atexit, time, utils.errors\natexit.register(time.sleep, 600)\n@utils.errors.exit_clearly\n'
              f'def main():\n    print("not yet written")\n    raise {error}\nmain()')
    environment = {**os.environ, 'PYTHONPATH': str(REPO), 'RANK': '0', 'TORCHELASTIC_RUN_ID': 'x', 'PYTHONUNBUFFERED': ''}
    with open('/dev/full', 'w') as broken:  # as a pipe that nobody reads any more
        done = subprocess.run([sys.executable, '-c', script], env=environment, timeout=60, text=True,
                              stdout=broken, stderr=subprocess.PIPE)
    assert done.returncode == code and said in done.stderr


# What is written

@pytest.mark.parametrize('name, write', [
    ('a.pth', lambda path: torch.save({'a': torch.zeros(10000)}, path)), ('a.npy', lambda path: np.save(path, np.zeros(10000))),
    ('a.npz', lambda path: np.savez(path, a=np.zeros(10000))), ('a.txt', lambda path: Path(path).write_text('a' * 10000))])
def test_a_file_that_the_disk_has_no_room_for_is_named(tmp_path, name, write, capsys):
    (tmp_path / name).write_text('old')
    before, limit = snapshot(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limit[1]))
    try:
        with pytest.raises(OSError) as caught:
            write_whole(tmp_path / name, write)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert snapshot(tmp_path) == before
    assert_fails_clearly(caught.value, capsys, str(tmp_path / name))


def limit_files():
    limit = os.stat('results/r/last.pth').st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit // 2, resource.RLIM_INFINITY))


def test_a_full_disk_leaves_the_last_checkpoint(trained, drawn, work):
    """By a limit on the size of files, which stops the same writes."""
    folder, settings = work / 'results/r', dict(SETTINGS, **LONG, data_dir=drawn)
    before = snapshot(folder)
    full = forks.finish(forks.start(work, settings, prepare=limit_files), work)
    assert_refused(full, 'results/r/', '.pth', 'full')
    after = snapshot(folder)
    assert {name: after[name] for name in before if name.endswith('.pth')} == \
        {name: data for name, data in before.items() if name.endswith('.pth')}
    assert_nothing_left(folder)
    assert trained.train(**LONG).code == 0


@pytest.mark.skipif(not SOAK, reason='mounts a disk of a megabyte')
def test_a_disk_that_is_really_full(scripts, drawn, work):
    results, settings = work / 'results', dict(SETTINGS, max_iters=12, eval_every=1, data_dir=drawn)
    results.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=1300k', 'none', results]).returncode:
        pytest.skip('no right to mount')  # only root may, and not in every container; RLIMIT_FSIZE above shows the same without
    try:
        full = forks.finish(forks.start(work, settings), work)
        assert_refused(full, 'results/r/', '.pth', 'full')
        assert checkpoint.load(results / 'r/last.pth')['iteration'] > 0
        assert_nothing_left(results)
        subprocess.run(['mount', '-o', 'remount,size=50m', results], check=True)
        assert forks.finish(forks.start(work, settings), work).code == 0
        shutil.copytree(results / 'r', work / 'kept/r')
    finally:
        subprocess.run(['umount', results], check=True)
    assert_same_run(scripts.train(**{**settings, 'run': 'whole'}).folder, work / 'kept/r')


def test_a_disk_that_fills_while_crops_are_made(scripts, work, monkeypatch):
    """The room is taken before: a write to mapped memory without room would end the process without a word."""
    monkeypatch.setattr(os, 'posix_fallocate', raising(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    assert_refused(scripts.train(), 'No space left', 'make room', 'crops.u8')
    monkeypatch.undo()


def test_results_that_cannot_be_written(scripts, work, monkeypatch):
    (work / 'results').write_text('a file where the folder should be')
    assert_refused(scripts.train(), 'results')
    (work / 'results').unlink()
    monkeypatch.setattr('utils.files.open', raising(OSError(errno.EROFS, os.strerror(errno.EROFS))), raising=False)
    assert_refused(scripts.train(), 'results/cache/', 'Read-only', 'another place')


# What vanishes

def at_batch(monkeypatch, number, act):
    """`act()` before the `number`-th batch of training is read."""
    calls = []

    def batch(self, pairs, pin=False, real=train.TrainingSet.batch):
        calls.append(1)
        if len(calls) == number:
            act()
        return real(self, pairs, pin)

    monkeypatch.setattr(train.TrainingSet, 'batch', batch)


def empty(folder):
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize('vanish, words', [
    (lambda photos: empty(photos / 'train'), ['.jpg', 'No such file']), (shutil.rmtree, ['photos/train', 'No such file'])])
@pytest.mark.parametrize('skip', [False, True])
def test_photographs_that_vanish_while_they_are_decoded_are_named(scripts, photos, monkeypatch, vanish, words, skip):
    last = (scripts.train(max_iters=4, eval_every=2, data_dir=photos, cache='none').folder / 'last.pth').read_bytes()
    at_batch(monkeypatch, 2, lambda: vanish(photos))
    result = scripts.train(**LONG, data_dir=photos, cache='none', skip_bad_images=skip)
    assert_refused(result, *words)
    assert (result.folder / 'last.pth').read_bytes() == last


@pytest.mark.parametrize('vanish', ['photos', 'work/results/cache'])
def test_what_is_cached_already_is_not_missed(scripts, photos, tmp_path, monkeypatch, vanish):
    whole = scripts.train(run='whole', data_dir=photos)
    at_batch(monkeypatch, 2, lambda: shutil.rmtree(tmp_path / vanish))
    assert_same_run(whole.folder, scripts.train(data_dir=photos).folder)


def test_results_that_vanish_are_written_again(scripts, work, monkeypatch):
    scripts.train(run='whole')
    at_batch(monkeypatch, 4, lambda: shutil.rmtree(work / 'results/r'))
    folder = scripts.train().folder
    assert_same_weights(folder, work / 'results/whole')


def test_a_photograph_that_vanishes_between_its_check_and_its_crop(scripts, photos, monkeypatch):
    name = sorted((photos / 'train').iterdir())[5]
    real = train.TrainingSet.__init__.__globals__['check_images']

    def check_images(*args):
        checked = real(*args)
        name.unlink()
        return checked

    monkeypatch.setitem(train.TrainingSet.__init__.__globals__, 'check_images', check_images)
    assert_refused(scripts.train(data_dir=photos), name.name, 'No such file', 'put it back')


# What fails

def at_loss(monkeypatch, number, act):
    calls, real = [], utils.learn.joint_loss

    def loss(*args):
        calls.append(1)
        if len(calls) == number:
            act()
        return real(*args)

    monkeypatch.setattr(utils.learn, 'joint_loss', loss)


@pytest.mark.parametrize('act', [lambda: torch.empty(1 << 50), lambda: np.empty(1 << 50)])
def test_memory_that_ends_leaves_the_last_checkpoint(trained, work, monkeypatch, act):
    before = snapshot(work / 'results/r')
    with monkeypatch.context() as patch:
        at_loss(patch, 2, act)
        assert_refused(trained.train(**LONG), 'out of memory', 'lower batch_size')
    after = snapshot(work / 'results/r')
    after['constants.txt'] = before['constants.txt']
    assert after == before
    assert trained.train(**LONG).code == 0


@pytest.mark.parametrize('error, words', [
    (cv2.error('OpenCV(4) resize.cpp:1:\n error: (-4) Failed to allocate'), ['.jpg', 'Failed to allocate', 'skip_bad_images']),
    (MemoryError(), ['memory', 'lower batch_size'])])
@pytest.mark.parametrize('cache', ['disk', 'none'])
def test_a_photograph_that_cannot_be_cut(scripts, monkeypatch, error, words, cache):
    calls = []

    def cut_crop(*args, real=images.cut_crop):
        calls.append(1)
        if len(calls) == 5:
            raise error
        return real(*args)

    monkeypatch.setattr(images, 'cut_crop', cut_crop)
    assert_refused(scripts.train(cache=cache), *words)


# Several processes, as torchrun starts them

def join(rank, port):
    """The process is the `rank`-th of two."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', LOCAL_WORLD_SIZE='2', MASTER_ADDR='127.0.0.1',
                      MASTER_PORT=str(port), TORCHELASTIC_RUN_ID='none')


def start_two(work, settings, *how):
    """Two processes of one training; `how` says what befalls each."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    return [forks.start(work, settings, prepare=functools.partial(join, rank, port), **how[rank]) for rank in range(2)]


@pytest.mark.parametrize('dies', [1, 0] if SOAK else [1])
def test_a_process_that_dies_ends_the_others(scripts, drawn, work, dies):
    """In its second evaluation; the other one has then gone two iterations further than last.pth."""
    settings = dict(SETTINGS, max_iters=6, eval_every=2, batch_size=16, data_dir=drawn)
    how = [dict(only='predict', at=2), {}]
    ended = [forks.finish(process, work) for process in start_two(work, settings, *how[::-1 if dies else 1])]
    assert ended[dies].code == -signal.SIGKILL
    assert_refused(ended[1 - dies], 'another process', 'ended', 'the same command goes on')
    assert checkpoint.load(work / 'results/r/last.pth')['iteration'] == 2
    assert_nothing_left(work / 'results')
    assert scripts.train(**settings).code == 0


def join_and_end(rank, ended):
    """torchrun ends the other processes when one has ended: in the time that the second one leaves for it, or not at all."""
    join(rank, 1)
    time.sleep = lambda seconds: ended and os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize('rank, ended, code', [(0, True, 2), (1, True, -signal.SIGTERM), (1, False, 2)])
def test_of_several_processes_one_speaks(work, drawn, rank, ended, code):
    settings = dict(SETTINGS, lr=3, data_dir=drawn)
    found = forks.finish(forks.start(work, settings, prepare=functools.partial(join_and_end, rank, ended)), work)
    if code == 2:
        assert_refused(found, 'lr', 'between 0 and 1')
    assert found.code == code and ('error' in found.err) == (code == 2)


@pytest.mark.skipif(not SOAK, reason='starts torchrun')
def test_torchrun_ends_when_a_process_dies(drawn, work):
    code = ('import os, signal, sys, models.whale_net, train; from tests.conftest import SmallBackbone\n'
            'models.whale_net.build_backbone = SmallBackbone\n'
            'real, calls = train.predict, []\n'
            'def predict(*args, **options):\n'
            '    calls.append(1)\n'
            '    if len(calls) == 2 and os.environ["RANK"] == "1": os.kill(os.getpid(), signal.SIGKILL)\n'
            '    return real(*args, **options)\n'
            'train.predict = predict\n'
            'train.main(sys.argv[1:])')
    (work / 'dies.py').write_text(code)
    settings = dict(SETTINGS, max_iters=6, eval_every=2, batch_size=16, data_dir=drawn)
    ended = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--', 'dies.py',
                            *arguments(**settings)], cwd=work, capture_output=True, text=True, timeout=600)
    assert ended.returncode
    assert [line for line in ended.stderr.splitlines() if line.startswith('error: another process')]
    assert checkpoint.load(work / 'results/r/last.pth')['iteration'] == 2


def test_test_py_says_that_the_disk_is_full_before_it_writes_scores(trained, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, 'posix_fallocate', full)  # crops are there from the training
    assert_refused(trained.answer(cache='none'), 'No space left', 'make room')


@pytest.mark.parametrize('error', [MemoryError(), PermissionError(errno.EACCES, 'Permission denied', 'last.pth'),
                                   OSError(errno.EIO, 'Input/output error', 'last.pth')])
def test_trouble_of_the_machine_never_says_to_delete_a_checkpoint(trained, monkeypatch, error):
    def trouble(*_, **__):
        raise error
    monkeypatch.setattr(torch, 'load', trouble)
    result = trained.train(max_iters=9)
    assert_refused(result)
    assert 'delete' not in result.err


@pytest.mark.parametrize('change', [
    dict(sums=torch.zeros(2)), dict(kept=[('x', 'y')] * 3), dict(optimizer={'state': {}, 'param_groups': []}),
    dict(iteration=10 ** 30), dict(first=10 ** 30)])
def test_a_training_does_not_go_on_from_what_is_none_of_its_states(trained, change):
    path = Path('results/r/last.pth')
    torch.save({**torch.load(path, weights_only=True), **change, 'finished': False}, path)
    assert_refused(trained.train(max_iters=9), 'last.pth')


def test_an_error_that_speaks_of_gloomy_ids_is_not_taken_for_gloo(capsys):
    with pytest.raises(ValueError):
        exit_clearly(lambda: (_ for _ in ()).throw(ValueError('gloomy')))()
