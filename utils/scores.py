"""Network -> one score for each image and id: the classifiers', the gallery's, and their weighted mean."""
import torch

from data.augment import to_input
from data.images import MARGIN


@torch.inference_mode()
def predict(net, crops, rows, height, width, num_ids, flip_is_new_id=True, batch_size=64, device='cpu', amp=None,
            shifts=((0.0, 0.0, 1.0),), progress=lambda batches: batches):
    """Classifier scores (Q, N) and embeddings (Q, 2, C), of the image and of its mirror image, for `rows` of `crops`.

    Each image is seen as it is and mirrored; the mirror's scores are those of the flipped ids, so both speak of the
    same N ids: (p[:, :N] + p_mirror[:, N:]) / 2. `shifts` are further views (x, y, scale), in shares of the half box,
    averaged. `amp` is a torch dtype for autocast, None for float32. Outputs are float32 on the CPU.
    """
    net.eval()
    second = slice(num_ids, None) if flip_is_new_id else slice(None)
    all_scores, all_embeddings = [], []
    for first in progress(range(0, len(rows), batch_size)):
        pixels, masks = (part.to(device, non_blocking=True) for part in crops[rows[first:first + batch_size]])
        scores, embeddings = 0, 0
        for x, y, scale in shifts:
            view = torch.tensor([[scale, 0, x], [0, scale, y], [0, 0, 1.0]], device=device).expand(len(pixels), 3, 3)
            images = to_input(pixels, masks, height, width, MARGIN, view)  # (B, 4, H, W)
            images = torch.cat([images, images.flip(3)]).contiguous(memory_format=torch.channels_last)  # (2B, 4, H, W)
            with torch.autocast(torch.device(device).type, amp, enabled=amp is not None):
                embedding, logits, _ = net(images, local=False)
            image, mirror = logits.sigmoid().chunk(2)  # (B, 2N) each
            scores = scores + (image[:, :num_ids] + mirror[:, second]) / 2
            embeddings = embeddings + torch.stack(embedding.chunk(2), 1)  # (B, 2, C)
        all_scores.append((scores / len(shifts)).cpu())
        all_embeddings.append(torch.nn.functional.normalize(embeddings, dim=2).cpu())
    return torch.cat(all_scores), torch.cat(all_embeddings)


def gallery_scores(queries, gallery, gallery_labels, num_ids, block=2048):
    """The best likeness of each query to each id's gallery images: (Q, 2, C), (G, 2, C), (G,) -> (Q, N) in 0..1.

    Likeness is the mean of two cosines: image to image, and mirror to mirror. An id without gallery images gets 0.
    """
    gallery = gallery.flatten(1) / 2 ** 0.5  # (G, 2C): the product of two such rows is the mean of the two cosines
    best = torch.full((len(queries), num_ids), -1.0)
    for first in range(0, len(queries), block):
        cosine = queries[first:first + block].flatten(1) @ gallery.T / 2 ** 0.5  # (b, G)
        best[first:first + block].scatter_reduce_(1, gallery_labels.expand(len(cosine), -1), cosine, 'amax')
    return (1 + best) / 2


def fuse(classifier, gallery, gallery_weight):
    """Weighted mean of two (Q, N) score tables, both in 0..1."""
    return (1 - gallery_weight) * classifier + gallery_weight * gallery
