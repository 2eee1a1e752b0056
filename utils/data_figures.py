"""What a data folder holds, in two pictures: python -m utils.figures data"""
import os
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from data.decode import find_bad_images, read_image, read_mask, read_size
from data.duplicates import SAME, fingerprints
from data.tables import BOX, NEW_WHALE, load_tables, read_csv, refuse
from utils.errors import UserError
from utils.figures import BLUE, DARK, GREY, ORANGE, dress, histogram, plot_found, save
from utils.log import in_threads

SAMPLE = 2000   # labelled photographs, drawn at random, that are decoded to count greyscale ones
BLANK = None, None, (0, 0, 0, 0), ''  # a tile


def draw_data(data_dir):
    """results/eda/NAME_numbers.png and, where there are photographs, NAME_photographs.png; prints what they say.

    Photographs that cannot be read are counted and left out. A table image_sizes.csv (Image,width,height) in the folder
    stands in for the photographs' own sizes.
    """
    tables = load_tables(data_dir, check_files=False)
    frame = pd.concat([tables.train[tables.train['source'] == 'train'], tables.test], ignore_index=True)
    here = frame[[os.path.isdir(os.path.dirname(path)) for path in frame['path']]]
    readable = here[~here['path'].isin(find_bad_images(here['path']))]
    frame[['width', 'height']] = read_sizes(tables.data_dir / 'image_sizes.csv', frame, readable)
    labelled = readable[readable['Id'].notna()]
    some = labelled.sample(min(SAMPLE, len(labelled)), random_state=0)
    grey = np.array(in_threads(is_grey, some['path'], 'colours'), float)  # (m,)
    failed = len(here) - len(readable) + np.isnan(grey).sum()
    some, grey = some[~np.isnan(grey)], grey[~np.isnan(grey)]
    is_new, count = frame['Id'] == NEW_WHALE, frame['Id'].count()
    sizes, new = frame['Id'][~is_new].value_counts(), is_new.sum()
    numbers = {'training photographs': f'{count:,}', 'test photographs': f'{len(tables.test):,}',
               f'ids + {NEW_WHALE}': f'{len(sizes):,} + {min(new, 1)}', 'ids with one photograph': f'{(sizes == 1).sum():,}',
               f'photographs of {NEW_WHALE}': f'{new:,} ({new / count:.0%})'}
    if len(here):
        numbers['cannot be read'] = f'{failed:,}'
    if len(some):
        numbers[f'greyscale, of {len(some):,}'] = f'{grey.mean():.0%}'
    name = Path('results/eda') / tables.data_dir.resolve().name
    draw_numbers(f'{name}_numbers.png', numbers, sizes, new, frame)
    print(', '.join(f'{caption}: {number}' for caption, number in numbers.items()) + f'\nwritten: {name}_numbers.png')
    if len(some):
        draw_photographs(f'{name}_photographs.png', labelled, some)


def read_sizes(csv, frame, readable):
    """Width and height of the photographs of `frame`, of the table `csv` or the files of `readable`: (n, 2), NaN: unknown."""
    if not csv.is_file():
        sizes = in_threads(read_size, readable['path'], 'sizes')
        return pd.DataFrame(sizes, readable.index, ['width', 'height'], float).reindex(frame.index).to_numpy()
    table = read_csv(csv, ['Image', 'width', 'height'])
    sizes = table[['width', 'height']].apply(pd.to_numeric, errors='coerce')
    refuse(csv, table, ~(sizes > 0).all(axis=1), 'has sizes that are not above zero', 'mend or delete them')
    return sizes.set_index(table['Image']).reindex(frame['Image']).to_numpy(float)


def is_grey(path):
    """Whether a photograph has no colours; NaN when it does not decode."""
    try:
        return np.ptp(read_image(path)[::4, ::4], axis=2).mean() < 2  # of 255
    except UserError:
        return np.nan


