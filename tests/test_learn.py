"""One step of the optimizer: whole, in parts, in several processes, and when memory is short."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from models.backbone import build_backbone
from tests.conftest import SETTINGS, SmallBackbone, arguments, assert_refused, together
from utils import device

REPO = Path(__file__).parent.parent
STEP = """
import sys
from types import SimpleNamespace
import torch
from torch.nn.parallel import DistributedDataParallel
import models.whale_net, train
from tests.conftest import SmallBackbone
from utils import ranks

ranks.start('cpu')
torch.set_num_threads(1)
models.whale_net.build_backbone = SmallBackbone
torch.manual_seed(0)
net = models.whale_net.WhaleNet('small', 20, 32, 64).eval()
torch.nn.init.normal_(net.head.weight, std=0.5)
images, labels = torch.rand(16, 4, 32, 64), torch.tensor([0, 0, 7, 20, 3, 3, 15, 9, 5, 5, 20, 20, 20, 12, 12, 20])
c = SimpleNamespace(grad_accumulation=int(sys.argv[2]), w_sigmoid=1.0, w_triplet=float(sys.argv[3]), w_local=float(sys.argv[3]),
                    margin=0.3, hardest=7, clip=1e9)
if not c.w_local:
    net.local.requires_grad_(False)
optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.0)
model = DistributedDataParallel(net) if ranks.world() > 1 else net
measured = train.learn(c, model, optimizer, ranks.share(images), ranks.share(labels), torch.arange(21), None, 0.5)
measured = ranks.total(measured) / ranks.world()
rows = torch.arange(7.0)
scores = ranks.gather_uneven(torch.tensor_split(rows, ranks.world())[ranks.rank()])
assert torch.equal(scores, rows)
del model, optimizer
ranks.wait()
if ranks.rank() == 0:
    torch.save([measured, *(p.grad for p in net.parameters() if p.requires_grad)], sys.argv[1])
