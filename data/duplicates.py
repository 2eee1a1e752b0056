"""The same photograph under another name: it must not be learned from where it validates."""
import os
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np

from utils.log import progress_bar

# Correlation of two 32x32 thumbnails. Of different photographs of right whales, drawn flukes and characters the most alike
# reach 0.97; the same fluke photograph, made smaller and compressed again, stays above 0.98.
SAME = 0.975
SIDE = 32


def fingerprints(paths):
    """A grey thumbnail of each whole photograph, of mean 0 and length 1: (n, 1024) float32; zeros where none decodes."""
    def one(path):
        data = np.fromfile(path, np.uint8)
        image = cv2.imdecode(data, cv2.IMREAD_REDUCED_GRAYSCALE_2) if len(data) else None
        if image is None:
            return np.zeros(SIDE * SIDE, np.float32)
        small = cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA).astype(np.float32).ravel()
        small -= small.mean()
        return small / max(np.linalg.norm(small), 1e-6)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        marks = progress_bar(pool.map(one, paths), total=len(paths), desc='same photographs?', unit='img',
                             disable=len(paths) < 2000)
        return np.array(list(marks), np.float32).reshape(-1, SIDE * SIDE)


def same_photographs(some, others):
    """Which rows of two sets of fingerprints show the same photograph: two int arrays, of `some` and of `others`."""
    pairs = [np.argwhere(some[first:first + 1000] @ others.T > SAME) + [first, 0] for first in range(0, len(some), 1000)]
    return tuple(np.concatenate([np.empty((0, 2), int), *pairs]).T)
