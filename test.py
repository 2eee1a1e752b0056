"""Name the whales of the test photographs. Edit the constants below, then: python test.py

Scores the validation fold first, chooses gallery weight and threshold there, and writes results/RUN/submission.csv,
matches.png (queries beside their five nearest labelled photographs) and scores.npz; several runs together write into
results/ensemble. New animals join without training:
python test.py --enrol FOLDER, with a folder of photographs for each.
"""
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from data.decode import check_images
from data.tables import NEW_WHALE, load_tables, read_photographs, unlabelled_playground
from utils import checkpoint
from utils.constants import SHARED_RULES, read_constants, rule
from utils.device import choose_device
from utils.errors import UserError, exit_clearly
from utils.figures import plot_matches
from utils.files import write_whole
from utils.member import Member, Scores, save_scores, saved_scores
from utils.metrics import best_ids, choose_threshold, insert_new_whale, write_submission

data_dir = 'data'           # where train.csv, test/ and sample_submission.csv lie
run = 'whale'               # the training: results/RUN; several with commas (other networks, folds, sizes): their mean.
                            # A scores.npz of an earlier answer does for a run
checkPoint_start = 'best'   # of each run: 'best', 'last', an iteration, a path; several with commas: their mean
weights = ()                # in the mean, one for each run and checkpoint in that order; (): all alike
gallery_weight = -1.0       # of the gallery's scores against the classifiers', 0..1; -1: chosen on validation
threshold = -1.0            # new_whale stands above the ids that score less; -1: chosen on validation
new_whale_share = 0.0       # else: the threshold at which this share of the test images begins with new_whale; 0: off
views = 1                   # test-time augmentation: 1: image and mirror; 3: also at two other scales
enrol = ''                  # a folder of folders named as ids, or a CSV (Image,Id): photographs to add to the gallery
pseudo_label_min_score = 0.0  # above 0, such as 0.9: test and playground images whose first id scores more are written to
                            # pseudo_labels.csv, which train.py reads
pseudo_new_max_score = 0.05  # and as new_whale those whose best id scores less
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
    **rule('weights', tuple, lambda v: all(w > 0 for w in v), 'a positive number for each member'),
    **rule('gallery_weight threshold', float, lambda v: v == -1 or 0 <= v <= 1, 'between 0 and 1, or -1'),
    **rule('new_whale_share pseudo_label_min_score pseudo_new_max_score', float, lambda v: 0 <= v < 1, 'between 0 and 1'),
    **rule('enrol', str, lambda v: True, 'a folder or a CSV'),
    **rule('views', int, lambda v: v in (1, 3), '1 or 3'), **rule('batch_size', int, lambda v: v > 0, 'a whole number above 0')}


@exit_clearly
def main(argv):
    c = read_constants(__file__, argv, RULES)
    c.device = choose_device(c.device, c.threads)
    files = find_files(c)
    if c.weights and len(c.weights) != len(files):
        raise UserError(f'weights has {len(c.weights)} numbers for {len(files)} members: give one for each')
    tables = load_tables(c.data_dir)
    if not len(tables.test):
        raise UserError(f'{c.data_dir} has no sample_submission.csv with photographs in test/: there is nothing to answer')
    tables = check_images(tables, c.skip_bad_images)
    train, asked = tables.train.sort_values('Image', ignore_index=True), tables.test
    if c.pseudo_label_min_score:
        asked = pd.concat([asked, unlabelled_playground(tables)], ignore_index=True)
    crops, networks, members = {}, [], []
    for file in files:
        if file.suffix == '.npz':
            members.append(saved_scores(file))
            continue
        member = Member(c, file, train, asked, tables.ids, crops)
        if c.enrol:
            enrol_photographs(member, c)
            continue
        networks.append(member)
        members.append(member.scores())
    if c.enrol:
        return
    mean, threshold = combine(members, c.weights or (1.0,) * len(files), train, asked)
    folder, ids = Path('results') / ('ensemble' if ',' in c.run or files[0].suffix == '.npz' else c.run), mean.ids
    values, order = (torch.cat(parts) for parts in zip(*(
        best_ids(torch.from_numpy(mean.table[first:first + 512])) for first in range(0, len(asked), 512))))  # (Q, 5)
    if c.threshold >= 0:
        threshold = c.threshold
    if c.new_whale_share:
        threshold = values[:len(tables.test), 0].quantile(c.new_whale_share).item()
    answers = insert_new_whale(values, order, len(ids), threshold)
    share = (answers[:len(tables.test), 0] == len(ids)).float().mean()
    print(f'test: threshold {threshold:.3f}: {share:.1%} of {len(tables.test)} images begin with {NEW_WHALE}')
    write_submission(folder / 'submission.csv', tables.test['Image'].tolist(), answers[:len(tables.test)], ids,
                     Path(c.data_dir) / 'sample_submission.csv')
    save_scores(folder / 'scores.npz', mean, threshold)
    if networks and c.matches:
        draw_matches(networks[-1], folder / 'matches.png', c.matches, values[:, 0], answers)
    print(f'written: {folder}/submission.csv, scores.npz' + (', matches.png' if networks and c.matches else ''))
    if c.pseudo_label_min_score:
        write_pseudo_labels(c, asked, values[:, 0], order[:, 0], ids, tables.train)


def find_files(c):
    """The checkpoints, or saved scores, that the constants name."""
    names = [part.strip() for part in str(c.checkPoint_start).split(',')]
    files = []
    for run in (part.strip() for part in c.run.split(',')):
        if run.endswith('.npz'):
            files.append(Path(run))
        else:
            files += [checkpoint.find(Path('results') / run, int(name) if name.isdigit() else name) for name in names]
    return files


