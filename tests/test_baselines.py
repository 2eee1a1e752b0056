"""What no learning scores: features against plain loops, neighbours and thresholds on made-up crops."""
import subprocess
import sys

import numpy as np
import pytest
import torch

from benchmarks.baselines import baselines, baselines_of, hog_features, nearest_scores, pixel_features
from data.make_sample import draw_sample
from utils.errors import UserError


def random_crops(count, seed=0):
    return np.random.default_rng(seed).uniform(0, 255, (count, 64, 128)).astype(np.float32)


def hog_by_loops(image):
    """Votes shared between the two nearest of nine directions, 8x8 cells, 2x2 blocks, clipped at 0.2."""
    rows, columns = image.shape[0] // 8, image.shape[1] // 8
    cells = np.zeros((rows, columns, 9))
    padded = np.pad(image.astype(float), 1, mode='reflect', reflect_type='odd')     # one-sided at the edge
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            dx = (padded[y + 1, x + 2] - padded[y + 1, x]) / 2
            dy = (padded[y + 2, x + 1] - padded[y, x + 1]) / 2
            position = np.degrees(np.arctan2(dy, dx)) % 180 / 20
            low = int(position)
            cells[y // 8, x // 8, low % 9] += np.hypot(dx, dy) * (1 - (position - low))
            cells[y // 8, x // 8, (low + 1) % 9] += np.hypot(dx, dy) * (position - low)
    blocks = []
    for i in range(rows - 1):
        for j in range(columns - 1):
            block = np.concatenate([cells[i, j], cells[i, j + 1], cells[i + 1, j], cells[i + 1, j + 1]])
            block = np.minimum(block / np.linalg.norm(block), 0.2)
            blocks.append(block / np.linalg.norm(block))
    blocks = np.concatenate(blocks)
    return blocks / np.linalg.norm(blocks)


def test_hog_against_loops():
    crops = random_crops(2)[:, :32, :40]
    np.testing.assert_allclose(hog_features(crops).numpy(), [hog_by_loops(crop) for crop in crops], atol=2e-5)


def test_features_of_a_flat_image_are_finite():
    flat = np.full((1, 64, 128), 7, np.float32)
    assert hog_features(flat).isfinite().all() and pixel_features(flat).isfinite().all()


def test_features_ignore_light_and_contrast():
    crops = random_crops(3)
    for features in (pixel_features, hog_features):
        torch.testing.assert_close(features(crops), features(0.5 * crops + 20), atol=1e-4, rtol=0)
        likeness = features(crops) @ features(crops).T
        assert (likeness.diagonal() > 0.999).all() and (likeness.fill_diagonal_(0) < 0.95).all()


def test_nearest_scores():
    likeness = torch.tensor([[0.1, 0.9, 0.5, 0.99], [0.7, 0.2, 0.3, 0.0]])
    expected = torch.tensor([[0.9, 0.5, -torch.inf], [0.7, 0.3, -torch.inf]])
    # two images of id 0, one of id 1, none of id 2, and a new_whale that may not answer for anybody
    assert torch.equal(nearest_scores(likeness, torch.tensor([0, 0, 1, 3]), 3), expected)


@pytest.fixture(scope='module')
def easy():
    """Three ids with three, two and one images; strangers like nobody; test images like their id's."""
    faces, rng = random_crops(3), np.random.default_rng(1)

    def near(label):
        return np.clip(faces[label] + rng.normal(0, 20, faces[label].shape), 0, 255).astype(np.float32)
    train_labels, test_labels = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3]), torch.tensor([0, 1, 2, 3])
    train = np.stack([near(label) for label in train_labels[:6]] + list(random_crops(2, seed=2)))
    test = np.stack([near(label) for label in test_labels[:3]] + list(random_crops(1, seed=3)))
    return train, train_labels, test, test_labels, 3


def test_easy_faces_are_all_found(easy):
    table = baselines(*easy)
    assert len(table) == 3
    assert (table.iloc[1:] == 1).all(axis=None)
    # first everywhere new_whale, then ids 0, 1, 2 by their number of images
    assert table.map5.iloc[0] == pytest.approx((1 / 2 + 1 / 3 + 1 / 4 + 1) / 4)
    assert table.named_top1.iloc[0] == pytest.approx(1 / 3)


def test_threshold_comes_from_training_alone(easy):
    train, train_labels, test, test_labels, num_ids = easy
    # a threshold chosen on these labels would put new_whale first
    table = baselines(train, train_labels, test, torch.tensor([0, num_ids, num_ids, num_ids]), num_ids)
    assert (table.map5.iloc[1:] == (1 + 1 / 2 + 1 / 2 + 1) / 4).all()


def test_of_a_folder(tmp_path):
    draw_sample(tmp_path / 'sample', num_ids=4)
    table = baselines_of(tmp_path / 'sample')
    assert ((table >= 0) & (table <= 1)).all(axis=None)
    labels = tmp_path / 'sample' / 'test_labels.csv'
    labels.write_text('\n'.join(labels.read_text().split('\n')[:-2]))
    with pytest.raises(UserError, match='test_labels.csv must give each test image'):
        baselines_of(tmp_path / 'sample')


def test_command_line_refuses_clearly(tmp_path):
    done = subprocess.run([sys.executable, '-m', 'benchmarks.baselines', tmp_path], capture_output=True, text=True)
    assert done.returncode == 2 and 'Traceback' not in done.stderr
