"""The pictures of a data folder say what the tables and the photographs say."""
import os
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from data.decode import read_size
from tests.conftest import NEW, SIZES, TEST, cut, edit_table, first_row, write_frame
from utils import data_figures, figures


@pytest.fixture
def looked(work, monkeypatch, capsys):
    """looked(folder): the figures drawn of it, numbers first, and what was printed."""
    def look(folder):
        kept, save = [], figures.save
        for module in (figures, data_figures):
            monkeypatch.setattr(module, 'save', lambda figure, *rest: (kept.append(figure), save(figure, *rest)))
        figures.main([str(folder)])
        return kept, capsys.readouterr().out
    return look


def on_top(figure):
    """caption -> number, as they stand on the picture."""
    texts = [text.get_text() for text in figure.axes[0].texts]
    return dict(zip(texts[1::2], texts[::2]))


def panel(figure, title):
    return next((axes for axes in figure.axes if axes.get_title(loc='left').startswith(title)), None)


def sheet(figure):
    """Text beside each row -> the ids above its tiles."""
    rows = np.reshape(figure.axes, (-1, 6))
    return [(row[0].get_ylabel(), [axes.get_title().split('\n')[0] for axes in row]) for row in rows]


def test_counts_are_those_of_the_folder(drawn, looked, work):
    (numbers, photographs), out = looked(drawn)
    assert on_top(numbers) == {
        'training photographs': str(sum(SIZES) + NEW), 'test photographs': str(TEST), 'ids + new_whale': f'{len(SIZES)} + 1',
        'photographs of new_whale': f'{NEW} ({NEW / (sum(SIZES) + NEW):.0%})', 'ids with one photograph': str(SIZES.count(1)),
        'cannot be read': '0', 'greyscale, of 40': '0%'}
    heights = [bar.get_height() for bar in panel(numbers, 'ids by their number').patches]
    assert heights == [SIZES.count(number) for number in range(1, 11)]
    assert list(panel(numbers, 'photographs of each id').lines[0].get_ydata()) == sorted(SIZES, reverse=True)
    assert panel(numbers, 'shapes, median 2.00') and panel(numbers, f'sizes of {sum(SIZES) + NEW + TEST} photographs')
    assert panel(numbers, 'share of') is None  # there are no boxes
    rows = sheet(photographs)
    assert [beside for beside, _ in rows] == ['any'] * 2 + ['one whale'] * 3
    assert all(len(set(ids) - {''}) == 1 for beside, ids in rows if beside == 'one whale')
    for name in ('numbers', 'photographs'):
        assert f'written: results/eda/photos0_{name}.png' in out.replace(drawn.name, 'photos0')
        assert np.asarray(Image.open(work / f'results/eda/{drawn.name}_{name}.png').convert('RGB')).std() > 5


def test_tables_alone_are_enough(drawn, looked, tmp_path):
    folder = tmp_path / 'tables'
    folder.mkdir()
    for name in ('train.csv', 'sample_submission.csv'):
        shutil.copy(drawn / name, folder)
    (numbers,), _ = looked(folder)
    assert on_top(numbers)['training photographs'] == '40' and 'cannot be read' not in on_top(numbers)
    assert panel(numbers, 'shapes') is None
    names = pd.concat([pd.read_csv(folder / name)['Image'] for name in ('train.csv', 'sample_submission.csv')])
    write_frame(folder / 'image_sizes.csv', Image=names, width=300, height=100)
    write_frame(folder / 'bboxes.csv', Image=names[:20], x0=0, y0=0, x1=150, y1=100)
    (numbers,), _ = looked(folder)
    assert panel(numbers, 'shapes, median 3.00')
    cover = panel(numbers, 'share of 20 boxes').images[0].get_array()
    assert np.allclose(cover[:, :50], 1) and not cover[:, 50:].any()


def test_sizes_that_are_none_are_refused(photos, work, capsys):
    write_frame(photos / 'image_sizes.csv', Image=['a.jpg', 'b.jpg'], width=[10, 'wide'], height=[10, 10])
    with pytest.raises(SystemExit, match='2'):
        figures.main([str(photos)])
    assert 'line 3: b.jpg,wide,10' in capsys.readouterr().err


def test_a_broken_photograph_is_counted_and_left_out(photos, looked):
    images = sorted(os.listdir(photos / 'train'))
    cut(photos / 'train' / images[0])
    (photos / 'train' / images[1]).unlink()
    path = photos / 'train' / images[2]  # whole by head and tail, yet it does not decode
    data = path.read_bytes()
    path.write_bytes(data[:200] + data[-2:])
    (numbers, photographs), _ = looked(photos)
    assert on_top(numbers)['cannot be read'] == '3' and 'greyscale, of 37' in on_top(numbers)
    assert on_top(numbers)['training photographs'] == '40'
    titles = ' '.join(axes.get_title() for axes in photographs.axes)
    assert not any(name in titles for name in images[:3])


def test_greyscale_and_the_same_photograph_twice(photos, looked):
    table = pd.read_csv(photos / 'train.csv')
    one, two = (table['Image'][table['Id'] == name].iloc[0] for name in ('w_7', 'w_9'))
    shutil.copy(photos / 'train' / one, photos / 'train' / two)
    for name in table['Image'][table['Id'] == 'new_whale']:
        Image.open(photos / 'train' / name).convert('L').convert('RGB').save(photos / 'train' / name)
    (numbers, photographs), out = looked(photos)
    assert on_top(numbers)['greyscale, of 40'] == f'{NEW / 40:.0%}'
    assert '1 pairs of 40 photographs are nearly the same, 1 of them under two ids' in out
    beside, ids = sheet(photographs)[-1]
    assert beside == 'the same?' and set(ids) == {'w_7', 'w_9', ''}


def test_names_are_no_formulas(photos, looked):
    odd = {'w_9': '$\\frac{$', 'w_8': '_^{', 'w_7': 'x' * 200}  # the largest one is named beside its curve
    (photos / 'train' / '$a$^{.jpg').write_bytes((photos / 'test/t00.jpg').read_bytes())
    edit_table(photos, lambda table: first_row(Image='$a$^{.jpg')(table.assign(Id=table['Id'].replace(odd))))
    (numbers, photographs), _ = looked(photos)
    assert '$\\frac{$: 5' in [text.get_text() for text in panel(numbers, 'photographs of each id').texts]


def test_a_name_that_a_person_gave_is_no_id_of_the_pictures(photos, looked):
    (photos / 'reviewed.csv').write_text('Image,Id\nt00.jpg,w_new\n')
    (numbers, photographs), out = looked(photos)
    assert 'w_new' not in out and panel(numbers, 'photographs of each id').lines


def test_size_by_the_header(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.new('RGB', (40, 20)).save(tmp_path / 'turned.jpg', exif=exif)
    Image.new('L', (40, 20)).save(tmp_path / 'plain.png')
    Image.effect_noise((40, 20), 50).save(tmp_path / 'rubbish.png')
    damaged = bytearray((tmp_path / 'rubbish.png').read_bytes())
    damaged[60] ^= 255  # in the pixels: sound for those who look at the header and the end
    (tmp_path / 'rubbish.png').write_bytes(damaged)
    assert np.isnan(read_size(tmp_path / 'rubbish.png')).all() and np.isnan(read_size(tmp_path / 'absent.png')).all()
    assert read_size(tmp_path / 'turned.jpg') == (20, 40) and read_size(tmp_path / 'plain.png') == (40, 20)
