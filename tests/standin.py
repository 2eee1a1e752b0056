"""A stand-in for a GPU: after `import tests.standin`, in a process of its own, the scripts know a device 'cudastandin'.

It computes on the CPU, and refuses what a GPU refuses: a tensor of it beside one of the CPU is an error, and what would make the
processor wait for the GPU is written to WAITS. Its float32 products are rounded otherwise than the CPU's, from float64.
What it cannot show: speed, memory, streams, torch.compile, several GPUs, a real GPU's kernels.
"""
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
LOOKS_AT_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}  # .item(), nonzero, unique ...
PRODUCTS = {aten.convolution.default, aten.mm.default, aten.addmm.default, aten.bmm.default}


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

    def __format__(self, how):
        return format(self.cpu(), how)

    def __repr__(self):
        return repr(self.cpu())

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        done = op.decompose(*args, **(kwargs or {}))  # where no gradient is wanted torch leaves that to us
        return call(op, args, kwargs or {}) if done is NotImplemented else done


def call(op, args, kwargs):
    """Any operation of torch that has a tensor of the device, or makes one."""
    flat, form = pytree.tree_flatten((args, kwargs))
    tensors = [x for x in flat if isinstance(x, torch.Tensor)]
    ours = {id(x.raw): x for x in tensors if isinstance(x, OnDevice)}
    pointers = [x for x in args[1] if x is not None] if op in INDEXING else []  # those of the CPU may point into our tensors
    others = [x for x in tensors if not isinstance(x, OnDevice) and all(x is not pointer for pointer in pointers)]
    if ours and others and op not in COPIES:  # but a number of the CPU may be read, element by element
        numbers = op in INDEXING or torch.Tag.pointwise in op.tags
        if not numbers or any(x.dim() for x in others) or op._schema.is_mutable and not isinstance(args[0], OnDevice):
            raise RuntimeError(f'{op}: tensors on two devices, {NAME} and the CPU')
    if any(isinstance(x, torch.Generator) for x in flat):
        raise RuntimeError(f'{op}: random numbers of the CPU for {NAME}')
    to_cpu = torch.device(kwargs.get('device') or NAME).type == 'cpu'
    if op in COPIES:
        source = args[0]
        if op == aten.copy_.default:
            to_cpu, source = not isinstance(args[0], OnDevice), args[1]
        at_leisure = (kwargs.get('non_blocking') or args[2:] == (True,)) and hasattr(source, 'pinned')
        waits = to_cpu if isinstance(source, OnDevice) else not at_leisure
    elif op in INDEXING:  # a mask's places are counted first, and the CPU's are copied
        waits = any(x.dtype in (torch.bool, torch.uint8) or not isinstance(x, OnDevice) for x in pointers)
    else:
        waits = not LOOKS_AT_VALUES.isdisjoint(op.tags)
    if waits:
        WAITS.append(str(op))
    flat = [x.raw if isinstance(x, OnDevice) else torch.device('cpu') if isinstance(x, torch.device) else x for x in flat]
    args, kwargs = pytree.tree_unflatten(flat, form)
    kwargs.pop('pin_memory', None)
    result = product(op, args, kwargs) if op in PRODUCTS else op(*args, **kwargs)
    if to_cpu:
        return result
    for x in ours.values():
        if x.shape != x.raw.shape:  # torch.arange fills an empty one
            x.data = OnDevice(x.raw)
    normal = op.is_view and not all(x.is_inference() for x in ours.values())  # a view is what it is a view of
    with torch.inference_mode(torch.is_inference_mode_enabled() and not normal):
        return pytree.tree_map_only(torch.Tensor, lambda x: ours[id(x)] if id(x) in ours else OnDevice(x), result)


def product(op, args, kwargs):
    global products
    products += 1
    exact = pytree.tree_map_only(torch.Tensor, lambda x: x.double() if x.dtype == torch.float32 else x, (args, kwargs))
    result = op(*exact[0], **exact[1])
    return result.float() if result.dtype == torch.float64 else result


def lowered(op):
    """A product as torch.autocast has it computed where it is on: in bf16."""
    autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def cast(*args):
        with torch._C._ExcludeDispatchKeyGuard(autocast):
            return op(*pytree.tree_map_only(torch.Tensor, lambda x: x.bfloat16() if x.dtype == torch.float32 else x, args))

    return cast


def pin(tensor):
    if isinstance(tensor, OnDevice):
        raise RuntimeError('only tensors of the CPU can be pinned')
    tensor = tensor.clone()
    tensor.pinned = True
    return tensor


def install(real_save=torch.save, real_tensor=torch.tensor):
    """Registers the device; the rest is what torch does for a GPU inside, and the program asks of torch.cuda."""
    _setup_privateuseone_for_python_backend(NAME)
    getattr(torch, NAME).get_amp_supported_dtype = lambda: [torch.bfloat16]
    library, operations = torch.library.Library('_', 'IMPL'), torch.library.Library('aten', 'IMPL')
    library.fallback(lambda op, *args, **kwargs: call(op, args, kwargs), 'PrivateUse1')
    library.fallback(torch.library.fallthrough_kernel, 'AutocastPrivateUse1')
    for name in ('conv2d', 'linear', 'matmul', 'bmm'):
        operations.impl(name, lowered(getattr(aten, name).default), 'AutocastPrivateUse1')
    torch.tensor = lambda data, device='cpu', **options: real_tensor(data, **options).to(device)
    torch.save = lambda state, path: real_save(pytree.tree_map_only(OnDevice, lambda x: x.cpu(), state), path)
    torch.Tensor.pin_memory = pin
    torch.cuda.mem_get_info = lambda *_: (2 ** 36, 2 ** 36)
    torch.cuda.is_bf16_supported = lambda **_: True
    torch.cuda.get_device_name = lambda _: 'a stand-in'
    train.require_works = test.require_works = lambda _: None
    train.choose_device = test.choose_device = lambda device, threads: torch.set_num_threads(1) or device
    return library, operations  # which takes back what it has registered when it goes


LIBRARY = install()
