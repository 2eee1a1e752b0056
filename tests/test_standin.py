"""A training on a stand-in for a GPU (tests/standin.py): what would end it on a real one, or slow it down."""
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from tests.conftest import arguments, together

REPO = Path(__file__).parent.parent
TRAIN = """
import sys
import models.whale_net, tests.standin, train
from tests.conftest import SmallBackbone
models.whale_net.build_backbone = SmallBackbone
waits = []

def learn(*args, real=train.learn):
    result = real(*args)
    waits.append(len(tests.standin.WAITS))
    return result

train.learn = learn
train.main(sys.argv[1:])
assert len(waits) == 7 and waits[0] > 0 and waits[5] == waits[0], tests.standin.WAITS[waits[0]:waits[5]]
"""
MIXED = """
import tests.standin, torch
ours, other = torch.ones(2, 3, device='cudastandin'), torch.ones(2, 3)
assert (ours + ours.cpu().to('cudastandin') * torch.tensor(2.0)).sum().item() == 18
for mixed in (lambda: ours + other, lambda: torch.cat([other, ours]), lambda: other.add_(ours), lambda: ours.numpy()):
    try:
        mixed()
    except (RuntimeError, TypeError):
        continue
    raise SystemExit(mixed)
"""


def run(code, *argv):
    return subprocess.run([sys.executable, '-c', code, *argv], timeout=300, env={**os.environ, 'PYTHONPATH': str(REPO)},
                          capture_output=True, text=True)


def test_the_stand_in_keeps_its_tensors_apart():
    done = run(MIXED)
    assert done.returncode == 0, done.stderr + done.stdout


@pytest.mark.parametrize('cache', ['disk', 'device'])
def test_a_training_mixes_no_devices_and_never_waits_between_evaluations(scripts, drawn, cache):
    settings = dict(max_iters=7, eval_every=6, cache=cache)
    assert scripts.train(**settings).code == 0
    done = run(TRAIN, *arguments(**together(**settings, run='other', data_dir=drawn, device='cudastandin', compile='no')))
    assert done.returncode == 0, done.stderr
    here, there = (pd.read_csv(f'results/{run}/evaluations.csv') for run in ('r', 'other'))
    assert there['loss'].to_numpy() == pytest.approx(here['loss'].to_numpy(), rel=1e-3)
