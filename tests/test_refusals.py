"""What train.py refuses, in one sentence and with nothing written or lost."""
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

import train
import utils.learn
from tests.conftest import add_photographs, assert_refused, cut, edit_table, first_row, interrupt_at, snapshot, spy_on_batches

BAD_SETTINGS = {
    'unknown constant': (dict(batchsize=8), ['batchsize', 'batch_size']),
    'not a number': (dict(lr='fast'), ['lr', 'number']),
    'out of range': (dict(lr=3), ['lr', 'between 0 and 1']),
    'not a bool': (dict(freeze='maybe'), ['freeze', 'True or False']),
    'batch size': (dict(batch_size=10), ['batch_size', 'multiple of 4']),
    'model_name': (dict(model_name='seresnxt50'), ['seresnxt50', 'seresnext50']),
    'timm name': (dict(model_name='timm/resnet5O'), ['resnet5O', 'timm/resnet50']),
    'device': (dict(device='gpu'), ['gpu', 'cuda']),
    'a device without numbers': (dict(device='meta'), ['meta', 'cuda']),
    'data_dir': (dict(data_dir='nowhere'), ['nowhere', 'https://www.kaggle.com', 'data.make_sample']),
    'rare ids only': (dict(min_num_class=50), ['min_num_class = 50', 'largest has']),
    'too large a batch': (dict(batch_size=48), ['batch_size = 48', 'training images']),
    'no weights': (dict(pretrained=True), ['seresnext14', 'pretrained = False']),
    'shares of stages': (dict(stages='all', stage_share='(1, 1)'), ['stage_share', '3 stages']),
    'start': (dict(checkPoint_start='best'), ['checkPoint_start']),
    'seed': (dict(seed=10 ** 9), ['seed']),
}


