"""Whatever computes them, the answers are the same: bf16 or float32, compiled or eager, CPU or GPU, one process or two."""
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import utils.member
from tests.conftest import ASKED, SIZES, answers, arguments, draw, scores, together, write_frame
from utils.metrics import score_submission

QUERIES = 300
SCORES: list = []  # of the two that were compared last
REPO = Path(__file__).parent.parent
TRAINED = dict(max_iters=120, eval_every=60, batch_size=16, lr=3e-3)
PROCESS = """
import sys
import models.whale_net, train
from tests.conftest import SmallBackbone
models.whale_net.build_backbone = SmallBackbone
train.train_mode = lambda net: net.eval()  # without a GPU each process has batch norm's statistics of its own
train.main(sys.argv[1:])
"""
ANSWER = PROCESS.split('train.train_mode')[0] + """
import test
import torch
assert torch.backends.cpu.get_cpu_capability() == 'DEFAULT'  # other kernels indeed
test.main(sys.argv[1:])
"""

STAND_IN = PROCESS.split('train.train_mode')[0] + """
import os, shutil
import tests.standin, torch
import test
for _ in range(2):  # the second reads the gallery that the first has written
    test.main(sys.argv[2:])
shutil.copy('results/r/submission.csv', '.')
test.main([*sys.argv[2:], '--enrol', 'more'])
os.utime(sys.argv[1])  # the gallery is made anew, and gets what was enrolled
test.main(sys.argv[2:])
assert tests.standin.products > 30 and not torch.backends.cudnn.allow_tf32  # float32 was asked for
"""


@pytest.fixture
def many(photos):
    """The small data set with QUERIES photographs to answer, a third of them of animals that nobody knows."""
    rng = np.random.default_rng(1)
    animals = np.where(np.arange(QUERIES) % 3, rng.integers(len(SIZES), size=QUERIES), 200 + np.arange(QUERIES))
    shutil.rmtree(photos / 'test')
    (photos / 'test').mkdir()
    names = [f'q{number:03d}.jpg' for number in range(QUERIES)]
    for name, animal in zip(names, animals):
        draw(photos / 'test' / name, animal, rng)
    write_frame(photos / 'sample_submission.csv', Image=names, Id='new_whale')
    write_frame(photos / 'test_labels.csv', Image=names, Id=[f'w_{a}' if a < 200 else 'new_whale' for a in animals])
    return photos


def top_five(done):
    assert done.code == 0, done
    return answers(done.folder)['Id'].str.split(expand=True).to_numpy()  # (Q, 5)


def share_alike(one, other, first):
    return (one[:, :first] == other[:, :first]).all(1).mean()


def compare(scripts, data, **other):
    """Top five of one training, as the CPU answers eagerly in float32 and as `other` says; and both MAP@5."""
    assert scripts.train(data_dir=data, **TRAINED).code == 0
    lists, values = [], []
    SCORES.clear()
    for settings in ({}, other):
        Path('results/r/gallery_best.npz').unlink(missing_ok=True)  # each makes its own
        lists.append(top_five(scripts.answer(data_dir=data, gallery_weight=0.5, **settings)))
        SCORES.append(scores(Path('results/r'))[0])
        values.append(score_submission('results/r/submission.csv', data / 'test_labels.csv')['map5'])
    assert values[0] > 0.75  # there is something to get wrong
    return *lists, abs(values[0] - values[1])


def test_bf16_answers_as_float32(scripts, many):
    plain, rounded, difference = compare(scripts, many, precision='bf16')
    assert not np.array_equal(*SCORES)  # it was rounded
    assert share_alike(plain, rounded, 1) >= 0.99 and difference <= 0.005


@pytest.mark.skipif(not shutil.which('g++'), reason='torch.compile needs a C++ compiler')
def test_compiled_answers_as_eager(scripts, many, monkeypatch):
    """The scripts answer eagerly; here the second answer is that of the network as a training compiles it."""
    members = []

    def every_second(*args, real=utils.member.whale_net):
        members.append(real(*args))
        if len(members) == 2:
            members[1].forward = torch.compile(members[1].forward)
        return members[-1]

    monkeypatch.setattr(utils.member, 'whale_net', every_second)
    torch._dynamo.utils.counters.clear()
    plain, compiled, _ = compare(scripts, many)
    assert len(members) == 2 and torch._dynamo.utils.counters['stats']['unique_graphs'] > 0
    assert share_alike(plain, compiled, 5) >= 0.99


@pytest.mark.skipif(platform.machine() != 'x86_64', reason='asks for kernels of x86')
def test_an_older_processor_answers_as_this_one(scripts, many, work):
    """The libraries below torch choose their kernels by the processor; here they take those of twenty years ago."""
    assert scripts.train(data_dir=many, **TRAINED).code == 0
    here = top_five(scripts.answer(data_dir=many))
    (work / 'answer.py').write_text(ANSWER)
    older = {'ATEN_CPU_CAPABILITY': 'default', 'ONEDNN_MAX_CPU_ISA': 'SSE41', 'MKL_ENABLE_INSTRUCTIONS': 'SSE4_2'}
    done = subprocess.run([sys.executable, 'answer.py', *arguments(**ASKED, data_dir=many)], timeout=300,
                          env={**os.environ, **older, 'PYTHONPATH': str(REPO)})
    assert done.returncode == 0
    there = answers(Path('results/r'))['Id'].str.split(expand=True).to_numpy()
    assert share_alike(here, there, 5) >= 0.99


def test_a_stand_in_for_a_gpu_answers_as_the_cpu(scripts, many, work):
    """Other rounding, and the branches that the program takes on a GPU only."""
    assert scripts.train(data_dir=many, **TRAINED).code == 0
    settings = dict(data_dir=many, gallery_weight=0.5)
    here = top_five(scripts.answer(**settings))
    (work / 'answer.py').write_text(STAND_IN)
    settings = {**ASKED, **settings, 'device': 'cudastandin', 'matches': 4}
    Path('results/r/gallery_best.npz').unlink()
    shutil.copytree(many / 'test', work / 'more/another', ignore=lambda _, names: sorted(names)[3:])
    photograph = next((many / 'train').iterdir())
    subprocess.run([sys.executable, 'answer.py', str(photograph), *arguments(**settings)], check=True, timeout=300,
                   env={**os.environ, 'PYTHONPATH': str(REPO)})
    there = answers(work)['Id'].str.split(expand=True).to_numpy()
    assert share_alike(here, there, 5) >= 0.99


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_the_gpu_answers_as_the_cpu(scripts, many):
    plain, gpu, _ = compare(scripts, many, device='cuda')
    assert share_alike(plain, gpu, 5) >= 0.99


def test_two_processes_train_what_one_does(scripts, many, work):
    (work / 'process.py').write_text(PROCESS)
    lists = []
    for processes in (1, 2):
        launch = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}', '--'] if processes > 1 else []
        settings = together(data_dir=many, run=f'r{processes}', **{**TRAINED, 'max_iters': 10, 'lr': 1e-3},
                            strength_scratch=(0, 0))
        subprocess.run([sys.executable, *launch, 'process.py', *arguments(**settings)], check=True, timeout=300,
                       env={**os.environ, 'PYTHONPATH': str(REPO), 'OMP_NUM_THREADS': '1'})
        lists.append(top_five(scripts.answer(data_dir=many, run=f'r{processes}')))
    assert share_alike(*lists, 5) >= 0.99
    assert len(pd.unique(lists[0][:, 0])) > 5
