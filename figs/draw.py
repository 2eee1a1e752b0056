"""The README's two drawn pictures, model.png and map5.png: `python -m figs.draw`."""
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle

from utils.figures import BLUE, DARK, GREEN, GREY, RED, save


def draw_model(path):
    """The network and its losses, for the README."""
    axes = _canvas(148, 59)
    _photo(axes, 2, 32, 19, 9.5)
    _photo(axes, 2, 16, 19, 9.5, sea='black', skin='white')
    _text(axes, 11.5, 43.6, 'photograph cut to the fluke\nRGB, 256 x 512 x 3')
    _text(axes, 11.5, 13.4, 'mask, 256 x 512 x 1\n(zeros where unknown)')
    axes.add_patch(Polygon([(27, 40), (41, 35), (41, 22), (27, 17)], fc='#DCE9F3', ec=BLUE, lw=1.5))
    _text(axes, 34, 28.5, 'backbone\nSENet154,\nSE-ResNeXt, or\nany of timm')
    for shift in (1.6, 0.8, 0):
        axes.add_patch(Rectangle((45 + shift, 25 + shift), 6, 6, fc='white', ec=BLUE, lw=1))
    _text(axes, 46, 22.4, 'features\nC x h x w', colour=GREY)

    for x, y, width, colour, text in (
            (62, 40, 10, BLUE, 'average\npooling'), (74, 40, 10, BLUE, 'batch norm\nneck'),
            (86, 40, 10, BLUE, 'L2: vector\nof length 1'), (98, 40, 10, BLUE, 'x 16, linear:\n2N logits'),
            (62, 6, 10, GREEN, '1 x 1 conv\nto 512, BN'), (74, 6, 10, GREEN, 'average of\neach strip'),
            (86, 6, 10, GREEN, 'L2 of\neach strip'), (141.5, 27, 10, DARK, 'weighted\njoint loss'),
            (117.5, 40, 19, RED, 'sigmoid loss: 2N binary\nclassifiers, the 30 hardest'),
            (117.5, 27, 19, RED, 'triplet loss: hardest pair\nby Euclidean distance'),
            (117.5, 6, 19, RED, 'aligned triplet loss: shortest\npath between the strips')):
        _box(axes, x, y, width, text, colour)
    for y in (36.5, 21):
        _arrow(axes, (21.3, y), (26.6, 28.5 + (y - 28.5) / 4))
    _arrow(axes, (41.2, 28.5), (44.7, 28.5))
    _arrow(axes, (50, 32.8), (56.6, 40), 'angle,angleA=90,angleB=180,rad=4')
    _arrow(axes, (50, 24.8), (56.6, 6), 'angle,angleA=-90,angleB=180,rad=4')
    for y, ends in ((40, (68.6, 80.6, 92.6, 107.6)), (6, (68.6, 80.6, 107.6))):
        for start, end in zip((67.4, 79.4, 91.4, 103.4), ends):
            _arrow(axes, (start, y), (end, y))
    _arrow(axes, (86, 36.9), (107.6, 27), 'angle,angleA=-90,angleB=180,rad=4')
    _text(axes, 97, 24.4, 'also what is compared\nwith the gallery', colour=GREY)
    _arrow(axes, (127.4, 40), (141.5, 30.2), 'angle,angleA=0,angleB=-90,rad=4')
    _arrow(axes, (127.4, 27), (136.1, 27))
    _arrow(axes, (127.4, 6), (141.5, 23.8), 'angle,angleA=0,angleB=90,rad=4')
    for y, weight in ((41.4, 'w_sigmoid'), (28.4, 'w_triplet'), (7.4, 'w_local')):
        _text(axes, 131.8, y, weight, colour=RED)

    for y, cell, label, name in (
            (56.5, 3, 'whale k', 'class k'), (53.1, 11, 'its mirror image', 'class k + N'),
            (49.7, None, 'new_whale', 'all zeros')):
        _photo(axes, 69, y - 1.3, 5.2, 2.6, mirror=cell == 11, skin=GREY if cell is None else DARK)
        _text(axes, 75.5, y, label, align='left')
        for k in range(16):
            corner, fill = (89.5 + 2.4 * k + (k > 7), y - 1.2), RED if k == cell else 'white'
            axes.add_patch(Rectangle(corner, 2.4, 2.4, lw=0.8, ec=GREY, fc=fill))
        _text(axes, 130.5, y, name, align='left')
    _text(axes, 99, 46.9, '0 ... N-1: the ids', colour=GREY)
    _text(axes, 119.2, 46.9, 'N ... 2N-1: the flipped ids', colour=GREY)
    _text(axes, 59, 53, 'targets of the\n2N classifiers', weight='bold')
    _arrow(axes, (109.2, 48), (109.2, 43.1))
    save(axes.figure, path, 100)


