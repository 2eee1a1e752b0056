import os
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pytest

from data import images
from data.augment import unpack
from data.images import MARGIN, Crops, choose_cache, cut_crop, raw_size
from utils.errors import UserError
from utils.member import Member

RNG = np.random.default_rng(0)
WHOLE = [np.nan] * 4


def photograph(height=60, width=100):
    """Noise, and a mask of its bright pixels, so that mask and pixels can be compared after any crop."""
    image = RNG.integers(0, 256, (height, width, 3), np.uint8)
    return image, (image[..., 0] > 127).astype(np.uint8)


def with_margin(x0, y0, x1, y1):
    """The box whose surroundings are this one, in other words what to ask for to see exactly it."""
    dx, dy = (x1 - x0) * MARGIN / (1 + 2 * MARGIN), (y1 - y0) * MARGIN / (1 + 2 * MARGIN)
    return [x0 + dx, y0 + dy, x1 - dx, y1 - dy]


def test_a_box_of_the_crops_size_is_copied_exactly():
    image, mask = photograph()
    crop, cropped = cut_crop(image, mask, with_margin(20, 10, 84, 42), 32, 64)
    assert (crop == image[10:42, 20:84]).all() and (cropped == mask[10:42, 20:84]).all()
    assert crop.dtype == cropped.dtype == np.uint8


def test_surroundings_are_kept():
    image, mask = photograph()
    crop, _ = cut_crop(image, mask, [20, 16, 84, 48], *raw_size(32, 64))  # 4 and 2 pixels on each side
    assert crop.shape == (36, 72, 3)
    assert (crop == image[14:50, 16:88]).all()


def test_no_box_is_the_whole_image():
    image, mask = photograph()
    crops = [cut_crop(image, mask, box, 72, 120) for box in (WHOLE, [0, 0, 100, 60])]
    assert (crops[0][0] == crops[1][0]).all() and (crops[0][1] == crops[1][1]).all()


def test_beyond_the_edge_the_edge_goes_on_and_the_mask_ends():
    image, mask = photograph()
    mask[:] = 1
    crop, cropped = cut_crop(image, mask, with_margin(-10, -6, 54, 26), 32, 64)
    assert (crop[6:, 10:] == image[:26, :54]).all()
    assert (crop[:6, 10:] == image[0, :54]).all() and (crop[6:, :10] == image[:26, :1]).all()
    assert cropped[6:, 10:].all() and not cropped[:6].any() and not cropped[:, :10].any()


@pytest.mark.parametrize('times, down', [(2, 2), (3, 3), (4, 4), (4, 1), (1, 3)])
def test_a_large_box_is_averaged(times, down):
    small, _ = photograph(32, 64)
    image = np.kron(small, np.ones((down, times, 1), np.uint8))
    image = (image.astype(int) + RNG.integers(-9, 10, image.shape)).clip(0, 255).astype(np.uint8)
    crop, _ = cut_crop(image, np.zeros(image.shape[:2], np.uint8), with_margin(0, 0, 64 * times, 32 * down), 32, 64)
    blocks = image.reshape(32, down, 64, times, 3).mean((1, 3))
    assert abs(crop - blocks).max() <= 1


@pytest.mark.parametrize('box', [[11.5, 8.25, 70.0, 50.0], [-9.0, -2.0, 62.5, 58.0], WHOLE])
def test_a_stretched_crop_against_a_plain_reference(box):
    y, x = np.mgrid[:60, :100]
    image = np.dstack([2 * x, 4 * y, x + 2 * y]).astype(np.uint8)  # a ramp: its colour tells where a pixel came from
    height, width = 45, 90
    crop, _ = cut_crop(image, np.zeros(image.shape[:2], np.uint8), box, height, width)
    x0, y0, x1, y1 = [0, 0, 100, 60] if np.isnan(box[0]) else box
    w, h = x1 - x0, y1 - y0
    for row, column in [(0, 0), (44, 89), (20, 30), (7, 77)]:
        x = (x0 - MARGIN * w + (column + 0.5) / width * w * (1 + 2 * MARGIN) - 0.5)
        y = (y0 - MARGIN * h + (row + 0.5) / height * h * (1 + 2 * MARGIN) - 0.5)
        expected = np.array([2 * np.clip(x, 0, 99), 4 * np.clip(y, 0, 59)])
        assert (abs(crop[row, column, :2] - expected) / [2, 4]).max() <= 1.25  # half a pixel of the photograph, and of the crop


