"""test.py --enrol: new animals join the gallery without training."""
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.conftest import (
    answers,
    assert_refused,
    cut,
    draw,
    edit_table,
    fold_images,
    owner_of,
    scores,
    snapshot,
    write_frame,
)
from utils.member import Member


@pytest.fixture
def season(drawn, tmp_path):
    """Two new animals with two photographs each, and one more of a known one: a folder of folders."""
    rng = np.random.default_rng(5)
    for animal, name in [(500, 'w_new1'), (501, 'w_new2')]:
        (tmp_path / 'season' / name).mkdir(parents=True)
        for number in range(2):
            draw(tmp_path / 'season' / name / f'{number}.jpg', animal, rng)
    (tmp_path / 'season' / 'w_3').mkdir()
    draw(tmp_path / 'season/w_3/0.jpg', 3, rng)
    return tmp_path / 'season'


def test_enrolled_animals_are_answered_and_the_others_stay_as_they_were(scripts, season, photos):
    trained, rng = scripts, np.random.default_rng(9)
    trained.train(max_iters=60, eval_every=60, lr=3e-3)
    draw(photos / 'test/t05.jpg', 500, rng)  # now a photograph of the new animal
    before = scores(trained.answer(data_dir=photos, gallery_weight=0.5, threshold=0.5).folder)[0]
    enrolled = trained.answer(data_dir=photos, enrol=season)
    assert '5 photographs enrolled, 0 were already; 3 ids' in enrolled.out and '2 ids beside the 10' in enrolled.out
    result = trained.answer(data_dir=photos, gallery_weight=0.5, threshold=0.5)
    after = scores(result.folder)[0]
    assert after.shape == (12, 12)
    others = [number for number in range(10) if number != 3]
    assert np.allclose(after[:, others], before[:, others], atol=5e-3)
    labels = answers(result.folder).set_index('Image')['Id']
    new = [label for label in labels['t05.jpg'].split() if label != 'new_whale']
    assert new[0] == 'w_new1' and after[5, 10] > 1.2 * after[5, 11]
    again = trained.answer(data_dir=photos, enrol=season)  # what is there already is not added twice
    assert '0 photographs enrolled, 5 were already' in again.out
    (season / 'w_3').rename(season / 'w_4')
    assert_refused(trained.answer(data_dir=photos, enrol=season), 'w_4/0.jpg', 'a photograph of w_3 already')


def test_enrolment_from_a_csv(trained, season):
    table = pd.DataFrame({'Image': ['0.jpg', '1.jpg'], 'Id': ['w_a', 'w_b']})
    table.to_csv(season / 'w_new1/animals.csv', index=False)
    assert '2 photographs enrolled, 0 were already; 2 ids' in trained.answer(enrol=season / 'w_new1/animals.csv').out


def test_photographs_of_the_fold_that_are_enrolled_validate_no_longer(trained, drawn, tmp_path):
    """They would find themselves. A later photograph of the same file name is another photograph."""
    new = next(image for image in fold_images('r') if owner_of(drawn, image) == 'new_whale')
    (tmp_path / 'named' / 'w_named').mkdir(parents=True)
    shutil.copy(drawn / 'train' / new, tmp_path / 'named/w_named' / new)
    assert '1 photographs enrolled' in trained.answer(enrol=tmp_path / 'named').out
    assert '(2 images)' in trained.answer().out
    draw(tmp_path / 'named/w_named' / new, 7, np.random.default_rng(1))
    assert '1 photographs enrolled, 0 were already' in trained.answer(enrol=tmp_path / 'named').out


def test_photographs_that_training_has_are_not_enrolled_again(trained, drawn, tmp_path):
    """Someone enrols the whole catalogue: the fold stays what it is."""
    for row in pd.read_csv(drawn / 'train.csv').query('Id != "new_whale"').itertuples():
        (tmp_path / 'all' / row.Id).mkdir(parents=True, exist_ok=True)
        shutil.copy(drawn / 'train' / row.Image, tmp_path / 'all' / row.Id)
    assert ' 0 photographs enrolled' in trained.answer(enrol=tmp_path / 'all').out
    assert '(3 images)' in trained.answer().out


