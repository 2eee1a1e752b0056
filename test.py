"""Name the whales of the test photographs. Edit the constants below, then: python test.py

Scores the validation fold first, chooses gallery weight and threshold there, and writes results/RUN/submission.csv,
matches.png (queries beside their five nearest labelled photographs) and scores.npz.
"""
import sys
from pathlib import Path

import numpy as np
import torch

from data.decode import check_images
from data.images import Crops
from data.tables import NEW_WHALE, load_tables
from models.whale_net import WhaleNet
from utils import checkpoint
from utils.constants import read_constants
from utils.device import amp_dtype, choose_device
from utils.errors import UserError, exit_clearly
from utils.figures import plot_matches
from utils.files import write_whole
from utils.log import progress_bar
from utils.metrics import choose_threshold, top5, write_submission
from utils.scores import fuse, gallery_scores, predict

data_dir = 'data'           # where train.csv, test/ and sample_submission.csv lie
run = 'whale'               # the training: results/RUN
checkPoint_start = 'best'   # 'best', 'last', an iteration, a path; several with commas between: their mean
gallery_weight = -1.0       # of the gallery's scores against the classifiers', 0..1; -1: chosen on validation
threshold = -1.0            # new_whale stands above the ids that score less; -1: chosen on validation
new_whale_share = 0.0       # else: the threshold at which this share of the test images begins with new_whale; 0: off
views = 1                   # test-time augmentation: 1: image and mirror; 3: also at two other scales
skip_bad_images = False     # True: go on without images that cannot be read (answered with new_whale)
cache_dir = 'results/cache'  # decoded crops
matches = 8                 # queries in matches.png
device = 'auto'             # 'auto', 'cuda', 'cuda:1', 'cpu'
threads = 0                 # CPU threads; 0: all cores
precision = 'auto'          # 'auto': bf16 where the hardware has it; 'bf16', 'fp32'
# ----------------------------------------------------------------------------------------------------------------------

RULES = dict(
    data_dir=(str, bool, 'a folder'), run=(str, bool, 'a name'), skip_bad_images=(bool, lambda v: True, 'True or False'),
    checkPoint_start=((int, str), lambda v: v not in (0, ''), "'best', 'last', an iteration, a path, or several"),
    gallery_weight=(float, lambda v: v == -1 or 0 <= v <= 1, 'between 0 and 1, or -1'),
    threshold=(float, lambda v: v == -1 or 0 <= v <= 1, 'between 0 and 1, or -1'),
    new_whale_share=(float, lambda v: 0 <= v < 1, 'between 0 and 1'), views=(int, lambda v: v in (1, 3), '1 or 3'),
    cache_dir=(str, bool, 'a folder'), matches=(int, lambda v: v >= 0, 'a whole number, 0 or more'),
    device=(str, bool, 'a device'), threads=(int, lambda v: v >= 0, 'a whole number, 0 or more'),
    precision=(str, lambda v: v in ('auto', 'bf16', 'fp32'), "'auto', 'bf16' or 'fp32'"))
VIEWS = ((0.0, 0.0, 1.0), (0.0, 0.0, 0.93), (0.0, 0.0, 1.07))  # x, y, scale


