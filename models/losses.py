"""The joint loss: OHEM sigmoid over all classifiers, and batch-hard triplets on the global and the local embedding.

Labels are classes 0..2N-1; 2N is new_whale. `group` (2N + 1,) int64 numbers the animals: classes with one number are
one animal under several ids, and never each other's negatives. new_whale's own number is never used.
"""
import torch
import torch.nn.functional as F


def sigmoid_ohem_loss(logits, labels, group, hardest=30, named_count=None, weight=1.0):
    """Every class is its own yes/no question; only the `hardest` questions of each row teach.

    logits (B, 2N), labels (B,). With z = (1 - 2y) * logit: the mean softplus(z) over the min(hardest, 2N) largest z of
    each row, plus the mean softplus(-logit) of the true unit over the rows that have one. Softplus of the logit is the
    cross-entropy of its sigmoid, exact however wrong the logit is. `named_count`, a scalar tensor, replaces the number of
    rows with an id where these rows are a part of a batch: the whole batch's number divided by the number of parts.
    `weight`, (B,) or one number, says how much each row teaches.
    """
    classes = logits.shape[1]
    named = labels < classes  # (B,)
    true = labels.clamp(max=classes - 1)[:, None]  # (B, 1); any unit where there is none, masked below
    own = F.one_hot(labels, classes + 1)[:, :classes].bool()  # (B, 2N)
    twin = (group[labels][:, None] == group[None, :classes]) & ~own & named[:, None]  # (B, 2N) same animal, other id
    z = torch.where(own, -logits, logits).masked_fill(twin, -torch.inf)  # (B, 2N)
    hard = (F.softplus(z.topk(min(hardest, classes), dim=1).values).mean(1) * weight).mean()
    positive = F.softplus(-logits.gather(1, true)[:, 0])  # (B,)
    count = named.sum().clamp(min=1) if named_count is None else named_count
    return hard + (positive * named * weight).sum() / count


def pair_masks(labels, group, classes):
    """Who may be whose positive and negative: two (B, B) bool masks, the anchor itself in neither.

    Anchors are rows with an id. A new_whale image is a class of its own: a negative to every id, never a positive.
    """
    named = labels < classes  # (B,)
    same_class = labels[:, None] == labels[None, :]
    same_animal = group[labels][:, None] == group[labels][None, :]
    both_named = named[:, None] & named[None, :]
    positive = same_class & both_named & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    negative = named[:, None] & ~(same_animal & both_named)
    return positive, negative


def hardest_pairs(distance, positive, negative):
    """Column numbers of each row's farthest positive and nearest negative, and which rows have both: three (B,)."""
    farthest = distance.masked_fill(~positive, -torch.inf).argmax(1)
    nearest = distance.masked_fill(~negative, torch.inf).argmin(1)
    return farthest, nearest, positive.any(1) & negative.any(1)


def hinge(to_positive, to_negative, valid, margin, weight=1.0):
    """Mean of max(0, margin + d(a, p) - d(a, n)) over the valid rows, and the share of those rows that are above zero."""
    loss = F.relu(margin + to_positive - to_negative) * valid  # (B,)
    count = valid.sum().clamp(min=1)
    return (loss * weight).sum() / count, ((loss > 0).sum() / count).detach()


def euclidean(a, b):
    """Distance of row i of `a` to row i of `b`; the small term keeps the gradient finite where they coincide."""
    return ((a - b).square().sum(-1) + 1e-12).sqrt()


def batch_hard_triplet_loss(embedding, labels, group, classes, margin=0.3, weight=1.0):
    """Batch-hard triplet loss (arXiv:1703.07737) on L2-normalised (B, C); returns loss and share of active triplets.

    Mining needs no gradient, so only the mined pairs are differentiated. No valid triplet: zero, with a graph.
    """
    positive, negative = pair_masks(labels, group, classes)
    with torch.no_grad():
        distance = 2 - 2 * embedding @ embedding.T  # (B, B) squared Euclidean, of the same order
        p, n, valid = hardest_pairs(distance, positive, negative)
    return hinge(euclidean(embedding, embedding[p]), euclidean(embedding, embedding[n]), valid, margin, weight)