"""


def run_step(tmp_path, processes, parts=1, triplets=1.0):
    script, out = tmp_path / 'step.py', tmp_path / f'{processes}_{parts}.pt'
    script.write_text(STEP)
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}'] \
        if processes > 1 else [sys.executable]
    subprocess.run([*launch, script, out, str(parts), str(triplets)], check=True, cwd=tmp_path,
                   env={**os.environ, 'PYTHONPATH': str(REPO), 'OMP_NUM_THREADS': '1'}, timeout=120)
    return torch.load(out, weights_only=True)


def assert_close(one, other):
    assert len(one) == len(other) > 15
    for a, b in zip(one, other):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)
    assert max(grad.abs().max() for grad in one[1:]) > 0.01


def test_two_processes_are_one(tmp_path):
    assert_close(run_step(tmp_path, 1), run_step(tmp_path, 2))


def test_parts_add_up_where_there_are_no_triplets(tmp_path):
    one, other = (run_step(tmp_path, 1, parts, 0.0) for parts in (1, 2))
    one[0], other[0] = one[0][:2], other[0][:2]  # loss and sigmoid; triplets are also counted when they weigh nothing
    assert_close(one, other)


def test_two_processes_with_two_parts_each_are_one(tmp_path):
    one, other = run_step(tmp_path, 1, 1, 0.0), run_step(tmp_path, 2, 2, 0.0)
    one[0], other[0] = one[0][:2], other[0][:2]
    assert_close(one, other)


def test_two_processes_train_to_the_end_and_write_once(drawn, tmp_path):
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '--', REPO / 'train.py',
               *arguments(**together(data_dir=drawn, batch_size=16, max_iters=4, eval_every=2))]
    for _ in range(2):
        done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, timeout=300,
                              env={**os.environ, 'PYTHONPATH': str(REPO), 'OMP_NUM_THREADS': '1'})
        assert done.returncode == 0, done.stderr
        log = (tmp_path / 'results/r/log.txt').read_text()
        assert log.count('tr.MAP5') == 1 and [line.split()[1] for line in log.splitlines()[-2:]] == ['2', '4']
    assert done.stdout.count('finished') == 1


@pytest.mark.parametrize('settings', [dict(grad_accumulation=3), dict(batch_size=16, grad_accumulation=4)])
def test_parts_that_are_too_small_or_unequal_are_refused(scripts, settings):
    assert_refused(scripts.train(**settings), 'batch_size', 'grad_accumulation')


def test_a_training_in_parts_says_so(scripts):
    done = scripts.train(batch_size=16, grad_accumulation=2)
    assert done.code == 0 and '2 parts of 8' in (done.folder / 'log.txt').read_text()


@pytest.mark.parametrize('then', ['CUDA out of memory', 'Unable to find a valid cuDNN algorithm to run convolution'])
def test_out_of_memory_names_what_fits(scripts, monkeypatch, then):
    real = SmallBackbone.forward

    def small_card(self, x):
        if len(x) > 12:
            raise RuntimeError('CUDA out of memory' if len(x) == 32 else then)
        return real(self, x)

    monkeypatch.setattr(SmallBackbone, 'forward', small_card)
    assert_refused(scripts.train(batch_size=32), 'batch_size', '8 at a time fit', 'grad_accumulation = 4')


def test_the_log_says_what_computes(scripts, monkeypatch):
    first = (scripts.train().folder / 'log.txt').read_text().splitlines()[0]
    assert first == 'computing on the CPU with 1 thread, in fp32'
    monkeypatch.setattr(device.os.path, 'exists', lambda path: True)  # a driver is there
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    assert ('torch cannot use the GPU' in device.describe('cpu', 'fp32')) != torch.cuda.is_available()
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
    assert device.describe('cpu', 'fp32') == first


def test_a_gpu_that_cannot_be_used_is_said(scripts, monkeypatch):
    def refuse(_):
        raise RuntimeError('CUDA error: no kernel image is available for execution on the device\nmore')
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setattr(torch.cuda, 'set_device', refuse)
    assert_refused(scripts.train(device='cuda'), 'no kernel image is available', 'too old')


def test_what_cannot_be_compiled_is_said(scripts, monkeypatch):
    def no_compiler(*_, **__):
        raise RuntimeError('no compiler here')
    monkeypatch.setattr(device.torch, 'compile', no_compiler)
    done = scripts.train(compile='yes')
    assert done.code == 0 and 'not compiled: RuntimeError: no compiler here' in (done.folder / 'log.txt').read_text()


def test_training_is_compiled_and_evaluation_is_not(scripts, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda net, real=torch.nn.Module.compile: real(net, backend='eager'))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    done = scripts.train(compile='yes')  # with two evaluations
    assert done.code == 0 and 'compiles the network' in (done.folder / 'log.txt').read_text()
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 2  # of a trial, whether there is a compiler, and the step


def test_several_gpus_compile_only_when_asked_to(monkeypatch):
    def compile(*_):
        raise RuntimeError('tried')
    monkeypatch.setattr(device.torch, 'compile', compile)
    for world, auto in ((1, 'RuntimeError: tried'), (2, None)):
        monkeypatch.setattr(device.ranks, 'world', lambda: world)
        assert device.compile_network(None, 'auto', 'cuda') == auto
        assert device.compile_network(None, 'yes', 'cuda') == 'RuntimeError: tried'


def test_the_norms_of_several_gpus_keep_their_activations():
    """Some of timm's batch norms hold one, which torch's own conversion would drop."""
    net, images = build_backbone('timm/mobilenetv3_small_050', 32, 64).eval(), torch.rand(2, 4, 32, 64)
    before = net(images)
    converted = train.convert_sync_batchnorm(net)
    assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in converted.modules())
    assert torch.allclose(converted(images), before, atol=1e-6)


def test_processes_train_a_network_with_layers_that_nothing_asks(drawn, work):
    settings = dict(SETTINGS, data_dir=drawn, model_name='timm/mobilenetv3_small_050', batch_size=16)
    launch = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '--', str(REPO / 'train.py')]
    done = subprocess.run([sys.executable, *launch, *arguments(**settings)], timeout=300, capture_output=True, text=True,
                          env={**os.environ, 'PYTHONPATH': str(REPO), 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr
