"""The small network that finds flukes, its loss, and how a box and a mask are read from its answer."""
import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

CHANNELS = (16, 32, 64, 96, 128)    # from half resolution to a thirty-second


def block(inside, outside):
    return nn.Sequential(*(layer for count in (inside, outside) for layer in (
        nn.Conv2d(count, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside), nn.ReLU(True))))


class FlukeFinder(nn.Module):
    """A small U-Net: (B, 3, H, W) in 0..1 -> logits: mask (B, H, W), columns (B, W) and rows (B, H) within the box.

    A box is two intervals, and is found as such: as a mask of one dimension, each way.
    """

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS[0], 5, 2, 2)
        self.down = nn.ModuleList(map(block, (CHANNELS[0], *CHANNELS), CHANNELS))
        self.up = nn.ModuleList(block(low + high, high) for low, high in zip(CHANNELS[:0:-1], CHANNELS[-2::-1]))
        self.mask = nn.Conv2d(CHANNELS[0], 1, 1)
        self.profiles = nn.ModuleList(nn.Sequential(nn.Conv1d(2 * CHANNELS[0], 32, 9, padding=4), nn.ReLU(True),
                                                    nn.Conv1d(32, 1, 9, padding=4)) for _ in range(2))

    def forward(self, images):
        size, x, passed = images.shape[2:], self.stem((images - 0.45) / 0.25), []
        for number, layer in enumerate(self.down):
            x = layer(F.max_pool2d(x, 2) if number else x)
            passed.append(x)
        for layer, skip in zip(self.up, passed[-2::-1]):
            x = layer(torch.cat([F.interpolate(x, scale_factor=2.0), skip], 1))  # (B, 16, H / 2, W / 2) in the end
        columns, rows = (profile(torch.cat([x.mean(axis), x.amax(axis)], 1)) for profile, axis in zip(self.profiles, (2, 3)))
        mask = F.interpolate(self.mask(x), size, mode='bilinear')
        columns, rows = (F.interpolate(part, length, mode='linear') for part, length in ((columns, size[1]), (rows, size[0])))
        return mask[:, 0].float(), columns[:, 0].float(), rows[:, 0].float()


def apart(p, target):
    """1 - Dice of probabilities and targets, over all but the first dimension: (B,)."""
    p, target = p.flatten(1), target.flatten(1)
    return 1 - (2 * (p * target).sum(1) + 1) / (p.sum(1) + target.sum(1) + 1)


def finder_loss(outputs, mask, columns, rows, has_mask):
    """Mean loss of a batch; mask (B, H, W), columns (B, W), rows (B, H) hold 0/1, has_mask (B,) bool.

    Where only the box is known, the mask's shadows must fill it both ways, and nothing may lie outside (BoxInst, 2021).
    """
    logits, of_columns, of_rows = outputs
    bce, p = F.binary_cross_entropy_with_logits, logits.sigmoid()
    exact = bce(logits, mask, reduction='none').mean((1, 2)) + apart(p, mask)
    outside = F.softplus(logits).mul(1 - columns[:, None] * rows[:, :, None]).mean((1, 2))
    weak = apart(p.amax(1), columns) + apart(p.amax(2), rows) + outside
    return bce(of_columns, columns) + bce(of_rows, rows) + torch.where(has_mask, exact, weak).mean()


def longest(logits):
    """The interval with the most evidence, the largest sum of logits: (L,) -> start and end as shares of L."""
    total = F.pad(logits.double().cumsum(0), (1, 0))  # (L + 1,)
    lowest, start = total.cummin(0)
    end = (total - lowest)[1:].argmax() + 1
    return start[end].item() / len(logits), end.item() / len(logits)


@torch.inference_mode()
def find(net, image, height, width):
    """Box (4,) int in pixels, mask (h, w) uint8 0/1, confidence 0..1 of a photograph (h, w, 3) uint8, seen in the mirror too.

    The confidence is the overlap of the box with that around the mask: the network finds each in its own way.
    """
    size = image.shape[1::-1]
    small = torch.from_numpy(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)).permute(2, 0, 1) / 255
    small = small.to(next(net.parameters()).device)
    logits, columns, rows = net(torch.stack([small, small.flip(2)]))
    (x0, x1), (y0, y1) = longest(columns[0] + columns[1].flip(0)), longest(rows.sum(0))
    logits = cv2.resize((logits[0] + logits[1].flip(1)).cpu().numpy(), size)
    _, label, stats, _ = cv2.connectedComponentsWithStats(np.uint8(logits > 0))
    large = stats[:, cv2.CC_STAT_AREA] > 0.1 * stats[1:, cv2.CC_STAT_AREA].max(initial=0)
    large[0] = False  # the sea; spray may cut a fluke in two, specks are none
    box, mask = np.rint(np.array([x0, y0, x1, y1]) * np.tile(size, 2)).astype(int), np.uint8(large[label])
    return box, mask, iou(box, box_of(mask))


def box_of(mask):
    """The box (x0, y0, x1, y1) around a mask; zeros if it is empty."""
    x, y, w, h = cv2.boundingRect(mask)
    return np.array([x, y, x + w, y + h])


def iou(one, other):
    """Intersection over union of two boxes (4,); 0 where they do not meet."""
    both = np.prod(np.clip(np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2]), 0, None))
    return float(both / max(np.prod(one[2:] - one[:2]) + np.prod(other[2:] - other[:2]) - both, 1e-9))
