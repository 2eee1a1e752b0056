import cv2
import numpy as np
import pytest

from data.duplicates import fingerprints, twins
from data.make_sample import draw_animal, draw_photograph


@pytest.fixture
def photographs(tmp_path):
    """Four photographs of two drawn flukes."""
    paths = [str(tmp_path / f'{number}.jpg') for number in range(4)]
    for number, path in enumerate(paths):
        image, _ = draw_photograph(np.random.default_rng(number), draw_animal(0, number // 2, 10))
        cv2.imwrite(path, image, [cv2.IMWRITE_JPEG_QUALITY, 95])
    return paths


def test_the_same_photograph_is_found_smaller_and_compressed_again(photographs, tmp_path):
    image = cv2.imread(photographs[2])
    small, grey = str(tmp_path / 'small.png'), str(tmp_path / 'grey.jpg')
    cv2.imwrite(small, cv2.resize(image, None, fx=0.7, fy=0.7, interpolation=cv2.INTER_AREA))
    cv2.imwrite(grey, cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), [cv2.IMWRITE_JPEG_QUALITY, 40])
    assert twins(fingerprints(photographs), fingerprints([small, grey])).tolist() == [2, 2]
    assert twins(fingerprints([small]), fingerprints(photographs)).tolist() == [-1, -1, 0, -1]


def test_photographs_of_one_animal_are_different_photographs(photographs):
    marks = fingerprints(photographs)
    assert twins(marks, marks).tolist() == [0, 1, 2, 3]
    assert twins(marks[:2], marks[2:]).tolist() == [-1, -1]


def test_mirrored_is_another_photograph(photographs, tmp_path):
    mirror = str(tmp_path / 'mirror.jpg')
    cv2.imwrite(mirror, cv2.imread(photographs[0])[:, ::-1])
    assert (twins(fingerprints([mirror]), fingerprints(photographs)) == -1).all()


def test_what_does_not_decode_is_like_nothing(tmp_path):
    for name, content in [('a.jpg', b''), ('b.jpg', b'no image'), ('c.jpg', b'no image')]:
        (tmp_path / name).write_bytes(content)
    marks = fingerprints([str(tmp_path / name) for name in ('a.jpg', 'b.jpg', 'c.jpg')])
    assert marks.shape == (3, 1024) and (twins(marks, marks) == -1).all()
    assert twins(marks[:0], marks).tolist() == [-1] * 3 and fingerprints([]).shape == (0, 1024)


def test_how_alike_two_photographs_must_be():
    one = np.zeros((1, 1024), np.float32)
    one[0, 0] = 1
    others = np.zeros((2, 1024), np.float32)
    for row, cosine in enumerate((0.97, 0.98)):
        others[row, :2] = cosine, (1 - cosine ** 2) ** 0.5
    assert twins(one, others).tolist() == [-1, 0]