def combine(members, weights, train, asked):
    """The weighted mean of the members, as Scores of float32, and the threshold of new_whale that is best on validation.

    A validation image counts the members that did not learn from it. Prints what each member and their mean reach.
    """
    ids = members[0].ids
    for member in members:
        if member.ids != ids:
            raise UserError(f'{member.name} knows other ids than {members[0].name}: leave it out, or '
                            'enrol the same animals in each')
        if member.images != asked['Image'].tolist():
            raise UserError(f'{member.name} answered other images than are asked now: run test.py for it again')
    label = dict(zip(ids, range(len(ids))))
    owner = dict(zip(train['Image'], train['Id'].map(label).fillna(len(ids)).astype(int)))
    images = sorted(set().union(*(member.valid_images for member in members)))
    truth = torch.tensor([owner[image] for image in images])  # (V,)
    row = dict(zip(images, range(len(images))))
    scores, count = torch.zeros(len(images), len(ids)), torch.zeros(len(images), 1)
    for member, weight in zip(members, weights):
        rows = torch.tensor([row[image] for image in member.valid_images])
        scores[rows] += weight * member.valid
        count[rows] += weight
        if len(members) > 1:
            print(f'{member.name}: weight {weight:g}, validation MAP@5 {choose_threshold(member.valid, truth[rows])[1]:.3f}')
    if any(member.valid_images != members[0].valid_images for member in members):
        print('the members were validated on different images: the figure of their mean is that of the members that did not '
              'learn an image, fewer than answer the test images')
    threshold, value = choose_threshold(scores / count, truth)
    print(f'validation MAP@5 {value:.3f} at threshold {threshold:.3f} ({len(images)} images)')

    table = members[0].table
    if len(members) > 1:
        table = np.memmap(tempfile.TemporaryFile(), np.float32, 'w+', shape=table.shape)
    for first in range(0, len(table), 512) if len(members) > 1 else ():
        rows = slice(first, first + 512)
        table[rows] = sum(weight * member.table[rows].astype(np.float32) for member, weight in zip(members, weights))
        table[rows] /= sum(weights)  # what cannot be read has -1 in all of them
    return Scores('the mean', ids, members[0].images, table, images, scores / count), threshold


def enrol_photographs(member, c):
    """Add the photographs of `enrol` to the gallery, each under its id."""
    frame = read_photographs(c.enrol, c.data_dir)
    known = set(member.images)
    frame = frame[~frame['Image'].isin(known)].reset_index(drop=True)
    if len(frame):
        crops = member.new_crops(frame)
        crops.readable(False)
        member.add(frame['Image'].to_numpy(str), frame['Id'].to_numpy(str),
                   member.embed(crops, np.arange(len(frame)), 'enrolment'))
        member.save_gallery()
    print(f'{member.name}: {len(frame)} photographs of {frame["Id"].nunique()} ids enrolled, {frame["x0"].notna().sum()} with '
          f'a box; {len(member.all_ids) - len(member.ids)} ids beside the {len(member.ids)} trained ones: {member.gallery_file}')


def write_pseudo_labels(c, asked, best, order, ids, train):
    """pseudo_labels.csv in the data folder: what is sure enough to learn from."""
    sure, new = best.numpy() >= c.pseudo_label_min_score, best.numpy() <= c.pseudo_new_max_score
    new &= best.numpy() >= 0
    table = pd.DataFrame({'Image': asked['Image'], 'Id': np.array(ids, object)[order.numpy()], 'score': best.numpy()})
    table.loc[new, ['Id']] = NEW_WHALE
    table.loc[new, 'score'] = 1 - table.loc[new, 'score']
    path = Path(c.data_dir) / 'pseudo_labels.csv'
    write_whole(path, lambda temporary: table[sure | new].to_csv(temporary, index=False, float_format='%.4f'))
    print(f'written: {path}: {sure.sum()} images of ids and {new.sum()} of {NEW_WHALE}, of {len(asked)}')


def draw_matches(member, path, count, surest, answers):
    """A few queries, from the surest to the least sure, beside their five nearest labelled photographs."""
    order = surest.argsort(descending=True)
    chosen = order[torch.linspace(0, len(order) - 1, min(count, len(order))).long()]
    likeness = (1 + member.gallery.likeness(member.embed(member.test, chosen.numpy(), 'matches'))) / 2  # (count, G)
    likeness[:, torch.from_numpy(member.enrolled)[member.gallery.columns.cpu()]] = 0  # whose crops are not kept
    best = likeness.topk(min(5, int((~member.enrolled).sum())))  # (count, 5)
    places = member.gallery.columns[best.indices].cpu().numpy()  # (count, 5) in the gallery
    rows = np.array([pd.Index(member.train['Image']).get_indexer(member.images[row]) for row in places])
    names = [*member.all_ids, NEW_WHALE]
    titles = [f'{member.asked["Image"].iloc[q]}: {names[answers[q, 0]]}' for q in chosen.tolist()]
    values = [[f'{member.owners[g]}  {value:.2f}' for g, value in zip(*row)] for row in zip(places, best.values.tolist())]
    plot_matches(path, member.test[chosen.numpy()][0].cpu().numpy(), titles,
                 [member.labelled[row][0].cpu().numpy() for row in rows], values)


if __name__ == '__main__':
    main(sys.argv[1:])
