"""train.py: going on where it stopped, the next step, time limits, and what it refuses."""
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

import train
import utils.learn
from tests.conftest import (
    SETTINGS,
    TIME_COLUMNS,
    arguments,
    assert_refused,
    assert_same_weights,
    interrupt_at,
    snapshot,
    spy_on_batches,
    together,
    weights,
    write_frame,
)
from utils.clock import Clock
from utils.figures import plot_batch

ROOT = Path(train.__file__).parent
ALL = dict(stages='all', max_iters=4, eval_every=2)


def log_without_times(folder):
    """log.txt, without the last two columns of its rows."""
    lines = (folder / 'log.txt').read_text().splitlines()
    return [re.sub(r' +\S+ +\S+$', '', line) if re.match(r' +\d', line) else line for line in lines]


def assert_same_run(one, other):
    assert_same_weights(one, other)
    assert_same_weights(one, other, 'best')
    assert log_without_times(one) == log_without_times(other)
    tables = [pd.read_csv(folder / 'evaluations.csv').drop(columns=list(TIME_COLUMNS)) for folder in (one, other)]
    pd.testing.assert_frame_equal(*tables, check_exact=True)


# Going on

@pytest.mark.parametrize('where, call, number', [
    ('augment', 1, signal.SIGINT), ('joint_loss', 2, signal.SIGINT), ('joint_loss', 5, signal.SIGTERM),
    ('Adam.step', 4, signal.SIGINT), ('evaluate', 1, signal.SIGINT), ('save', 1, signal.SIGTERM)])
def test_an_interrupted_run_ends_as_one_that_was_not(scripts, monkeypatch, where, call, number):
    whole = scripts.train(run='whole')
    with monkeypatch.context() as patch:
        interrupt_at(patch, where, call, number)
        stopped = scripts.train(run='stopped')
    assert stopped.code == 130 and 'the same command goes on' in stopped.err
    assert scripts.train(run='stopped').code == 0
    assert_same_run(whole.folder, stopped.folder)


@pytest.mark.parametrize('where, call', [('joint_loss', 5), ('joint_loss', 11), ('evaluate', 2)])
def test_an_interrupted_run_of_all_stages_ends_as_one_that_was_not(scripts, monkeypatch, where, call):
    """In step 2's first iteration, in the midst of step 3, and in the evaluation that ends step 1."""
    whole = scripts.train(run='whole', **ALL)
    with monkeypatch.context() as patch:
        interrupt_at(patch, where, call)
        assert scripts.train(run='stopped', **ALL).code == 130
    stopped = scripts.train(run='stopped', **ALL)
    assert_same_run(whole.folder, stopped.folder)
    assert pd.read_csv(stopped.folder / 'evaluations.csv')['step'].tolist() == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize('options', [
    dict(strips='down'), dict(stages='cosine', max_iters=9)], ids=str)
def test_each_option_trains_goes_on_and_answers(scripts, monkeypatch, options):
    whole = scripts.train(run='whole', **options)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 'joint_loss', 5)
        assert scripts.train(run='stopped', **options).code == 130
    stopped = scripts.train(run='stopped', **options)
    assert_same_run(whole.folder, stopped.folder)
    assert scripts.answer(run='whole').code == 0
    table = pd.read_csv(whole.folder / 'evaluations.csv')
    if 'stages' in options:  # after 3, 6 and 9 iterations, those of the last one's beginning
        expected = [3e-4 * (0.5 + 0.5 * np.cos(np.pi * done / 9)) for done in (2, 5, 8)]
        assert table['lr'].tolist() == pytest.approx(expected)


def test_a_schedule_in_brackets_goes_on_too(scripts, monkeypatch):
    brackets = dict(ALL, schedule_scratch='[[0,False,1e-3],[0,False,3e-4],[0,False,1e-4]]')
    with monkeypatch.context() as patch:
        interrupt_at(patch, 'joint_loss', 7)
        scripts.train(**brackets)
    folder = scripts.train(**brackets).folder
    assert pd.read_csv(folder / 'evaluations.csv')['step'].tolist() == [1, 1, 2, 2, 3, 3]