@exit_clearly
def main(argv):
    c = read_constants(__file__, argv, RULES)
    c.device = choose_device(c.device, c.threads)
    folder = Path('results') / c.run
    names = [part.strip() for part in str(c.checkPoint_start).split(',')]
    files = [checkpoint.find(folder, int(name) if name.isdigit() else name) for name in names]
    members = [checkpoint.load(file) for file in files]
    tables = load_tables(c.data_dir, members[0]['constants']['flip_is_new_id'])
    for file, member in zip(files, members):
        check_member(file, member, members[0], tables.ids, c.data_dir)
    if not len(tables.test):
        raise UserError(f'{c.data_dir} has no sample_submission.csv with photographs in test/: there is nothing to answer')
    tables = check_images(tables, c.skip_bad_images)
    train, test = tables.train.sort_values('Image', ignore_index=True), tables.test
    labels = torch.from_numpy(train['label'].to_numpy().copy())
    valid = train['Image'].isin(members[0]['fold_images']).to_numpy()  # the images that the training left out
    named = train['label'].to_numpy() < tables.num_ids
    crops = {}  # size -> crops of the labelled and of the test images; one size for most ensembles
    for member in members:
        size = member['constants']['height'], member['constants']['width']
        crops[size] = crops.get(size) or [Crops(frame, *size, c.cache_dir) for frame in (train, test)]
    readable, answerable = (part.readable(c.skip_bad_images) for part in crops[size])
    rows = dict(valid=np.flatnonzero(valid & readable), gallery=np.flatnonzero(named & readable), test=np.arange(len(test)))
    in_fold = torch.from_numpy(valid[rows['gallery']])  # the fold's own images answer test queries, not its own
    truth = labels[rows['valid']].clamp(max=tables.num_ids)  # (V,)

    classifier, gallery = dict(valid=0, test=0), dict(valid=0, test=0)
    for file, member in zip(files, members):
        seen = see(c, file, member, tables.num_ids, crops, rows)
        embeddings, owners = seen['gallery'][1], labels[rows['gallery']]
        near = dict(valid=gallery_scores(seen['valid'][1], embeddings[~in_fold], owners[~in_fold], tables.num_ids),
                    test=gallery_scores(seen['test'][1], embeddings, owners, tables.num_ids))
        for part in near:
            classifier[part] += seen[part][0] / len(members)
            gallery[part] += near[part] / len(members)

    weight, chosen = choose_fusion(classifier['valid'], gallery['valid'], truth, c.gallery_weight)
    final = fuse(classifier['test'], gallery['test'], weight)  # (Q, N)
    if c.threshold >= 0:
        chosen = c.threshold
    if c.new_whale_share:
        chosen = final.max(1).values.quantile(c.new_whale_share).item()
    final[torch.from_numpy(test['bad'].to_numpy(bool) | ~answerable)] = -1  # what cannot be read is new
    answers = top5(final, chosen)
    share = (answers[:, 0] == tables.num_ids).float().mean()
    print(f'test: gallery weight {weight:.2f}, threshold {chosen:.3f}: {share:.1%} of {len(test)} images begin with new_whale')
    write_submission(folder / 'submission.csv', test['Image'].tolist(), answers, tables.ids,
                     Path(c.data_dir) / 'sample_submission.csv')
    write_whole(folder / 'scores.npz', lambda path: np.savez(path, scores=final.half().numpy(), ids=np.array(tables.ids),
                                                             images=test['Image'].to_numpy(str), threshold=chosen))
    if c.matches:
        draw_matches(c, folder / 'matches.png', crops[size], train, rows['gallery'], test, seen, final, answers, tables.ids)
    print(f'written: {folder}/submission.csv, scores.npz' + (', matches.png' if c.matches else ''))


def check_member(file, member, first, ids, data_dir):
    """Refuse a checkpoint whose ids are not the table's; say so when two were trained on different folds."""
    if member['ids'] != ids:
        odd = sorted(set(member['ids']) ^ set(ids))
        raise UserError(f'{file} was trained on other ids than {data_dir}/train.csv has ({len(odd)} differ, such as '
                        f'{odd[0]}): its answers would be wrong; use the data folder that it was trained on')
    if member['fold_images'] != first['fold_images']:
        raise UserError(f'{file} was validated on other images than the first checkpoint: one of them has learned what would '
                        'validate here; list checkpoints of one fold')
    if member['constants']['flip_is_new_id'] != first['constants']['flip_is_new_id']:
        raise UserError(f'{file} has another flip_is_new_id than the first checkpoint; list checkpoints that agree')


def see(c, file, member, num_ids, crops, rows):
    """What one checkpoint says of validation, gallery and test images: part -> scores (Q, N), embeddings (Q, 2, C)."""
    made = member['constants']
    size = made['height'], made['width']
    net = WhaleNet(made['model_name'], num_ids * (2 if made['flip_is_new_id'] else 1), *size)
    checkpoint.fill(net, member, file)
    net.to(c.device, memory_format=torch.channels_last)
    train, test = crops[size]
    seen = {}
    for part, source in (('valid', train), ('gallery', train), ('test', test)):
        seen[part] = predict(net, source, rows[part], *size, num_ids, made['flip_is_new_id'], device=c.device,
                             amp=amp_dtype(c.precision, c.device), shifts=VIEWS[:c.views],
                             progress=lambda batches: progress_bar(batches, desc=f'{file.name}: {part}', unit='batch'))
    return seen


def draw_matches(c, path, crops, train, gallery, test, seen, final, answers, ids):
    """A few queries, from the surest to the least sure, beside their five nearest labelled photographs."""
    order = final.max(1).values.argsort(descending=True)
    chosen = order[torch.linspace(0, len(order) - 1, min(c.matches, len(order))).long()]
    likeness = (seen['test'][1][chosen].flatten(1) @ seen['gallery'][1].flatten(1).T / 2 + 1) / 2  # (matches, G)
    best = likeness.topk(min(5, len(gallery)))  # (matches, 5)
    owner = train['Id'].to_numpy()[gallery]
    names = [*ids, NEW_WHALE]
    titles = [f'{test["Image"].iloc[q]}: {names[answers[q, 0]]}' for q in chosen.tolist()]
    plot_matches(path, crops[1][chosen.numpy()][0].numpy(), titles,
                 [crops[0][gallery[row]][0].numpy() for row in best.indices.numpy()],
                 [[f'{owner[g]}  {value:.2f}' for g, value in zip(row.tolist(), values.tolist())]
                  for row, values in zip(best.indices, best.values)])


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
