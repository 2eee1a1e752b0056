"""One step of the optimizer on one batch; and what to lower when memory does not hold it."""
import gc
from contextlib import nullcontext
from types import SimpleNamespace

import torch

from models.losses import joint_loss
from models.whale_net import whale_net
from utils import ranks
from utils.device import amp_dtype
from utils.metrics import average_precision, rank_of_truth, top_k

MEASURED = ('loss', 'sigmoid', 'triplet', 'local', 'active', 'train_map5', 'train_top1', 'train_top5')  # and a count


def learn(c, model, optimizer, images, labels, group, amp, threshold, weight=None):
    """One step of the optimizer on a batch, in `grad_accumulation` parts.

    `weight` (B,): how much each image teaches. Returns (9,): what MEASURED names, and 1. Nothing here waits for the device.
    """
    optimizer.zero_grad(set_to_none=True)
    parts, classes = c.grad_accumulation, len(group) - 1
    named = ranks.total((labels < classes).sum().float()).clamp(min=1) / (parts * ranks.world())
    measured = torch.zeros(len(MEASURED) + 1, device=images.device)
    weight = torch.ones_like(images[:, 0, 0, 0]) if weight is None else weight
    for number, (some, truth, share) in enumerate(zip(*(whole.chunk(parts) for whole in (images, labels, weight))), 1):
        with model.no_sync() if number < parts and ranks.world() > 1 else nullcontext():  # gradients are averaged once
            with torch.autocast(images.device.type, amp, enabled=amp is not None):
                outputs = model(some.contiguous(memory_format=torch.channels_last), local=c.w_local > 0)
            loss, losses = joint_loss(outputs, truth, group, c, named, share, ranks.gather)
            (loss / parts).backward()
        with torch.no_grad():
            place = rank_of_truth(outputs[1].sigmoid(), truth, threshold)  # (B / parts,)
            measured += torch.stack([loss, *losses, average_precision(place).mean(), top_k(place, 1), top_k(place, 5),
                                     torch.ones_like(loss)]).float() / parts
    torch.nn.utils.clip_grad_norm_(model.parameters(), c.clip)
    optimizer.step()
    return measured


def out_of_memory(c, data, part):
    """What to lower when `part` images at once are too many; the largest halving that fits is found by trying."""
    size, fits = part, 0
    while size > 8 and not fits and ranks.world() == 1:  # alone: the other processes would wait for this one's part
        size = max(8, size // 8 * 4)
        gc.collect()
        if 'cuda' in c.device:
            torch.cuda.empty_cache()
        try:
            _learn_once(c, data, size)
            fits = size
        except Exception:  # another part of torch may say in other words how full it is
            pass
    more = next((k for k in range(2, part) if fits and part % (4 * k) == 0 and 8 <= part // k <= fits), None)
    advice = 'lower batch_size' + (f', or set grad_accumulation = {more * c.grad_accumulation}' if more else '')
    less = "'memory'" if 'cuda' in c.device else "'disk'"
    found = '' if ranks.world() > 1 else f' ({fits} at a time fit)' if fits else ' (not even 8 fit)'
    return (f'out of memory with {part} images of {c.height}x{c.width} at a time{found}: {advice}, take a smaller model_name, '
            f"height or width, or set cache = {less}; the last checkpoint is untouched")


def _learn_once(c, data, size):
    """A step of a fresh network on `size` empty images, which are gone again afterwards."""
    net = whale_net(vars(c), data.classes).to(c.device, memory_format=torch.channels_last)
    small = SimpleNamespace(**{**vars(c), 'grad_accumulation': 1})
    images = torch.zeros(size, 4, c.height, c.width, device=c.device)
    labels = torch.zeros(size, dtype=torch.int64, device=c.device)
    learn(small, net, torch.optim.Adam(net.parameters()), images, labels, data.group.to(c.device),
          amp_dtype(c.precision, c.device), 0.5)
