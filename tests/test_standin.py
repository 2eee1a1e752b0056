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
import signal, sys
import models.whale_net, tests.standin, train
from tests.conftest import SmallBackbone
models.whale_net.build_backbone = SmallBackbone
waits = []

def learn(*args, real=train.learn):
    result = real(*args)
    waits.append(len(tests.standin.WAITS))
    if len(waits) == 3:
        signal.raise_signal(signal.SIGINT)  # it goes on from last.pth below
    return result

train.learn = learn
try:
    train.main(sys.argv[1:])
except SystemExit as stop:
    assert stop.code == 130
train.main(sys.argv[1:])
for first, last in ((0, 2), (3, 5)):
    assert len(waits) == 7 and 0 < waits[first] == waits[last], tests.standin.WAITS[waits[first]:waits[last]]
"""
APART = """
import tests.standin, torch
waits, number = tests.standin.WAITS, torch.tensor(2.0)
ours, other = torch.ones(2, 3, device='cudastandin'), torch.ones(2, 3)
refused = dict(sum=lambda: ours + other, cat=lambda: torch.cat([other, ours]), written=lambda: other.add_(ours),
               total=lambda: number.add_(ours.sum()), stack=lambda: torch.stack([ours.sum(), number]),
               index=lambda: other[ours.long()], linear=lambda: torch.nn.functional.linear(ours, other),
               pinned=ours.pin_memory, numpy=ours.numpy)
looks = dict(item=lambda: ours[0, 0].item(), bool=lambda: bool(ours.any()), cpu=ours.cpu, half=lambda: ours.to('cpu', torch.half),
             mask=lambda: ours[ours > 0], rows=lambda: ours[torch.tensor([0])], where=lambda: torch.where(ours > 0),
             close=lambda: torch.allclose(ours, ours + 1), unpinned=lambda: other.to(ours.device, non_blocking=True))
for mode in (torch.enable_grad, torch.inference_mode):
    with mode():
        assert (ours + ours.cpu().to(ours.device) * number).sum().item() == 18
        assert len(torch.arange(3, device=ours.device)) == 3
        for name, mixed in refused.items():
            try:
                mixed()
            except (RuntimeError, TypeError):
                continue
            raise SystemExit(f'{mode.__name__}, {name}: not refused')
        for name, look in looks.items():
            before = len(waits)
            look()
            assert len(waits) == before + 1, (mode, name, waits[before:])
        before = len(waits)
        ours[torch.tensor([0]).pin_memory().to(ours.device, non_blocking=True)], ours + number, torch.rand(3, device=ours.device)
        assert len(waits) == before, waits[before:]
"""

REAL = """
from types import SimpleNamespace
import tests.standin, torch
from models.backbone import fold_batch_norms
from models.whale_net import WhaleNet
from utils.learn import learn

c = SimpleNamespace(grad_accumulation=2, w_sigmoid=1.0, w_triplet=1.0, w_local=1.0, margin=0.3, hardest=30, clip=5.0)
labels, images = torch.tensor([0, 0, 1, 40, 2, 2, 23, 40] * 2), torch.rand(16, 4, 32, 64)
for amp, close in ((None, 1e-4), (torch.bfloat16, 0.02)):
    found = []
    for device in ('cpu', 'cudastandin'):
        torch.manual_seed(0)
        net = WhaleNet('seresnext14', 40, 32, 64).train().to(device, memory_format=torch.channels_last)
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-4, fused=True)
        batch = images.to(device), labels.to(device), torch.arange(41).to(device)
        before = len(tests.standin.WAITS)
        measured = learn(c, net, optimizer, *batch, amp, 0.5)
        assert len(tests.standin.WAITS) == before, tests.standin.WAITS[before:]
        fold_batch_norms(net.eval().backbone)
        with torch.inference_mode(), torch.autocast(torch.device(device).type, amp, enabled=amp is not None):
            found.append([measured.cpu(), net(batch[0], local=False)[0].float().cpu()])
    for one, other in zip(*found):
        assert torch.allclose(one, other, atol=close), (amp, (one - other).abs().max())
"""


def run(code, *argv):
    return subprocess.run([sys.executable, '-c', code, *argv], timeout=300, env={**os.environ, 'PYTHONPATH': str(REPO)},
                          capture_output=True, text=True)


def test_the_stand_in_keeps_its_tensors_apart():
    done = run(APART)
    assert done.returncode == 0, done.stderr + done.stdout


def test_a_real_network_learns_and_answers_there_as_on_the_cpu():
    done = run(REAL)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('cache, precision', [('disk', 'fp32'), ('device', 'bf16')])
def test_a_training_mixes_no_devices_and_never_waits_between_evaluations(scripts, drawn, cache, precision):
    settings = dict(max_iters=7, eval_every=6, cache=cache, precision=precision)
    assert scripts.train(**settings).code == 0
    done = run(TRAIN, *arguments(**together(**settings, run='other', data_dir=drawn, device='cudastandin', compile='no')))
    assert done.returncode == 0, done.stderr
    here, there = (pd.read_csv(f'results/{run}/evaluations.csv') for run in ('r', 'other'))
    assert there['loss'].to_numpy() == pytest.approx(here['loss'].to_numpy(), rel=1e-3)