def shortest_path(dots, a, b):
    """Length of the shortest path from (0, 0) to (S-1, S-1), down or right, over tanh(d / 2) between strips.

    dots (S, S, ...) are the strips' inner products, a (S, 1, ...) and b (1, S, ...) their squared lengths -> (...).
    AlignedReID, arXiv:1711.08184; its (e^d - 1) / (e^d + 1) is tanh(d / 2).
    """
    step = torch.tanh((torch.add(a + b, dots, alpha=-2).clamp(min=0) + 1e-12).sqrt() / 2)  # (S, S, ...)
    size, cells = len(step), step.flatten(0, 1)
    path = cells[:1]  # (1, ...) the first anti-diagonal; then one after another, all its cells at once
    for d in range(1, 2 * size - 1):
        first = max(0, d - size + 1)  # row of its upper end
        if d < size:  # longer than the one before: beyond its ends there is no way
            wall = torch.full_like(path[:1], torch.inf)
            path = torch.cat([wall, path, wall])
        path = torch.minimum(path[1:], path[:-1]) + cells[d + first * (size - 1):d * size + 1:size - 1]
    return path[0]


def aligned_distance(a, b):
    """The shortest path of each pair of rows: (P, S, C) and (P, S, C) -> (P,)."""
    dots = torch.bmm(a, b.transpose(1, 2)).permute(1, 2, 0)  # (S, S, P)
    return shortest_path(dots, a.square().sum(2).T[:, None], b.square().sum(2).T[None])


def aligned_distances(strips):
    """The shortest path of every row to every other: (B, S, C) -> (B, B).

    A path and its mirror image have one length, so on a CPU blocks of rows meet only the rows from their own on.
    """
    rows, count, channels = strips.shape
    block = rows if strips.is_cuda else 24  # what fits into a processor's cache; a GPU would rather do all at once
    length = strips.square().sum(2).T  # (S, B)
    table = strips.new_zeros(rows, rows)
    for first in range(0, rows, block):
        some, rest = strips[first:first + block], strips[first:]
        dots = some.reshape(-1, channels) @ rest.reshape(-1, channels).T  # (b * S, r * S)
        dots = dots.view(len(some), count, len(rest), count).permute(1, 3, 0, 2).contiguous()  # (S, S, b, r)
        table[first:first + block, first:] = shortest_path(
            dots, length[:, None, first:first + block, None], length[None, :, None, first:])
    return torch.maximum(table, table.T)


def local_triplet_loss(strips, labels, group, classes, margin=0.3, weight=1.0):
    """Batch-hard triplet loss by the aligned distance of (B, S, 512) strips, mined by that distance itself."""
    positive, negative = pair_masks(labels, group, classes)
    with torch.no_grad():
        p, n, valid = hardest_pairs(aligned_distances(strips), positive, negative)
    both = aligned_distance(strips.repeat(2, 1, 1), strips[torch.cat([p, n])])  # (2B,)
    return hinge(*both.chunk(2), valid, margin, weight)  # type: ignore[call-arg]


def joint_loss(outputs, labels, group, c, named_count=None, weight=1.0, gather=lambda rows: rows):
    """Sum of the losses, weighted by the constants `c`; returns it, and its detached parts: sigmoid, triplet, local,
    active share.

    `gather` joins the rows of several processes, with their gradients: triplets are mined among all of them.
    `named_count`, `weight`: see sigmoid_ohem_loss; triplets of anchors with a weight count by it.
    """
    embedding, logits, strips = outputs
    classes = logits.shape[1]
    sigmoid = sigmoid_ohem_loss(logits, labels, group, c.hardest, named_count, weight)
    embedding, strips, labels = gather(embedding), gather(strips) if c.w_local else None, gather(labels)
    weight = gather(weight)
    triplet, active = batch_hard_triplet_loss(embedding, labels, group, classes, c.margin, weight)
    local = torch.zeros_like(triplet)
    if c.w_local:
        local = local_triplet_loss(strips, labels, group, classes, c.margin, weight)[0]
    total = c.w_sigmoid * sigmoid + c.w_triplet * triplet + c.w_local * local
    return total, torch.stack([part.detach() for part in (sigmoid, triplet, local, active)])