def draw_map5(path):
    """What MAP@5 counts, for the README: four images, their five guesses and what each earns."""
    axes = _canvas(100, 43)
    rows = (('w_a', 'w_a w_d new_whale w_b w_c', 0, '1'), ('w_b', 'w_c w_b new_whale w_a w_e', 1, '1/2'),
            ('new_whale', 'w_e w_d w_a new_whale w_b', 3, '1/4'),
            ('w_c', 'w_a w_e w_b w_d new_whale', None, '0'))
    _text(axes, 15, 39.5, 'image and its true label', weight='bold')
    _text(axes, 93, 39.5, 'earns', weight='bold')
    for j, share in enumerate(('1', '1/2', '1/3', '1/4', '1/5')):
        _text(axes, 37 + 12 * j, 41, ('1st', '2nd', '3rd', '4th', '5th')[j] + ' guess', colour=GREY)
        _text(axes, 37 + 12 * j, 38.3, share, size=12, weight='bold', colour=BLUE)
    for i, (truth, guesses, hit, earned) in enumerate(rows):
        y = 30.5 - 7.5 * i
        _photo(axes, 3, y, 11, 5.5, mirror=i % 2 == 1)
        _text(axes, 21.5, y + 2.75, truth, size=10, weight='bold')
        for j, guess in enumerate(guesses.split()):
            _box(axes, 37 + 12 * j, y + 2.75, 8.6, guess, *((GREEN, '#D9F0E8') if j == hit else ('#BBBBBB',)))
        _text(axes, 93, y + 2.75, earned, size=12, weight='bold', colour=GREEN if hit is not None else RED)
    axes.plot([3, 97], [6, 6], color=GREY, lw=0.8)
    _text(axes, 50, 3, 'MAP@5 = the mean = (1 + 1/2 + 1/4 + 0) / 4 = 0.4375', size=12, weight='bold')
    save(axes.figure, path, 110)


def _canvas(width, height):
    """Empty axes of width x height units, ten of them an inch."""
    figure = Figure(figsize=(width / 10, height / 10))
    axes = figure.add_axes([0, 0, 1, 1], xlim=(0, width), ylim=(0, height))
    axes.axis('off')
    return axes


def _text(axes, x, y, text, size=9, colour=DARK, weight='normal', align='center'):
    axes.text(x, y, text, fontsize=size, color=colour, weight=weight, ha=align, va='center', linespacing=1.25)


def _box(axes, x, y, width, text, colour, fill='white'):
    axes.add_patch(FancyBboxPatch((x - width / 2, y - 2.3), width, 4.6, boxstyle='round,pad=0.5', lw=1.5,
                                  ec=colour, fc=fill))
    _text(axes, x, y, text)


def _arrow(axes, start, end, course='arc3'):
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle='-|>', mutation_scale=10, color=GREY, lw=1.2,
                                   shrinkA=0, shrinkB=0, connectionstyle=course))


def _photo(axes, x, y, width, height, sea='#B9CCD8', skin=DARK, mirror=False):
    """A drawn photograph of a fluke, with a bite out of one lobe so that its mirror image differs."""
    axes.add_patch(Rectangle((x, y), width, height, fc=sea, ec=DARK, lw=0.8))
    lobe = np.array([(.06, .1), (.07, .3), (.2, .42), (.35, .55), (.44, .7),
                     (.48, .86), (.38, .8), (.2, .82), (.06, .74), (.0, .58)])
    bitten = np.insert(lobe, 7, [(.33, .8), (.31, .8), (.28, .62), (.25, .81)], axis=0)
    outline = np.concatenate([lobe, (bitten * [-1, 1])[::-1]])
    for _ in range(2):  # Chaikin's corner cutting makes it round
        after = np.roll(outline, -1, axis=0)
        outline = np.stack([0.75 * outline + 0.25 * after, 0.25 * outline + 0.75 * after], 1).reshape(-1, 2)
    outline = outline * ([-1, 1] if mirror else [1, 1]) + [0.5, 0]
    axes.add_patch(Polygon(outline * [width, height] + [x, y], fc=skin, ec='none'))


if __name__ == '__main__':
    draw_model(Path(__file__).parent / 'model.png')
    draw_map5(Path(__file__).parent / 'map5.png')
