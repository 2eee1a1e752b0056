"""A hundred thousand queries against a gallery of a hundred thousand: `python -m benchmarks.matching [QUERIES]`.

The product and the five best ids alone. Random embeddings of 512 numbers (256 for the image, 256 for its mirror image), made
block by block as test.py sees its queries; the ids in the competition's proportion.
"""
import resource
import sys
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

from utils.device import choose_device
from utils.metrics import best_ids
from utils.scores import Gallery

GALLERY, IDS, BLOCK = 100_000, 32_000, 64


def main(argv):
    queries = int(argv[0]) if argv else 100_000
    device = choose_device('auto')
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    generator = torch.Generator(device).manual_seed(0)

    def embeddings(count):
        return F.normalize(torch.randn(count, 2, 256, generator=generator, device=device), dim=2)

    labels = torch.cat([torch.arange(IDS), torch.randint(IDS, (GALLERY - IDS,))]).to(device)
    gallery = Gallery(embeddings(GALLERY), labels, IDS)
    values, order = torch.empty(queries, 5), torch.empty(queries, 5, dtype=torch.int64)
    began = time.perf_counter()
    for first in tqdm(range(0, queries, BLOCK), unit='block'):
        block = slice(first, min(first + BLOCK, queries))
        values[block], order[block] = best_ids(gallery.scores(embeddings(block.stop - first)))
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f'{queries:,} queries against {GALLERY:,} images of {IDS:,} ids on {device}: {seconds:.0f} s '
          f'({queries / seconds:,.0f} queries/s; a million would take {seconds / queries * 1e6 / 60:.0f} minutes); '
          f'peak memory of the process {peak:.2f} GB, of them {before:.2f} before')


if __name__ == '__main__':
    main(sys.argv[1:])
