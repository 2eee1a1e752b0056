"""The same photograph under another name: it must not be learned from where it validates."""
import cv2
import numpy as np

from data.decode import BadImage, read_image
from utils.log import in_threads

# Correlation of two 32x32 thumbnails. Of different photographs of right whales, drawn flukes and characters the most alike
# reach 0.97; the same fluke photograph, made smaller and compressed again, stays above 0.98.
SAME = 0.975
SIDE = 32


def fingerprints(paths):
    """A grey thumbnail of each whole photograph, of mean 0 and length 1: (n, 1024) float32; zeros where none decodes."""
    def one(path):
        try:
            image = read_image(path, thumbnail=True)
        except BadImage:
            return np.zeros(SIDE * SIDE, np.float32)
        small = cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
        small = small.reshape(SIDE * SIDE, -1).mean(1)
        small -= small.mean()
        return small / max(np.linalg.norm(small), 1e-6)

    return np.array(in_threads(one, paths, 'same photographs?'), np.float32).reshape(-1, SIDE * SIDE)


def twins(some, others):
    """For each of the fingerprints `others` a row of `some` that shows the same photograph, -1 where none does: (n,) int."""
    found = np.full(len(others), -1)
    for first in range(0, len(others), 1000) if len(some) else ():
        alike = others[first:first + 1000] @ some.T  # (1000, m)
        found[first:first + 1000] = np.where(alike.max(1) > SAME, alike.argmax(1), -1)
    return found
