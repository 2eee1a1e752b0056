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
CACHE_VERSION = 3  # raise it when cut_crop changes, so that no old entry is used


def cut_crop(image, mask, box, height, width):
    """The box and MARGIN around it, stretched to (height, width); beyond the photograph's edge, its edge goes on.

    Exact to half a pixel, of the photograph and of the crop, which is less than any box is sure of; whole pixels can be
    cut and resized in a third of the time. image (H, W, 3) uint8, mask (H, W) 0/1 or None, box (x0, y0, x1, y1) in
    pixels, NaN: the whole image. Returns crop (height, width, 3) uint8 and mask (height, width) uint8
    0/1, or None.
    """
    rows, columns = image.shape[:2]
    x0, y0, x1, y1 = (0, 0, columns, rows) if np.isnan(box[0]) else box
    x, left, right = _within(x0 - MARGIN * (x1 - x0), x1 + MARGIN * (x1 - x0), columns, width)
    y, top, bottom = _within(y0 - MARGIN * (y1 - y0), y1 + MARGIN * (y1 - y0), rows, height)
    size, part = (width - left - right, height - top - bottom), image[y, x]
    # Shrink by whole factors first (area average): one bilinear step alone would skip pixels of a large photograph.
    fx, fy = max(1, part.shape[1] // size[0]), max(1, part.shape[0] // size[1])
    if fx > 1 or fy > 1:
        part = cv2.resize(part, (part.shape[1] // fx, part.shape[0] // fy), interpolation=cv2.INTER_AREA)
    crop = cv2.copyMakeBorder(cv2.resize(part, size), top, bottom, left, right, cv2.BORDER_REPLICATE)
    if mask is None:
        return crop, None
    mask = cv2.resize(mask[y, x], size, interpolation=cv2.INTER_NEAREST_EXACT)
    return crop, cv2.copyMakeBorder(mask, top, bottom, left, right, cv2.BORDER_CONSTANT)


def _within(low, high, count, size):
    """The part of low .. high that lies in 0 .. count, as a slice; how many of `size` output pixels lie before, after it."""
    first, last = min(max(round(low), 0), count - 1), max(min(round(high), count), 1)
    each = size / (high - low)
    before = min(round(max(0, -low) * each), size - 1)
    return slice(first, max(last, first + 1)), before, min(round(max(0, high - count) * each), size - 1 - before)


def raw_size(height, width):
    """Size of a raw crop whose box alone would be (height, width); a multiple of 8 wide, so that mask bits fill bytes."""
    return round(height * (1 + 2 * MARGIN)), 8 * round(width * (1 + 2 * MARGIN) / 8)


def choose_cache(size, folder, device):
    """Where `size` bytes of crops fit: 'none' when not even `folder` has room for them, 'device' in a third of a GPU's
    free memory, 'memory' in a half of the machine's beside a GPU, else 'disk', which spare memory keeps anyway."""
    parent = next(parent for parent in folder.absolute().parents if parent.exists())
    if not folder.exists() and size > shutil.disk_usage(parent).free:
        return 'none'
    if 'cuda' not in device:
        return 'disk'
    if size < torch.cuda.mem_get_info(device)[0] / 3:
        return 'device'
    memory = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    return 'memory' if size < memory / 2 else 'disk'


class Crops:
    """The raw crops of a table's images: decoded once, in parallel, into one file; a killed build goes on where it was.

    `crops[rows]` -> crops (B, h, w, 3) uint8 and masks (B, h, w / 8) uint8, 8 pixels a byte (data.augment.unpack), tensors.
    Rows marked `bad` are black. The file is keyed by everything that went into it: names, sizes and times of the files,
    boxes, masks, crop size. `cache` says where it is read from: 'disk', 'memory' or 'device' (the accelerator's memory);
    'none': no file, each image is decoded when it is asked for (one that cannot be, although its header was sound, is then
    an error, or black when bad images are skipped); 'auto': see `choose_cache`.
    """

    def __init__(self, frame, height, width, cache_dir, workers=None, cache='disk', device='cpu'):
        self.height, self.width = raw_size(height, width)
        self.count, self.skip_bad_images = len(frame), False
        self.boxes = frame[['x0', 'y0', 'x1', 'y1']].to_numpy(float)
        self.files = [frame[name].tolist() for name in ('path', 'mask_path', 'mask_rle')]
        self.bad = frame['bad'].to_numpy(bool) if 'bad' in frame else np.zeros(len(frame), bool)
        self.failed = {}  # row -> why its file, whose header was sound, could not be decoded; such rows are black
        self.workers = workers or os.cpu_count()
        self.bytes = self.count * self.height * self.width * 3 + self.count * self.height * self.width // 8
        self.key = self._key(frame)
        self.folder = folder = Path(cache_dir) / self.key
        self.cache = choose_cache(self.bytes, folder, device) if cache == 'auto' else cache
        if self.cache == 'none':
            return
        if self.cache == 'device' and 'cuda' in device and self.bytes > torch.cuda.mem_get_info(device)[0]:
            raise UserError(f"the {self.bytes / 1e9:.1f} GB of crops do not fit on {device}: set cache = 'memory' or 'disk'")
        folder.mkdir(parents=True, exist_ok=True)
        self.pixels = self._open(folder / 'crops.u8', (self.count, self.height, self.width, 3))
        self.masks = self._open(folder / 'masks.u8', (self.count, self.height, self.width // 8))
        done = self._open(folder / 'done.u8', (self.count,))
        todo = np.flatnonzero(done == 0)
        if len(todo):
            self._build(todo, done)
        if self.cache == 'memory':
            self.pixels, self.masks = np.array(self.pixels), np.array(self.masks)
        if self.cache == 'device':
            self.pixels, self.masks = (torch.from_numpy(part).to(device, copy=True) for part in (self.pixels, self.masks))

    def __len__(self):
        return self.count

    def __str__(self):
        return f"{self.count} crops of {self.height}x{self.width}, {self.bytes / 1e9:.2g} GB, cache = '{self.cache}'"

    def readable(self, skip_bad_images):
        """Which rows have pixels: (count,) bool. UserError that lists the others, unless `skip_bad_images`."""
        self.skip_bad_images = skip_bad_images
        if self.failed and not skip_bad_images:
            raise UserError(f'{len(self.failed)} images could not be decoded: {"; ".join(list(self.failed.values())[:10])}. '
                            'Or set skip_bad_images = True to go on without them')
        rows = np.ones(self.count, bool)
        rows[list(self.failed)] = False
        return rows

    def __getitem__(self, rows):
        rows = np.asarray(rows)
        if self.cache == 'none':
            crops = np.empty((len(rows), self.height, self.width, 3), np.uint8)
            masks = np.empty((len(rows), self.height, self.width // 8), np.uint8)
            with ThreadPoolExecutor(self.workers) as pool:
                errors = list(pool.map(self._decode, rows.tolist(), crops, masks))
            self.failed.update({row: error for row, error in zip(rows.tolist(), errors) if error})
            self.readable(self.skip_bad_images)
            return torch.from_numpy(crops), torch.from_numpy(masks)
        if self.cache != 'device':
            return torch.from_numpy(self.pixels[rows]), torch.from_numpy(self.masks[rows])
        rows = torch.from_numpy(rows)
        if self.pixels.is_cuda:
            rows = rows.pin_memory().to(self.pixels.device, non_blocking=True)  # no waiting for the step before
        return self.pixels[rows], self.masks[rows]

    def _decode(self, row, crop, packed):
        """Write the crop and its packed mask into these arrays; None, or why there is none (a black crop)."""
        error, packed[:] = None, 0
        try:
            if not self.bad[row]:
                image = read_image(self.files[0][row])
                files = self.files[1][row], self.files[2][row]
                mask = None if files == (None, None) else read_mask(*files, image.shape[:2])
                crop[:], mask = cut_crop(image, mask, self.boxes[row], self.height, self.width)
                if mask is not None:
                    packed[:] = np.packbits(mask, axis=-1)
                return None
        except (UserError, cv2.error) as caught:
            if isinstance(caught, cv2.error) and caught.code == cv2.Error.StsNoMem:
                raise MemoryError from caught
            for files in self.files[:2]:  # photographs, masks
                if isinstance(files[row], str):
                    os.stat(files[row])  # one that is gone ends the training, since the others may be gone too
            error = str(caught) if isinstance(caught, UserError) else f'{self.files[0][row]} ({" ".join(str(caught).split())})'
        crop[:] = 0
        return error

    def _build(self, todo, done):
        def one(row):
            return row, self._decode(row, self.pixels[row], self.masks[row])

        pool, good = ThreadPoolExecutor(self.workers), []  # OpenCV leaves the interpreter's lock while it decodes
        try:
            bar = progress_bar(pool.map(one, todo), total=len(todo), desc='crops', unit='img', disable=len(todo) < 500)
            for number, (row, error) in enumerate(bar, 1):
                if error:
                    self.failed[row] = error
                else:
                    good.append(row)
                if number % 2000 == 0:
                    self._mark(done, good)
        finally:
            pool.shutdown(cancel_futures=True)
            self._mark(done, good)

    def _mark(self, done, rows):
        """Rows are done when their pixels are on the disk, or a power cut could leave black ones."""
        self.pixels.flush(), self.masks.flush()
        done[rows] = 1

    @staticmethod
    def _open(path, shape):
        """The file as an array; one that is not there, or was cut off, is made anew of zeros, and then nothing is done yet."""
        size = int(np.prod(shape))
        if not path.exists() or path.stat().st_size != size:
            path.with_name('done.u8').unlink(missing_ok=True)  # first: killed in between, nothing black counts as done
            free = shutil.disk_usage(path.parent).free
            if size > free:  # a full disk would end a write to mapped memory with a bus error
                raise UserError(f'{path.parent} needs {size / 1e9:.1f} GB for decoded crops and {free / 1e9:.1f} GB are free; '
                                "make room, set cache_dir to a folder on another disk, or cache = 'none'")
            with open(path, 'ab') as file:  # another training may have it by now: it is not emptied
                try:
                    getattr(os, 'posix_fallocate', lambda *_: 0)(file.fileno(), 0, size)  # the room is ours from now on
                    file.truncate(size)
                except OSError as error:
                    raise OSError(error.errno, error.strerror, str(path)) from error
        return np.memmap(path, np.uint8, 'r+', shape=shape)

    def _key(self, frame):
        columns = ['path', 'x0', 'y0', 'x1', 'y1', 'mask_path', 'mask_rle'] + ['bad'] * ('bad' in frame)
        digest = hashlib.sha256(json.dumps([CACHE_VERSION, self.height, self.width, MARGIN, len(frame)]).encode())
        digest.update(frame[columns].to_csv(index=False).encode(errors='surrogateescape'))
        good = frame[~frame['bad']] if 'bad' in frame else frame
        stats = [os.stat(path) for name in ('path', 'mask_path') for path in good[name].dropna()]
        digest.update(np.array([[s.st_size, s.st_mtime_ns] for s in stats]).tobytes())
        return digest.hexdigest()[:16]
