"""What only a GPU can show; skipped where there is none."""
from types import SimpleNamespace

import pytest
import torch

import train
from data.augment import augment
from data.images import MARGIN, Crops, raw_size
from models.whale_net import WhaleNet
from tests.test_images import frame  # noqa: F401, a fixture
from utils.device import compile_network
from utils.learn import learn

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
C = SimpleNamespace(grad_accumulation=2, w_sigmoid=1.0, w_triplet=1.0, w_local=1.0, margin=0.3, hardest=30,
                    clip=5.0)
LABELS = torch.tensor([0, 0, 1, 40, 2, 2, 23, 40, 4, 4, 5, 40, 6, 6, 7, 40])


def make(amp=None, compiled=False):
    """A network and a function that makes one step on it and returns what `learn` does."""
    torch.manual_seed(0)
    net = WhaleNet('seresnext14', 40, 64, 128).cuda().train().to(memory_format=torch.channels_last)
    if compiled:
        assert compile_network(net, 'yes', 'cuda') is None
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4, fused=True)
    images, labels, group = torch.rand(16, 4, 64, 128).cuda(), LABELS.cuda(), torch.arange(41).cuda()
    return net, lambda: learn(C, net, optimizer, images, labels, group, amp, 0.5)


def test_a_step_never_waits_for_the_device():
    _, step = make(torch.bfloat16)
    step()
    torch.cuda.set_sync_debug_mode('error')
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode('default')


@pytest.mark.parametrize('cache', ['disk', 'device'])
def test_a_training_never_waits_between_evaluations(scripts, monkeypatch, cache):
    calls = []

    def learn(*args, real=train.learn):
        measured = real(*args)
        calls.append(1)
        torch.cuda.set_sync_debug_mode('error' if 2 <= len(calls) < 5 else 'default')
        return measured

    monkeypatch.setattr(train, 'learn', learn)
    try:
        done = scripts.train(device='cuda', precision='auto', cache=cache, compile='no', max_iters=6, eval_every=6)
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert done.code == 0 and len(calls) == 6, done


def test_compiled_is_eager():
    plain, compiled = make(), make(compiled=True)
    for _ in range(2):
        assert torch.allclose(plain[1](), compiled[1](), rtol=1e-3, atol=1e-3)


def test_the_gpu_augments_as_the_cpu_does():
    height, width = raw_size(64, 128)
    crops, masks = torch.randint(256, (4, height, width, 3)).byte(), torch.randint(256, (4, height, width // 8)).byte()
    flips = torch.tensor([0, 1, 0, 1])
    one = augment(crops, masks, flips, 64, 128, MARGIN, (0, 0))
    other = augment(crops.cuda(), masks.cuda(), flips.cuda(), 64, 128, MARGIN, (0, 0))
    assert torch.allclose(one, other.cpu(), atol=1e-4)


def test_crops_on_the_device(frame, tmp_path):  # noqa: F811
    disk = Crops(frame, 32, 64, tmp_path)[[3, 0]]
    pixels, masks = Crops(frame, 32, 64, tmp_path, cache='device', device='cuda')[[3, 0]]
    assert pixels.is_cuda and (pixels.cpu() == disk[0]).all() and (masks.cpu() == disk[1]).all()
