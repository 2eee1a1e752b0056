"""Network -> one score for each image and id: the classifiers', the gallery's, and their weighted mean."""
import torch
import torch.nn.functional as F

from data.augment import to_input
from data.images import MARGIN


@torch.inference_mode()
def predict_batches(net, crops, rows, height, width, num_ids, flip_is_new_id=True, batch_size=64, device='cpu', amp=None,
                    shifts=((0.0, 0.0, 1.0),)):
    """Yields, batch after batch of `rows` of `crops`, classifier scores (b, N) and embeddings (b, 2, C) on the device.

    Each image is seen as it is and mirrored; the mirror's scores are those of the flipped ids, so both speak of the
    same N ids: (p[:, :N] + p_mirror[:, N:]) / 2. `shifts` are further views (x, y, scale), in shares of the half box,
    averaged. `amp` is a torch dtype for autocast, None for float32.
    """
    net.eval()
    second = slice(num_ids, None) if flip_is_new_id else slice(None)
    for first in range(0, len(rows), batch_size):
        pixels, masks = (part.to(device, non_blocking=True) for part in crops[rows[first:first + batch_size]])
        scores = embeddings = torch.zeros((), device=device)
        for x, y, scale in shifts:
            view = torch.tensor([[scale, 0, x], [0, scale, y], [0, 0, 1.0]], device=device).expand(len(pixels), 3, 3)
            images = to_input(pixels, masks, height, width, MARGIN, view)  # (b, 4, H, W)
            images = torch.cat([images, images.flip(3)]).contiguous(memory_format=torch.channels_last)  # (2b, 4, H, W)
            with torch.autocast(torch.device(device).type, amp, enabled=amp is not None):
                embedding, logits, *_ = net(images, local=False)
            image, mirror = logits.sigmoid().chunk(2)  # (b, 2N) each
            scores = scores + (image[:, :num_ids] + mirror[:, second]) / 2
            embeddings = embeddings + torch.stack(embedding.chunk(2), 1)  # (b, 2, C)
        yield scores / len(shifts), F.normalize(embeddings, dim=2)


def predict(*what, progress=lambda count: None, **more):
    """The same for all rows at once, on the CPU: scores (Q, N), embeddings (Q, 2, C)."""
    parts = []
    for scores, embeddings in predict_batches(*what, **more):
        parts.append((scores.cpu(), embeddings.cpu()))
        progress(len(scores))
    return tuple(torch.cat(part) for part in zip(*parts))


class Gallery:
    """Labelled images to compare with: embeddings (G, 2, C), labels (G,) in 0..N-1, on one device.

    Kept in layers, the first image of each id, then the second images, ...; ids in the order of their numbers of images,
    so that the best of each id is a maximum of slices.
    """

    def __init__(self, embeddings, labels, num_ids):
        counts = torch.bincount(labels, minlength=num_ids)  # (N,)
        self.ids = counts.argsort(descending=True, stable=True)  # (N,) most images first
        by_id = torch.argsort(self.ids.argsort()[labels], stable=True)  # (G,) images grouped by id, in that order
        first = counts[self.ids].cumsum(0) - counts[self.ids]  # (N,) where each id begins
        layer = torch.arange(len(labels), device=labels.device) - first.repeat_interleave(counts[self.ids])  # (G,)
        self.columns = by_id[layer.argsort(stable=True)]  # (G,) layer after layer
        self.layers = torch.bincount(layer).tolist()  # images in each
        self.rows = embeddings.flatten(1)[self.columns] / 2  # (G, 2C)

    def likeness(self, queries):
        """(b, 2, C) -> (b, G), in the order of `columns`: the mean of two cosines, image to image, mirror to mirror."""
        return queries.flatten(1) @ self.rows.T

    def scores(self, queries):
        """The best likeness of each query to each id's images: (b, 2, C) -> (b, N) in 0..1; an id without any has 0."""
        likeness = self.likeness(queries)
        best = torch.full((len(queries), len(self.ids)), -1.0, device=queries.device)
        start = 0
        for size in self.layers:
            torch.maximum(best[:, :size], likeness[:, start:start + size], out=best[:, :size])
            start += size
        scores = torch.empty_like(best)
        scores[:, self.ids] = (1 + best) / 2
        return scores

    def nearest_of(self, ids, likeness):
        """Of each query's `ids` (b, k) the image that is most like it: (b, k), its place among the G; -1: all are at -2."""
        rank, start = self.ids.argsort()[ids], 0  # (b, k)
        best, column = torch.full(ids.shape, -2.0, device=ids.device), torch.full_like(ids, -1)
        for size in self.layers:
            here = likeness.gather(1, start + rank.clamp(max=size - 1)).masked_fill(rank >= size, -2)  # (b, k)
            column = torch.where(here > best, start + rank, column)
            best = torch.maximum(best, here)
            start += size
        return torch.where(column < 0, column, self.columns[column])


def fuse(classifier, gallery, gallery_weight):
    """Weighted mean of (Q, N) classifier and (Q, M) gallery scores, both in 0..1: (Q, M), M >= N.

    The ids from N on have no classifier: theirs is the gallery's score alone.
    """
    fused, known = gallery.clone(), classifier.shape[1]
    fused[:, :known] = (1 - gallery_weight) * classifier + gallery_weight * gallery[:, :known]
    return fused


def calibrate(scores, truth, hardest=20):
    """A function from the gallery's scores to the probability that query and id are one animal (Platt's sigmoid).

    Fitted to held-out queries: scores (Q, N), truth (Q,) in 0..N, on the `hardest` best ids of each and its true one.
    """
    own = F.one_hot(truth, scores.shape[1] + 1)[:, :-1].bool()  # (Q, N)
    asked = own | (scores >= scores.topk(min(hardest, scores.shape[1])).values[:, -1:])
    value, target = scores[asked].double(), own[asked].double()
    start = torch.tensor([20.0, -18.0], dtype=torch.float64)  # slope and offset: even chances at a cosine of 0.8
    curve = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([curve], max_iter=100, line_search_fn='strong_wolfe')

    def loss():
        optimizer.zero_grad()
        # a prior as wide as the start itself: where few queries do not overlap the slope would be infinite
        prior = ((curve - start) / start).square().sum() / 2 / len(value)
        total = F.binary_cross_entropy_with_logits(value * curve[0] + curve[1], target) + prior
        total.backward()
        return total

    optimizer.step(loss)
    slope, offset = curve.detach().clamp(min=torch.tensor([1e-3, -torch.inf])).tolist()  # more alike is never less likely
    return lambda scores: (slope * scores + offset).sigmoid()
