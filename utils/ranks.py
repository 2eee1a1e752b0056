"""One training in several processes, as torchrun starts them: `torchrun --nproc_per_node=8 -- train.py --batch_size 384`.

Each process (rank) has a share of every batch. Without torchrun there is one process, and each function here gives back
what it was given.
"""
import atexit
import datetime
import gc
import os
import sys

import torch
import torch.distributed as dist

from utils.errors import UserError


def start(device):
    """Join the other processes, if torchrun started some; the device of this one."""
    if not dist.is_torchelastic_launched():
        return device
    if 'cuda' in device:
        device = f'cuda:{os.environ["LOCAL_RANK"]}'
        if int(os.environ['LOCAL_RANK']) >= torch.cuda.device_count():
            raise UserError(f'--nproc_per_node is more than the {torch.cuda.device_count()} GPUs of this machine; lower it')
        torch.cuda.set_device(device)
    # building the crops of a large data set may take hours, for which the other processes wait
    dist.init_process_group('cpu:gloo,cuda:nccl' if 'cuda' in device else 'gloo', timeout=datetime.timedelta(hours=6))
    atexit.register(_leave)
    if rank():
        sys.stdout = open(os.devnull, 'w')  # the first process speaks for all
    return device


def _leave():
    """Close the connections before the interpreter goes; whatever still holds them (a model) would end it in an abort."""
    gc.collect()
    dist.destroy_process_group()
    sys.stdout.flush(), sys.stderr.flush()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def share(rows):
    """This process's part of a batch: equal parts, in order."""
    size = len(rows) // world()
    return rows[rank() * size:(rank() + 1) * size]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows):
        parts = [torch.empty_like(rows) for _ in range(world())]
        dist.all_gather(parts, rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        return share(total(gradient.clone(memory_format=torch.contiguous_format)))


def gather(rows):
    """The rows of all processes, in order, with their gradients: (B / world, ...) -> (B, ...).

    Every process computes the same loss of the gathered rows. The gradient of a row then sums over the processes, and
    DistributedDataParallel's mean over them makes it the gradient of that one loss.
    """
    return _Gather.apply(rows.contiguous()) if world() > 1 else rows


def gather_uneven(rows):
    """The same for a number of rows that differs between processes, without gradients, on the CPU."""
    if world() == 1:
        return rows
    parts = [None] * world()
    dist.all_gather_object(parts, rows)
    return torch.cat(parts)


def total(numbers, op=dist.ReduceOp.SUM):
    """The sum (or least, ...) over all processes, in place."""
    if world() > 1:
        dist.all_reduce(numbers, op)
    return numbers


def any_of(flag):
    """Whether `flag` is true in any process: all of them must stop at the same iteration."""
    return bool(total(torch.tensor(float(flag)))) if world() > 1 else flag


def wait():
    """Until all processes are here. One that leaves early closes connections that others still read from."""
    any_of(False)


def one_after_another(make):
    """`make()` in the first process of each machine, then in the others, which find its files."""
    first = world() == 1 or os.environ['LOCAL_RANK'] == '0'
    made = make() if first else None
    wait()
    return made if first else make()
