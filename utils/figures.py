"""The pictures of a training and of its answers; those of a data folder: python -m utils.figures data"""
import argparse
import sys

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from utils.errors import exit_clearly
from utils.files import write_whole

# Paul Tol's vibrant scheme, which the colour-blind can tell apart.
BLUE, ORANGE, GREEN, RED, PINK = '#0077BB', '#EE7733', '#009988', '#CC3311', '#EE3377'
DARK, GREY = '#222222', '#777777'


def plot_curves(table, path):
    """The course of a training: `table` is a frame of evaluations.csv, one row an evaluation.

    Each step counts its iterations from zero; here they follow one another, with a line at each border.
    """
    before = table['iteration'].shift()
    restarts = table['step'].diff() > 0
    x = table['iteration'] + before.where(restarts, 0).cumsum().fillna(0)
    figure = Figure(figsize=(12, 6.4), layout='constrained')
    panels = figure.subplot_mosaic('LLLMMM;rrttaa')

    def draw(axes, title, **lines):
        """`lines`: column = (label, colour, line style); columns that the table lacks are left out."""
        for column, (label, colour, style) in lines.items():
            if column in table and table[column].notna().any():
                axes.plot(x, table[column], style, color=colour, label=label, lw=1.6, ms=3.5,
                          marker='o' if len(table) < 30 else None)
        for border in x.shift()[restarts]:
            axes.axvline(border, color=GREY, lw=0.8, ls=':')
        if len(lines) > 1:
            axes.legend(edgecolor='none', fontsize=9)
        return dress(axes, title, 'iteration')

    draw(panels['L'], 'training loss and its parts',
         loss=('joint loss', DARK, '-'), sigmoid=('sigmoid', BLUE, '-'), triplet=('triplet', ORANGE, '-'),
         local=('local triplet', GREEN, '-')).set_ylim(bottom=0)
    draw(panels['M'], 'MAP@5, top-1, top-5',
         valid_map5=('validation MAP@5', BLUE, '-'), valid_top1=('validation top-1', BLUE, '--'),
         valid_top5=('validation top-5', BLUE, ':'), train_map5=('training MAP@5', ORANGE, '-'),
         train_top1=('training top-1', ORANGE, '--')).set_ylim(0, 1.02)
    rates = draw(panels['r'], 'learning rate', lr=('', DARK, '-'))
    rates.set_yscale('log')
    rates.lines[0].set_drawstyle('steps-pre')  # a row tells of the iterations before it
    ends = table['lr'].min(), table['lr'].max()
    rates.set_yticks(ends, [f'{rate:g}' for rate in ends])
    rates.minorticks_off()
    draw(panels['t'], 'threshold of new_whale', threshold=('', PINK, '-'))
    draw(panels['a'], 'share of triplets that still teach', active=('', GREEN, '-')).set_ylim(0, 1.02)
    save(figure, path, 110)


def plot_matches(path, queries, query_titles, matches, match_titles):
    """Queries, each beside its nearest gallery images, best first.

    `queries` (Q) and `matches` (Q, up to 5) hold crops (H, W, 3) uint8, `query_titles` and `match_titles`
    the text above each.
    """
    figure, axes = _grid(len(queries), 1 + max(len(row) for row in matches), queries[0])
    for i, query in enumerate(queries):
        _show(axes[i, 0], query, query_titles[i], DARK).title.set_weight('bold')
        for j, match in enumerate(matches[i]):
            _show(axes[i, j + 1], match, match_titles[i][j], GREY)
    save(figure, path, 100)


