"""Pseudo-labels: test.py writes them, train.py learns from them."""
import shutil

import cv2
import numpy as np
import pandas as pd
import torch

from tests.conftest import (
    answers,
    assert_refused,
    draw,
    fold_images,
    spy_on_batches,
)


def test_pseudo_labels_are_learned_from_but_never_what_validates(trained, photos, monkeypatch):
    twin = fold_images('r')[0]  # a photograph of the fold lies in the test set too, compressed anew
    cv2.imwrite(str(photos / 'test/t02.jpg'), cv2.imread(str(photos / 'train' / twin)), [cv2.IMWRITE_JPEG_QUALITY, 80])
    result = trained.answer(data_dir=photos, threshold=0.3, pseudo_label_min_score=0.0001, pseudo_new_max_score=0.0)
    table = pd.read_csv(photos / 'pseudo_labels.csv')
    assert 'pseudo_labels.csv' in result.out and len(table) == 12 and list(table) == ['Image', 'Id', 'score']
    spy = spy_on_batches(monkeypatch)
    learned = trained.train(run='distilled', data_dir=photos, pseudo_label_weight=0.5, max_iters=30)
    assert learned.code == 0
    assert '1 images left out of training that show a photograph of the fold: t02.jpg' in learned.out
    assert 'test images show' not in learned.out  # each is in training under its own name
    seen = set(spy.data.train['Image'].iloc[spy.rows])
    assert 't02.jpg' not in seen and len(seen & set(table['Image'])) >= 9  # in 30 batches most have their turn
    assert fold_images('distilled') == fold_images('r')
    weight = spy.data.weight[torch.tensor((spy.data.train['source'] == 'pseudo').tolist())]
    assert (weight == 0.5).all() and len(weight) == 12 and spy.data.weight.sum() == 6 + len(spy.data.train) - 12
    assert '1 test images show a photograph of train.csv: t02.jpg' in trained.train(run='plain', data_dir=photos, max_iters=1).out


def test_pseudo_labels_of_the_playground(trained, photos):
    """Copies of training photographs have their ids; ids that were only enrolled are no labels."""
    (photos / 'playground/train').mkdir(parents=True)
    twin, other = pd.read_csv(photos / 'train.csv').query('Id == "w_9"')['Image'].iloc[0], 'p1.jpg'
    cv2.imwrite(str(photos / 'playground/train/p0.jpg'), cv2.imread(str(photos / 'train' / twin)), [cv2.IMWRITE_JPEG_QUALITY, 80])
    draw(photos / 'playground/train' / other, 700, np.random.default_rng(3))
    result = trained.answer(data_dir=photos, pseudo_label_min_score=0.0001, pseudo_new_max_score=0.0)
    table = pd.read_csv(photos / 'pseudo_labels.csv').set_index('Image')
    assert table.loc['p0.jpg', 'Id'] == 'w_9' and table.loc['p0.jpg', 'score'] == 1 and len(table) == 14
    assert '1 of the playground images are photographs of train.csv' in result.out and len(answers(result.folder)) == 12
    assert_refused(trained.answer(data_dir=photos, pseudo_label_min_score=0.3, pseudo_new_max_score=0.4), 'pseudo_new_max_score')


def test_enrolled_ids_are_no_pseudo_labels(trained, photos, tmp_path):
    for number in range(6):  # these test photographs find themselves
        (tmp_path / f'all/e{number}').mkdir(parents=True)
        shutil.copy(photos / f'test/t{number:02d}.jpg', tmp_path / f'all/e{number}')
    trained.answer(data_dir=photos, enrol=tmp_path / 'all')
    trained.answer(data_dir=photos, pseudo_label_min_score=0.0001, pseudo_new_max_score=0.0)
    assert not pd.read_csv(photos / 'pseudo_labels.csv')['Id'].str.startswith('e').any()
    assert trained.train(run='distilled', data_dir=photos, pseudo_label_weight=0.5, max_iters=1).code == 0


def test_saved_scores_give_pseudo_labels_by_name(trained, photos):
    """An id that has joined train.csv since moves the numbers of those behind it."""
    saved = trained.answer(data_dir=photos).folder / 'scores.npz'
    settings = dict(data_dir=photos, run=saved, pseudo_label_min_score=0.0001, pseudo_new_max_score=0.0)
    assert trained.answer(**settings).code == 0
    before = pd.read_csv(photos / 'pseudo_labels.csv').set_index('Image')
    with open(photos / 'reviewed.csv', 'a') as file:
        file.write('Image,Id\nt00.jpg,a_new_name\n')
    assert trained.answer(**settings).code == 0
    after = pd.read_csv(photos / 'pseudo_labels.csv').set_index('Image')
    assert (after['Id'] == before['Id'][after.index]).all() and len(after) > 9


def test_a_test_photograph_that_was_replaced_is_compared_anew(trained, photos):
    assert 'test images show' not in trained.train(data_dir=photos, run='before', max_iters=1).out
    copied = pd.read_csv(photos / 'train.csv')['Image'].iloc[0]
    cv2.imwrite(str(photos / 'test/t02.jpg'), cv2.imread(str(photos / 'train' / copied)), [cv2.IMWRITE_JPEG_QUALITY, 80])
    assert '1 test images show a photograph' in trained.train(data_dir=photos, run='after', max_iters=1).out


def test_without_a_file_of_pseudo_labels(trained):
    assert_refused(trained.train(run='other', pseudo_label_weight=1.0), 'pseudo_labels.csv', 'pseudo_label_min_score')
