"""Name the whales of the test photographs. Edit the constants below, then: python test.py

Scores the validation fold first, chooses gallery weight and threshold there, and writes into results/RUN:
  submission.csv   five answers for each photograph
  matches.html     each photograph beside its five answers, for a person to decide
  matches.png      some photographs beside the labelled ones that are most like them
  distances.png    how near photographs of one animal lie, and of different ones
  scores.npz       the score of each id, for ensembles
Several runs together write into results/ensemble.

New animals join without training: python test.py --enrol FOLDER, with a folder of photographs for each.
"""
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from data.decode import check_images
from data.duplicates import fingerprints, twins
from data.tables import NEW_WHALE, load_tables, read_photographs, unlabelled_playground
from utils import checkpoint
from utils.constants import SHARED_RULES, read_constants, rule
from utils.device import choose_device, describe, require_works
from utils.errors import UserError, exit_clearly
from utils.figures import plot_distances, plot_matches
from utils.files import sweep, write_whole
from utils.member import Member, on_disk, saved_scores
from utils.metrics import best_ids, choose_threshold, insert_new_whale, write_submission
from utils.review import write_review

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
cache = 'auto'              # where they are read from: 'disk', 'none' (decode anew), 'auto': the disk, if it has room for them
matches = 8                 # queries in matches.png; 0: no pictures
review = True               # matches.html and its thumbnails in matches/: look at all answers in a browser, decide, export
batch_size = 64             # images at a time, each with its mirror image
device = 'auto'             # 'auto', 'cuda', 'cuda:1', 'cpu'
threads = 0                 # CPU threads; 0: all cores
precision = 'auto'          # 'auto': bf16 where the hardware has it; 'bf16', 'fp32'
# ----------------------------------------------------------------------------------------------------------------------

RULES = {
    **SHARED_RULES, **rule('matches', int, lambda v: v >= 0, 'a whole number, 0 or more'),
    **rule('checkPoint_start', (int, str), lambda v: v not in (0, ''), "'best', 'last', an iteration, a path, or several"),
    **rule('weights', tuple, lambda v: all(w > 0 for w in v), 'a positive number for each member'),
    **rule('gallery_weight threshold', float, lambda v: v == -1 or 0 <= v <= 1, 'between 0 and 1, or -1'),
    **rule('new_whale_share pseudo_label_min_score pseudo_new_max_score', float, lambda v: 0 <= v < 1, 'between 0 and 1'),
    **rule('enrol', str, lambda v: True, 'a folder or a CSV'), **rule('review', bool, lambda v: True, 'True or False'),
    **rule('views', int, lambda v: v in (1, 3), '1 or 3'), **rule('batch_size', int, lambda v: v > 0, 'a whole number above 0')}


