"""test.py: the mean of several trainings, and of saved scores."""
from pathlib import Path

import numpy as np

import test as answer
from tests.conftest import answers, assert_refused, cut, fold_images, scores


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
