"""From a JPEG of 1050x600 to a training image of 256x512x4: `python -m benchmarks.input`, on one core, under a minute.

The comparison is the competition's first place's way, written anew from its description: decode, cut the box, one
OpenCV call for each change, noise on the lightness in float64, all for one image at a time; CLAHE, which an eighth of its
images get, is left out.
"""
import os
import tempfile

import cv2
import numpy as np
import pandas as pd
import torch

from benchmarks.timing import compare
from data.augment import augment
from data.images import MARGIN, Crops
from data.make_sample import draw_animal, draw_photograph
from utils.device import choose_device

HEIGHT, WIDTH, IMAGES = 256, 512, 48


def write_images(folder):
    """IMAGES photographs of 1050x600 with masks, as the tables describe them.

    Quality and grain are such that a pixel costs a third of a byte, the median of the competition's photographs.
    """
    rows = []
    for number in range(IMAGES):
        rng = np.random.default_rng(number)
        image, mask = draw_photograph(rng, draw_animal(0, number % 4, 10))
        image = cv2.resize(image, (1050, 600), interpolation=cv2.INTER_CUBIC).astype(np.int16)
        image = (image + rng.normal(0, 4.6, image.shape)).clip(0, 255).astype(np.uint8)  # a sensor's grain, which JPEG pays for
        path, mask_path = f'{folder}/{number}.jpg', f'{folder}/{number}.png'
        cv2.imwrite(path, image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 94])
        cv2.imwrite(mask_path, cv2.resize(mask, (1050, 600)))
        rows.append([path, 40.0, 30.0, 1010.0, 570.0, mask_path, None])
    return pd.DataFrame(rows, columns=['path', 'x0', 'y0', 'x1', 'y1', 'mask_path', 'mask_rle'])


def reference(path, mask_path, box, rng):
    """One training image as the first place made it: (4, 256, 512) float tensor."""
    image, mask = cv2.imread(path), cv2.imread(mask_path, cv2.IMREAD_GRAYSCALE)
    x0, y0, x1, y1 = (np.array(box) + rng.uniform(-0.03, 0.03, 4) * 900).clip(0, [1050, 600] * 2).astype(int)
    image, mask = image[y0:y1, x0:x1].copy(), mask[y0:y1, x0:x1].copy()
    image, mask = cv2.resize(image, (WIDTH, HEIGHT)), cv2.resize(mask, (WIDTH, HEIGHT))
    if rng.random() < 0.5:
        image, mask = np.fliplr(image).copy(), np.fliplr(mask).copy()
    angle, scale, shift = rng.uniform(-25, 25), rng.uniform(0.9, 1.1), rng.uniform(-0.04, 0.04, 2) * [WIDTH, HEIGHT]
    if rng.random() < 0.5:
        turn = cv2.getRotationMatrix2D((WIDTH / 2, HEIGHT / 2), angle, scale)
        turn[:, 2] += shift
        image = cv2.warpAffine(image, turn, (WIDTH, HEIGHT), borderMode=cv2.BORDER_REFLECT_101)
        mask = cv2.warpAffine(mask, turn, (WIDTH, HEIGHT), borderMode=cv2.BORDER_REFLECT_101)
    if rng.random() < 0.5:
        lab = cv2.cvtColor(image, cv2.COLOR_BGR2LAB).astype(np.float64)
        noise = rng.normal(0, 0.1, (HEIGHT, WIDTH))
        lab[..., 0] = (lab[..., 0] * (1 + noise) if rng.random() < 0.5 else lab[..., 0] + 255 * noise).clip(0, 255)
        image = cv2.cvtColor(lab.astype(np.uint8), cv2.COLOR_LAB2BGR)
    if rng.random() < 0.5:
        image = (image * rng.uniform(0.7, 1.3)).clip(0, 255).astype(np.uint8)
    if rng.random() < 0.5:
        image = ((image - image.mean()) * rng.uniform(0.6, 1.4) + image.mean()).clip(0, 255).astype(np.uint8)
    if rng.random() < 0.5:
        image = (255 * (image / 255.0) ** rng.uniform(0.7, 1.4)).astype(np.uint8)
    if rng.random() < 0.5:
        image = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR)
    if rng.random() < 0.5:
        y, x = rng.integers(HEIGHT - 40), rng.integers(WIDTH - 80)
        image[y:y + 40, x:x + 80] = 0
    if rng.random() < 0.5:
        mask[:] = 0
    whole = np.concatenate([image, mask[..., None]], 2).transpose(2, 0, 1).astype(np.float64) / 255
    return torch.from_numpy(whole).float()


def main():
    choose_device('cpu', threads=1)  # as the scripts do
    cv2.setNumThreads(1)
    if hasattr(os, 'sched_setaffinity'):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        frame = write_images(folder)
        box, paths = frame[['x0', 'y0', 'x1', 'y1']].to_numpy(), list(zip(frame['path'], frame['mask_path']))
        files, rng = [np.fromfile(path, np.uint8) for path, _ in paths], np.random.default_rng(0)
        fresh = Crops(frame, HEIGHT, WIDTH, folder, workers=1, cache='none')
        bare = Crops(frame.assign(mask_path=None), HEIGHT, WIDTH, folder, workers=1, cache='none')
        large = pd.concat([frame] * 20, ignore_index=True)  # half a gigabyte, more than the processor's own memory
        cached = {name: Crops(large, HEIGHT, WIDTH, folder, workers=1, cache=name) for name in ('disk', 'memory')}
        rows, flips = np.random.default_rng(1).permutation(IMAGES), torch.arange(IMAGES) % 2
        many = np.random.default_rng(2).permutation(len(large))

        def training(crops):
            return augment(*crops[rows], flips, HEIGHT, WIDTH, MARGIN)

        print(f'one core, {IMAGES} JPEGs of 1050x600 (mean {np.mean([len(file) for file in files]) / 1000:.0f} kB) to '
              f'{HEIGHT}x{WIDTH}x4')
        compare({
            'decoding the JPEG, nothing else': lambda: [cv2.imdecode(file, cv2.IMREAD_COLOR) for file in files],
            'ours without cache, without masks, host side': lambda: bare[rows],
            'ours without cache, with masks, host side': lambda: fresh[rows]}, IMAGES)
        compare({
            "the reference's pipeline": lambda: torch.stack([reference(*path, b, rng) for path, b in zip(paths, box)]),
            'ours without cache, augmentation on the same core': lambda: training(fresh),
            'ours from the cache, augmentation on the same core': lambda: training(cached['disk'])}, IMAGES)
        print('host side alone, from the cache')
        compare({f"cache = '{name}'": lambda crops=crops: [crops[many[k:k + 48]] for k in range(0, len(many), 48)]
                 for name, crops in cached.items()}, len(many))
        if torch.cuda.is_available():
            torch.use_deterministic_algorithms(False)  # as on a GPU
            on_device = [part.cuda() for part in cached['memory'][rows]]
            print('augmentation on the GPU')
            compare({'augment': lambda: [augment(*on_device, flips.cuda(), HEIGHT, WIDTH, MARGIN) for _ in range(20)]},
                    20 * IMAGES, cuda=True)


if __name__ == '__main__':
    main()
