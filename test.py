"""Name the whales of the test photographs. Edit the constants below, then: python test.py

Scores the validation fold first, chooses gallery weight and threshold there, and writes results/RUN/submission.csv,
matches.png (queries beside their five nearest labelled photographs) and scores.npz.
"""
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from data.decode import check_images
from data.images import Crops
from data.tables import NEW_WHALE, load_tables
from models.backbone import fold_batch_norms
from models.whale_net import whale_net
from utils import checkpoint
from utils.constants import SHARED_RULES, read_constants, rule
from utils.device import amp_dtype, choose_device, compile_network
from utils.errors import UserError, exit_clearly
from utils.figures import plot_matches
from utils.files import write_whole
from utils.log import progress_bar
from utils.metrics import best_ids, choose_threshold, insert_new_whale, write_submission
from utils.scores import Gallery, fuse, predict, predict_batches

data_dir = 'data'           # where train.csv, test/ and sample_submission.csv lie
run = 'whale'               # the training: results/RUN
checkPoint_start = 'best'   # 'best', 'last', an iteration, a path; several with commas between: their mean
gallery_weight = -1.0       # of the gallery's scores against the classifiers', 0..1; -1: chosen on validation
threshold = -1.0            # new_whale stands above the ids that score less; -1: chosen on validation
new_whale_share = 0.0       # else: the threshold at which this share of the test images begins with new_whale; 0: off
views = 1                   # test-time augmentation: 1: image and mirror; 3: also at two other scales
skip_bad_images = False     # True: go on without images that cannot be read (answered with new_whale)
cache_dir = 'results/cache'  # decoded crops
cache = 'auto'              # where they are read from: 'device', 'memory', 'disk', 'none' (decode anew), 'auto': what fits
matches = 8                 # queries in matches.png
batch_size = 64             # images at a time, each with its mirror image
device = 'auto'             # 'auto', 'cuda', 'cuda:1', 'cpu'
threads = 0                 # CPU threads; 0: all cores
precision = 'auto'          # 'auto': bf16 where the hardware has it; 'bf16', 'fp32'
compile = 'auto'            # torch.compile: 'auto' on a GPU; 'yes', 'no'
# ----------------------------------------------------------------------------------------------------------------------

RULES = {
    **SHARED_RULES, **rule('matches', int, lambda v: v >= 0, 'a whole number, 0 or more'),
    **rule('checkPoint_start', (int, str), lambda v: v not in (0, ''), "'best', 'last', an iteration, a path, or several"),
    **rule('gallery_weight threshold', float, lambda v: v == -1 or 0 <= v <= 1, 'between 0 and 1, or -1'),
    **rule('new_whale_share', float, lambda v: 0 <= v < 1, 'between 0 and 1'),
    **rule('views', int, lambda v: v in (1, 3), '1 or 3'), **rule('batch_size', int, lambda v: v > 0, 'a whole number above 0')}
VIEWS = ((0.0, 0.0, 1.0), (0.0, 0.0, 0.93), (0.0, 0.0, 1.07))  # x, y, scale


