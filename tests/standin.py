"""A stand-in for a GPU: after `import tests.standin`, in a process of its own, the scripts know a device 'cudastandin'.

It computes on the CPU, and is as strict as a GPU: a tensor of it beside one of the CPU is an error, and what would make the
processor wait for the GPU is written to WAITS. Its products are rounded otherwise than the CPU's: from float64, or, where
the program allows TF32, from inputs of 10 bits. What it cannot show: speed, memory, streams, a real GPU's kernels.
"""
from types import SimpleNamespace

import torch
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import test
import train

NAME = 'cudastandin'  # the program looks for 'cuda' in it
WAITS: list = []
products = 0  # so far
aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
LOOKS_AT_VALUES = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default,
                   aten._unique2.default, aten.unique_consecutive.default}
CONVOLUTIONS = {aten.convolution.default, aten.conv2d.default}  # the second where no gradient is wanted, like two of the next
PRODUCTS = CONVOLUTIONS | {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.linear.default, aten.matmul.default}


class OnDevice(torch.Tensor):
    """A tensor that says it is on the device, around one of the CPU."""
    is_cuda = property(lambda self: True)

    @staticmethod
    def __new__(cls, raw):
        return torch.Tensor._make_wrapper_subclass(cls, raw.shape, strides=raw.stride(), storage_offset=raw.storage_offset(),
                                                   dtype=raw.dtype, device=torch.device(NAME, 0))

    def __init__(self, raw):
        self.raw = raw

    def tolist(self):
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return call(op, args, kwargs or {})


def call(op, args, kwargs):
    """Any operation of torch that has a tensor of the device, or makes one."""
    flat, form = pytree.tree_flatten((args, kwargs))
    tensors = [x for x in flat if isinstance(x, torch.Tensor)]
    ours = {id(x.raw): x for x in tensors if isinstance(x, OnDevice)}
    others = [x for x in tensors if not isinstance(x, OnDevice)]
    if ours and any(x.dim() for x in others) and op not in COPIES:  # but the CPU's numbers may point into our tensors
        if op not in INDEXING or not isinstance(args[0], OnDevice) or any(x.is_floating_point() for x in others):
            raise RuntimeError(f'{op}: tensors on two devices, {NAME} and the CPU')
    to_cpu = torch.device(kwargs.get('device') or NAME).type == 'cpu'
    if op in COPIES:
        source = args[0]
        if op == aten.copy_.default:
            to_cpu, source = not isinstance(args[0], OnDevice), args[1]
        at_leisure = (kwargs.get('non_blocking') or args[2:] == (True,)) and hasattr(source, 'pinned')
        waits = to_cpu if isinstance(source, OnDevice) else not at_leisure
    else:
        waits = op in LOOKS_AT_VALUES or op in INDEXING and any(x.dtype == torch.bool for x in args[1] if x is not None)
    if waits:
        WAITS.append(str(op))
    flat = [x.raw if isinstance(x, OnDevice) else torch.device('cpu') if isinstance(x, torch.device) else x for x in flat]
    args, kwargs = pytree.tree_unflatten(flat, form)
    kwargs.pop('pin_memory', None)
    result = product(op, args) if op in PRODUCTS and args[0].dtype == torch.float32 else op(*args, **kwargs)
    if to_cpu:
        return result
    return pytree.tree_map_only(torch.Tensor, lambda x: ours[id(x)] if id(x) in ours else OnDevice(x), result)


def product(op, args):
    global products
    products += 1
    short = op in CONVOLUTIONS and torch.backends.cudnn.allow_tf32

    def exact(x):
        return (((x.view(torch.int32) + 4096) & -8192).view(torch.float32) if short else x).double()

    return op(*pytree.tree_map_only(torch.Tensor, exact, args)).float()


class Module(SimpleNamespace):
    """What torch asks of a device's module."""

    def __init__(self):
        nothing = dict.fromkeys(['manual_seed_all', 'set_device', 'synchronize'], lambda *_: None)
        super().__init__(**nothing, is_available=lambda: True, is_initialized=lambda: True, _is_in_bad_fork=lambda: False,
                         device_count=lambda: 1, current_device=lambda: 0, get_amp_supported_dtype=lambda: [torch.bfloat16])


def pin(tensor):
    tensor = tensor.clone()
    tensor.pinned = True
    return tensor


def install(real_save=torch.save, real_tensor=torch.tensor):
    """Registers the device; the rest is what torch does for a GPU inside, and the program asks of torch.cuda."""
    _setup_privateuseone_for_python_backend(NAME, Module())
    library = torch.library.Library('_', 'IMPL')
    library.fallback(lambda op, *args, **kwargs: call(op, args, kwargs), 'PrivateUse1')
    library.fallback(torch.library.fallthrough_kernel, 'AutocastPrivateUse1')
    torch.tensor = lambda data, device='cpu', **options: real_tensor(data, **options).to(device)
    torch.save = lambda state, path: real_save(pytree.tree_map_only(OnDevice, lambda x: x.cpu(), state), path)
    torch.Tensor.pin_memory = pin
    torch.cuda.mem_get_info = lambda *_: (2 ** 36, 2 ** 36)
    torch.cuda.is_bf16_supported = lambda **_: True
    torch.cuda.get_device_name = lambda _: 'a stand-in'
    train.choose_device = test.choose_device = lambda device, threads: torch.set_num_threads(1) or device
    return library  # which takes back what it has registered when it goes


LIBRARY = install()
