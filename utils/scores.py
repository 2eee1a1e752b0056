"""Network -> one score for each image and id: the classifiers', the gallery's, and their weighted mean."""
import torch
import torch.nn.functional as F

from data.augment import to_input
from data.images import MARGIN
from utils.log import progress_bar


@torch.inference_mode()
def predict_batches(net, crops, rows, height, width, num_ids, flip_is_new_id=True, batch_size=64, device='cpu', amp=None,
                    scales=(1.0,), what=''):
    """Yields, batch after batch of `rows` of `crops`, classifier scores (b, N) and embeddings (b, 2, C) on the device.

    Each image is seen as it is and mirrored; the mirror's scores are those of the flipped ids, so both speak of the
    same N ids: (p[:, :N] + p_mirror[:, N:]) / 2. The views at several `scales` are averaged. `amp` is a torch dtype for
    autocast, None for float32. `what` is done, for a progress bar; '': none. A network that is compiled for training runs
    eagerly here: to compile for these sizes too takes longer than it saves, and would make its later steps slower.
    """
    net.eval()
    second = slice(num_ids, None) if flip_is_new_id else slice(None)
    firsts = range(0, len(rows), batch_size)
    for first in progress_bar(firsts, desc=what, unit='img', unit_scale=batch_size, disable=not what):
        pixels, masks = (part.to(device, non_blocking=True) for part in crops[rows[first:first + batch_size]])
        scores = embeddings = torch.zeros((), device=device)
        for scale in scales:
            view = torch.tensor([scale, scale, 1.0], device=device).diag().expand(len(pixels), 3, 3)
            images = to_input(pixels, masks, height, width, MARGIN, view)  # (b, 4, H, W)
            images = torch.cat([images, images.flip(3)]).contiguous(memory_format=torch.channels_last)  # (2b, 4, H, W)
            with torch.autocast(torch.device(device).type, amp, enabled=amp is not None):
                embedding, logits, _ = net.forward(images, local=False)
            image, mirror = logits.sigmoid().chunk(2)  # (b, 2N) each
            scores = scores + (image[:, :num_ids] + mirror[:, second]) / 2
            embeddings = embeddings + torch.stack(embedding.chunk(2), 1)  # (b, 2, C)
        yield scores / len(scales), F.normalize(embeddings, dim=2)


def predict(*args, **options):
    """The same for all rows at once, on the CPU: scores (Q, N), embeddings (Q, 2, C)."""
    parts = [(scores.cpu(), embeddings.cpu()) for scores, embeddings in predict_batches(*args, **options)]
    return tuple(torch.cat(part) for part in zip(*parts))


class Gallery:
    """Labelled images to compare with: embeddings (G, 2, C), labels (G,) in 0..N-1, on one device."""

    def __init__(self, embeddings, labels, num_ids):
        self.rows, self.labels, self.num_ids = embeddings.flatten(1) / 2, labels, num_ids  # (G, 2C)

    def likeness(self, queries):
        """(b, 2, C) -> (b, G): the mean of two cosines, image to image, mirror to mirror."""
        return (self.rows @ queries.flatten(1).T).T

    def scores(self, queries):
        """The best likeness of each query to each id's images: (b, 2, C) -> (b, N) in 0..1; an id without any has 0."""
        likeness = self.likeness(queries).T  # (G, b)
        best = likeness.new_full((self.num_ids, len(queries)), -1.0)
        best.scatter_reduce_(0, self.labels[:, None].expand_as(likeness), likeness, 'amax')
        return (1 + best.T) / 2

    def nearest_of(self, ids, likeness):
        """Of each query's `ids` (b, k) the image that is most like it: (b, k), its place among the G; -1: all are at -2."""
        best = likeness[:, None].masked_fill(self.labels != ids[..., None], -2).max(2)  # (b, k)
        return torch.where(best.values > -2, best.indices, -1)


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