def test_enrolling_needs_no_test_photographs_and_all_runs_or_none(trained, season, photos):
    (photos / 'sample_submission.csv').unlink()
    assert trained.answer(data_dir=photos, enrol=season).code == 0
    other = trained.train(run='other', max_iters=2, eval_every=2).folder
    cut(other / 'best.pth')
    (season / 'w_new3').mkdir()
    shutil.copy(season / 'w_new1/0.jpg', season / 'w_new3/1.jpg')
    (season / 'w_new1/0.jpg').unlink()
    before = snapshot(trained.answer(run='r').folder)['gallery_best.npz']
    assert_refused(trained.answer(run='r,other', enrol=season), 'other/best.pth')
    assert snapshot(Path('results/r'))['gallery_best.npz'] == before
    assert_refused(trained.answer(run='results/r/scores.npz', enrol=season), 'no gallery')


def test_boxes_of_enrolled_photographs_lie_beside_them(trained, season):
    write_frame(season / 'bboxes.csv', Image=['w_new1/0.jpg', '1.jpg'], x0=[5, 5], y0=[5, 5], x1=[80, 80], y1=[40, 40])
    assert '1 photographs with a box' in trained.answer(enrol=season).out


def test_a_table_with_other_ids_for_the_same_photographs_makes_the_gallery_anew(trained, photos):
    before = gallery(trained.answer(data_dir=photos))
    edit_table(photos, lambda table: table.assign(Id=table['Id'].mask(
        table['Id'].eq('new_whale') & ~table['Id'].duplicated(), 'w_3')))
    assert gallery(trained.answer(data_dir=photos)) == before + 1


def gallery(result):
    """How many photographs the gallery of an answer has."""
    assert result.code == 0
    with np.load(result.folder / 'gallery_best.npz') as file:
        return len(file['images'])


def test_what_cannot_be_enrolled_is_said_and_the_gallery_stays(trained, season):
    trained.answer()
    gallery = (trained.answer().folder / 'gallery_best.npz').read_bytes()
    assert_refused(trained.answer(enrol='nowhere'), 'nowhere')
    cut(season / 'w_new1/1.jpg')
    assert_refused(trained.answer(enrol=season), 'w_new1/1.jpg')
    (season / 'w_new1').rename(season / 'a name')
    assert_refused(trained.answer(enrol=season), 'space')
    (season / 'a name').rename(season / 'new_whale')
    assert_refused(trained.answer(enrol=season), 'new_whale')
    assert (trained.answer().folder / 'gallery_best.npz').read_bytes() == gallery


def test_a_gallery_of_other_weights_is_made_anew_unless_it_holds_enrolled_animals(trained, season):
    trained.answer()
    trained.train(max_iters=6, eval_every=2, lr=1e-4, checkPoint_start='last')
    assert trained.answer(checkPoint_start='last').code == 0
    trained.answer(enrol=season, checkPoint_start='last')
    trained.train(max_iters=8, eval_every=2, lr=2e-4, checkPoint_start='last')
    assert_refused(trained.answer(checkPoint_start='last'), 'other weights', 'enrol')


def test_of_two_that_enrol_at_once_the_second_is_refused_and_loses_nothing(trained, drawn, tmp_path, monkeypatch):
    for name in ('a', 'b'):
        (tmp_path / name / f'new_{name}').mkdir(parents=True)
        shutil.copy(drawn / f'test/t0{"ab".index(name)}.jpg', tmp_path / name / f'new_{name}')
    real = Member.enrol

    def meanwhile(self, frame):
        monkeypatch.setattr(Member, 'enrol', real)
        assert trained.answer(enrol=tmp_path / 'a').code == 0
        return real(self, frame)

    monkeypatch.setattr(Member, 'enrol', meanwhile)
    assert_refused(trained.answer(enrol=tmp_path / 'b'), 'another test.py wrote', 'run this again')
    with np.load('results/r/gallery_best.npz') as file:
        assert set(file['owners'][file['enrolled']]) == {'new_a'}
    assert trained.answer(enrol=tmp_path / 'b').code == 0
