"""One training step, part by part: `python -m benchmarks.step [MODEL [BATCH]]`, under three minutes.

On a GPU senet154 with batch 48, on a CPU seresnext50 with batch 4, at 256x512. Each line adds one thing to the line above
(compiled NCHW stands beside them); the first is plain float32 (TF32 off), eager, NCHW. The floors are what arithmetic
alone, or moving each layer's activations through memory once, would allow; both rates are measured here.
"""
import sys
from types import SimpleNamespace

import torch
from timm.models.senet import SEModule
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import train
from benchmarks.timing import compare
from models.backbone import Grouped, Pointwise, SqueezeExcite
from models.whale_net import WhaleNet
from utils.device import amp_dtype, choose_device, compile_network

HEIGHT, WIDTH, CLASSES = 256, 512, 10008
C = SimpleNamespace(grad_accumulation=1, w_sigmoid=1.0, w_triplet=1.0, w_local=1.0, margin=0.3, hardest=30,
                    clip=5.0)


def make_step(model_name, batch, device, channels_last, amp, rewritten=True, compiled=False, fused=True):
    """A function that makes one optimizer step, the whole of it."""
    torch.manual_seed(0)
    net = WhaleNet(model_name, CLASSES, HEIGHT, WIDTH).train().to(device)
    for layer in () if rewritten else net.modules():
        if isinstance(layer, (Pointwise, Grouped)):
            layer.__class__ = nn.Conv2d
        elif isinstance(layer, SqueezeExcite):
            layer.__class__ = SEModule
    if channels_last:
        net = net.to(memory_format=torch.channels_last)
    why_not = compile_network(net, 'yes' if compiled else 'no', device)
    if why_not:
        print(f'not compiled: {why_not}')
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=1e-5, fused=fused)
    images = torch.rand(batch, 4, HEIGHT, WIDTH, device=device)
    labels = torch.arange(batch, device=device) // 2
    labels[3 * batch // 4:] = CLASSES
    group = torch.arange(CLASSES + 1, device=device)
    model = net if channels_last else lambda images, local: net(images.contiguous(), local)
    if not channels_last:
        model.parameters = net.parameters
    return net, lambda: train.learn(C, model, optimizer, images, labels, group, amp, 0.5)


def floors(model_name, batch, device):
    """Work of one image's training step: FLOP (three times the forward pass), and bytes of activations, moved once."""
    net = WhaleNet(model_name, CLASSES, HEIGHT, WIDTH).train().to(device)
    sizes = []
    hooks = [layer.register_forward_hook(lambda _, __, out: sizes.append(out.numel()))
             for layer in net.modules() if isinstance(layer, (nn.Conv2d, nn.BatchNorm2d, nn.ReLU))]
    images = torch.rand(2, 4, HEIGHT, WIDTH, device=device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(images)
    for hook in hooks:
        hook.remove()
    # forward: written and read once; backward: the activation and its gradient are read, a gradient is written
    return 3 * counter.get_total_flops() / 2, 5 * sum(sizes) / 2 * (2 if amp_dtype('auto', device) else 4)


def machine(device):
    """Measured: FLOP/s of a large product in the precision that training uses, bytes/s of a large copy."""
    size = 8192 if 'cuda' in device else 2048
    dtype = amp_dtype('auto', device) or torch.float32
    a, big = torch.rand(size, size, device=device, dtype=dtype), torch.rand(64 * 2 ** 20, device=device)
    table = compare({'product': lambda: a @ a, 'copy': lambda: big.clone()}, 1, unit='a second', cuda='cuda' in device)
    return 2 * size ** 3 * table.iloc[0, 0], 2 * big.numel() * 4 * table.iloc[1, 0]


def main(argv):
    device = choose_device('auto')
    cuda = device == 'cuda'
    model_name = argv[0] if argv else 'senet154' if cuda else 'seresnext50'
    batch = int(argv[1]) if len(argv) > 1 else 48 if cuda else 4
    amp = amp_dtype('auto', device)
    flops, moved = floors(model_name, batch, device)
    arithmetic, memory = machine(device)
    print(f'{model_name}, batch {batch}, {HEIGHT}x{WIDTH}, {CLASSES} classes, on '
          f'{torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} CPU threads"}; '
          f'{flops / 1e9:.0f} GFLOP and {moved / 1e9:.2f} GB an image')
    kinds = {'plain: float32, NCHW, eager': dict(channels_last=False, amp=None, rewritten=False, fused=False),
             '+ channels_last': dict(channels_last=True, amp=None, rewritten=False, fused=False),
             '+ fused Adam': dict(channels_last=True, amp=None, rewritten=False)}
    if amp:
        kinds[f'+ {str(amp).split(".")[-1]}'] = dict(channels_last=True, amp=amp, rewritten=False)
    if cuda:
        kinds['+ torch.compile, but NCHW'] = dict(channels_last=False, amp=amp, compiled=True)
        kinds['+ torch.compile (ours)'] = dict(channels_last=True, amp=amp, compiled=True)
    else:
        kinds['+ layers rewritten for a CPU (ours)'] = dict(channels_last=True, amp=amp)
    torch.backends.cudnn.allow_tf32 = False  # which 'auto' allows
    ways = {name: make_step(model_name, batch, device, **kind)[1] for name, kind in kinds.items()}
    rate = compare(ways, batch, rounds=5, cuda=cuda)['img/s'].iloc[-1]
    print(f'ours is {rate * flops / arithmetic:.1%} of the arithmetic floor ({arithmetic / flops:,.1f} img/s) and '
          f'{rate * moved / memory:.1%} of the memory floor ({memory / moved:,.1f} img/s)')
    if cuda:
        print(f'peak memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB (all ways together)')
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA if cuda else
                                            torch.profiler.ProfilerActivity.CPU]) as profile:
        list(ways.values())[-1]()
    print('where the time of our step goes:')
    print(profile.key_averages().table(sort_by='self_cuda_time_total' if cuda else 'self_cpu_time_total', row_limit=12,
                                       max_name_column_width=60))


if __name__ == '__main__':
    main(sys.argv[1:])
