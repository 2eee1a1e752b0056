"""A small data set and a small backbone, so that whole trainings take seconds."""
import os
import shutil
import signal
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from torch import nn

import models.whale_net
import test as answer
import train
import utils.learn

SIZES = [1, 1, 2, 2, 3, 3, 3, 4, 4, 5]  # training images of each id
NEW, TEST = 12, 12
SETTINGS = dict(run='r', model_name='seresnext14', height=32, width=64, batch_size=8, threads=1, precision='fp32',
                pretrained=False, device='cpu', min_num_class=0, max_iters=6, eval_every=3)

SOAK = bool(os.environ.get('SOAK'))
CASES = dict(count=0, slowest=(0.0, 0.0, ''), grown=0)  # of tests/test_hostile.py
settings.register_profile('test', derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck),
                          phases=[Phase.explicit, Phase.generate])  # a failing case is small enough; to shrink it takes minutes
settings.register_profile('soak', settings.get_profile('test'), derandomize=False, deadline=5000, print_blob=True)
settings.load_profile('soak' if SOAK else 'test')


def pytest_terminal_summary(terminalreporter):
    if CASES['count']:
        seconds, computed, what = CASES['slowest']
        terminalreporter.line(f'hostile input: {CASES["count"]:,} cases; the slowest ({what}) took {seconds:.2f} s, '
                              f'{computed:.2f} s of them on the CPU; memory grew by {CASES["grown"] / 1e6:.0f} MB')


class SmallBackbone(nn.Module):
    """layer0..layer4 as in a SENet, with a thousandth of its weights."""
    channels = 24

    def __init__(self, *_):
        super().__init__()
        for number, (inside, outside, stride) in enumerate([(4, 8, 4), (8, 8, 1), (8, 8, 2), (8, 16, 2), (16, 24, 1)]):
            convolution = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
            layer = nn.Sequential(convolution, nn.BatchNorm2d(outside), nn.ReLU())
            setattr(self, f'layer{number}', layer)

    def forward(self, x):
        return self.layer4(self.layer3(self.layer2(self.layer1(self.layer0(x)))))


def draw(path, animal, rng):
    """A blotchy picture, the same for one animal but for light, noise and something in front."""
    own = np.random.default_rng(animal).integers(0, 255, (4, 8, 3), np.uint8)
    image = cv2.resize(own, (96, 48)) * rng.uniform(0.6, 1) + rng.uniform(0, 40, (48, 96, 3))
    x, y = rng.integers(70), rng.integers(30)
    image[y:y + 18, x:x + 26] = rng.choice([0, 255])
    cv2.imwrite(str(path), image.clip(0, 255).astype(np.uint8))


def write_frame(path, **columns):
    pd.DataFrame(columns).to_csv(path, index=False)


@pytest.fixture(scope='session')
def drawn(tmp_path_factory):
    """10 ids, 40 training and 12 test images in Kaggle's layout. To be read only; `photos` is a copy."""
    folder, rng = tmp_path_factory.mktemp('photos'), np.random.default_rng(0)
    (folder / 'train').mkdir(), (folder / 'test').mkdir()
    animals = np.concatenate([np.repeat(np.arange(len(SIZES)), SIZES), 100 + np.arange(NEW)])
    names = [f'{number:04x}.jpg' for number in rng.permutation(len(animals))]
    for name, animal in zip(names, animals):
        draw(folder / 'train' / name, animal, rng)
    write_frame(folder / 'train.csv', Image=names, Id=[f'w_{a}' if a < 100 else 'new_whale' for a in animals])
    tests = [f't{number:02d}.jpg' for number in rng.permutation(TEST)]
    for number, name in enumerate(tests):
        draw(folder / 'test' / name, number, rng)
    write_frame(folder / 'sample_submission.csv', Image=tests, Id='new_whale w_0 w_1 w_2 w_3')
    return folder


@pytest.fixture
def photos(drawn, tmp_path):
    return shutil.copytree(drawn, tmp_path / 'photos')


@pytest.fixture
def work(tmp_path, monkeypatch):
    """An empty working folder, since results/ is made where a script runs; what scripts change globally is put back."""
    folder = tmp_path / 'work'
    folder.mkdir()
    monkeypatch.chdir(folder)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield folder
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(models.whale_net, 'build_backbone', SmallBackbone)


TIME_COLUMNS = ('img_s', 'left', 'seconds')  # of evaluations.csv: they differ from run to run
ASKED = dict(run='r', device='cpu', threads=1, precision='fp32', matches=0)  # settings of test.py


