"""The drawn sample: the same bytes each time, Kaggle's layout, the shape of class sizes, mirrored twins."""
import os
import subprocess
import sys

import cv2
import numpy as np
import pandas as pd
import pytest

from data import make_sample
from data.make_sample import draw_animal, draw_sample, plan_photographs
from data.tables import load_tables
from utils.errors import UserError

few = 5     # ids: about forty photographs


@pytest.fixture(scope='module')
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp('drawn') / 'sample'
    assert draw_sample(folder, seed=3, num_ids=few)
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def test_same_bytes_whoever_draws(sample, tmp_path):
    draw_animal.cache_clear()
    cv2.setNumThreads(1)
    draw_sample(tmp_path / 'again', seed=3, num_ids=few)
    cv2.setNumThreads(-1)
    assert contents(tmp_path / 'again') == contents(sample)


def test_another_seed_is_another_sample(sample, tmp_path):
    draw_sample(tmp_path / 'other', seed=4, num_ids=few)
    drawn = {name for name in contents(tmp_path / 'other') if name.endswith('.jpg')}
    assert drawn and not drawn & set(contents(sample))


def test_drawn_once(sample, capsys):
    before = {path: path.stat().st_mtime_ns for path in sample.rglob('*')}
    assert not draw_sample(sample, seed=3, num_ids=few)
    assert 'already' in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in sample.rglob('*')}


@pytest.mark.parametrize('name, text', [('train.csv', 'Image,Id\n'), ('sample.json', '{"version": 0}')])
def test_another_folder_or_sample_is_left_alone(tmp_path, name, text):
    """The labels that a person has given to a sample's photographs lie beside them."""
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match='something else than this sample: remove it'):
        draw_sample(tmp_path, num_ids=2)
    assert contents(tmp_path) == {name: text.encode()}


def test_a_sample_that_is_no_longer_whole_is_said_to_be_so(tmp_path):
    draw_sample(tmp_path / 'sample', num_ids=2)
    gone = next((tmp_path / 'sample/train').iterdir())
    gone.unlink()
    with pytest.raises(UserError, match=f'train/{gone.name} is not there'):
        draw_sample(tmp_path / 'sample', num_ids=2)


def test_an_empty_folder_is_filled_under_a_bar(tmp_path, capsys):
    assert draw_sample(tmp_path, num_ids=2) and (tmp_path / 'train.csv').is_file()
    assert 'photographs: 100%' in capsys.readouterr().err


def test_interrupted_leaves_nothing(tmp_path, monkeypatch):
    def stop(job):
        raise KeyboardInterrupt
    monkeypatch.setattr(make_sample, 'write_photograph', stop)
    with pytest.raises(KeyboardInterrupt):
        draw_sample(tmp_path / 'sample', num_ids=2)
    assert os.listdir(tmp_path) == []


def test_kaggle_layout(sample):
    tables = load_tables(sample)
    assert tables.num_ids == few
    plan = plan_photographs(3, few)
    for split, frame in (('train', tables.train), ('test', tables.test)):
        assert sorted(frame['Image']) == sorted(plan.Image[plan.split == split])
        assert frame[['x0', 'y0', 'x1', 'y1']].notna().all(axis=None) and frame['mask_path'].notna().all()
    submission = pd.read_csv(sample / 'sample_submission.csv')
    assert submission.Image.tolist() == pd.read_csv(sample / 'test_labels.csv').Image.tolist()
    assert plan.Image.str.fullmatch('[0-9a-f]{9}.jpg').all()
    assert plan.Id.str.fullmatch('w_[0-9a-f]{7}|new_whale').all()


def test_boxes_hold_the_masks(sample):
    frame = pd.concat([load_tables(sample).train, load_tables(sample).test])
    for row in frame.itertuples():
        mask, image = cv2.imread(row.mask_path, cv2.IMREAD_UNCHANGED), cv2.imread(row.path)
        assert mask.shape == image.shape[:2] and set(np.unique(mask)) == {0, 255}
        assert 300 <= mask.shape[1] <= 420
        x, y, w, h = cv2.boundingRect(mask)
        slack = np.array([x - row.x0, y - row.y0, row.x1 - x - w, row.y1 - y - h]) / [w, h, w, h]
        assert slack.min() > -0.05 and slack.max() < 0.1
        assert 0 <= row.x0 < row.x1 <= mask.shape[1] and 0 <= row.y0 < row.y1 <= mask.shape[0]


@pytest.mark.parametrize('seed', range(3))
def test_class_sizes(seed):
    plan = plan_photographs(seed, make_sample.num_ids)
    train, test = plan[plan.split == 'train'], plan[plan.split == 'test']
    sizes = train.Id.value_counts()
    new = sizes.pop('new_whale')
    assert len(sizes) == make_sample.num_ids and plan.Image.is_unique
    assert 0.38 <= (sizes == 1).mean() <= 0.42 and 10 <= sizes.max() <= make_sample.max_images
    assert 0.36 <= new / len(train) <= 0.40
    known = test[test.Id != 'new_whale']
    assert 0.28 <= 1 - len(known) / len(test) <= 0.32
    assert set(known.Id) <= set(sizes.index) and 0.1 < (sizes[known.Id] == 1).mean() < 0.3
    # unnamed animals: never an id's, never in both parts, some of them twice
    unnamed = [frame.animal[frame.Id == 'new_whale'] for frame in (train, test)]
    assert not set(unnamed[0]) & set(unnamed[1]) and min(map(min, unnamed)) >= make_sample.num_ids
    assert all(animals.duplicated().any() for animals in unnamed)


def test_mirrored_twins():
    ids = 40
    pictures = np.stack([draw_animal(0, animal, ids).prod(-1) for animal in range(ids)])
    flat = pictures.reshape(ids, -1) - pictures.reshape(ids, -1).mean(1, keepdims=True)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    likeness = flat @ flat.reshape(pictures.shape)[..., ::-1].reshape(ids, -1).T
    twins = likeness > 0.85
    assert np.array_equal(twins.nonzero()[0], [16, 17, 18, 19, 36, 37, 38, 39])   # a tenth, and their twins
    assert not twins.diagonal().any()     # left differs from right
    assert likeness[36, 16] < 0.9999      # nearly the mirror, not quite


def test_command_line_refuses_clearly(tmp_path):
    (tmp_path / 'mine.txt').touch()
    command = [sys.executable, '-m', 'data.make_sample', '--out', tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith('error: ') and len(done.stderr.splitlines()) == 1