@exit_clearly
def main(argv):
    c = read_constants(__file__, argv, RULES)
    c.device = choose_device(c.device, c.threads)
    folder = Path('results') / c.run
    names = [part.strip() for part in str(c.checkPoint_start).split(',')]
    files = [checkpoint.find(folder, int(name) if name.isdigit() else name) for name in names]
    states = [checkpoint.load(file) for file in files]
    tables = load_tables(c.data_dir, states[0]['constants']['flip_is_new_id'])
    for file, state in zip(files, states):
        check_member(file, state, states[0], tables.ids, c.data_dir)
    if not len(tables.test):
        raise UserError(f'{c.data_dir} has no sample_submission.csv with photographs in test/: there is nothing to answer')
    tables = check_images(tables, c.skip_bad_images)
    train, test = tables.train.sort_values('Image', ignore_index=True), tables.test
    labels = torch.from_numpy(train['label'].to_numpy().copy())
    valid = train['Image'].isin(states[0]['fold_images']).to_numpy()  # the images that the training left out
    named = train['label'].to_numpy() < tables.num_ids
    crops = {}  # size -> crops of the labelled and of the test images; one size for most ensembles
    for state in states:
        size = state['constants']['height'], state['constants']['width']
        crops[size] = crops.get(size) or [Crops(frame, *size, c.cache_dir, cache=c.cache, device=c.device)
                                          for frame in (train, test)]
    readable, answerable = (np.all([part.readable(c.skip_bad_images) for part in parts], axis=0)
                            for parts in zip(*crops.values()))
    valid_rows, gallery_rows = np.flatnonzero(valid & readable), np.flatnonzero(named & readable)
    owners, in_fold = labels[gallery_rows].to(c.device), torch.from_numpy(valid[gallery_rows]).to(c.device)
    truth = labels[valid_rows].clamp(max=tables.num_ids)  # (V,)

    members, classifier, near = [], 0, 0
    for file, state in zip(files, states):
        member = Member(c, file, state, crops, tables.num_ids)
        embeddings = member.embed(0, gallery_rows, 'gallery')  # (G, 2, C)
        member.gallery = Gallery(embeddings, owners, tables.num_ids)
        scores, queries = member.predict(0, valid_rows, 'validation')  # (V, N), (V, 2, C)
        rest = Gallery(embeddings[~in_fold], owners[~in_fold], tables.num_ids)  # without the fold's own images
        classifier, near = classifier + scores / len(files), near + rest.scores(queries.to(c.device)).cpu() / len(files)
        members.append(member)
        del embeddings, rest
    weight, chosen = choose_fusion(classifier, near, truth, c.gallery_weight)

    unreadable = torch.from_numpy(test['bad'].to_numpy(bool) | ~answerable)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:  # a score for each image and id may be more than memory holds
        table = np.memmap(file, np.float16, 'w+', shape=(len(test), tables.num_ids))
        most = min(5, tables.num_ids)
        values, order = torch.empty(len(test), most), torch.empty(len(test), most, dtype=torch.int64)  # (Q, 5)
        each = [member.batches(1, np.arange(len(test))) for member in members]
        for first in progress_bar(range(0, len(test), c.batch_size), desc='test', unit='batch'):
            seen = [next(batches) for batches in each]
            final = sum(fuse(scores, member.gallery.scores(queries), weight)
                        for member, (scores, queries) in zip(members, seen)).cpu() / len(members)  # (b, N)
            unreadable[[row for part in crops.values() for row in part[1].failed]] = True  # without a cache known only now
            block = slice(first, first + len(final))
            final[unreadable[block]] = -1  # what cannot be read is new
            table[block] = final.half()
            values[block], order[block] = best_ids(final)
        if c.threshold >= 0:
            chosen = c.threshold
        if c.new_whale_share:
            chosen = values[:, 0].quantile(c.new_whale_share).item()
        write_whole(folder / 'scores.npz', lambda path: np.savez(
            path, scores=table, ids=np.array(tables.ids), images=test['Image'].to_numpy(str), threshold=chosen))
    answers = insert_new_whale(values, order, tables.num_ids, chosen)
    share = (answers[:, 0] == tables.num_ids).float().mean()
    print(f'test: gallery weight {weight:.2f}, threshold {chosen:.3f}: {share:.1%} of {len(test)} images begin with new_whale')
    write_submission(folder / 'submission.csv', test['Image'].tolist(), answers, tables.ids,
                     Path(c.data_dir) / 'sample_submission.csv')
    if c.matches:
        draw_matches(members[-1], folder / 'matches.png', c.matches, train, gallery_rows, test, values[:, 0], answers, tables.ids)
    print(f'written: {folder}/submission.csv, scores.npz' + (', matches.png' if c.matches else ''))


def check_member(file, state, first, ids, data_dir):
    """Refuse a checkpoint whose ids are not the table's; say so when two were trained on different folds."""
    if state['ids'] != ids:
        odd = sorted(set(state['ids']) ^ set(ids))
        raise UserError(f'{file} was trained on other ids than {data_dir}/train.csv has ({len(odd)} differ, such as '
                        f'{odd[0]}): its answers would be wrong; use the data folder that it was trained on')
    if state['fold_images'] != first['fold_images']:
        raise UserError(f'{file} was validated on other images than the first checkpoint: one of them has learned what would '
                        'validate here; list checkpoints of one fold')
    if state['constants']['flip_is_new_id'] != first['constants']['flip_is_new_id']:
        raise UserError(f'{file} has another flip_is_new_id than the first checkpoint; list checkpoints that agree')