def test_going_on_needs_no_start_weights(scripts, monkeypatch):
    first = scripts.train(run='first').folder / 'best.pth'
    with monkeypatch.context() as patch:
        interrupt_at(patch, 'joint_loss', 4)
        scripts.train(checkPoint_start=first, run='next')
    first.rename(first.with_name('gone.pth'))
    assert scripts.train(checkPoint_start=first, run='next').code == 0


def test_what_is_absent_is_said_before_the_training(scripts):
    out = scripts.train().out
    assert out.index('bboxes.csv: absent') < out.index('step 1: ')


def test_interrupted_twice(scripts, monkeypatch):
    whole = scripts.train(run='whole')
    for call in (1, 3):
        with monkeypatch.context() as patch:
            interrupt_at(patch, 'joint_loss', call)
            assert scripts.train(run='stopped').code == 130
    assert_same_run(whole.folder, scripts.train(run='stopped').folder)


def test_a_killed_run_ends_as_one_that_was_not(scripts, drawn, work):
    """SIGKILL between evaluations, so that nothing can be saved."""
    long = dict(max_iters=20, eval_every=4, run='killed', data_dir=drawn)
    whole = scripts.train(**{**long, 'run': 'whole'})
    code = ('import os, signal, sys, models.whale_net, train, utils.learn; from tests.conftest import SmallBackbone\n'
            'models.whale_net.build_backbone = SmallBackbone\n'
            'real, calls = utils.learn.joint_loss, []\n'
            'def loss(*args):\n'
            '    calls.append(1)\n'
            '    if len(calls) == 11: os.kill(os.getpid(), signal.SIGKILL)\n'
            '    return real(*args)\n'
            'utils.learn.joint_loss = loss\n'
            'train.main(sys.argv[1:])')
    killed = subprocess.run([sys.executable, '-c', code, *arguments(**{**SETTINGS, **long})], cwd=work,
                            env={**os.environ, 'PYTHONPATH': str(ROOT)}, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert len(pd.read_csv(work / 'results/killed/evaluations.csv')) == 2
    assert_same_run(whole.folder, scripts.train(**long).folder)


# Going on or the next step

def test_a_finished_step_says_so_and_changes_nothing(scripts):
    first = scripts.train()
    before = snapshot(first.folder)
    again = scripts.train()
    assert again.code == 0 and 'finished' in again.out
    assert snapshot(first.folder) == before


@pytest.fixture
def starts(monkeypatch):
    """The weights that each step of a training starts from."""
    found = []

    def build(*args, real=train.build):
        net = real(*args)
        found.append({name: value.clone() for name, value in net.state_dict().items()})
        return net

    monkeypatch.setattr(train, 'build', build)
    return found


def assert_equal_weights(one, other):
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


@pytest.mark.parametrize('change', [dict(freeze=True), dict(min_num_class=2), dict(lr=1e-4),
                                    dict(checkPoint_start='best')])
def test_a_changed_constant_makes_a_next_step_from_the_best(scripts, starts, change):
    folder = scripts.train(max_iters=5, eval_every=1).folder
    best, log = (folder / 'step1_best.pth').read_bytes(), (folder / 'log.txt').read_text()
    second = scripts.train(**{'checkPoint_start': 'best', **change, 'max_iters': 2, 'eval_every': 2})
    assert second.code == 0, second.err
    assert_equal_weights(starts[-1], weights(folder, 'step1_best'))
    assert (folder / 'step1_best.pth').read_bytes() == best and (folder / 'step2_best.pth').is_file()
    last = torch.load(folder / 'last.pth', weights_only=True)
    assert (last['step'], last['iteration']) == (2, 2)
    assert {moment['step'].item() for moment in last['optimizer']['state'].values()} == {2}  # Adam starts afresh
    assert (folder / 'log.txt').read_text().startswith(log)  # step 1's course stays
    assert pd.read_csv(folder / 'evaluations.csv')['step'].tolist() == [1] * 5 + [2]


def test_the_next_step_has_its_own_pace(scripts, monkeypatch):
    monkeypatch.setattr('utils.clock.STARTED', time.monotonic() - 1000)
    scripts.train(max_iters=2, eval_every=2)
    monkeypatch.setattr('utils.clock.STARTED', time.monotonic())
    folder = scripts.train(max_iters=2, eval_every=1, lr=1e-4, checkPoint_start='best').folder
    pace = pd.read_csv(folder / 'evaluations.csv')['img_s']
    assert (pace > 0).all()


def test_a_step_starts_from_last_from_an_iteration_or_from_a_path(scripts, starts):
    folder = scripts.train(max_iters=5, eval_every=1).folder
    kept = sorted(int(path.stem[-6:]) for path in folder.glob('step1_0*.pth'))[0]
    for start, name in [(kept, f'step1_{kept:06d}'), (folder / 'step1_best.pth', 'step1_best'), ('last', 'last')]:
        own = weights(folder, name)
        assert scripts.train(checkPoint_start=start, max_iters=1).code == 0
        assert_equal_weights(starts[-1], own)


def test_all_stages_start_from_the_best_of_the_one_before(scripts, starts):
    folder = scripts.train(**{**ALL, 'max_iters': 3, 'eval_every': 1}).folder
    assert_equal_weights(starts[1], weights(folder, 'step1_best'))
    assert_equal_weights(starts[2], weights(folder, 'step2_best'))


def test_stages_that_the_clock_ends_start_from_the_last_of_the_one_before(scripts, starts, monkeypatch):
    monkeypatch.setattr(train.Clock, 'over', lambda self: False)
    folder = scripts.train(**{**ALL, 'max_minutes': 60, 'run': 'timed'}).folder
    assert [line.split()[-1] for line in (folder / 'log.txt').read_text().splitlines() if 'checkPoint_start' in line] == [
        '0', 'last', 'last']


def test_frozen_layers_and_their_statistics_stand_still(scripts, starts):
    scripts.train()
    folder = scripts.train(freeze=True, checkPoint_start='best').folder
    after = weights(folder)
    same = {key for key in after if torch.equal(after[key], starts[-1][key])}
    early = {key for key in after if re.match(r'backbone\.layer[012]', key)}
    assert early and early <= same
    assert {'backbone.layer3.0.weight', 'backbone.layer4.1.running_mean', 'head.weight'} & same == set()


def test_another_seed_or_size_is_refused(scripts):
    folder = scripts.train().folder
    before = snapshot(folder)
    for change in (dict(seed=1), dict(height=64), dict(fold=1), dict(flip_is_new_id=False)):
        assert_refused(scripts.train(**change), str(*change))
    assert snapshot(folder) == before


def test_the_three_best_stay_under_their_iteration(scripts):
    folder = scripts.train(max_iters=10, eval_every=2).folder
    table = pd.read_csv(folder / 'evaluations.csv').sort_values(['valid_map5', 'iteration'], ascending=False)
    kept = {int(path.stem[-6:]) for path in folder.glob('step1_0*.pth')}
    assert kept == set(table['iteration'][:3])
    best = torch.load(folder / 'step1_best.pth', weights_only=True)
    assert best['iteration'] == table['iteration'].iloc[0]


@pytest.mark.parametrize('start', ['best', 'last', 7, 'nowhere.pth'])
def test_a_start_that_is_not_there_is_refused_and_nothing_written(scripts, work, start):
    result = scripts.train(checkPoint_start=start)
    assert_refused(result, 'checkpoint')
    assert not (work / 'results/r').exists()


# What ends a step

def test_a_step_ends_without_a_better_validation(scripts, monkeypatch):
    monkeypatch.setattr(train, 'choose_threshold', lambda scores, truth: (0.5, 0.25))
    folder = scripts.train(max_iters=50, eval_every=1, patience=3).folder
    assert pd.read_csv(folder / 'evaluations.csv')['iteration'].tolist() == [1, 2, 3, 4]


def test_the_clock_counts_earlier_runs_and_leaves_time_to_save(monkeypatch):
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr('utils.clock.time', SimpleNamespace(monotonic=lambda: now.seconds))
    monkeypatch.setattr('utils.clock.STARTED', 0.0)
    clock = Clock(before=40.0, limit=100.0)
    assert clock.elapsed() == 40 and not clock.over()
    now.seconds = 40.0
    clock.measure(began=60.0)  # an evaluation of 20 seconds
    assert clock.elapsed() == 80 and clock.over()  # another, with something to spare, would not fit any more
    now.seconds = 5.0
    clock = Clock(before=40.0, limit=100.0)
    clock.measure(began=40.0)
    now.seconds = 45.0
    assert not clock.over()
    now.seconds = 59.0
    assert clock.over()
    now.seconds = 1e6
    assert not Clock(before=0.0, limit=0.0).over()


def test_the_first_evaluation_of_a_slow_machine_fits_into_the_time_too(monkeypatch):
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr('utils.clock.time', SimpleNamespace(monotonic=lambda: now.seconds))
    monkeypatch.setattr('utils.clock.STARTED', 0.0)
    clock = Clock(before=0.0, limit=600.0, each=8.0)
    ends = {}
    for now.seconds in (100.0, *range(110, 600, 10)):  # 100 seconds until the first: it was compiled
        ends[now.seconds] = clock.over()
    assert min(seconds for seconds, over in ends.items() if over) == 510  # and 10 for one more, 80 to evaluate, 6


def test_max_minutes_runs_all_stages_and_ends(work, drawn):
    settings = together(**{**ALL, 'data_dir': drawn, 'max_iters': 100000, 'eval_every': 10000, 'max_minutes': 0.2})
    code = ('import sys, models.whale_net, train; from tests.conftest import SmallBackbone\n'
            'models.whale_net.build_backbone = SmallBackbone\n'
            'train.main(sys.argv[1:])')
    done = subprocess.run([sys.executable, '-c', code, *arguments(**settings)], cwd=work, timeout=600,  # not hours
                          env={**os.environ, 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert pd.read_csv(work / 'results/r/evaluations.csv')['step'].unique().tolist() == [1, 2, 3]
    assert torch.load(work / 'results/r/last.pth', weights_only=True)['finished']
    assert (work / 'results/r/curves.png').stat().st_size > 1000


# What it shows

def test_the_first_batch_is_drawn_once_and_changes_nothing(scripts, monkeypatch):
    without = scripts.train(run='without', **ALL)
    drawn, seen = [], []
    monkeypatch.setattr(train, 'plot_batch', lambda *args: drawn.append(args) or plot_batch(*args))
    monkeypatch.setattr(train, 'augment', lambda *args, real=train.augment: seen.append(real(*args)) or seen[-1])
    spy = spy_on_batches(monkeypatch)
    shown = scripts.train(run='shown', **ALL)
    assert_same_run(without.folder, shown.folder)
    (path, images, titles), = drawn
    assert path.resolve() == shown.folder / 'batch.png' and path.stat().st_size > 1000
    assert images is seen[0]
    names = spy.data.train['Id'].iloc[spy.rows[:8]].tolist()
    assert [title.split()[0] for title in titles] == names
    assert {title.split()[-1] == 'mirrored' for title in titles} == {True, False}


def test_titles_of_a_batch_where_a_mirror_is_the_same_animal(scripts, monkeypatch):
    titles, spy = [], spy_on_batches(monkeypatch)
    monkeypatch.setattr(train, 'plot_batch', lambda path, images, some: titles.extend(some))
    scripts.train(max_iters=1, flip_is_new_id=False)
    assert [title.split()[0] for title in titles] == spy.data.train['Id'].iloc[spy.rows[:8]].tolist()


def test_progress_in_a_file_is_a_few_lines(scripts):
    err = scripts.train(eval_every=1).err  # each evaluation writes a row of the table to the screen
    lines = [line for line in err.split('\n') if line]
    assert '\r' not in err and [line.split('|')[-1].split()[0] for line in lines] == ['0/6', '6/6']


# What comes out does not depend on how the table is written

def test_the_order_of_rows_changes_nothing(scripts, photos):
    one = scripts.train(run='one')
    table = pd.read_csv(photos / 'train.csv')
    table.sample(frac=1, random_state=1).to_csv(photos / 'train.csv', index=False)
    assert_same_run(one.folder, scripts.train(run='other', data_dir=photos).folder)


def test_other_names_for_the_ids_change_nothing(scripts, photos):
    one = scripts.train(run='one')
    table = pd.read_csv(photos / 'train.csv')
    ids = sorted(set(table['Id']) - {'new_whale'})
    names = {old: f'animal{number:03d}' for number, old in enumerate(ids)}
    table.assign(Id=table['Id'].replace(names)).to_csv(photos / 'train.csv', index=False)
    assert_same_run(one.folder, scripts.train(run='other', data_dir=photos).folder)


def test_another_seed_changes_the_weights(scripts):
    one, other = scripts.train(run='one').folder, scripts.train(run='other', seed=1).folder
    assert not torch.equal(weights(one)['head.weight'], weights(other)['head.weight'])


def test_random_weights_are_augmented_by_their_own_strength(scripts, monkeypatch):
    strengths = []
    real = train.augment
    monkeypatch.setattr(train, 'augment', lambda *args: strengths.append(args[-1]) or real(*args))
    scripts.train(max_iters=1, strength='(0.1,0.2)', strength_scratch='(0.3,0.4)')
    assert strengths == [(0.3, 0.4)]


def test_each_iteration_is_augmented_in_its_own_way(scripts, monkeypatch):
    seeds = []
    real = train.augment
    monkeypatch.setattr(train, 'augment', lambda *args: seeds.append(torch.initial_seed()) or real(*args))
    scripts.train(**ALL)
    assert len(seeds) == len(set(seeds)) == 12


@pytest.mark.parametrize('min_num_class', [0, 3])
def test_no_validation_image_and_no_rare_id_is_in_a_batch(scripts, monkeypatch, min_num_class):
    spy = spy_on_batches(monkeypatch)
    scripts.train(min_num_class=min_num_class, max_iters=30, eval_every=30)
    seen, valid = np.unique(spy.rows), spy.data.valid
    labels = spy.data.train['Id'].to_numpy()
    assert valid.any() and not valid[seen].any()
    left = pd.Series(labels[~valid]).value_counts()
    assert set(labels[seen]) == {'new_whale', *left.index[left >= min_num_class]}


def test_duplicate_ids_reach_the_loss(scripts, photos, monkeypatch):
    write_frame(photos / 'duplicate_ids.csv', Id=['w_2'], SubId=['w_7'])
    groups = []
    real = utils.learn.joint_loss
    monkeypatch.setattr(utils.learn, 'joint_loss', lambda *args: groups.append(args[2]) or real(*args))
    assert scripts.train(data_dir=photos, max_iters=1).code == 0
    group = groups[0].tolist()
    assert group[2] == group[7] and group[12] == group[17]
    assert len(set(group)) == len(group) - 2 == 19  # else all differ, a whale from its mirror image too


def test_the_loss_sees_mirrored_images_as_the_flipped_ids(scripts, monkeypatch):
    spy, labels = spy_on_batches(monkeypatch), []
    flips = []
    monkeypatch.setattr(train, 'augment', lambda *args, real=train.augment: flips.append(args[2]) or real(*args))
    real = utils.learn.joint_loss
    monkeypatch.setattr(utils.learn, 'joint_loss', lambda *args: labels.append(args[1]) or real(*args))
    scripts.train(max_iters=5, eval_every=5)
    plain = spy.data.labels[spy.rows].tolist()  # 10 ids; 20 is new_whale
    flips, labels = torch.cat(flips).tolist(), torch.cat(labels).tolist()
    assert labels == [20 if k == 20 else k + 10 * flip for k, flip in zip(plain, flips)]
    assert {0, 1} == {flip for k, flip in zip(plain, flips) if k < 20}