def draw_numbers(path, numbers, sizes, new, frame):
    """The charts: `numbers` {caption: text} on top; `sizes` (N,) photographs of each id, `frame` with width and height."""
    width, height, is_train = frame['width'].rename('width'), frame['height'], frame['Id'].notna()
    boxes = (frame[BOX] / frame[['width', 'height'] * 2].to_numpy()).dropna().clip(0, 1)  # (n, 4), shares of the frame
    rows = ['TTT', 'CHa', 'sbk'] if len(boxes) else ['TTTT', 'CHas'] if width.any() else ['TT', 'CH']
    figure = Figure(figsize=(13, 1 + 3.4 * (len(rows) - 1)), layout='constrained')
    panels = figure.subplot_mosaic(list(map(list, rows)), height_ratios=[0.25, 1, 1][:len(rows)])
    panels['T'].axis('off')
    for place, (caption, number) in enumerate(numbers.items()):
        x = (place + 0.5) / len(numbers)
        panels['T'].text(x, 0.5, number, fontsize=18, color=BLUE, weight='bold', ha='center')
        panels['T'].text(x, 0.1, caption, fontsize=9, color=GREY, ha='center')
    ordered = sizes.sort_values(ascending=False)
    axes = dress(panels['C'], 'photographs of each id', 'ids, the largest first', 'photographs')
    axes.loglog(range(1, len(sizes) + 1), ordered, color=BLUE, lw=2, drawstyle='steps-mid')
    axes.text(1, ordered.iloc[0] * 1.15, f'{ordered.index[0][:24]}: {ordered.iloc[0]}', fontsize=9, color=BLUE, parse_math=False)
    axes.set_ylim(0.7, 3 * max(new, ordered.iloc[0]))
    if new:
        axes.axhline(new, color=ORANGE, lw=2)
        axes.text(len(sizes), new / 1.15, f'{NEW_WHALE}: {new:,}', fontsize=9, color=ORANGE, ha='right', va='top')
    axes = dress(panels['H'], 'ids by their number of photographs', 'photographs of an id', 'ids')
    bars = axes.bar(range(1, 11), np.bincount(sizes.clip(upper=10), minlength=11)[1:], color=BLUE)
    axes.bar_label(bars, fmt='{:,.0f}', fontsize=8.5, color=DARK)
    axes.set_xticks(range(1, 11), [*range(1, 10), '10+'])
    axes.margins(y=0.1)
    if width.any():
        aspect, far = width / height, (0, width.quantile(0.99) * 1.15, 0, height.quantile(0.99) * 1.15)
        axes = dress(panels['a'], f'shapes, median {aspect.median():.2f}', 'width / height', 'share of photographs')
        histogram(axes, {'training': aspect[is_train], 'test': aspect[~is_train]}, np.linspace(0, 5, 41), 'upper right')
        axes = dress(panels['s'], f'sizes of {width.count():,} photographs', 'width, pixels', 'height, pixels')
        axes.hexbin(width, height, gridsize=40, norm=LogNorm(0.1), mincnt=1, cmap='Blues', extent=far)
        axes.axis(far)
    if len(boxes):
        cover, middle = np.zeros((100, 100)), np.linspace(0.005, 0.995, 100)
        for x0, y0, x1, y1 in (100 * boxes).round().astype(int).to_numpy():
            cover[y0:y1, x0:x1] += 1 / len(boxes)
        axes = dress(panels['b'], f'share of {len(boxes):,} boxes that cover a point', 'share of width', 'share of height')
        axes.imshow(cover, cmap='Blues', vmin=0, vmax=1.3, extent=(0, 1, 1, 0), aspect='auto')
        axes.clabel(axes.contour(middle, middle, cover, [0.1, 0.5, 0.9], colors=DARK, linewidths=0.8), fmt=lambda v: f'{v:.0%}')
        wide, tall = boxes['x1'] - boxes['x0'], boxes['y1'] - boxes['y0']
        axes = dress(panels['k'], 'how much of the frame a box has', 'share of the frame', 'share of boxes')
        histogram(axes, {'width': wide, 'height': tall, 'area': wide * tall}, np.linspace(0, 1, 31), 'upper left')
    save(figure, path, 90)


def draw_photographs(path, labelled, some):
    """Photographs with boxes and masks: any, whales that were taken several times, near-duplicates."""
    marks = fingerprints(labelled['path'])  # (n, 1024)
    pairs = np.concatenate([np.argwhere(np.triu(marks[first:first + 1000] @ marks.T, first + 1) > SAME) + (first, 0)
                            for first in range(0, len(marks), 1000)])  # (p, 2)
    owner = labelled['Id'].to_numpy()[pairs]  # (p, 2)
    one_id = owner[:, 0] == owner[:, 1]
    pairs = pairs[one_id.argsort(kind='stable')]  # first those under two ids
    whales = [part[:6] for name, part in labelled.groupby('Id') if len(part) > 2 and name != NEW_WHALE]
    rows = [('any', some[:6]), ('any', some[6:12]), *(('one whale', part) for part in whales[::-(-len(whales) // 4) or 1]),
            *(('the same?', labelled.iloc[pairs[first:first + 3].ravel()]) for first in (0, 3))]
    rows = [(text, part) for text, part in rows if len(part)]
    tiles = [shown for _, part in rows for shown in [*map(tile, part.itertuples()), *[BLANK] * (6 - len(part))]]
    images, masks, boxes, titles = zip(*tiles)
    plot_found(path, images, masks, boxes, titles, rows=[text for text, _ in rows])
    print(f'written: {path}; {len(pairs)} pairs of {len(labelled):,} photographs are nearly the same, {(~one_id).sum()} of them '
          'under two ids')


def tile(row):
    """Image, mask, box and title of a row of the table."""
    try:
        image = read_image(row.path)
        mask = read_mask(row.mask_path, row.mask_rle, image.shape[:2])
        return image, mask, (row.x0, row.y0, row.x1, row.y1), f'{row.Id[:24]}\n{row.Image[:24]}'
    except UserError:
        return BLANK
