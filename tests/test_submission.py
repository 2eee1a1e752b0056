"""test.py: from a checkpoint to submission.csv."""
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch

import test as answer
from tests.conftest import (
    add_photographs,
    assert_refused,
    cut,
    draw,
    edit_table,
    first_row,
    snapshot,
    spy_on_batches,
    write_frame,
)
from utils import member
from utils.metrics import score_submission


@pytest.fixture
def trained(scripts):
    """The scripts, and a training of four iterations in results/r."""
    assert scripts.train(max_iters=4, eval_every=2).code == 0
    return scripts


def answers(folder):
    return pd.read_csv(folder / 'submission.csv')


def scores(folder):
    with np.load(folder / 'scores.npz') as file:
        return file['scores'].astype(float), file['threshold'].item()


def test_a_submission_has_five_different_labels_in_the_samples_order(trained, drawn):
    result = trained.answer(matches=3)
    assert result.code == 0
    table, sample = answers(result.folder), pd.read_csv(drawn / 'sample_submission.csv')
    assert list(table) == ['Image', 'Id'] and table['Image'].tolist() == sample['Image'].tolist()
    known = {'new_whale', *pd.read_csv(drawn / 'train.csv')['Id']}
    for labels in table['Id'].str.split():
        assert len(labels) == len(set(labels)) == 5 and set(labels) <= known
    assert (result.folder / 'matches.png').stat().st_size > 1000
    assert 'validation MAP@5' in result.out


def test_the_samples_order_is_followed_whatever_it_is(trained, photos):
    first = trained.answer()
    one = answers(first.folder).set_index('Image')['Id']
    sample = pd.read_csv(photos / 'sample_submission.csv')[::-1]
    sample.to_csv(photos / 'sample_submission.csv', index=False)
    other = answers(trained.answer(data_dir=photos).folder)
    assert other['Image'].tolist() == sample['Image'].tolist()
    assert other['Id'].tolist() == one[sample['Image']].tolist()


def test_the_same_command_gives_the_same_bytes(trained):
    first = snapshot(trained.answer().folder)
    assert snapshot(trained.answer().folder)['submission.csv'] == first['submission.csv']


def test_answers_stand_in_the_order_of_the_scores(trained, drawn):
    folder = trained.answer(gallery_weight=0.5, threshold=0.5).folder
    table, (final, threshold) = answers(folder), scores(folder)
    ids = sorted(set(pd.read_csv(drawn / 'train.csv')['Id']) - {'new_whale'})
    assert threshold == 0.5
    for labels, row in zip(table['Id'].str.split(), final):
        row = dict(zip(ids, row), new_whale=threshold)
        assert (np.diff([row[label] for label in labels]) <= 1e-3).all()


def test_several_checkpoints_are_averaged(trained):
    fixed = dict(gallery_weight=0.25, threshold=0.5)
    best = torch.load('results/r/step1_000002.pth', weights_only=True)['iteration']
    one = scores(trained.answer(checkPoint_start=best, **fixed).folder)[0]
    other = scores(trained.answer(checkPoint_start='last', **fixed).folder)[0]
    mean = scores(trained.answer(checkPoint_start=f'{best},last', **fixed).folder)[0]
    assert abs(one - other).max() > 2e-3
    assert np.allclose(mean, (one + other) / 2, atol=1e-3)


def test_weight_and_threshold_are_chosen_on_validation(trained, monkeypatch):
    asked = []
    for module in (answer, member):
        monkeypatch.setattr(module, 'choose_threshold', lambda scores, truth: asked.append(len(scores)) or (0.25, 0.5))
    folder = trained.answer().folder
    assert set(asked) == {3}  # the fold has 2 ids and 1 new_whale
    assert scores(folder)[1] == 0.25


@pytest.mark.parametrize('share', [0.25, 0.5, 0.75])
def test_new_whale_share(trained, share):
    table = answers(trained.answer(new_whale_share=share).folder)
    first = table['Id'].str.split().str[0]
    assert (first == 'new_whale').mean() == pytest.approx(share, abs=1 / len(table))


@pytest.mark.parametrize('threshold', [-1.0, 0.0, 0.5])
def test_what_cannot_be_read_is_answered_with_new_whale(trained, photos, threshold):
    bad = cut(photos / 'test/t03.jpg')
    refused = trained.answer(data_dir=photos)
    assert_refused(refused, bad, 'skip_bad_images')
    assert not (refused.folder / 'submission.csv').exists()
    result = trained.answer(data_dir=photos, skip_bad_images=True, threshold=threshold)
    table = answers(result.folder).set_index('Image')['Id']
    assert table[bad].split()[0] == 'new_whale'
    others = table.drop(bad)
    if threshold == 0:
        assert not others.str.contains('new_whale').any()


