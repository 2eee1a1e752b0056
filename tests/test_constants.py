"""A script's constants are checked, explained and overridden."""
import runpy

import pytest

from utils.constants import read_constants
from utils.errors import UserError

SCRIPT = '''"""Trains a network.

A longer description.
"""
import sys

model_name = 'seresnext50'  # a name
freeze = False              # train only the last layers
lr = 3e-4                   # the step of Adam; 90% of it
                            # later on
max_iters = 100             # at most
checkPoint_start = 0        # 0, an iteration, or a name
scales = (1.0, 0.9)
schedule = [(10, False),    # frequent ids
            (0, True)]      # all ids
# ------------------------------------------------------------
below = 1
'''
RULES = {
    'model_name': (str, bool, 'a text'),
    'freeze': (bool, lambda v: True, 'true or false'),
    'lr': (float, lambda v: 0 < v < 1, 'a learning rate between 0 and 1'),
    'max_iters': (int, lambda v: v > 0, 'a positive number of iterations'),
    'checkPoint_start': ((int, str), lambda v: True, 'a number or a name'),
    'scales': (tuple, lambda v: True, 'a tuple'),
    'schedule': (list, lambda v: all(len(row) == 2 for row in v), 'a list'),
}


def read(tmp_path, *argv, source=SCRIPT, rules=RULES):
    path = tmp_path / 'train.py'
    path.write_text(source, encoding='utf-8')
    return read_constants(runpy.run_path(str(path)), list(argv), rules)


def test_the_constants_are_those_above_the_ruler(tmp_path):
    assert vars(read(tmp_path)) == {
        'model_name': 'seresnext50', 'freeze': False, 'lr': 3e-4, 'max_iters': 100, 'checkPoint_start': 0,
        'scales': (1.0, 0.9), 'schedule': [(10, False), (0, True)]}


@pytest.mark.parametrize('argv, name, value', [
    (['--lr', '3e-5'], 'lr', 3e-5),
    (['--lr=.5'], 'lr', 0.5),
    (['--freeze', 'true'], 'freeze', True),
    (['--freeze', 'False'], 'freeze', False),
    (['--max_iters', '7'], 'max_iters', 7),
    (['--model_name', '123'], 'model_name', '123'),
    (['--model_name=timm/a=b'], 'model_name', 'timm/a=b'),
    (['--checkPoint_start', '400'], 'checkPoint_start', 400),
    (['--checkPoint_start', 'best'], 'checkPoint_start', 'best'),
    (['--checkPoint_start', 'true'], 'checkPoint_start', 'true'),
    (['--checkPoint_start', '1e3'], 'checkPoint_start', '1e3'),
    (['--checkPoint_start', '1e3.pth'], 'checkPoint_start', '1e3.pth'),
    (['--scales', '(1, 2.5)'], 'scales', (1, 2.5)),
    (['--scales', '[1]'], 'scales', (1,)),
    (['--schedule', '[(0, True)]'], 'schedule', [(0, True)]),
    (['--lr', '0.1', '--lr', '0.2'], 'lr', 0.2),
])
def test_the_command_line_overrides(tmp_path, argv, name, value):
    constants = read(tmp_path, *argv)
    assert getattr(constants, name) == value
    assert type(getattr(constants, name)) is type(value)
    assert {key for key, old in vars(read(tmp_path)).items() if getattr(constants, key) != old} <= {name}


def test_a_whole_number_becomes_a_float_where_one_is_wanted(tmp_path):
    rules = RULES | {'lr': (float, lambda v: True, '')}
    assert type(read(tmp_path, '--lr', '1', rules=rules).lr) is float
    assert type(read(tmp_path, source=SCRIPT.replace('3e-4', '1'), rules=rules).lr) is float


@pytest.mark.parametrize('line', ['lr=2e-5', 'lr  =  2e-5 # a step', 'lr: float = 2e-5'])
def test_other_spaces_are_no_mistake(tmp_path, line):
    assert read(tmp_path, source=SCRIPT.replace('lr = 3e-4 ', line)).lr == 2e-5


@pytest.mark.parametrize('argv, sentence', [
    (['--learning_rate', '1'], "no constant 'learning_rate'"),
    (['--model-name', 'a'], "did you mean 'model_name'"),
    (['--frezze=true'], "did you mean 'freeze'"),
    (['--max', '3'], "no constant 'max'"),
    (['3'], "'3' belongs to no constant"),
    (['--lr'], '--lr needs a value'),
    (['--lr', '--freeze', 'true'], '--lr needs a value'),
    (['--lr', 'fast'], "--lr: lr is 'fast', but must be a learning rate between 0 and 1"),
    (['--lr', '2'], "--lr: lr is '2', but must be a learning rate"),
    (['--lr', '-1'], "--lr: lr is '-1', but"),
    (['--lr', '1e999'], "lr is '1e999'"),
    (['--freeze', '1'], "--freeze: freeze is '1', but must be true or false"),
    (['--max_iters', '1e3'], "max_iters is '1e3', but must be a positive number"),
    (['--max_iters', 'True'], "max_iters is 'True'"),
    (['--scales', '1.0'], "scales is '1.0', but must be a tuple"),
    (['--schedule', '[3]'], r"schedule is '\[3\]', but must be a list"),
    (['--schedule', '[(0,'], r"schedule is '\[\(0,', but must be a list"),
])
def test_mistakes_on_the_command_line(tmp_path, argv, sentence):
    with pytest.raises(UserError, match=sentence):
        read(tmp_path, *argv)


@pytest.mark.parametrize('old, new, sentence', [
    ('lr = 3e-4', "lr = '3e-4'", "train.py: lr is '3e-4', but must be a learning rate"),
    ('lr = 3e-4', 'lr = 3.0', 'train.py: lr is 3.0, but must be a learning rate'),
    ('lr = 3e-4', 'lr = 2 - 1', 'train.py: lr is 1, but must be a learning rate'),
    ('freeze = False', 'freeze = 0', 'freeze is 0, but must be true or false'),
    ('max_iters = 100', 'max_iters = 1e2', 'max_iters is 100.0'),
    ('max_iters = 100', 'max_iters = True', 'max_iters is True'),
    ('lr = 3e-4', 'lrate = 3e-4', "constant 'lr' is missing"),
    ('freeze = False', 'freeze = False\nlrs = 2', "train.py: there is no constant 'lrs'; did you mean 'lr'"),
    ('freeze = False', 'freeze = False\nqqqqqqqq = 2', "there is no constant 'qqqqqqqq'; delete its line"),
    ('# -----', '# === ', 'below the constants is missing'),
])
def test_mistakes_in_the_script(tmp_path, old, new, sentence):
    with pytest.raises(UserError, match=sentence):
        read(tmp_path, source=SCRIPT.replace(old, new))


def test_an_override_mends_a_wrong_constant(tmp_path):
    assert read(tmp_path, '--lr', '0.5', source=SCRIPT.replace('3e-4', '3.0')).lr == 0.5


def test_help_shows_each_constant_with_its_comment(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv('COLUMNS', '100')
    with pytest.raises(SystemExit) as stop:
        read(tmp_path, '--help')
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert 'A longer description.' in text
    lines = {line.split()[0]: line for line in text.splitlines() if line.startswith('  --')}
    assert set(lines) == {f'--{name}' for name in RULES}
    assert lines['--lr'].split(maxsplit=2)[1:] == ['0.0003', 'the step of Adam; 90% of it later on']
    assert lines['--lr'].index('the step') == lines['--freeze'].index('train only')
    assert 'frequent ids' in text
