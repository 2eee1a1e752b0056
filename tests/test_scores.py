import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

import models.whale_net
from data.images import MARGIN, raw_size
from tests.conftest import SmallBackbone
from utils.scores import Gallery, calibrate, fuse, predict

HEIGHT, WIDTH, IDS = 16, 32, 3


class StubNet(torch.nn.Module):
    """Sees the mean light of the left and of the right half, and nothing else: so a mirror image swaps the two."""

    def __init__(self, classes):
        super().__init__()
        self.batches = []
        self.to_logits = torch.randn(2, classes, generator=torch.Generator().manual_seed(0))

    def forward(self, images, local=True):
        assert not local and not self.training
        self.batches.append(len(images))
        halves = images[:, :3].unflatten(3, (2, WIDTH // 2)).mean((1, 2, 4))  # (B, 2)
        return F.normalize(halves), halves @ self.to_logits, None


class StubCrops:
    """Image i has light 10 i on its left half and 250 - 20 i on its right half."""

    def __getitem__(self, rows):
        rows, (height, width) = torch.from_numpy(np.asarray(rows)), raw_size(HEIGHT, WIDTH)
        left = torch.arange(width) < width // 2
        light = torch.where(left, 10 * rows[:, None], 250 - 20 * rows[:, None]).byte()  # (B, w)
        masks = torch.zeros(len(rows), height, width // 8, dtype=torch.uint8)
        return light[:, None, :, None].expand(-1, height, -1, 3), masks


def halves(rows):
    """What StubNet sees of these images, but for the blurred border between the halves."""
    rows = torch.tensor(rows)[:, None]
    return torch.cat([10.0 * rows, 250.0 - 20 * rows], 1) / 255


def test_scores_are_the_mean_of_image_and_mirrored_ids():
    net, rows = StubNet(2 * IDS), np.array([5, 0, 3, 9, 1])
    scores, embeddings = predict(net, StubCrops(), rows, HEIGHT, WIDTH, IDS, batch_size=2)
    seen = halves([5, 0, 3, 9, 1])
    mirrored = seen.flip(1)
    expected = ((seen @ net.to_logits).sigmoid()[:, :IDS] + (mirrored @ net.to_logits).sigmoid()[:, IDS:]) / 2
    assert scores.shape == (5, IDS) and torch.allclose(scores, expected, atol=0.03)
    assert torch.allclose(embeddings, F.normalize(torch.stack([seen, mirrored], 1), dim=2), atol=0.03)
    assert net.batches == [4, 4, 2]  # image and mirror at once, two images a time


def test_where_a_mirror_is_the_same_animal_both_images_ask_the_same_classifiers():
    net = StubNet(IDS)
    scores, _ = predict(net, StubCrops(), np.arange(4), HEIGHT, WIDTH, IDS, flip_is_new_id=False)
    seen = halves([0, 1, 2, 3])
    expected = ((seen @ net.to_logits).sigmoid() + (seen.flip(1) @ net.to_logits).sigmoid()) / 2
    assert torch.allclose(scores, expected, atol=0.03)


def test_further_views_are_averaged():
    net, rows = StubNet(2 * IDS), np.arange(4)
    each = [predict(net, StubCrops(), rows, HEIGHT, WIDTH, IDS, scales=(scale,)) for scale in (1.0, 0.3)]
    scores, embeddings = predict(net, StubCrops(), rows, HEIGHT, WIDTH, IDS, scales=(1.0, 0.3))
    assert (each[0][0] - each[1][0]).abs().max() > 0.001
    assert torch.allclose(scores, (each[0][0] + each[1][0]) / 2)
    assert torch.allclose(embeddings, F.normalize(each[0][1] + each[1][1], dim=2), atol=1e-6)


def test_the_network_sees_the_box_without_its_margin():
    height, width = raw_size(64, 128)

    class Framed:
        def __getitem__(self, rows):
            pixels = torch.full((len(rows), height, width, 3), 255, dtype=torch.uint8)
            y, x = round(64 * MARGIN) - 1, round(128 * MARGIN) - 1  # a pixel less, for interpolation
            pixels[:, y:-y, x:-x] = 100
            return pixels, torch.full((len(rows), height, width // 8), 255, dtype=torch.uint8)

    class Look(torch.nn.Module):
        def forward(self, images, local):
            assert images.shape == (4, 4, 64, 128)
            assert torch.allclose(images[:, :3], torch.tensor(100 / 255)) and (images[:, 3] == 1).all()
            return images.mean((2, 3)), images.new_zeros(4, 2 * IDS), None

    predict(Look(), Framed(), np.arange(2), 64, 128, IDS)


def test_mirroring_all_photographs_and_swapping_the_halves_of_the_label_space_changes_no_score(monkeypatch):
    monkeypatch.setattr(models.whale_net, 'build_backbone', SmallBackbone)
    torch.manual_seed(0)
    net = models.whale_net.WhaleNet('small', 2 * IDS, 32, 64).eval()
    torch.nn.init.normal_(net.head.weight)
    torch.nn.init.normal_(net.head.bias)
    height, width = raw_size(32, 64)
    crops = torch.randint(256, (9, height, width, 3), dtype=torch.uint8)
    masks = torch.randint(2, (9, height, width), dtype=torch.uint8)

    def both(crops, masks):
        packed = torch.from_numpy(np.packbits(masks.numpy(), axis=-1))
        scores, embeddings = predict(net, Rows(crops, packed), np.arange(9), 32, 64, IDS)
        return scores, Gallery(embeddings[:6], torch.arange(6) % IDS, IDS).scores(embeddings[6:])

    before = both(crops, masks)
    with torch.no_grad():
        for part in (net.head.weight, net.head.bias):
            part.copy_(part.roll(IDS, 0))
    for one, other in zip(before, both(crops.flip(2), masks.flip(2))):
        assert torch.allclose(one, other, atol=1e-5)
    assert not torch.allclose(before[0], both(crops, masks)[0], atol=1e-2)


class Rows:
    def __init__(self, *parts):
        self.parts = parts

    def __getitem__(self, rows):
        return [part[rows] for part in self.parts]


def test_gallery_against_two_loops():
    generator = torch.Generator().manual_seed(1)
    queries, gallery = (F.normalize(torch.randn(n, 2, 8, generator=generator), dim=2) for n in (7, 20))
    labels = torch.randint(4, (20,), generator=generator)  # of 5 ids: id 4 has no image
    expected = torch.zeros(7, 5)
    for q, query in enumerate(queries):
        for image, label in zip(gallery, labels):
            cosine = (query[0] @ image[0] + query[1] @ image[1]) / 2
            expected[q, label] = max(expected[q, label], (1 + cosine) / 2)
    made = Gallery(gallery, labels, 5)
    assert torch.allclose(made.scores(queries), expected, atol=1e-6)
    likeness = made.likeness(queries)
    nearest = made.nearest_of(torch.tensor([[4, 2]] * 7), likeness)  # (7, 2)
    assert (nearest[:, 0] == -1).all() and (labels[nearest[:, 1]] == 2).all()
    assert torch.allclose((1 + likeness.gather(1, nearest[:, 1:])[:, 0]) / 2, expected[:, 2], atol=1e-6)


def test_fuse():
    classifier, gallery = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(fuse(classifier, gallery, 0.0), classifier)
    assert torch.equal(fuse(classifier, gallery, 1.0), gallery)
    assert torch.allclose(fuse(classifier, gallery, 0.25), 0.75 * classifier + 0.25 * gallery)
    fused = fuse(classifier[:, :3], gallery, 0.25)  # the last id has no classifier
    assert torch.allclose(fused[:, :3], 0.75 * classifier[:, :3] + 0.25 * gallery[:, :3])
    assert torch.equal(fused[:, 3], gallery[:, 3])


def test_calibration_is_that_of_scikit_learn():
    """Pairs whose chance of being one animal is a sigmoid of their likeness: the sigmoid is found again."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(400, 30, generator=generator)
    truth = torch.where(torch.rand(400, generator=generator) < 0.3, 30, (8 * scores).softmax(1).multinomial(
        1, generator=generator)[:, 0])
    curve = calibrate(scores, truth, hardest=30)
    target = F.one_hot(truth, 31)[:, :30].flatten()
    oracle = LogisticRegression(C=1e6, tol=1e-8).fit(scores.flatten()[:, None].numpy(), target.numpy())
    points = torch.linspace(0, 1, 11)
    assert torch.allclose(curve(points), torch.from_numpy(oracle.predict_proba(points[:, None].numpy())[:, 1]).float(), atol=2e-3)
    assert (curve(points).diff() > 0).all() and 0 < curve(points).min()


def test_calibration_of_too_little_still_rises():
    for truth in (torch.tensor([4, 4]), torch.tensor([0, 4]), torch.tensor([3, 3])):
        values = calibrate(torch.tensor([[0.9, 0.5, 0.4, 0.3]] * 2), truth)(torch.linspace(0, 1, 5))
        assert values.isfinite().all() and (values.diff() >= 0).all()