def test_unreadable_training_images_are_left_out_of_the_gallery(scripts, photos):
    cut(sorted((photos / 'train').iterdir())[0])
    settings = dict(data_dir=photos, skip_bad_images=True)
    assert scripts.train(max_iters=1, **settings).code == 0
    assert scripts.answer(**settings).code == 0


def test_a_checkpoint_of_other_ids_is_refused(trained, photos):
    before = snapshot(trained.answer().folder)
    edit_table(photos, first_row(Id='w_another'))
    result = trained.answer(data_dir=photos)
    assert_refused(result, 'other ids', 'train.csv')
    assert snapshot(result.folder) == before


def test_the_images_that_the_training_left_out_validate_whatever_comes_to_the_table(trained, photos, work, monkeypatch):
    seen = []
    monkeypatch.setattr(member, 'predict', lambda net, crops, rows, *args, real=member.predict, **kwargs:
                        seen.append(list(rows)) or real(net, crops, rows, *args, **kwargs))
    left_out = torch.load(work / 'results/r/best.pth', weights_only=True)['fold_images']
    add_photographs(photos)
    trained.answer(data_dir=photos)
    images = sorted(pd.read_csv(photos / 'train.csv')['Image'])
    assert [images[row] for row in seen[0]] == left_out


def test_answers_do_not_depend_on_how_many_images_are_seen_at_a_time(trained):
    folder = trained.answer().folder
    names, table = (folder / 'submission.csv').read_text(), scores(folder)[0]
    trained.answer(batch_size=5)  # 12 images: the last batch has two
    assert (folder / 'submission.csv').read_text() == names
    assert np.allclose(scores(folder)[0], table, atol=2e-3)


def test_members_of_other_folds_and_their_own_validation(trained, work, monkeypatch):
    """Each validation image counts the members that did not learn from it; a warning says that they differ."""
    trained.train(run='other', fold=1, max_iters=4, eval_every=2, seed=1)
    fixed = dict(gallery_weight=0.25, threshold=0.5)
    alone = [scores(trained.answer(run=run, **fixed).folder)[0] for run in ('r', 'other')]
    asked = []
    monkeypatch.setattr(answer, 'choose_threshold', lambda table, truth, real=answer.choose_threshold:
                        asked.append((table, truth)) or real(table, truth))
    both = trained.answer(run='r,other', weights='(3, 1)', **fixed)
    assert 'different images' in both.out and both.out.count('validation MAP@5') == 5
    assert len(asked[-1][0]) == 6 - len(set(fold_images('r')) & set(fold_images('other')))
    assert asked[-1][0].isfinite().all() and (asked[-1][0] <= 1).all()
    from_files = trained.answer(run='results/r/scores.npz,results/other/scores.npz', weights='(3, 1)', threshold=0.5)
    assert from_files.code == 0
    assert_same_answers(work / 'results/ensemble', 0.75 * alone[0] + 0.25 * alone[1])


def fold_images(run):
    return torch.load(f'results/{run}/best.pth', weights_only=True)['fold_images']


def assert_same_answers(folder, mean, threshold=0.5):
    """The first label of each image is that of these scores, where float16 leaves no doubt."""
    labels = answers(folder)['Id'].str.split().str[0].tolist()
    with np.load('results/r/scores.npz') as file:
        ids = file['ids'].tolist()
    for label, row in zip(labels, mean):
        top = np.sort(row)[-2:]
        if abs(top[1] - threshold) > 2e-3 and top[1] - top[0] > 2e-3:
            assert label == (ids[row.argmax()] if top[1] >= threshold else 'new_whale')


def test_members_must_fit_each_other(trained):
    trained.answer()
    assert_refused(trained.answer(run='r,results/r/scores.npz', weights='(1, 2, 3)'), 'weights', '2 members')
    with np.load('results/r/scores.npz') as file:
        content = dict(file)
    np.savez('results/other.npz', **dict(content, images=content['images'][::-1]))
    assert_refused(trained.answer(run='r,results/other.npz'), 'other images')
    np.savez('results/other.npz', **dict(content, ids=content['ids'][::-1]))
    assert_refused(trained.answer(run='r,results/other.npz'), 'other ids')
    np.savez('results/other.npz', images=content['images'])
    assert_refused(trained.answer(run='r,results/other.npz'), 'other.npz', 'cannot be read')
    cut(Path('results/other.npz'))
    assert_refused(trained.answer(run='r,results/other.npz'), 'other.npz', 'cannot be read')
    assert_refused(trained.answer(run='gone.npz'), 'gone.npz', 'cannot be read')
    assert trained.answer(run='results/r/scores.npz', new_whale_share=0.5).code == 0