def plot_found(path, images, masks, boxes, titles, columns=6, tile=(2, 3), dpi=90, rows=()):
    """Photographs (h, w, 3), masks (h, w) 0/1 as outlines, boxes (x0, y0, x1, y1; NaN: none), all in tiles of 3:2.

    An image that is None leaves its tile empty; `rows` are texts beside the rows.
    """
    figure, axes = _grid(-(-len(images) // columns), columns, np.empty(tile))
    for panel, image, mask, (x0, y0, x1, y1), title in zip(axes.flat, images, masks, boxes, titles):
        if image is None:
            continue
        step = max(1, image.shape[1] // 400)    # a tile has no more pixels
        _show(panel, image[::step, ::step], title, DARK).set_anchor('N')
        panel.autoscale(False)
        panel.plot(np.array([x0, x1, x1, x0, x0]) / step, np.array([y0, y0, y1, y1, y0]) / step, color=ORANGE, lw=1.2)
        if mask.any() and not mask.all():
            panel.contour(mask[::step, ::step], [0.5], colors=PINK, linewidths=0.8)
    for panel, text in zip(axes[:, 0], rows):
        panel.set_ylabel(text, fontsize=10, color=DARK)
    save(figure, path, dpi)


def plot_batch(path, images, titles):
    """The first images of a batch (B, 4, H, W) as the network sees them, four in a row, the mask an outline."""
    pixels = images[:16].permute(0, 2, 3, 1).float().cpu().numpy()  # (16, H, W, 4)
    plot_found(path, pixels[..., :3], pixels[..., 3] > 0.5, np.full((len(pixels), 4), np.nan), titles, 4, pixels.shape[1:3], 150)


def plot_distances(path, near, truth):
    """Of validation photographs: how far the nearest labelled photograph of their own id is, and the nearest of any other.

    near (V, N): Gallery.scores; truth (V,) in 0..N, N being new_whale, of which every id is another.
    """
    is_named = truth < near.shape[1]
    named, column = near[is_named], truth[is_named, None]
    own, other, new = named.gather(1, column)[:, 0], named.scatter(1, column, -1).amax(1), near[~is_named].amax(1)
    series = {'of its own id': own, 'of any other id': other, 'of any id, to a new_whale': new}
    series = {f'{name} ({len(values)})': pd.Series(2 - 2 * values.numpy()) for name, values in series.items()}
    figure, right = Figure(figsize=(8, 4.2), layout='constrained'), (own > other).float().mean()
    axes = dress(figure.subplots(), f'{right:.0%} of the named validation photographs have one of their own id nearest',
                 'cosine distance to the nearest labelled photograph', 'share')
    histogram(axes, series, np.histogram_bin_edges(pd.concat(series.values()), 'auto'), 'best')
    save(figure, path, 100)


def dress(axes, title, x, y=''):
    """Title and labels, and what all charts have alike."""
    axes.set_title(title, loc='left', fontsize=10.5, color=DARK)
    axes.set_xlabel(x, fontsize=9), axes.set_ylabel(y, fontsize=9)
    axes.grid(alpha=0.25, lw=0.6)
    axes.spines[['top', 'right']].set_visible(False)
    axes.tick_params(labelsize=8.5)
    return axes


def histogram(axes, series, bins, place):
    """Shares of the values in `bins`, what lies beyond in the last ones; `series` {label: values}, `place` of the legend."""
    for (label, values), colour in zip(series.items(), (BLUE, ORANGE, GREEN)):
        values = values.dropna().clip(bins[0], bins[-1])
        axes.hist(values, bins, weights=np.full(len(values), 1 / max(len(values), 1)), histtype='stepfilled', lw=1.6,
                  facecolor=colour + '22', edgecolor=colour, label=label)
    axes.legend(edgecolor='none', fontsize=9, loc=place)


def _grid(rows, columns, crop):
    """A figure of empty panels shaped like `crop`, with room for two lines above each."""
    width = 2.2
    height = width * crop.shape[0] / crop.shape[1] + 0.45
    figure = Figure(figsize=(width * columns, height * rows), layout='constrained')
    blank = dict(frame_on=False, xticks=[], yticks=[])
    return figure, figure.subplots(rows, columns, squeeze=False, subplot_kw=blank)


def _show(axes, crop, title, colour):
    axes.imshow(crop, interpolation='antialiased')
    axes.set_frame_on(True)
    axes.spines[:].set(color=colour, linewidth=0.8)
    axes.set_title(title, fontsize=9, color=colour, pad=4, parse_math=False)  # an id may hold a dollar sign
    return axes


def save(figure, path, dpi):
    write_whole(path, lambda temporary: figure.savefig(temporary, dpi=dpi))


@exit_clearly
def main(argv):
    from utils.data_figures import __doc__, draw_data  # which draws with what stands above
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('data_dir', help='a folder with train.csv; pictures go to results/eda/')
    draw_data(parser.parse_args(argv).data_dir)


if __name__ == '__main__':
    main(sys.argv[1:])
