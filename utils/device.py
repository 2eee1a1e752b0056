"""Which device, how many threads, which precision."""
import ctypes
import os
import sys

import torch

from utils import ranks
from utils.errors import UserError


def choose_device(device, threads=0):
    """'auto', 'cuda', 'cuda:1' or 'cpu' -> a device name that is there; sets the number of CPU threads (0: all cores)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    torch.set_num_threads(threads or max(1, cores // int(os.environ.get('LOCAL_WORLD_SIZE', 1))))  # torchrun's variable
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
    try:
        kind = torch.device(device)
        if kind.type not in ('cuda', 'cpu'):
            raise RuntimeError
    except RuntimeError as error:
        raise UserError(f"device = '{device}' is no device; write 'auto', 'cuda', 'cuda:1' or 'cpu'") from error
    if kind.type == 'cuda' and (kind.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device = '{device}' is not there: this machine has {torch.cuda.device_count()} CUDA devices")
    torch.backends.cudnn.benchmark = True  # all batches have one size: try each algorithm once, keep the fastest
    torch.use_deterministic_algorithms(kind.type == 'cpu')  # the same bits each time, at no cost but that of the next default
    if kind.type == 'cpu':
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        mallopt = getattr(ctypes.CDLL(None), 'mallopt', None) if sys.platform == 'linux' else None
        if mallopt:  # keep freed memory (M_MMAP_MAX 0, M_TRIM_THRESHOLD): fresh pages cost more time than most operations
            mallopt(-4, 0), mallopt(-1, 2 ** 31 - 1)
    return device


def compile_network(net, compile, device):
    """torch.compile `net` in place, on a single GPU or when asked to ('yes'); returns why it could not, else None."""
    if compile == 'no' or compile == 'auto' and ('cuda' not in device or ranks.world() > 1):
        return None  # SyncBatchNorm, which several GPUs need, would cut the network into pieces at each layer
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))  # is there a compiler at all?
    except Exception as error:  # many kinds, by what is missing
        return f'{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ""}'
    torch._dynamo.config.suppress_errors = True  # what fails to compile runs eagerly, and torch says so
    net.compile()
    return None


def amp_dtype(precision, device):
    """The dtype of autocast, None for float32. 'auto' is bf16 where the hardware multiplies in it."""
    torch.backends.cudnn.allow_tf32 = precision != 'fp32'  # float32 then means float32, on a GPU too
    native = torch.cuda.is_bf16_supported(including_emulation=False) if 'cuda' in device else \
        getattr(torch.cpu, '_is_avx512_bf16_supported', bool)()
    return torch.bfloat16 if precision == 'bf16' or precision == 'auto' and native else None


def require_works(device):
    """UserError unless the device can compute: a GPU may be held by another program, or be too old for this torch."""
    if 'cuda' in device:
        try:
            torch.cuda.set_device(torch.device(device).index or 0)  # what asks for no device by name asks this one
            torch.ones(1, device=device).add(1)
        except RuntimeError as error:
            raise UserError(f"{device} cannot be used ({str(error).splitlines()[0]}): another program may hold it, or it is too "
                            "old for this torch; free it, or set device = 'cpu'") from error


def describe(device, precision):
    """What computes, for the log, which shows at once when it is not what one thought."""
    threads = torch.get_num_threads()
    name = torch.cuda.get_device_name(device) if 'cuda' in device else f'the CPU with {threads} thread{"s" * (threads > 1)}'
    several = f'{ranks.world()} times ' if ranks.world() > 1 else ''
    there = os.path.exists('/proc/driver/nvidia/version') and os.environ.get('CUDA_VISIBLE_DEVICES') not in ('', '-1')
    idle = '; torch cannot use the GPU that is here: ' + (
        f'is its driver too old for CUDA {torch.version.cuda}, or was this container started without it?' if torch.version.cuda
        else 'this torch is built without CUDA') if there and not torch.cuda.is_available() else ''
    return f'computing on {several}{name}, in {"bf16" if amp_dtype(precision, device) else "fp32"}{idle}'