@pytest.mark.parametrize('settings, words', BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_a_bad_setting_is_refused_and_nothing_written(scripts, settings, words):
    result = scripts.train(**settings)
    assert_refused(result, *words)
    assert not result.folder.exists()


@pytest.mark.parametrize('setting', [dict(lr=1e-4), dict(freeze=True), dict(min_num_class=2)], ids=str)
def test_what_the_schedule_decides_cannot_be_given_beside_it(scripts, setting):
    assert_refused(scripts.train(stages='all', **setting), *setting, 'schedule')


def test_a_bad_setting_leaves_a_stopped_training_as_it_was(scripts, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 'joint_loss', 4)
        folder = scripts.train().folder
    before = snapshot(folder)
    for name, (settings, _) in BAD_SETTINGS.items():
        if name != 'start':  # 'best' is there now
            assert scripts.train(**settings).code == 2
            assert snapshot(folder) == before, name


BAD_TABLES = {
    'no columns': (lambda t: t.rename(columns={'Id': 'whale'}), ['column', 'Id']),
    'blank id': (first_row(Id=''), ['without an image or an id', 'line 2']),
    'image twice': (lambda t: pd.concat([t, t[:1]]), ['more than once']),
    'no file': (first_row(Image='gone.jpg'), ['gone.jpg', 'not in']),
    'space in an id': (first_row(Id='w 1'), ['space', 'w 1']),
    'no ids': (lambda t: t.assign(Id='new_whale'), ['names no id']),
    'one image each': (lambda t: t.assign(Id=[f'w_{i}' for i in range(len(t))]), ['two images']),
}


@pytest.mark.parametrize('edit, words', BAD_TABLES.values(), ids=BAD_TABLES)
def test_a_bad_table_is_refused_and_nothing_written(scripts, photos, edit, words):
    edit_table(photos, edit)
    result = scripts.train(data_dir=photos)
    assert_refused(result, *words)
    assert not result.folder.exists()


def test_a_file_that_the_table_does_not_list_is_named_in_the_log(scripts, photos):
    (photos / 'train/extra.jpg').write_bytes((photos / 'test/t00.jpg').read_bytes())
    folder = scripts.train(data_dir=photos, max_iters=1).folder
    assert 'extra.jpg' in (folder / 'log.txt').read_text()


def test_broken_images_are_named_or_left_out(scripts, photos, monkeypatch):
    name, other = cut(sorted((photos / 'train').iterdir())[3]), cut(photos / 'test/t03.jpg')
    refused = scripts.train(data_dir=photos)
    assert_refused(refused, f'train/{name}', f'test/{other}', 'skip_bad_images')
    assert not refused.folder.exists()
    spy = spy_on_batches(monkeypatch)
    went_on = scripts.train(data_dir=photos, skip_bad_images=True)
    assert went_on.code == 0 and name not in set(spy.data.train['Image'])
    assert name in (went_on.folder / 'log.txt').read_text()


@pytest.mark.parametrize('content', [b'', b'no checkpoint' * 20])
def test_an_unreadable_checkpoint_is_refused_and_left_alone(scripts, work, content):
    path = work / 'results/r/last.pth'
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    assert_refused(scripts.train(), 'last.pth', 'not a readable checkpoint')
    assert snapshot(path.parent) == {'last.pth': content}


@pytest.mark.parametrize('content', [{'weight': torch.zeros(2)}, torch.zeros(2)], ids=['weights', 'tensor'])
@pytest.mark.parametrize('name', ['last.pth', 'other.pth'])
def test_a_file_of_torch_that_is_no_checkpoint_is_refused(scripts, work, content, name):
    path = work / 'results/r' / name
    path.parent.mkdir(parents=True)
    torch.save(content, path)
    before = snapshot(path.parent)
    assert_refused(scripts.train(checkPoint_start=0 if name == 'last.pth' else path), name)
    assert snapshot(path.parent) == before


def test_a_start_of_other_ids_or_another_network_is_refused_and_nothing_written(scripts, photos):
    best = scripts.train(run='first').folder / 'best.pth'
    other = scripts.train(run='other', checkPoint_start=best, flip_is_new_id=False)
    assert_refused(other, 'best.pth')
    assert not other.folder.exists()
    edit_table(photos, first_row(Id='w_another'))
    other = scripts.train(run='other', checkPoint_start=best, data_dir=photos)
    assert_refused(other, 'best.pth', 'ids')
    assert not other.folder.exists()


def test_a_stopped_training_does_not_go_on_with_other_ids(scripts, photos, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 'joint_loss', 4)
        folder = scripts.train().folder
    before = snapshot(folder)
    edit_table(photos, first_row(Id='w_another'))
    assert_refused(scripts.train(data_dir=photos), 'other ids')
    assert snapshot(folder) == before


def test_a_run_does_not_go_on_with_another_fold(scripts, photos):
    folder = scripts.train(data_dir=photos).folder
    before = snapshot(folder)
    add_photographs(photos)
    assert_refused(scripts.train(data_dir=photos, lr=1e-4, checkPoint_start='best'), 'validation fold', 'another run')
    assert snapshot(folder) == before


# A loss that is not finite

def spoil_loss(monkeypatch, call):
    """The loss of the `call`-th iteration is not a number."""
    calls, spy = [], spy_on_batches(monkeypatch)

    def loss(*args, real=utils.learn.joint_loss):
        calls.append(1)
        total, parts = real(*args)
        if len(calls) == call:
            spy.names = set(spy.data.train['Image'].iloc[spy.rows[-8:]])
            total = total * float('nan')
        return total, parts

    monkeypatch.setattr(utils.learn, 'joint_loss', loss)
    return spy


def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_images(scripts, monkeypatch):
    folder = scripts.train(max_iters=4, eval_every=2).folder
    last = (folder / 'last.pth').read_bytes()
    spy = spoil_loss(monkeypatch, 2)
    result = scripts.train(max_iters=9, eval_every=3, lr=1e-4, checkPoint_start='best')
    assert_refused(result, 'not finite', 'lower lr')
    named, = folder.glob('not_finite*.txt')
    assert set(named.read_text().split()) == spy.names
    assert named.name in result.err
    assert (folder / 'last.pth').read_bytes() == last


def test_an_interrupt_does_not_save_weights_that_are_not_finite(scripts, monkeypatch):
    folder = scripts.train(max_iters=4, eval_every=2).folder
    last = (folder / 'last.pth').read_bytes()
    spoil_loss(monkeypatch, 2)
    interrupt_at(monkeypatch, 'joint_loss', 4)
    result = scripts.train(max_iters=9, eval_every=9, lr=1e-4, checkPoint_start='best')
    assert_refused(result, 'not finite')
    assert (folder / 'last.pth').read_bytes() == last


def test_two_trainings_do_not_write_to_one_folder(scripts, work):
    """The lock is the kernel's: it goes with the process that has it, and leaves nothing behind."""
    scripts.train()
    before = snapshot(work / 'results/r')
    other = subprocess.Popen([sys.executable, '-c', 'import sys, time; from utils.files import held\n'
                              'with held("results/r"): print("held", flush=True); time.sleep(600)'],
                             stdout=subprocess.PIPE, text=True, env=dict(os.environ, PYTHONPATH=str(Path(train.__file__).parent)))
    try:
        assert other.stdout.readline() == 'held\n'
        assert_refused(scripts.train(max_iters=9), 'another training', 'results/r')
    finally:
        other.kill()
        other.wait()
    assert snapshot(work / 'results/r') == before
    assert scripts.train(max_iters=9).code == 0


def test_a_loss_cannot_come_or_go_within_a_run(scripts):
    """Its layers would have no state in the optimizer; another weight above 0 is no matter."""
    scripts.train()
    assert_refused(scripts.train(w_local=0.0, max_iters=9), 'w_local')
    assert scripts.train(w_local=0.5, max_iters=9).code == 0