def together(**changes):
    """SETTINGS with changes; the schedule of all stages decides what min_num_class would."""
    settings = {**SETTINGS, **changes}
    if settings.get('stages', 'one') != 'one' and 'min_num_class' not in changes:
        del settings['min_num_class']
    return settings


def arguments(**settings):
    return [part for name, value in settings.items() for part in (f'--{name}', str(value))]


@pytest.fixture
def scripts(drawn, work, small, capsys, monkeypatch):
    """train(...) and answer(...) run the two scripts here; they give exit code (0: returned), out, err, folder."""
    for name in ('plot_curves', 'plot_batch'):
        monkeypatch.setattr(train, name, lambda *_: None)  # slower than the trainings

    def call(script, settings, folder):
        try:
            code = script.main(arguments(**settings)) or 0
        except SystemExit as stop:
            code = stop.code
        except KeyboardInterrupt:
            pytest.fail('KeyboardInterrupt came through')
        return SimpleNamespace(code=code, folder=folder, **capsys.readouterr()._asdict())

    def run_train(**settings):
        settings = together(**{'data_dir': drawn, **settings})
        return call(train, settings, work / 'results' / settings['run'])

    def run_answer(**settings):
        settings = {'data_dir': drawn, **ASKED, **settings}
        return call(answer, settings, work / 'results' / settings['run'])

    return SimpleNamespace(train=run_train, answer=run_answer)


def snapshot(folder):
    """name -> bytes of all files below `folder`; empty when it is not there."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()}


def run_main(main, argv, capsys, **options):
    """What a command does here: exit code (0: returned), out, err."""
    try:
        code = main([str(part) for part in argv], **options) or 0
    except SystemExit as stop:
        code = stop.code
    return SimpleNamespace(code=code, **capsys.readouterr()._asdict())


def weights(folder, name='last'):
    return torch.load(folder / f'{name}.pth', weights_only=True)['model']


def assert_same_weights(one, other, name='last'):
    one, other = weights(one, name), weights(other, name)
    assert list(one) == list(other)
    different = [key for key in one if not torch.equal(one[key], other[key])]
    assert not different


def interrupt_at(monkeypatch, where, call, number=signal.SIGINT):
    """A signal arrives when `where`, the name of something that train.py uses, is called for the `call`-th time."""
    target, name = (torch.optim.Adam, 'step') if where == 'Adam.step' else \
        (utils.learn if where == 'joint_loss' else train, where)
    real, calls = getattr(target, name), []

    def wrapped(*args, **kwargs):
        calls.append(1)
        result = real(*args, **kwargs)
        if len(calls) == call:
            signal.raise_signal(number)
        return result

    monkeypatch.setattr(target, name, wrapped)


def spy_on_batches(monkeypatch):
    seen = []

    def batch(self, pairs, pin=False, real=train.TrainingSet.batch):
        seen.extend(pairs[:, 0].tolist())
        spy.data = self
        return real(self, pairs, pin)

    spy = SimpleNamespace(rows=seen)
    monkeypatch.setattr(train.TrainingSet, 'batch', batch)
    return spy


def assert_refused(result, *words):
    """Exit code 2 and one line that says what is wrong."""
    assert result.code == 2, result
    lines = [line for line in result.err.splitlines() if line.startswith('error: ')]
    assert len(lines) == 1 and 'Traceback' not in result.err
    for word in words:
        assert word in lines[0]


def edit_table(photos, edit):
    table = pd.read_csv(photos / 'train.csv')
    edit(table).to_csv(photos / 'train.csv', index=False)


def first_row(**cells):
    return lambda table: table.assign(**{name: [cell, *table[name][1:]] for name, cell in cells.items()})


def cut(path):
    path.write_bytes(path.read_bytes()[:-200])
    return path.name


def add_photographs(photos):
    """A second photograph of two whales that had one: validation is then drawn among more."""
    names = [f'added{number}.jpg' for number in range(2)]
    for name in names:
        shutil.copy(photos / 'test/t00.jpg', photos / 'train' / name)
    edit_table(photos, lambda table: pd.concat([table, pd.DataFrame(dict(Image=names, Id=['w_0', 'w_1']))]))


@pytest.fixture
def trained(scripts):
    """The scripts, and a training of four iterations in results/r."""
    assert scripts.train(max_iters=4, eval_every=2).code == 0
    return scripts


def answers(folder):
    return pd.read_csv(folder / 'submission.csv')


def scores(folder):
    with np.load(folder / 'scores.npz') as file:
        return file['scores'].astype(float), file['threshold'].item()


def fold_images(run):
    return torch.load(f'results/{run}/best.pth', weights_only=True)['fold_images']


def owner_of(data, image):
    return pd.read_csv(data / 'train.csv').set_index('Image')['Id'][image]
