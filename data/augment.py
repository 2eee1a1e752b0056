"""Augmentation of a whole batch on the device: one resampling, photometric changes, a mirrored image is another class.

One implementation for CPU and GPU, no loop over the batch. Random numbers come from torch's global generator, which the
training loop seeds at each iteration. Ranges are those of the competition's first place, perspective, shear, blur and
grey those of its second.
"""
import math

import torch
import torch.nn.functional as F

ROTATION = 25.0              # degrees, either way
SHIFT_X, SHIFT_Y = 0.03, 0.04  # of the width and of the height, either way
SCALE = 0.10                 # 0.9 .. 1.1
SHEAR = 0.10                 # either way
PERSPECTIVE = 0.10           # how much nearer one edge may be than the other, in half widths
JITTER = 0.03                # of the box's sides, each side for itself
NOISE = 0.05                 # largest sigma, of pixels 0..1; the reference's 0.1 drowns the detail of small inputs
GREY = (0.299, 0.587, 0.114)  # luma, ITU-R BT.601


def flip_labels(labels, flips, num_ids, flip_is_new_id):
    """The classes of mirrored images: id k <-> k + N; new_whale (2N) stays. labels, flips (B,) -> (B,)."""
    if not flip_is_new_id:
        return labels
    mirrored = (labels + num_ids) % (2 * num_ids)
    return torch.where(flips.bool() & (labels < 2 * num_ids), mirrored, labels)


def unpack(masks):
    """Mask bits, 8 pixels a byte as numpy.packbits writes them: (B, h, w / 8) uint8 -> (B, h, w) uint8 0/1."""
    bits = torch.arange(7, -1, -1, dtype=torch.uint8, device=masks.device)
    return (masks[..., None] >> bits & 1).flatten(2)


def to_input(crops, masks, height, width, margin, transform=None):
    """Raw crops -> network input, in one resampling.

    crops (B, h, w, 3) uint8 show the box and `margin` (a share of its sides) of surroundings on every side;
    masks (B, h, w / 8) uint8, packed; transform (B, 3, 3) maps output to input coordinates, both -1..1 over the box
    (default: the box itself). Returns (B, 4, height, width) float: RGB 0..1 and the mask.
    """
    batch, device = len(crops), crops.device
    image = torch.cat([crops, unpack(masks)[..., None] * 255], 3).permute(0, 3, 1, 2).float()  # (B, 4, h, w), 0..255
    if transform is None:
        transform = torch.eye(3, device=device).expand(batch, 3, 3)
    y = (torch.arange(height, device=device) + 0.5) * 2 / height - 1
    x = (torch.arange(width, device=device) + 0.5) * 2 / width - 1
    across, down = transform[:, :, :1] * x + transform[:, :, 2:], transform[:, :, 1:2] * y  # (B, 3, width), (B, 3, height)
    moved = across[:, :, None] + down[..., None]  # (B, 3, height, width)
    depth = moved[:, 2:].clamp_(min=0.1).mul_(1 + 2 * margin)  # also from the box to the crop around it
    grid = (moved[:, :2] / depth).permute(0, 2, 3, 1)  # (B, height, width, 2)
    return F.grid_sample(image, grid, padding_mode='border', align_corners=False).mul_(1 / 255)


def random_transform(flips, height, width, strength=1.0):
    """Flip, rotation, scale, shear, shift, perspective and box jitter as one homography an image: (B,) -> (B, 3, 3)."""
    batch, device = len(flips), flips.device

    def uniform(limit):
        return (torch.rand(batch, device=device) * 2 - 1) * limit * strength

    aspect = width / height
    angle = uniform(math.radians(ROTATION)) * _maybe(batch, device)
    sx, sy = 1 + uniform(SCALE), 1 + uniform(SCALE)
    sx, sy = sx * (1 + uniform(JITTER)), sy * (1 + uniform(JITTER))
    sign = 1 - 2 * flips.float()
    # rows and columns in a square's units, so that a rotation of a 2:1 crop is one
    cos, sin, shear = angle.cos(), angle.sin(), uniform(SHEAR) * _maybe(batch, device)
    return torch.stack([
        sign * sx * cos, sx * (shear * cos - sin) / aspect, uniform(2 * SHIFT_X + JITTER),
        sign * sy * sin * aspect, sy * (shear * sin + cos), uniform(2 * SHIFT_Y + JITTER),
        uniform(PERSPECTIVE) * _maybe(batch, device), uniform(PERSPECTIVE) * _maybe(batch, device), torch.ones_like(sx),
    ], 1).view(batch, 3, 3)