def test_a_submission_for_the_photographs_of_the_fold_scores_as_validation_did(trained, photos):
    """So the threshold is applied once, and to the same scores. The gallery, which knows these photographs, is left out."""
    images = fold_images('r')
    shutil.rmtree(photos / 'test')
    (photos / 'test').mkdir()
    for image in images:
        shutil.copy(photos / 'train' / image, photos / 'test' / f't{image}')
    write_frame(photos / 'sample_submission.csv', Image=[f't{image}' for image in images], Id='new_whale')
    write_frame(photos / 'truth.csv', Image=[f't{image}' for image in images], Id=[owner_of(photos, image) for image in images])
    result = trained.answer(data_dir=photos, gallery_weight=0.0)
    said = re.search(r'validation MAP@5 ([0-9.]+) at threshold', result.out)[1]
    assert f'{score_submission(result.folder / "submission.csv", photos / "truth.csv")["map5"]:.3f}' == said


# Enrolment

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
    assert_refused(trained.answer(data_dir=photos, enrol=season), 'w_4/0.jpg', 'enrolled as w_3')


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


def owner_of(data, image):
    return pd.read_csv(data / 'train.csv').set_index('Image')['Id'][image]


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
    trained.answer(data_dir=photos)
    edit_table(photos, lambda table: table.assign(Id=table['Id'].mask(
        table['Id'].eq('new_whale') & ~table['Id'].duplicated(), 'w_3')))
    assert trained.answer(data_dir=photos).code == 0


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


# Distillation

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
    seen = set(spy.data.train['Image'].iloc[spy.rows])
    assert 't02.jpg' not in seen and len(seen & set(table['Image'])) >= 9  # in 30 batches most have their turn
    assert fold_images('distilled') == fold_images('r')
    weight = spy.data.weight[torch.tensor((spy.data.train['source'] == 'pseudo').tolist())]
    assert (weight == 0.5).all() and len(weight) == 12 and spy.data.weight.sum() == 6 + len(spy.data.train) - 12


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


def test_without_a_file_of_pseudo_labels(trained):
    assert_refused(trained.train(run='other', pseudo_label_weight=1.0), 'pseudo_labels.csv', 'pseudo_label_min_score')


def test_where_a_mirror_is_the_same_animal_both_scripts_work(scripts):
    folder = scripts.train(flip_is_new_id=False, max_iters=3).folder
    assert torch.load(folder / 'best.pth', weights_only=True)['model']['head.weight'].shape[0] == 10
    assert scripts.answer().code == 0
    assert scores(folder)[0].shape == (12, 10)


def test_a_validation_image_is_not_in_its_own_gallery(trained, monkeypatch):
    """Each validation image is looked for among the images that are not in the fold."""
    calls = []

    class Spy(member.Gallery):
        def __init__(self, embeddings, *args):
            super().__init__(embeddings, *args)
            calls.append(('gallery', embeddings))

        def scores(self, queries):
            calls.append(('queries', queries))
            return super().scores(queries)

    monkeypatch.setattr(member, 'Gallery', Spy)
    trained.answer()
    (_, gallery), (kind, queries), (_, whole), *_ = calls
    assert kind == 'queries' and len(whole) - len(gallery) == 2  # ids in the fold
    same = (queries.flatten(1)[:, None] - gallery.flatten(1)[None]).abs().amax(2) < 1e-6
    assert not same.any()


def test_a_bad_setting_is_refused_and_nothing_written(trained):
    folder = trained.answer().folder
    before = snapshot(folder)
    for settings, words in [
            (dict(run='nothing'), ['checkpoint', 'nothing']), (dict(checkPoint_start=77), ['iteration 77']),
            (dict(checkPoint_start='best,gone.pth'), ['gone.pth']),
            (dict(data_dir='nowhere'), ['nowhere', 'train.csv']),
            (dict(views=2), ['views']), (dict(threshold=2), ['threshold']),
            (dict(gallery=1), ['gallery', 'gallery_weight'])]:
        assert_refused(trained.answer(**settings), *words)
        assert snapshot(folder) == before


def test_no_test_photographs(trained, photos):
    (photos / 'sample_submission.csv').unlink()
    assert_refused(trained.answer(data_dir=photos), 'sample_submission.csv')
