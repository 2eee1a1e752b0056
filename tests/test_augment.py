import math

import numpy as np
import pytest
import torch

from data.augment import augment, flip_labels, photometric, random_transform, to_input, unpack
from data.images import MARGIN, raw_size

H, W = 64, 128


def pack(mask):
    return torch.from_numpy(np.packbits(mask.numpy(), axis=-1))


def gradient_crop(batch=4):
    """A crop whose red is x, green is y, over the crop with its surroundings."""
    height, width = raw_size(H, W)
    x = torch.linspace(0, 255, width).round().expand(height, width)
    y = torch.linspace(0, 255, height).round()[:, None].expand(height, width)
    crop = torch.stack([x, y, torch.zeros_like(x)], 2).to(torch.uint8).expand(batch, -1, -1, -1).contiguous()
    mask = (x > 127).to(torch.uint8).expand(batch, -1, -1).contiguous()
    return crop, pack(mask)


def test_plain_input_is_the_box_without_its_surroundings():
    crop, mask = gradient_crop()
    images = to_input(crop, mask, H, W, MARGIN)
    assert images.shape == (4, 4, H, W)
    top, left = (crop.shape[1] - H) // 2, (crop.shape[2] - W) // 2
    inside = crop[:, top:top + H, left:left + W].permute(0, 3, 1, 2).float() / 255
    assert torch.allclose(images[:, :3], inside, atol=0.01)
    assert images[:, 3, :, :W // 2 - 2].max() == 0 and images[:, 3, :, W // 2 + 2:].min() == 1


def test_unpack_gives_the_bits_back():
    mask = torch.randint(2, (3, 5, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpack(pack(mask)), mask) and unpack(pack(mask)).dtype == torch.uint8


def test_flip_is_a_mirror_and_nothing_else():
    crop, mask = gradient_crop(2)
    images = augment(crop, mask, torch.tensor([0, 1]), H, W, MARGIN, strength=(0, 0))
    assert torch.allclose(images[0], images[1].flip(2), atol=1e-5)
    assert images[0, 0, 0, 0] < images[1, 0, 0, 0]


def test_flip_moves_between_an_id_and_its_mirror():
    labels, ones = torch.tensor([0, 7, 10, 19, 20]), torch.ones(5, dtype=torch.long)
    assert flip_labels(labels, ones, 10, True).tolist() == [10, 17, 0, 9, 20]
    assert flip_labels(flip_labels(labels, ones, 10, True), ones, 10, True).tolist() == labels.tolist()
    assert flip_labels(labels, 0 * ones, 10, True).tolist() == labels.tolist()
    assert flip_labels(labels, ones, 10, False).tolist() == labels.tolist()


def test_transforms_stay_within_the_reference_ranges():
    torch.manual_seed(0)
    matrices = random_transform(torch.zeros(4000, dtype=torch.long), H, W)
    assert matrices[:, 0, 2].abs().max() <= 0.09 + 1e-6 and matrices[:, 1, 2].abs().max() <= 0.11 + 1e-6
    turn = torch.atan2(matrices[:, 1, 0] / (W / H), matrices[:, 0, 0])
    assert math.radians(20) < turn.abs().max() < math.radians(30)
    area = (matrices[:, 0, 0] * matrices[:, 1, 1] - matrices[:, 0, 1] * matrices[:, 1, 0])
    assert 0.7 < area.min() and area.max() < 1.35
    mirrored = random_transform(torch.ones(50, dtype=torch.long), H, W)
    assert (torch.linalg.det(mirrored[:, :2, :2]) < 0).all()


def test_a_rotated_circle_stays_a_circle():
    height, width = raw_size(H, W)
    y, x = torch.meshgrid(torch.arange(height) - height / 2 + 0.5, torch.arange(width) - width / 2 + 0.5, indexing='ij')
    mask = (x ** 2 + y ** 2 < 20 ** 2).to(torch.uint8)[None].contiguous()
    angle = math.radians(25)
    transform = torch.tensor([[[math.cos(angle), -math.sin(angle) / 2, 0], [math.sin(angle) * 2, math.cos(angle), 0], [0, 0, 1]]])
    turned = to_input(torch.zeros(1, height, width, 3, dtype=torch.uint8), pack(mask), H, W, MARGIN, transform)[0, 3] > 0.5
    rows, columns = turned.any(1).sum().item(), turned.any(0).sum().item()
    assert rows == pytest.approx(columns, abs=1) and rows == pytest.approx(40, abs=2)


def test_photometric_keeps_range_and_shape_and_drops_half_the_masks():
    torch.manual_seed(0)
    images = torch.rand(400, 4, 16, 32)
    images[:, 3] = 1
    changed = photometric(images)
    assert changed.shape == images.shape
    assert changed[:, :3].min() >= 0 and changed[:, :3].max() <= 1
    dropped = (changed[:, 3].amax((1, 2)) == 0).float().mean()
    assert 0.4 < dropped < 0.6
    grey = ((changed[:, 0] - changed[:, 1]).abs().amax((1, 2)) < 1e-4).float().mean()
    assert 0.35 < grey < 0.65


def test_the_same_seed_gives_the_same_batch():
    crop, mask = gradient_crop()
    flips = torch.tensor([0, 1, 0, 1])
    torch.manual_seed(7)
    first = augment(crop, mask, flips, H, W, MARGIN)
    torch.manual_seed(7)
    assert torch.equal(first, augment(crop, mask, flips, H, W, MARGIN))
    assert not torch.equal(first, augment(crop, mask, flips, H, W, MARGIN))


def test_photometric_changes_are_as_strong_as_they_say():
    """A white point on mid grey: blur spreads it over 3 x 3 pixels and loses nothing; noise keeps its sigma."""
    torch.manual_seed(0)
    flat = torch.full((400, 4, 24, 24), 0.5)
    changed = photometric(flat)[:, :3]
    light = changed.median(3).values.median(2).values[:, :, None, None]  # (B, 3, 1, 1) of each image
    spread = ((changed - light) / light).flatten(1).quantile(0.84, dim=1)  # of sigma, where there is noise
    assert spread.max() < 0.2 and (spread > 0.005).float().mean() > 0.3
    point = flat.clone()
    point[:, :3, 12, 12] = 0.6
    torch.manual_seed(0)
    gain = (photometric(point)[:, :3] - changed)[:, :, 11:14, 11:14].sum((2, 3)).mean()
    assert 0.07 < gain < 0.13
