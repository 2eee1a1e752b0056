"""The local triplet loss against the loop form, and the choice of a threshold: `python -m benchmarks.losses`, one core."""
import torch

from benchmarks.timing import compare
from models.losses import hardest_pairs, hinge, local_triplet_loss, pair_masks
from utils.device import choose_device
from utils.metrics import average_precision, choose_threshold, rank_of_truth

BATCH, STRIPS, CHANNELS, CLASSES = 144, 16, 512, 10008


def loop_form(strips, labels, group):
    """The same loss, with the shortest paths of all pairs built cell by cell with gradients, as AlignedReID has it."""
    flat = strips.reshape(-1, CHANNELS)
    square = flat.square().sum(1, keepdim=True)
    distance = (square + square.T - 2 * flat @ flat.T).clamp(min=1e-12).sqrt()
    step = torch.tanh(distance / 2).view(BATCH, STRIPS, BATCH, STRIPS).permute(1, 3, 0, 2)
    path = [[0] * STRIPS for _ in range(STRIPS)]
    for i in range(STRIPS):
        for j in range(STRIPS):
            if i == 0 and j == 0:
                path[i][j] = step[i, j]
            elif i == 0:
                path[i][j] = path[i][j - 1] + step[i, j]
            elif j == 0:
                path[i][j] = path[i - 1][j] + step[i, j]
            else:
                path[i][j] = torch.min(path[i - 1][j], path[i][j - 1]) + step[i, j]
    table = path[-1][-1]
    positive, negative = pair_masks(labels, group, CLASSES)
    p, n, valid = hardest_pairs(table.detach(), positive, negative)
    rows = torch.arange(BATCH)
    return hinge(table[rows, p], table[rows, n], valid, 0.3)


def main():
    choose_device('cpu', threads=1)  # as the scripts do
    torch.manual_seed(0)
    strips = torch.nn.functional.normalize(torch.randn(BATCH, STRIPS, CHANNELS), dim=2).requires_grad_()
    labels, group = torch.arange(BATCH) // 2, torch.arange(CLASSES + 1)
    labels[108:] = CLASSES

    def learn(loss):
        strips.grad = None
        loss(strips, labels, group)[0].backward()

    def ours(*args):
        return local_triplet_loss(*args, CLASSES)

    assert torch.allclose(loop_form(strips, labels, group)[0], ours(strips, labels, group)[0], atol=1e-4)
    print(f'local triplet loss of {BATCH}x{STRIPS}x{CHANNELS}, forward and backward, one core')
    compare({'loop form': lambda: learn(loop_form), 'mined without gradients': lambda: learn(ours)}, 1, unit='a second')

    scores, truth = torch.rand(7960, 5004), torch.randint(5005, (7960,))
    truth[:2400] = 5004

    def evaluate():
        threshold, _ = choose_threshold(scores, truth)
        return average_precision(rank_of_truth(scores, truth, threshold)).mean()

    def sort():
        order = scores.argsort(1, descending=True)
        return (order == truth[:, None]).float().argmax(1)

    print('threshold and MAP@5 of 7,960 x 5,004 scores, one core')
    table = compare({'sorting all scores': sort, 'ours': evaluate}, 1, rounds=3, unit='a second')
    print(f'ours: {1 / table.iloc[1, 0]:.2f} s')


if __name__ == '__main__':
    main()
