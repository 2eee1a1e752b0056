"""Each loss against an independent oracle: another library, or a plain double loop."""
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning import distances, losses, miners

from models.losses import (
    aligned_distance,
    aligned_distances,
    batch_hard_triplet_loss,
    hardest_pairs,
    hinge,
    joint_loss,
    local_triplet_loss,
    pair_masks,
    sigmoid_ohem_loss,
)

N = 20           # ids
CLASSES = 2 * N
NEW = CLASSES    # the label of new_whale


def make_batch(seed=0, size=24, dim=8, news=True):
    torch.manual_seed(seed)
    labels = torch.randint(CLASSES, (size // 3,)).repeat_interleave(2)
    rest = torch.randint(CLASSES + 1, (size - len(labels),))
    labels = torch.cat([labels, rest])
    if news:
        labels[-4:] = NEW
    return F.normalize(torch.randn(size, dim)).requires_grad_(), labels


def no_twins():
    return torch.arange(CLASSES + 1)


def test_sigmoid_loss_is_the_double_loop():
    torch.manual_seed(0)
    logits, labels = 5 * torch.randn(9, CLASSES), torch.tensor([0, 3, NEW, 39, 21, 3, NEW, 7, 19])
    rows, positives = [], []
    for i in range(9):
        questions = []
        for j in range(CLASSES):
            y = float(labels[i] == j)
            p = 1 / (1 + math.exp(-logits[i, j].item()))
            questions.append(-(y * math.log(p) + (1 - y) * math.log(1 - p)))
        rows += sorted(questions, reverse=True)[:30]
        if labels[i] != NEW:
            positives.append(-math.log(1 / (1 + math.exp(-logits[i, labels[i]].item()))))
    expected = sum(rows) / len(rows) + sum(positives) / len(positives)
    assert sigmoid_ohem_loss(logits, labels, no_twins()).item() == pytest.approx(expected, rel=1e-5)


def test_sigmoid_loss_teaches_where_a_float32_sigmoid_would_be_clamped():
    logits = torch.full((1, CLASSES), -5.0)
    logits[0, 4] = 60.0
    logits.requires_grad_()
    sigmoid_ohem_loss(logits, torch.tensor([7]), no_twins()).backward()
    assert logits.grad[0, 4].item() == pytest.approx(1 / 30)


def test_sigmoid_loss_of_new_whales_alone_is_finite_and_only_negative():
    logits = torch.zeros(4, CLASSES, requires_grad=True)
    loss = sigmoid_ohem_loss(logits, torch.full((4,), NEW), no_twins())
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert (logits.grad >= 0).all()


def test_fewer_classes_than_hardest():
    assert sigmoid_ohem_loss(torch.zeros(2, 6), torch.tensor([0, 6]), torch.arange(7)).item() == pytest.approx(2 * math.log(2))


def test_one_animal_under_two_ids_is_never_its_own_negative():
    group = no_twins()
    group[5] = group[4]
    logits = torch.zeros(2, CLASSES)
    logits[0, 5] = 50.0  # the twin's unit answers for the label 4: not a mistake
    labels = torch.tensor([4, 9])
    assert sigmoid_ohem_loss(logits, labels, group) < 2
    assert sigmoid_ohem_loss(logits, labels, no_twins()) > 2
    positive, negative = pair_masks(torch.tensor([4, 5, 4, 9]), group, CLASSES)
    assert not negative[0, 1] and not positive[0, 1] and positive[0, 2] and negative[0, 3]


@pytest.mark.parametrize('seed', range(5))
def test_batch_hard_is_pytorch_metric_learning(seed):
    embedding, labels = make_batch(seed, news=False)
    loss, _ = batch_hard_triplet_loss(embedding, labels, no_twins(), CLASSES + 1)  # +1: every label is an id here
    distance = distances.LpDistance(normalize_embeddings=False)
    triplets = miners.BatchHardMiner(distance=distance)(embedding, labels)
    oracle = losses.TripletMarginLoss(margin=0.3, distance=distance, reducer=None)
    oracle.reducer = __import__('pytorch_metric_learning.reducers', fromlist=['MeanReducer']).MeanReducer()
    expected = oracle(embedding, labels, triplets)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    ours, theirs = torch.autograd.grad(loss, embedding)[0], torch.autograd.grad(expected, embedding)[0]
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_new_whales_are_negatives_and_never_positives_or_anchors():
    labels = torch.tensor([1, 1, NEW, NEW])
    positive, negative = pair_masks(labels, no_twins(), CLASSES)
    assert positive.nonzero().tolist() == [[0, 1], [1, 0]]  # no diagonal, no pair of strangers
    assert negative.nonzero().tolist() == [[0, 2], [0, 3], [1, 2], [1, 3]]


def test_the_number_of_new_whale_in_the_groups_is_never_used():
    labels, group = torch.tensor([3, NEW, 3, 7, NEW]), no_twins()
    before = pair_masks(labels, group, CLASSES)
    group[NEW] = group[3]
    for one, other in zip(before, pair_masks(labels, group, CLASSES)):
        assert torch.equal(one, other)


def test_the_anchor_is_not_its_own_positive():
    distance = torch.tensor([[0.0, 5, 1], [5, 0, 1], [1, 1, 0]])
    positive, negative = pair_masks(torch.tensor([3, 4, 4]), no_twins(), CLASSES)
    _, _, valid = hardest_pairs(distance, positive, negative)
    assert valid.tolist() == [False, True, True]


def test_a_row_is_valid_where_it_has_both_a_positive_and_a_negative():
    distance = torch.tensor([[0.0, 3, 2], [3, 0, 1], [2, 1, 0]])
    positive = torch.tensor([[0, 1, 1], [1, 0, 1], [0, 0, 0]]).bool()
    negative = torch.tensor([[0, 0, 0], [1, 0, 1], [1, 1, 0]]).bool()
    farthest, nearest, valid = hardest_pairs(distance, positive, negative)
    assert farthest[:2].tolist() == [1, 0] and nearest[1:].tolist() == [2, 1]
    assert valid.tolist() == [False, True, False]


def test_hinge_is_the_mean_over_the_valid_rows():
    to_positive, to_negative = torch.tensor([0.9, 0.2, 0.5]), torch.tensor([0.6, 0.9, 0.1])
    for valid, loss, active in ([1, 0, 0], 0.4, 1), ([1, 1, 0], 0.2, 0.5), ([1, 1, 1], 0.3, 2 / 3), ([0, 0, 0], 0, 0):
        found = hinge(to_positive, to_negative, torch.tensor(valid).bool(), 0.1)
        assert [value.item() for value in found] == pytest.approx([loss, active])


def test_empty_batches_give_zero_with_a_graph():
    embedding = F.normalize(torch.randn(6, 8)).requires_grad_()
    strips = F.normalize(torch.randn(6, 4, 8), dim=2).requires_grad_()
    for labels in (torch.full((6,), NEW), torch.arange(6), torch.full((6,), 3)):
        for loss, _ in (batch_hard_triplet_loss(embedding, labels, no_twins(), CLASSES),
                        local_triplet_loss(strips, labels, no_twins(), CLASSES)):
            assert loss.item() == 0
            loss.backward()
    assert torch.isfinite(embedding.grad).all() and torch.isfinite(strips.grad).all()


def test_identical_images_have_a_finite_gradient():
    embedding = F.normalize(torch.ones(4, 8)).requires_grad_()
    batch_hard_triplet_loss(embedding, torch.tensor([1, 1, 2, 2]), no_twins(), CLASSES)[0].backward()
    assert torch.isfinite(embedding.grad).all()


def shortest_path(a, b):
    """The recurrence of the AlignedReID paper, written with lists."""
    d = [[math.tanh(math.dist(x, y) / 2) for y in b.tolist()] for x in a.tolist()]
    for i in range(len(d)):
        for j in range(len(d[0])):
            if i and j:
                d[i][j] += min(d[i - 1][j], d[i][j - 1])
            elif i or j:
                d[i][j] += d[i - 1][j] if i else d[i][j - 1]
    return d[-1][-1]


@pytest.mark.parametrize('strips', [1, 2, 3, 8])
def test_aligned_distance_is_the_double_loop(strips):
    torch.manual_seed(1)
    a, b = F.normalize(torch.randn(5, strips, 16), dim=2), F.normalize(torch.randn(5, strips, 16), dim=2)
    found = aligned_distance(a, b)
    assert found.tolist() == pytest.approx([shortest_path(x, y) for x, y in zip(a, b)], rel=1e-4)
    table = aligned_distances(torch.cat([a, b]))[:5, 5:]
    assert table.shape == (5, 5) and torch.allclose(table.diagonal(), found, atol=1e-5)


def test_local_triplets_are_the_double_loop():
    torch.manual_seed(2)
    strips = F.normalize(torch.randn(10, 4, 16), dim=2)
    labels = torch.tensor([1, 1, 1, 2, 2, 3, 5, NEW, NEW, 5])
    hinges = []
    for i in range(10):
        far = [shortest_path(strips[i], strips[j]) for j in range(10) if j != i and labels[j] == labels[i] != NEW]
        near = [shortest_path(strips[i], strips[j]) for j in range(10) if labels[j] != labels[i]]
        if far and labels[i] != NEW:
            hinges.append(max(0, 0.3 + max(far) - min(near)))
    loss, active = local_triplet_loss(strips, labels, no_twins(), CLASSES)
    assert loss.item() == pytest.approx(sum(hinges) / len(hinges), rel=1e-4)
    assert active.item() == pytest.approx(sum(h > 0 for h in hinges) / len(hinges))


def test_parts_of_a_batch_add_up_to_it():
    torch.manual_seed(3)
    logits, labels = torch.randn(8, CLASSES), torch.tensor([0, 1, 2, NEW, 3, NEW, NEW, NEW])
    whole = sigmoid_ohem_loss(logits, labels, no_twins())
    parts = [sigmoid_ohem_loss(logits[rows], labels[rows], no_twins(), named_count=torch.tensor(4 / 2))
             for rows in (slice(4), slice(4, 8))]
    assert torch.allclose(sum(parts) / 2, whole)


@pytest.mark.parametrize('count', [None, torch.tensor(5.0)], ids=['own count', 'count of the whole batch'])
def test_joint_loss_is_the_weighted_sum(count):
    embedding, labels = make_batch()
    logits, strips = torch.randn(24, CLASSES), F.normalize(torch.randn(24, 4, 16), dim=2)
    group = no_twins()
    c = SimpleNamespace(w_sigmoid=2.0, w_triplet=3.0, w_local=5.0, margin=0.4, hardest=10)
    total, parts = joint_loss((embedding, logits, strips), labels, group, c, count)
    assert total.item() == pytest.approx((parts * torch.tensor([2.0, 3.0, 5.0, 0.0])).sum().item(), rel=1e-5)
    triplet, active = batch_hard_triplet_loss(embedding, labels, group, CLASSES, 0.4)
    local, _ = local_triplet_loss(strips, labels, group, CLASSES, 0.4)
    sigmoid = sigmoid_ohem_loss(logits, labels, group, 10, count)
    assert torch.allclose(parts, torch.stack([sigmoid, triplet, local, active]))


def test_losses_without_a_weight_are_zero_and_need_no_layers():
    embedding, labels = make_batch()
    c = SimpleNamespace(w_sigmoid=1.0, w_triplet=1.0, w_local=0.0, margin=0.3, hardest=30)
    total, parts = joint_loss((embedding, torch.randn(24, CLASSES), None), labels, no_twins(), c, weight=torch.ones(24),
                              gather=lambda rows: rows.clone())  # of None there is nothing to gather
    assert parts[2] == 0 and total.item() == pytest.approx(parts[:2].sum().item())


def test_weights_of_images_count_in_every_loss():
    """An image of weight 0 teaches nothing as an anchor and as a row; all weights 2 double each part."""
    embedding, labels = make_batch()
    strips, logits = F.normalize(torch.randn(24, 4, 16), dim=2), torch.randn(24, CLASSES)
    c = SimpleNamespace(w_sigmoid=1.0, w_triplet=1.0, w_local=1.0, margin=0.3, hardest=30)

    def parts(weight):
        return joint_loss((embedding, logits, strips), labels, no_twins(), c, weight=weight)[1][:3]

    assert torch.allclose(parts(torch.ones(24)), parts(1.0)) and torch.allclose(parts(torch.full((24,), 2.0)), 2 * parts(1.0))
    assert parts(torch.zeros(24)).eq(0).all()
    each = sum(parts(torch.eye(24)[row]) for row in range(24))
    assert torch.allclose(each, parts(1.0), rtol=1e-4) and (parts(torch.eye(24)[0]) < parts(1.0)).all()
    logits[-1] *= 9  # a new_whale: all its questions are in one part of the loss
    alone = sigmoid_ohem_loss(logits[-1:], labels[-1:], no_twins()) / 24
    assert torch.allclose(sigmoid_ohem_loss(logits, labels, no_twins(), weight=torch.eye(24)[-1]), alone)


def test_aligned_distances_of_more_rows_than_a_block_has():
    """Each pair is computed once, in one of several blocks, and stands on both sides of the diagonal."""
    strips = F.normalize(torch.randn(53, 4, 8, generator=torch.Generator().manual_seed(0)), dim=2)
    table = aligned_distances(strips)
    a, b = torch.arange(53).repeat_interleave(53), torch.arange(53).repeat(53)
    assert torch.allclose(table, aligned_distance(strips[a], strips[b]).view(53, 53), atol=1e-3)
