"""File -> crop: the fluke's box (with some surroundings) at one size, decoded once into a raw cache on disk."""
import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import torch

from data.decode import read_image, read_mask
from utils.errors import UserError
from utils.log import progress_bar

MARGIN = 1 / 16   # surroundings kept on each side, a share of the box's sides: rotations and shifts find real pixels
CACHE_VERSION = 1  # raise it when cut_crop changes, so that no old entry is used


def cut_crop(image, mask, box, height, width):
    """The box and MARGIN around it, stretched to (height, width); beyond the photograph's edge, its edge goes on.

    image (H, W, 3) uint8, mask (H, W) 0/1, box (x0, y0, x1, y1) in pixels, NaN: the whole image.
    Returns crop (height, width, 3) uint8 and mask (height, width) uint8 0/1.
    """
    rows, columns = image.shape[:2]
    x0, y0, x1, y1 = (0, 0, columns, rows) if np.isnan(box[0]) else box
    x0, x1 = x0 - MARGIN * (x1 - x0), x1 + MARGIN * (x1 - x0)
    y0, y1 = y0 - MARGIN * (y1 - y0), y1 + MARGIN * (y1 - y0)
    # Shrink by whole factors first (area average): one bilinear step alone would skip pixels of a large photograph.
    factor = max(1, int(min((x1 - x0) / width, (y1 - y0) / height)))
    if factor > 1:
        image = cv2.resize(image, (max(1, columns // factor), max(1, rows // factor)), interpolation=cv2.INTER_AREA)
        mask = cv2.resize(mask, image.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    fx, fy = image.shape[1] / columns, image.shape[0] / rows
    ax, ay = (x1 - x0) * fx / width, (y1 - y0) * fy / height
    # pixel centres: output (i + 0.5) lies at x0 + ax * (i + 0.5)
    matrix = np.array([[ax, 0, x0 * fx + ax / 2 - 0.5], [0, ay, y0 * fy + ay / 2 - 0.5]])
    flags = cv2.WARP_INVERSE_MAP
    crop = cv2.warpAffine(image, matrix, (width, height), flags=flags | cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    mask = cv2.warpAffine(mask, matrix, (width, height), flags=flags | cv2.INTER_NEAREST, borderMode=cv2.BORDER_CONSTANT)
    return crop, mask


def raw_size(height, width):
    """Size of a raw crop whose box alone would be (height, width); a multiple of 8 wide, so that mask bits fill bytes."""
    return round(height * (1 + 2 * MARGIN)), 8 * round(width * (1 + 2 * MARGIN) / 8)


class Crops:
    """The raw crops of a table's images: decoded once, in parallel, into one file; a killed build goes on where it was.

    `crops[rows]` -> crops (B, h, w, 3) uint8 and masks (B, h, w) uint8 0/1, tensors. Rows marked `bad` are black.
    The file is keyed by everything that went into it: names, sizes and times of the files, boxes, masks, crop size.
    """

    def __init__(self, frame, height, width, cache_dir, workers=None):
        self.height, self.width = raw_size(height, width)
        self.count = len(frame)
        self.failed = {}  # row -> why its file, whose header was sound, could not be decoded; such rows are black
        folder = Path(cache_dir) / self._key(frame)
        folder.mkdir(parents=True, exist_ok=True)
        self.pixels, new_pixels = self._open(folder / 'crops.u8', (self.count, self.height, self.width, 3))
        self.masks, new_masks = self._open(folder / 'masks.u8', (self.count, self.height, self.width // 8))
        done, _ = self._open(folder / 'done.u8', (self.count,))
        if new_pixels or new_masks:  # one of the files was deleted or cut off
            done[:] = 0
        todo = np.flatnonzero(done == 0)
        if len(todo):
            self._build(frame, todo, done, workers or os.cpu_count())

    def __len__(self):
        return self.count

    def readable(self, skip_bad_images):
        """Which rows have pixels: (count,) bool. UserError that lists the others, unless `skip_bad_images`."""
        if self.failed and not skip_bad_images:
            raise UserError(f'{len(self.failed)} images could not be decoded: {"; ".join(list(self.failed.values())[:10])}. '
                            'Or set skip_bad_images = True to go on without them')
        rows = np.ones(self.count, bool)
        rows[list(self.failed)] = False
        return rows

    def __getitem__(self, rows):
        rows = np.asarray(rows)
        masks = np.unpackbits(self.masks[rows], axis=-1)  # (B, h, w)
        return torch.from_numpy(self.pixels[rows]), torch.from_numpy(masks)

    def _build(self, frame, todo, done, workers):
        boxes = frame[['x0', 'y0', 'x1', 'y1']].to_numpy(float)
        paths, mask_paths, mask_rles = (frame[name].tolist() for name in ('path', 'mask_path', 'mask_rle'))
        bad = frame['bad'].to_numpy() if 'bad' in frame else np.zeros(len(frame), bool)

        def one(row):
            if bad[row]:
                return row, None
            try:
                image = read_image(paths[row])
                mask = read_mask(mask_paths[row], mask_rles[row], image.shape[:2])
            except UserError as error:
                return row, str(error)
            crop, mask = cut_crop(image, mask, boxes[row], self.height, self.width)
            self.pixels[row], self.masks[row] = crop, np.packbits(mask, axis=-1)
            return row, None

        with ThreadPoolExecutor(workers) as pool:  # OpenCV leaves the interpreter's lock while it decodes
            bar = progress_bar(pool.map(one, todo), total=len(todo), desc='crops', unit='img', disable=len(todo) < 500)
            for number, (row, error) in enumerate(bar, 1):
                done[row] = error is None
                if error:
                    self.failed[row] = error
                if number % 2000 == 0:
                    self._flush()
        self._flush()

    def _flush(self):
        self.pixels.flush(), self.masks.flush()

    @staticmethod
    def _open(path, shape):
        """The file as an array, and whether it had to be made anew (of zeros)."""
        size = int(np.prod(shape))
        new = not path.exists() or path.stat().st_size != size
        if new:
            free = shutil.disk_usage(path.parent).free
            if size > free:  # a full disk would end a write to mapped memory with a bus error
                raise UserError(f'{path.parent} needs {size / 1e9:.1f} GB for decoded crops and {free / 1e9:.1f} GB are free; '
                                'make room, or set cache_dir to a folder on another disk')
            with open(path, 'wb') as file:
                file.truncate(size)
        return np.memmap(path, np.uint8, 'r+', shape=shape), new

    def _key(self, frame):
        columns = ['path', 'x0', 'y0', 'x1', 'y1', 'mask_path', 'mask_rle'] + ['bad'] * ('bad' in frame)
        digest = hashlib.sha256(json.dumps([CACHE_VERSION, self.height, self.width, MARGIN, len(frame)]).encode())
        digest.update(frame[columns].to_csv(index=False).encode())
        good = frame[~frame['bad']] if 'bad' in frame else frame
        stats = [os.stat(path) for name in ('path', 'mask_path') for path in good[name].dropna()]
        digest.update(np.array([[s.st_size, s.st_mtime_ns] for s in stats]).tobytes())
        return digest.hexdigest()[:16]
