import errno
import os
import pickle
from pathlib import Path

import pytest
import torch

from tests.conftest import snapshot
from utils import checkpoint
from utils.errors import UserError
from utils.files import write_whole


def keep(folder, scores, step=1):
    """Evaluations 10, 20, ... with these MAP@5."""
    kept = []
    for number, score in enumerate(scores, 1):
        kept, _ = checkpoint.keep_best(folder, dict(step=step, iteration=10 * number, kept=kept), score)
    return kept


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def iteration(path):
    return torch.load(path, weights_only=True)['iteration']


def test_the_three_best_are_kept(tmp_path):
    kept = keep(tmp_path, [0.1, 0.5, 0.4, 0.2, 0.6, 0.3])
    assert kept == [(0.6, 50), (0.5, 20), (0.4, 30)]
    assert names(tmp_path) == ['best.pth', 'step1_000020.pth', 'step1_000030.pth', 'step1_000050.pth', 'step1_best.pth']
    assert iteration(tmp_path / 'best.pth') == iteration(tmp_path / 'step1_best.pth') == 50


def test_of_equal_ones_the_later_are_kept(tmp_path):
    assert keep(tmp_path, [0.3] * 5) == [(0.3, 50), (0.3, 40), (0.3, 30)]
    assert iteration(tmp_path / 'best.pth') == 50
    assert names(tmp_path)[1:4] == ['step1_000030.pth', 'step1_000040.pth', 'step1_000050.pth']


def test_the_next_step_leaves_the_kept_ones_of_the_step_before(tmp_path):
    keep(tmp_path, [0.5, 0.4])
    keep(tmp_path, [0.1], step=2)
    assert iteration(tmp_path / 'step1_best.pth') == 10
    assert {'step1_000010.pth', 'step1_000020.pth', 'step2_000010.pth'} <= set(names(tmp_path))


def test_a_save_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    checkpoint.save(tmp_path / 'last.pth', {'iteration': 1})
    before = snapshot(tmp_path)

    def full(state, path):
        with open(path, 'wb') as file:
            file.write(b'half')
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(OSError, match='No space.*last.pth'):
        checkpoint.save(tmp_path / 'last.pth', {'iteration': 2})
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize('refused', [False, True])
def test_an_evaluation_that_is_kept_is_written_once(scripts, monkeypatch, refused):
    """And where a disk refuses links it is copied."""
    def refuse(*_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    def save(*args, real=torch.save):
        calls.append(1)
        real(*args)

    calls: list = []
    monkeypatch.setattr(torch, 'save', save)
    if refused:
        monkeypatch.setattr(os, 'link', refuse)
    folder = scripts.train(max_iters=6, eval_every=3).folder
    assert len(calls) == 2
    last, own = (folder / name for name in ('last.pth', 'step1_000006.pth'))
    assert os.path.samefile(last, own) != refused and last.read_bytes() == own.read_bytes()
    assert 6 in [iteration for _, iteration in checkpoint.load(last)['kept']]


class Exploit:
    def __reduce__(self):
        return os.mkdir, ('owned',)


@pytest.mark.parametrize('write', [torch.save, lambda state, path: path.write_bytes(pickle.dumps(state))])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    write({'iteration': 1, 'model': Exploit()}, tmp_path / 'evil.pth')
    with pytest.raises(UserError, match='evil.pth is not a readable checkpoint') as error:
        checkpoint.load('evil.pth')
    assert '\n' not in str(error.value)
    assert not (tmp_path / 'owned').exists()


@pytest.mark.parametrize('content', [b'', b'\0', b'no checkpoint', b'PK\3\4 cut off'])
def test_what_is_no_checkpoint_is_refused_in_one_sentence(tmp_path, content):
    (tmp_path / 'a.pth').write_bytes(content)
    with pytest.raises(UserError, match='a.pth is not a readable checkpoint') as error:
        checkpoint.load(tmp_path / 'a.pth')
    assert '\n' not in str(error.value)


def test_a_checkpoint_that_is_cut_off_is_refused(tmp_path):
    path = tmp_path / 'a.pth'
    checkpoint.save(path, {'model': torch.zeros(1000)})
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match='not a readable checkpoint'):
        checkpoint.load(path)


def test_the_sums_of_a_checkpoint_with_arcface_lose_its_column(trained):
    path = trained.train(max_iters=4, eval_every=4, run='x').folder / 'last.pth'
    state = torch.load(path, weights_only=True)
    state['sums'] = torch.arange(10.0)
    checkpoint.save(path, state)
    assert checkpoint.load(path)['sums'].tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9]


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(UserError, match='a.pth is not a readable checkpoint .FileNotFoundError'):
        checkpoint.load(tmp_path / 'a.pth')


def test_find(tmp_path):
    keep(tmp_path, [0.1, 0.5])
    keep(tmp_path, [0.4], step=2)
    checkpoint.save(tmp_path / 'last.pth', {'iteration': 99})

    def find(start, **options):
        return checkpoint.find(tmp_path, start, **options).name

    assert find('best') == 'best.pth' and find('last') == 'last.pth'
    assert find('best', before_step=2) == 'step1_best.pth' and find('best', before_step=3) == 'step2_best.pth'
    assert find(20) == 'step1_000020.pth' and find(10) == 'step2_000010.pth'
    for step in (9, 10):
        keep(tmp_path, [0.4], step=step)
    assert find(10) == 'step10_000010.pth'  # as a text it would stand before the others
    assert find(str(tmp_path / 'step1_best.pth')) == 'step1_best.pth'


def test_a_start_that_was_not_kept_is_refused_and_the_kept_ones_named(tmp_path):
    keep(tmp_path, [0.1, 0.5])
    with pytest.raises(UserError, match='iteration 7 .*step1_000010, step1_000020'):
        checkpoint.find(tmp_path, 7)
    for start in ('last', 'nowhere.pth'):
        with pytest.raises(UserError, match='there is no checkpoint'):
            checkpoint.find(tmp_path, start)


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    calls = []
    for name in ('fsync', 'replace'):
        monkeypatch.setattr(os, name, lambda *what, real=getattr(os, name), name=name: calls.append(name) or real(*what))
    write_whole(tmp_path / 'a.txt', lambda path: Path(path).write_text('x'))
    assert calls == ['fsync', 'replace']