@pytest.mark.parametrize('box', [[20, 10, 52, 26], [5, 5, 95, 50], [-20, -10, 60, 55], WHOLE])
def test_the_mask_follows_the_image(box):
    mask = np.zeros((60, 100), np.uint8)
    cv2.circle(mask, (45, 25), 14, 1, -1)
    crop, cropped = cut_crop(np.repeat(mask[..., None] * 255, 3, 2), mask, box, 40, 80)
    assert set(np.unique(cropped)) <= {0, 1} and cropped.any()
    assert (cropped != (crop[..., 0] > 127)).mean() < 0.02


@pytest.mark.parametrize('box', [[-300, 5, -200, 50], [20, 90, 60, 120], [99.9, 59.9, 100.1, 60.1], [-500, -500, 900, 900]])
def test_a_box_beyond_the_photograph_is_no_error(box):
    image, mask = photograph()
    crop, cropped = cut_crop(image, mask, np.array(box, float), 36, 72)
    assert crop.shape == (36, 72, 3) and cropped.shape == (36, 72)


@pytest.mark.parametrize('height, width', [(256, 512), (64, 64), (32, 64), (33, 70), (299, 299)])
def test_raw_size_has_the_margins_and_fills_bytes(height, width):
    rows, columns = raw_size(height, width)
    assert columns % 8 == 0
    assert abs(rows - height * (1 + 2 * MARGIN)) <= 0.5 and abs(columns - width * (1 + 2 * MARGIN)) <= 4
    assert raw_size(256, 512) == (288, 576)


# The cache

@pytest.fixture
def frame(tmp_path):
    """Six photographs, the last three with a mask, as data/tables.py describes them."""
    rows = []
    for number in range(6):
        image, mask = photograph(40, 80)
        path, mask_path = str(tmp_path / f'{number}.png'), str(tmp_path / f'{number}_mask.png')
        cv2.imwrite(path, image[..., ::-1])
        cv2.imwrite(mask_path, mask * 255)
        box = [8.0, 4.0, 72.0, 36.0] if number % 2 else WHOLE
        rows.append([path, *box, mask_path if number > 2 else None, None])
    frame = pd.DataFrame(rows, columns=['path', 'x0', 'y0', 'x1', 'y1', 'mask_path', 'mask_rle'], dtype=object)
    return frame.astype(dict.fromkeys(['x0', 'y0', 'x1', 'y1'], float))


@pytest.fixture
def decoded(monkeypatch):
    """The files that were decoded, but for masks."""
    paths = []
    monkeypatch.setattr(images, 'read_image', lambda path, real=images.read_image: paths.append(path) or real(path))
    return paths


def build(frame, tmp_path):
    return Crops(frame, 32, 64, tmp_path / 'cache', workers=2)


def test_crops_are_those_of_cut_crop(frame, tmp_path):
    crops = build(frame, tmp_path)
    pixels, masks = crops[[4, 0, 3]]
    assert pixels.shape == (3, 36, 72, 3) and masks.shape == (3, 36, 9) and len(crops) == 6
    for row, crop, mask in zip([4, 0, 3], pixels.numpy(), unpack(masks).numpy()):
        image = cv2.imread(frame['path'][row])[..., ::-1]
        path = frame['mask_path'][row]
        own = (cv2.imread(path, 0) > 127).astype(np.uint8) if path else np.zeros((40, 80), np.uint8)
        box = frame.loc[row, ['x0', 'y0', 'x1', 'y1']].to_numpy(float)
        expected = cut_crop(np.ascontiguousarray(image), own, box, 36, 72)
        assert (crop == expected[0]).all() and (mask == expected[1]).all()


def test_what_is_cached_is_not_decoded_again(frame, tmp_path, decoded):
    first = build(frame, tmp_path)[range(6)]
    assert sorted(decoded) == frame['path'].tolist()
    again = build(frame, tmp_path)[range(6)]
    assert len(decoded) == 6 and (again[0] == first[0]).all() and (again[1] == first[1]).all()


def changed_file(frame):
    image, _ = photograph(40, 80)
    cv2.imwrite(frame['path'][1], image)
    stat = os.stat(frame['path'][1])
    os.utime(frame['path'][1], ns=(stat.st_atime_ns, stat.st_mtime_ns + 10 ** 9))


def changed_mask(frame):
    cv2.imwrite(frame['mask_path'][4], np.zeros((40, 80), np.uint8))


def changed_box(frame):
    frame.loc[3, 'x1'] = 60.0


def another_mask(frame):
    frame.loc[3, 'mask_path'] = None


def mask_of_a_csv(frame):
    frame.loc[0, 'mask_rle'] = '1 3000'


@pytest.mark.parametrize('change, row', [(changed_file, 1), (changed_mask, 4), (changed_box, 3), (another_mask, 3),
                                         (mask_of_a_csv, 0)])