def photometric(images, strength=1.0):
    """Light, contrast, gamma, greyscale, blur, noise, one erased box, a mask taken away: each for half of the images.

    images (B, 4, H, W), RGB 0..1 and mask -> the same. What costs most is computed for its half of the batch alone.
    """
    batch, device = len(images), images.device
    height, width = images.shape[2:]
    rgb, mask = images[:, :3], images[:, 3:]

    def half():
        return torch.randperm(batch, device=device)[:batch // 2]

    def uniform(low, high, count=batch):  # (count, 1, 1, 1)
        return torch.rand(count, 1, 1, 1, device=device) * (high - low) + low

    mean = rgb.mean((1, 2, 3), keepdim=True)
    contrast, light = (1 + uniform(-limit, limit) * strength * _maybe(batch, device).view(-1, 1, 1, 1) for limit in (0.4, 0.3))
    rgb = torch.addcmul(mean * (1 - contrast) * light, rgb, contrast * light).clamp_(1e-3, 1)
    some = half()
    rgb.index_copy_(0, some, rgb[some] ** (1 + uniform(-0.4, 0.4, len(some)) * strength))
    some = half()
    grey = sum(share * rgb[some, k] for k, share in enumerate(GREY))  # (B / 2, H, W)
    rgb.index_copy_(0, some, grey[:, None].expand(-1, 3, -1, -1))
    some = half()
    sharp = rgb[some]
    padded = F.pad(sharp, (1, 1, 1, 1), mode='replicate')  # (B / 2, 3, H + 2, W + 2)
    rows = padded[:, :, :-2] + padded[:, :, 1:-1] + padded[:, :, 2:]
    blurred = (rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]) / 9  # the mean of 3 x 3 pixels
    rgb.index_copy_(0, some, torch.lerp(sharp, blurred, uniform(0, 1, len(some)) * strength))
    some = half()
    noise = torch.randn(len(some), 1, height, width, device=device)  # on lightness: the same for R, G and B
    noise = noise * uniform(0, NOISE, len(some)) * strength
    speckle = _maybe(len(some), device).view(-1, 1, 1, 1)  # noise that grows with the light, or the same everywhere
    clean = rgb[some]
    rgb.index_copy_(0, some, torch.addcmul(clean, noise, 1 - speckle + speckle * clean))
    # one small box, filled with the image's mean
    top, left = torch.rand(2, batch, 1, 1, 1, device=device)
    tall, wide = 0.05 + 0.15 * torch.rand(2, batch, 1, 1, 1, device=device)
    y = torch.arange(height, device=device).view(1, 1, -1, 1) / height
    x = torch.arange(width, device=device).view(1, 1, 1, -1) / width
    beside = (y >= top) & (y < top + tall) & _maybe(batch, device).bool().view(-1, 1, 1, 1)  # (B, 1, H, 1)
    rgb = torch.where(beside & ((x >= left) & (x < left + wide)), mean, rgb).clamp_(0, 1)
    return torch.cat([rgb, mask * _maybe(batch, device).view(-1, 1, 1, 1)], 1)


def augment(crops, masks, flips, height, width, margin, strength=(1.0, 1.0)):
    """A training batch: random_transform, to_input, photometric. Shapes as there; strength (0, 0) leaves only the flip."""
    geometric, light = strength
    images = to_input(crops, masks, height, width, margin, random_transform(flips, height, width, geometric))
    return photometric(images, light) if light else images


def _maybe(batch, device):
    """0 or 1 for each image, evenly: (B,) float."""
    return torch.randint(2, (batch,), device=device).float()