class Member:
    """One checkpoint: its network, the crops that it sees (of labelled and of test images), and its gallery."""

    def __init__(self, c, file, state, crops, num_ids):
        made = state['constants']
        size = made['height'], made['width']
        self.name, self.crops, self.gallery = file.name, crops[size], None
        self.net = whale_net(made, num_ids * (2 if made['flip_is_new_id'] else 1))
        checkpoint.fill(self.net, state, file)
        self.net.to(c.device, memory_format=torch.channels_last)
        fold_batch_norms(self.net.backbone)
        why_not = compile_network(self.net, c.compile, c.device)
        if why_not:
            print(f'not compiled: {why_not}')
        self.batch_size = c.batch_size
        self.settings = (*size, num_ids, made['flip_is_new_id'], c.batch_size, c.device, amp_dtype(c.precision, c.device),
                         VIEWS[:c.views])

    def batches(self, part, rows):
        """Scores and embeddings of rows of the labelled (part 0) or test (1) images, batch after batch."""
        return predict_batches(self.net, self.crops[part], rows, *self.settings)

    def predict(self, part, rows, what):
        with progress_bar(total=len(rows), desc=f'{self.name}: {what}', unit='img') as bar:
            return predict(self.net, self.crops[part], rows, *self.settings, progress=bar.update)

    def embed(self, part, rows, what):
        """Embeddings alone, (n, 2, C) on the device: the scores of a whole gallery may be more than memory holds."""
        bar = progress_bar(self.batches(part, rows), total=-(-len(rows) // self.batch_size), desc=f'{self.name}: {what}')
        return torch.cat([embeddings for _, embeddings in bar])


def draw_matches(member, path, count, train, gallery_rows, test, surest, answers, ids):
    """A few queries, from the surest to the least sure, beside their five nearest labelled photographs."""
    order = surest.argsort(descending=True)
    chosen = order[torch.linspace(0, len(order) - 1, min(count, len(order))).long()]
    queries = member.embed(1, chosen.numpy(), 'matches')  # (count, 2, C)
    likeness = (1 + member.gallery.likeness(queries)) / 2  # (count, G)
    best = likeness.topk(min(5, len(gallery_rows)))  # (count, 5)
    rows = gallery_rows[member.gallery.columns[best.indices].cpu().numpy()]  # (count, 5) of the training table
    names, owner = [*ids, NEW_WHALE], train['Id'].to_numpy()
    titles = [f'{test["Image"].iloc[q]}: {names[answers[q, 0]]}' for q in chosen.tolist()]
    values = [[f'{owner[g]}  {value:.2f}' for g, value in zip(*row)] for row in zip(rows, best.values.tolist())]
    plot_matches(path, member.crops[1][chosen.numpy()][0].cpu().numpy(), titles,
                 [member.crops[0][row][0].cpu().numpy() for row in rows], values)


def choose_fusion(classifier, gallery, truth, gallery_weight):
    """The gallery's weight and the threshold that are best on validation; prints what each choice reaches there."""
    grid = torch.linspace(0, 1, 21).tolist()
    found = [choose_threshold(fuse(classifier, gallery, weight), truth) for weight in grid]
    values = torch.tensor([value for _, value in found])
    # a small fold is noisy: take the weight whose neighbours are good too
    kernel = torch.tensor([1.0, 2, 3, 2, 1])
    smooth = torch.nn.functional.conv1d(values[None, None], kernel[None, None], padding=2)[0, 0]
    smooth = smooth / torch.nn.functional.conv1d(torch.ones_like(values)[None, None], kernel[None, None], padding=2)[0, 0]
    weight = gallery_weight if gallery_weight >= 0 else grid[smooth.argmax()]
    threshold, value = choose_threshold(fuse(classifier, gallery, weight), truth)
    print(f'validation MAP@5 ({len(truth)} images): classifiers {values[0]:.3f}, gallery {values[-1]:.3f}, '
          f'gallery weight {weight:.2f}: {value:.3f} at threshold {threshold:.3f}')
    return weight, threshold


if __name__ == '__main__':
    main(sys.argv[1:])