def test_a_change_is_seen(frame, tmp_path, change, row):
    before = build(frame, tmp_path)[[row]]
    change(frame)
    after = build(frame, tmp_path)[[row]]
    assert (before[0] != after[0]).any() or (before[1] != after[1]).any()


def test_a_killed_build_goes_on_where_it_was(frame, tmp_path, decoded, monkeypatch):
    whole = Crops(frame, 32, 64, tmp_path / 'whole', workers=1)[range(6)]
    decoded.clear()
    with monkeypatch.context() as patch:
        def killed(path, real=images.read_image):
            if path == frame['path'][3]:
                raise KeyboardInterrupt
            return real(path)
        patch.setattr(images, 'read_image', killed)
        with pytest.raises(KeyboardInterrupt):
            Crops(frame, 32, 64, tmp_path / 'cache', workers=1)
    decoded.clear()
    pixels, masks = Crops(frame, 32, 64, tmp_path / 'cache', workers=1)[range(6)]
    assert decoded == frame['path'].tolist()[3:]
    assert (pixels == whole[0]).all() and (masks == whole[1]).all()


@pytest.mark.parametrize('name', ['crops.u8', 'masks.u8', 'done.u8'])
@pytest.mark.parametrize('damage', [lambda path: path.unlink(), lambda path: os.truncate(path, 5)])
def test_a_file_of_the_cache_that_is_lost_is_built_again(frame, tmp_path, name, damage):
    first = build(frame, tmp_path)[range(6)]
    first = [part.clone() for part in first]
    path, = (tmp_path / 'cache').glob(f'*/{name}')
    damage(path)
    again = build(frame, tmp_path)[range(6)]
    assert (again[0] == first[0]).all() and (again[1] == first[1]).all()


def test_rows_marked_bad_are_black_and_not_read(frame, tmp_path, decoded):
    bad = frame['path'][2]
    open(bad, 'w').close()
    pixels, masks = build(frame.assign(bad=frame['path'] == bad), tmp_path)[[2, 1]]
    assert bad not in decoded
    assert not pixels[0].any() and not masks[0].any() and pixels[1].any()


def test_too_little_room_for_the_crops_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(images.shutil, 'disk_usage', lambda _: SimpleNamespace(free=100))
    with pytest.raises(UserError, match='cache_dir'):
        Crops._open(tmp_path / 'crops.u8', (10, 20))
    assert not (tmp_path / 'crops.u8').exists()


@pytest.mark.parametrize('cache', ['disk', 'memory', 'device', 'none'])
def test_every_place_gives_the_same_crops(frame, tmp_path, cache):
    expected = build(frame, tmp_path)[[4, 0, 3, 4]]
    found = Crops(frame, 32, 64, tmp_path / 'other', cache=cache)
    for _ in range(2):
        assert all((one == other).all() for one, other in zip(found[[4, 0, 3, 4]], expected))
    assert (tmp_path / 'other').exists() == (cache != 'none')
    assert f"cache = '{cache}'" in str(found)


def test_without_a_cache_what_cannot_be_decoded_is_black_and_named(frame, tmp_path):
    open(frame['path'][2], 'w').close()
    crops = Crops(frame, 32, 64, tmp_path, cache='none')
    with pytest.raises(UserError, match='2.png'):
        crops[[1, 2]]
    crops.readable(skip_bad_images=True)
    pixels, _ = crops[[1, 2]]
    assert pixels[0].any() and not pixels[1].any()
    assert frame['path'][2] in crops.failed[2]


def test_auto_takes_what_fits(tmp_path, monkeypatch):
    monkeypatch.setattr(images.torch.cuda, 'mem_get_info', lambda device: (9000, 10000))
    monkeypatch.setattr(images.os, 'sysconf', lambda name: 100)  # of pages, and of bytes in each: 10,000
    monkeypatch.setattr(images.shutil, 'disk_usage', lambda _: SimpleNamespace(free=20000))
    for size, device, place in [(2999, 'cuda', 'device'), (4000, 'cuda', 'memory'), (6000, 'cuda:0', 'disk'),
                                (2000, 'cpu', 'disk'), (30000, 'cuda', 'none'), (30000, 'cpu', 'none')]:
        assert choose_cache(size, tmp_path / 'not' / 'there', device) == place
    assert choose_cache(30000, tmp_path, 'cpu') == 'disk'  # the crops are there already


def test_answers_read_their_crops_from_the_disk_beside_a_gpu_too(frame, tmp_path):
    """Each is asked for about once; to move all of them to the GPU first would cost more."""
    c = SimpleNamespace(cache='auto', cache_dir=tmp_path, device='cuda')
    assert Member._crops(SimpleNamespace(c=c, size=(32, 64)), frame).cache == 'disk'