@exit_clearly
def main(argv):
    c = read_constants(globals(), argv, RULES)
    c.device = choose_device(c.device, c.threads)
    require_works(c.device)
    print(describe(c.device, c.precision))
    files = find_files(c)
    if c.weights and len(c.weights) != len(files):
        raise UserError(f'weights has {len(c.weights)} numbers for {len(files)} members: give one for each')
    if c.pseudo_label_min_score and c.pseudo_new_max_score >= c.pseudo_label_min_score:
        raise UserError(f'pseudo_new_max_score = {c.pseudo_new_max_score} must be below pseudo_label_min_score')
    tables = load_tables(c.data_dir)
    if not len(tables.test) and not c.enrol:
        raise UserError(f'{c.data_dir} has no sample_submission.csv with photographs in test/: there is nothing to answer')
    tables = check_images(tables, c.skip_bad_images)
    for note in tables.notes:
        if 'are not in' in note or 'cannot be read' in note:  # what train.py says of the rest is known by now
            print(note)
    train, asked = tables.train.sort_values('Image', ignore_index=True), tables.test
    crops: dict = {}
    if c.enrol:
        return enrol_photographs(c, files, train, tables.ids, crops)
    if c.pseudo_label_min_score:
        asked = pd.concat([asked, unlabelled_playground(tables)], ignore_index=True)
    member, scores = None, []
    for file in files:
        if file.suffix == '.npz':
            scores.append(saved_scores(file))
        else:
            member = Member(c, file, train, tables.ids, crops)
            scores.append(member.scores(asked))
    weights = c.weights or (1.0,) * len(files)
    threshold, valid, valid_images = validate(scores, weights, train, asked)
    ids, folder = scores[0].ids, Path('results') / c.run
    if ',' in c.run or member is None:
        folder = Path('results/ensemble')
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)  # those of trainings sweep theirs
    table = on_disk(folder, scores[0].table.shape, np.float16)
    most = min(5, len(ids))
    values, order = torch.empty(len(asked), most), torch.empty(len(asked), most, dtype=torch.int64)  # (Q, 5)
    for first in range(0, len(asked), 512):
        block = slice(first, first + 512)
        mean = sum(weight * one.table[block].astype(np.float32) for one, weight in zip(scores, weights)) / sum(weights)
        table[block] = mean  # what cannot be read has -1 in each of them, so it is new
        values[block], order[block] = best_ids(torch.from_numpy(mean))
    if c.threshold >= 0:
        threshold = c.threshold
    if c.new_whale_share:
        threshold = values[:len(tables.test), 0].quantile(c.new_whale_share).item()
    answers = insert_new_whale(values, order, len(ids), threshold)
    share = (answers[:len(tables.test), 0] == len(ids)).float().mean()
    print(f'test: threshold {threshold:.3f}: {share:.1%} of {len(tables.test)} images begin with {NEW_WHALE}')
    write_submission(folder / 'submission.csv', tables.test['Image'].tolist(), answers[:len(tables.test)], ids,
                     Path(c.data_dir) / 'sample_submission.csv')
    write_whole(folder / 'scores.npz', lambda path: np.savez(
        path, scores=table, ids=np.array(ids), images=asked['Image'].to_numpy(str), threshold=threshold,
        valid=valid.half().numpy(), valid_images=np.array(valid_images)))
    if member and c.matches:
        draw_matches(member, folder / 'matches.png', c.matches, asked, values[:, 0], answers)
        plot_distances(folder / 'distances.png', *member.nearest)
    if member and c.review:
        write_review(folder / 'matches.html', member, asked['Image'], values, order, answers[:, 0] == len(ids), threshold)
    pictures = ('matches.png', c.matches), ('distances.png', c.matches), ('matches.html', c.review)
    drawn = [name for name, wanted in pictures if member and wanted]
    print(', '.join([f'written: {folder}/submission.csv', 'scores.npz', *drawn]))
    if c.pseudo_label_min_score:
        write_pseudo_labels(c, asked, len(tables.test), values[:, 0], order[:, 0], ids, tables)


def find_files(c):
    """The checkpoints, or saved scores, that the constants name."""
    names = [part.strip() for part in str(c.checkPoint_start).split(',')]
    files = []
    for run in (part.strip() for part in c.run.split(',')):
        if run.endswith('.npz'):
            files.append(Path(run))
        else:
            files += [checkpoint.find(Path('results') / run, int(name) if name.isdecimal() else name) for name in names]
    return files


