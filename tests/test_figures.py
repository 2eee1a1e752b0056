"""The plots show what they are given, and are written whole."""
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from utils import figures


def evaluations(steps=(3, 2)):
    table = pd.DataFrame(dict(step=step, iteration=10 * (k + 1), lr=1e-3 / step)
                         for step, count in enumerate(steps, 1) for k in range(count))
    return table.assign(loss=2.0, sigmoid=1.5, triplet=0.3, local=0.2, active=0.9, train_map5=0.2,
                        train_top1=0.1, valid_map5=0.3, valid_top1=0.2, valid_top5=0.4, threshold=0.5)


@pytest.fixture
def saved(monkeypatch):
    """The figures that were saved, to look into."""
    kept, save = [], figures.save
    monkeypatch.setattr(figures, 'save', lambda figure, *rest: (kept.append(figure), save(figure, *rest)))
    return kept


def pixels(path):
    return np.asarray(Image.open(path).convert('RGB'))


def test_curves_follow_one_another_across_steps(tmp_path, saved):
    figures.plot_curves(evaluations(), tmp_path / 'curves.png')
    assert pixels(tmp_path / 'curves.png').std() > 5
    loss, named, rate, threshold, active = saved[0].axes
    labels = [line.get_label() for line in loss.lines[:4]]
    assert labels == ['joint loss', 'sigmoid', 'triplet', 'local triplet']
    assert [line.get_ydata()[0] for line in loss.lines[:4]] == [2, 1.5, 0.3, 0.2]
    assert [line.get_ydata()[0] for line in named.lines[:5]] == [0.3, 0.2, 0.4, 0.2, 0.1]
    for axes in saved[0].axes:
        assert list(axes.lines[0].get_xdata()) == [10, 20, 30, 40, 50]
        assert list(axes.lines[-1].get_xdata()) == [30, 30]  # the border of the steps


def test_a_step_that_begins_with_a_later_iteration_follows_too(tmp_path, saved):
    """The first ended early; its number of iterations is below that of the second's first evaluation."""
    figures.plot_curves(evaluations().assign(iteration=[10, 20, 25, 30, 60], step=[1, 1, 1, 2, 2]), tmp_path / 'curves.png')
    assert list(saved[0].axes[0].lines[0].get_xdata()) == [10, 20, 25, 55, 85]


@pytest.mark.parametrize('table', [evaluations((1,)), evaluations().drop(columns='local')], ids=len)
def test_curves_of_little_data(tmp_path, table, saved):
    figures.plot_curves(table, tmp_path / 'curves.png')
    assert pixels(tmp_path / 'curves.png').std() > 5
    assert ('local triplet' in [line.get_label() for line in saved[0].axes[0].lines]) == ('local' in table)


def flat_crops(*shades):
    return [np.full((20, 40, 3), shade, np.uint8) for shade in shades]


def test_matches_stand_beside_their_query(tmp_path, saved):
    matches = [flat_crops(50, 60), flat_crops(70)]
    figures.plot_matches(tmp_path / 'm.png', flat_crops(10, 20), ['query $1$', 'query 2'], matches,
                         [['a', 'b'], ['c']])
    titles = [[axes.get_title() for axes in row] for row in np.reshape(saved[0].axes, (2, 3))]
    assert titles == [['query $1$', 'a', 'b'], ['query 2', 'c', '']]
    shades = [axes.images[0].get_array()[0, 0, 0] for axes in saved[0].axes if axes.images]
    assert shades == [10, 50, 60, 20, 70]


def test_a_failing_plot_leaves_the_old_picture(tmp_path):
    path = tmp_path / 'curves.png'
    path.write_text('before')
    with pytest.raises(KeyError):
        figures.plot_curves(evaluations().drop(columns='iteration'), path)
    assert path.read_text() == 'before' and list(tmp_path.iterdir()) == [path]


def test_a_batch_is_drawn_as_the_network_sees_it(tmp_path, saved):
    images = torch.rand(20, 4, 32, 64)
    images[:, 3] = 0
    images[1, 3, 8:24, 8:40] = 1
    titles = [f'${number}' for number in range(20)]
    figures.plot_batch(tmp_path / 'batch.png', images, titles)
    axes = saved[0].axes
    assert len(axes) == 16 and [panel.get_title() for panel in axes] == titles[:16]
    for panel, image in zip(axes, images):
        assert np.array_equal(panel.images[0].get_array(), image[:3].permute(1, 2, 0).numpy())
    outlines = [panel.collections for panel in axes]
    assert [len(found) for found in outlines] == [0, 1] + 14 * [0]
    x0, y0, x1, y1 = outlines[1][0].get_paths()[0].get_extents().extents
    assert (x0, y0, x1, y1) == (7.5, 7.5, 39.5, 23.5)


def test_distances_are_to_the_own_id_and_to_others(tmp_path, saved):
    near = torch.tensor([[0.9, 0.2, 0.5], [0.3, 0.6, 0.8], [0.1, 0.4, 0.2]])
    figures.plot_distances(tmp_path / 'distances.png', near, torch.tensor([0, 1, 3]))  # the last one is a new_whale
    axes = saved[0].axes[0]
    assert axes.get_title(loc='left').startswith('50% of the named')
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        'of its own id (2)', 'of any other id (2)', 'of any id, to a new_whale (1)']
    for patch, distances in zip(axes.patches, ([0.2, 0.8], [0.4, 1.0], [1.2])):
        x = patch.get_xy()[patch.get_xy()[:, 1] > 0, 0]  # where the outline is above zero
        assert x.min() <= distances[0] + 1e-6 and x.max() >= distances[-1] - 1e-6
        assert x.min() > distances[0] - 0.3 and x.max() < distances[-1] + 0.3  # a bin is a third of 1.0 at most
