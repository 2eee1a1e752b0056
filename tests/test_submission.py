"""test.py: from a checkpoint to submission.csv."""
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import test as answer
from tests.conftest import (
    add_photographs,
    answers,
    assert_refused,
    cut,
    edit_table,
    first_row,
    fold_images,
    owner_of,
    scores,
    snapshot,
    write_frame,
)
from utils import member
from utils.metrics import score_submission


def test_a_submission_has_five_different_labels_in_the_samples_order(trained, drawn):
    result = trained.answer(matches=3)
    assert result.code == 0
    table, sample = answers(result.folder), pd.read_csv(drawn / 'sample_submission.csv')
    assert list(table) == ['Image', 'Id'] and table['Image'].tolist() == sample['Image'].tolist()
    known = {'new_whale', *pd.read_csv(drawn / 'train.csv')['Id']}
    for labels in table['Id'].str.split():
        assert len(labels) == len(set(labels)) == 5 and set(labels) <= known
    for name in ('matches.png', 'distances.png'):
        assert (result.folder / name).stat().st_size > 1000
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
    folder = trained.answer().folder
    first = snapshot(folder)
    assert snapshot(trained.answer().folder)['submission.csv'] == first['submission.csv']


def test_other_names_for_the_ids_permute_the_answers_and_nothing_else(trained, photos):
    """The network stays: its classifiers move to the new places of their ids, in both halves."""
    file = Path('results/r/best.pth')
    state = torch.load(file, weights_only=True)
    head = {name: torch.randn(state['model'][name].shape, generator=torch.Generator().manual_seed(0))
            for name in ('head.weight', 'head.bias')}  # (20, 24), (20,)

    def answer_with(rows, ids):
        model = {**state['model'], **{name: part[rows] for name, part in head.items()}}
        torch.save({**state, 'model': model, 'ids': ids}, file)
        folder = trained.answer(data_dir=photos, gallery_weight=0.5).folder
        return *scores(folder), answers(folder)['Id']

    one, threshold, labels = answer_with(torch.arange(20), state['ids'])
    place = np.random.default_rng(0).permutation(10)  # of the old ids among the new names
    names = {f'w_{old}': f'animal{new}' for old, new in enumerate(place)}
    edit_table(photos, lambda table: table.assign(Id=table['Id'].replace(names)))
    back = place.argsort()
    other, threshold_after, labels_after = answer_with(np.concatenate([back, 10 + back]), sorted(names.values()))
    assert np.allclose(other[:, place], one, atol=1e-3) and threshold_after == pytest.approx(threshold, abs=1e-3)
    assert one.std(1).min() > 0.02 and labels_after.tolist() == labels.replace(names, regex=True).tolist()


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


def test_a_fold_without_new_whale_is_said_to_tell_nothing_of_new_animals(scripts, photos):
    table = pd.read_csv(photos / 'train.csv')
    table[table['Id'] != 'new_whale'].to_csv(photos / 'train.csv', index=False)
    assert scripts.train(data_dir=photos, max_iters=2).code == 0
    assert 'tells nothing of new animals' in scripts.answer(data_dir=photos).out


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
            (dict(checkPoint_start='best,gone.pth'), ['gone.pth']), (dict(checkPoint_start='²'), ['²']),
            (dict(data_dir='nowhere'), ['nowhere', 'train.csv']),
            (dict(views=2), ['views']), (dict(threshold=2), ['threshold']),
            (dict(gallery=1), ['gallery', 'gallery_weight'])]:
        assert_refused(trained.answer(**settings), *words)
        assert snapshot(folder) == before


def test_no_test_photographs(trained, photos):
    (photos / 'sample_submission.csv').unlink()
    assert_refused(trained.answer(data_dir=photos), 'sample_submission.csv')