def validate(members, weights, train, asked):
    """The threshold of new_whale that is best on validation, the members' mean scores there (V, N), and its V images.

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
    images = sorted(set().union(*(member.valid_images for member in members)) & set(owner))
    truth = torch.tensor([owner[image] for image in images])  # (V,)
    scores, count = torch.zeros(len(images), len(ids)), torch.zeros(len(images), 1)
    for member, weight in zip(members, weights):
        place = pd.Index(member.valid_images).get_indexer(images)  # (V,) -1: learned
        rows = torch.from_numpy(np.flatnonzero(place >= 0))
        own = member.valid[place[place >= 0]]
        scores[rows] += weight * own
        count[rows] += weight
        if len(members) > 1:
            print(f'{member.name}: weight {weight:g}, validation MAP@5 {choose_threshold(own, truth[rows])[1]:.3f}')
    if any(member.valid_images != members[0].valid_images for member in members):
        print('the members were validated on different images: the figure of their mean is that of the members that did not '
              'learn an image, fewer than answer the test images')
    scores /= count
    threshold, value = choose_threshold(scores, truth)
    print(f'validation MAP@5 {value:.3f} at threshold {threshold:.3f} ({len(images)} images)')
    if not (truth == len(ids)).any():
        print(f'none of them is of a {NEW_WHALE}, so the threshold tells nothing of new animals: set it, or new_whale_share')
    return threshold, scores, images


def enrol_photographs(c, files, train, ids, crops):
    """Add the photographs of `enrol` to the gallery of each training, or, when something is wrong with one, to none."""
    if any(file.suffix == '.npz' for file in files):
        raise UserError('saved scores have no gallery: name trainings in `run` to enrol in')
    frame = read_photographs(c.enrol)
    members = [Member(c, file, train, ids, crops) for file in files]
    new = [member.enrol(frame) for member in members]
    for member, count in zip(members, new):
        member.save_gallery()
        print(f'{member.name}: {count} photographs enrolled, {len(frame) - count} were already; {frame["Id"].nunique()} ids, '
              f'{frame["x0"].notna().sum()} photographs with a box; {len(member.all_ids) - len(member.ids)} ids beside the '
              f'{len(member.ids)} trained ones: {member.gallery_file}')


def write_pseudo_labels(c, asked, num_test, best, order, ids, tables):
    """pseudo_labels.csv in the data folder: what is sure enough to learn from."""
    best, train, known = best.numpy().copy(), tables.train, set(tables.ids)
    names = np.array([name if name in known else '' for name in ids], object)[order.numpy()]  # '': train.py has no class of it
    rest = asked['path'][num_test:]
    twin = twins(fingerprints(train['path']), fingerprints(rest)) if len(rest) else np.empty(0, int)
    shared = num_test + np.flatnonzero((twin >= 0) & (train['Id'].to_numpy()[twin] != NEW_WHALE))
    names[shared], best[shared] = train['Id'].to_numpy()[twin[shared - num_test]], 1.0
    sure, new = (best >= c.pseudo_label_min_score) & (names != ''), (best >= 0) & (best <= c.pseudo_new_max_score)
    table = pd.DataFrame({'Image': asked['Image'], 'Id': np.where(new, NEW_WHALE, names), 'score': np.where(new, 1 - best, best)})
    path = Path(c.data_dir) / 'pseudo_labels.csv'
    write_whole(path, lambda temporary: table[sure | new].to_csv(temporary, index=False, float_format='%.4f'))
    for what, part in (('test', slice(num_test)), ('playground', slice(num_test, None))):
        print(f'{path}: {what}: {sure[part].sum()} images of ids and {new[part].sum()} of {NEW_WHALE}, of {len(best[part])}')
    print(f'{len(shared)} of the playground images are photographs of train.csv, and have its ids')


def draw_matches(member, path, count, asked, surest, answers):
    """A few queries, from the surest to the least sure, beside their five nearest labelled photographs."""
    order = surest.argsort(descending=True)
    chosen = order[torch.linspace(0, len(order) - 1, min(count, len(order))).long()]
    likeness = (1 + member.likeness(chosen.numpy())) / 2  # (count, G)
    best = likeness.topk(min(5, int((~member.enrolled).sum())))  # (count, 5)
    places = best.indices.cpu().numpy()  # (count, 5) in the gallery
    rows = np.array([pd.Index(member.train['Image']).get_indexer(member.images[row]) for row in places])
    names = [*member.all_ids, NEW_WHALE]
    titles = [f'{asked["Image"].iloc[q]}: {names[answers[q, 0]]}' for q in chosen.tolist()]
    values = [[f'{member.owners[g]}  {value:.2f}' for g, value in zip(*row)] for row in zip(places, best.values.tolist())]
    plot_matches(path, member.test[chosen.numpy()][0].cpu().numpy(), titles,
                 [member.labelled[row][0].cpu().numpy() for row in rows], values)


if __name__ == '__main__':
    main(sys.argv[1:])
