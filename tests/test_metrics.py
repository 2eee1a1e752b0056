"""MAP@5, the threshold and submissions, against scikit-learn and against plain loops."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import label_ranking_average_precision_score, top_k_accuracy_score

from utils.errors import UserError
from utils.metrics import (
    average_precision,
    best_ids,
    check_submission,
    choose_threshold,
    insert_new_whale,
    main,
    map_at_5,
    rank_of_truth,
    score_submission,
    top_k,
    write_submission,
)


def top5(scores, threshold):
    return insert_new_whale(*best_ids(scores), scores.shape[1], threshold)


def random_case(seed, queries=40, n_ids=12, levels=None, new_share=0.3):
    """Scores with many ties when `levels` is given."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(queries, n_ids, generator=generator)
    if levels:
        scores = (scores * levels).floor() / levels
    truth = torch.randint(n_ids, (queries,), generator=generator)
    scores[torch.arange(queries), truth] += 0.25
    truth[torch.rand(queries, generator=generator) < new_share] = n_ids
    return scores, truth


def naive_list(scores, threshold):
    """One row's answers, best first."""
    order = sorted(range(len(scores)), key=lambda k: (-scores[k], k))
    above = [k for k in order if scores[k] >= threshold]
    return above + [len(scores)] + order[len(above):]


def naive_map5(scores, truth, threshold):
    total = 0
    for row, answer in zip(scores.tolist(), truth.tolist()):
        place = naive_list(row, threshold).index(answer)
        total += 1 / (place + 1) if place < 5 else 0
    return total / len(truth)


def brute_force_threshold(scores, truth):
    values = sorted(set(scores.flatten().tolist()))
    return max(naive_map5(scores, truth, t) for t in values + [values[-1] + 1])


cases = pytest.mark.parametrize('case', [
    dict(seed=0), dict(seed=1, levels=4), dict(seed=2, n_ids=1), dict(seed=3, n_ids=3, levels=2),
    dict(seed=4, n_ids=5), dict(seed=5, n_ids=6, levels=1), dict(seed=6, new_share=0),
    dict(seed=7, new_share=1)], ids=str)


@cases
@pytest.mark.parametrize('threshold', [-1, 0.5, 0.75, 2])
def test_ranks_and_answers_are_those_of_a_plain_list(case, threshold):
    scores, truth = random_case(**case)
    lists = [naive_list(row, threshold) for row in scores.tolist()]
    ranks = rank_of_truth(scores, truth, threshold)
    assert ranks.dtype == torch.int64
    assert ranks.tolist() == [answers.index(t) for answers, t in zip(lists, truth.tolist())]
    assert top5(scores, threshold).tolist() == [answers[:5] for answers in lists]
    assert map_at_5(ranks).item() == pytest.approx(naive_map5(scores, truth, threshold))


def test_the_fifth_answer_is_the_first_of_many_equal_ones():
    generator = torch.Generator().manual_seed(0)
    scores = torch.zeros(20, 3000)
    columns = torch.rand(20, 3000, generator=generator).argsort(1)[:, :4]
    scores.scatter_(1, columns, torch.tensor([[0.9, 0.8, 0.7, 0.6]] * 20))
    assert top5(scores, -1).tolist() == [naive_list(row, -1)[:5] for row in scores.tolist()]
    assert top5(torch.zeros(2, 3000), -1).tolist() == [[0, 1, 2, 3, 4]] * 2


def test_map5_is_that_of_scikit_learn():
    scores, truth = random_case(8, queries=300)
    columns = torch.cat([scores, torch.full((300, 1), 0.8)], 1).numpy()  # new_whale's score is the threshold
    ranks = rank_of_truth(scores, truth, 0.8)
    inside = (ranks < 5).numpy()
    assert 0.2 < inside.mean() < 0.95
    onehot = np.eye(13)[truth]
    expected = label_ranking_average_precision_score(onehot[inside], columns[inside]) * inside.mean()
    assert map_at_5(ranks).item() == pytest.approx(expected)
    for k in (1, 5):
        accuracy = top_k_accuracy_score(truth, columns, k=k, labels=range(13))
        assert top_k(ranks, k).item() == pytest.approx(accuracy)


def test_average_precision_of_each_place():
    expected = [1, 1 / 2, 1 / 3, 1 / 4, 1 / 5, 0, 0]
    torch.testing.assert_close(average_precision(torch.arange(7)), torch.tensor(expected))


def test_a_score_that_is_not_a_number_is_never_right():
    scores = torch.full((1, 8), float('nan'))
    assert map_at_5(rank_of_truth(scores, torch.tensor([3]), 0.5)) == 0


@cases
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
def test_the_threshold_is_the_best_there_is(case, dtype):
    scores, truth = random_case(**case)
    scores = scores.to(dtype)
    threshold, map5 = choose_threshold(scores, truth)
    assert np.isfinite(threshold)
    assert map5 == pytest.approx(brute_force_threshold(scores, truth), abs=1e-9)
    assert map_at_5(rank_of_truth(scores, truth, threshold)).item() == pytest.approx(map5)


def test_the_threshold_is_in_the_middle_of_the_widest_best_interval():
    # Row 0 knows whale 0 at 0.9; row 1 is new, its best guess has 0.3, so all of (0.3, 0.9] is perfect.
    scores = torch.tensor([[0.9, 0.1], [0.3, 0.2]])
    assert choose_threshold(scores, torch.tensor([0, 2])) == (pytest.approx(0.6), 1.0)
    # Rows 2 and 3 are never both right: (0.1, 0.4] and (0.5, 0.9] are equally good, the second is wider.
    scores = torch.tensor([[0.9], [0.1], [0.4], [0.5]])
    threshold, map5 = choose_threshold(scores, torch.tensor([0, 1, 0, 1]))
    assert (threshold, map5) == (pytest.approx(0.7), 3.5 / 4)
    # At 0.5 one row gains what another loses: (0.1, 0.9] is one interval.
    scores = torch.tensor([[0.9], [0.5], [0.5], [0.1]])
    threshold, map5 = choose_threshold(scores, torch.tensor([0, 0, 1, 1]))
    assert (threshold, map5) == (pytest.approx(0.5), 3.5 / 4)


@pytest.mark.parametrize('scores, truth, threshold, map5', [
    ([0.5, 0.9], [0, 0], 0.4, 1),  # below all; the scores reach over 0.4, half of which is the interval's
    ([0.5, 0.9], [1, 1], 1.0, 1),
    ([0.5, 0.9, 0.8], [0, 1, 1], 2.9 / 3, 2.5 / 3),
    ([0.6], [0], 0.1, 1), ([0.6], [1], 1.1, 1),  # one score reaches over nothing: 1
    ([0.9, 0.9], [0, 1], 0.5, 0.75),  # any threshold does as well
])
def test_an_open_end_counts_as_wide_as_an_average_interval(scores, truth, threshold, map5):
    assert choose_threshold(torch.tensor(scores)[:, None], torch.tensor(truth)) == (pytest.approx(threshold), pytest.approx(map5))


def test_the_threshold_between_neighbouring_floats():
    low = torch.tensor(0.5)
    high = low.nextafter(torch.tensor(1.0))
    for _ in range(2):
        scores, truth = torch.stack([low, high])[:, None], torch.tensor([1, 0])
        threshold, map5 = choose_threshold(scores, truth)
        assert map5 == 1
        assert map_at_5(rank_of_truth(scores, truth, threshold)) == 1
        low, high = high, high.nextafter(torch.tensor(1.0))


def test_the_threshold_when_some_ids_have_no_score():
    scores = torch.tensor([[0.9, -torch.inf], [-torch.inf, -torch.inf], [0.2, -torch.inf]])
    for truth in ([0, 2, 2], [1, 2, 0], [1, 1, 1], [2, 2, 2]):
        threshold, map5 = choose_threshold(scores, torch.tensor(truth))
        assert np.isfinite(threshold)
        assert map5 == pytest.approx(max(naive_map5(scores, torch.tensor(truth), t) for t in (0.1, 0.5, 1)))
        assert map_at_5(rank_of_truth(scores, torch.tensor(truth), threshold)).item() == pytest.approx(map5)


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_no_threshold_from_scores_that_are_not_finite(bad):
    with pytest.raises(UserError, match='not finite'):
        choose_threshold(torch.tensor([[0.1, bad], [0.2, 0.3]]), torch.tensor([0, 1]))
    with pytest.raises(UserError, match='empty'):
        choose_threshold(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))


IDS = ['w_a', 'w_b', 'w_c', 'w_d', 'w_e', 'w_f']


def test_a_submission_has_the_order_of_the_sample_and_scores_as_its_ranks(tmp_path):
    scores, truth = random_case(9, queries=30, n_ids=6)
    images = np.array([f'{k:02}.jpg' for k in range(30)])
    shuffled = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    names = np.array(IDS + ['new_whale'])
    pd.DataFrame({'Image': images[shuffled], 'Id': 'new_whale'}).to_csv(tmp_path / 'sample.csv', index=False)
    pd.DataFrame({'Image': images, 'Id': names[truth]}).to_csv(tmp_path / 'labels.csv', index=False)
    path = tmp_path / 'out' / 'submission.csv'
    write_submission(path, list(images), top5(scores, 0.7), IDS, tmp_path / 'sample.csv')

    frame = pd.read_csv(path)
    assert list(frame.columns) == ['Image', 'Id']
    assert frame['Image'].tolist() == images[shuffled].tolist()
    assert frame['Id'][0].split() == names[naive_list(scores[shuffled[0]].tolist(), 0.7)[:5]].tolist()
    ranks, known = rank_of_truth(scores, truth, 0.7), truth < 6
    score = score_submission(path, tmp_path / 'labels.csv')
    assert score['map5'] == pytest.approx(map_at_5(ranks).item())
    assert score['top1'] == pytest.approx(top_k(ranks, 1).item())
    assert score['named_top1'] == pytest.approx((scores.argmax(1) == truth)[known].float().mean().item())
    assert (score['images'], score['named']) == (30, known.sum())


def test_a_small_label_space_has_fewer_answers(tmp_path):
    (tmp_path / 'sample.csv').write_text('Image,Id\na.jpg,new_whale\n')
    sample = tmp_path / 'sample.csv'
    write_submission(tmp_path / 's.csv', ['a.jpg'], torch.tensor([[1, 2, 0]]), ['x', 'y'], sample)
    assert (tmp_path / 's.csv').read_text() == 'Image,Id\na.jpg,y new_whale x\n'


@pytest.mark.parametrize('images, answers, ids, sentence', [
    (['a', 'b'], [[0, 1, 2, 3, 4]] * 2, IDS, "no row for 'c'"),
    (['a', 'b', 'd'], [[0, 1, 2, 3, 4]] * 3, IDS, "not asked for: 'd'"),
    (['a', 'b', 'b'], [[0, 1, 2, 3, 4]] * 3, IDS, "more than one row for 'b'"),
    (['a', 'b', 'c'], [[0, 1, 2, 3, 0]] * 3, IDS, "same label twice for 'a' and 2 more"),
    (['a', 'b', 'c'], [[0, 1, 2, 3, 4]] + [[5, 5, 0, 1, 2]] * 2, IDS, "same label twice for 'b' and 1 more"),
    (['a', 'b', 'c'], [[0, 1, 2, 3]] * 3, IDS, 'must have 5 labels a row, none of them with a space'),
    (['a', 'b', 'c'], [[0, 1, 2]] * 3, ['x y', 'z'], 'must have 3 labels a row, none of them with a space'),
])
def test_a_wrong_submission_is_not_written(tmp_path, images, answers, ids, sentence):
    (tmp_path / 'sample.csv').write_text('Image,Id\na,\nb,\nc,\n')
    (tmp_path / 's.csv').write_text('the file from before')
    with pytest.raises(UserError, match=f'^the submission .*{sentence}$'):
        write_submission(tmp_path / 's.csv', images, torch.tensor(answers), ids, tmp_path / 'sample.csv')
    assert (tmp_path / 's.csv').read_text() == 'the file from before'


def test_check_submission_takes_one_to_five_labels_in_any_order():
    sample = pd.DataFrame({'Image': ['a', 'b'], 'Id': ['', '']})
    check_submission(pd.DataFrame({'Image': ['b', 'a'], 'Id': ['x', 'p q r s t']}, index=[7, 7]), sample)


GOOD = 'Image,Id\na.jpg,new_whale x y z w\nb.jpg,x new_whale\nc.jpg,y x\n'


def score_command(tmp_path, submission, labels='Image,Id\na.jpg,x\nb.jpg,new_whale\nc.jpg,x\n'):
    (tmp_path / 'submission.csv').write_text(submission)
    (tmp_path / 'labels.csv').write_text(labels)
    return score_submission(tmp_path / 'submission.csv', tmp_path / 'labels.csv')


def test_the_score_by_hand(tmp_path):
    score = score_command(tmp_path, GOOD)
    assert score == {'map5': 0.5, 'top1': 0, 'named_top1': 0.5, 'images': 3, 'named': 2}


def test_names_that_look_like_numbers_or_gaps_are_names(tmp_path):
    score = score_command(tmp_path, 'Image,Id\n007,01 NA\n07,NA 01\n7,1 01\n', labels='Image,Id\n07,NA\n007,01\n7,01\n')
    assert score['top1'] == pytest.approx(2 / 3) and score['map5'] == pytest.approx(2.5 / 3)
    (tmp_path / 'submission.csv').write_text('Image,Id\n1,2\n2,NA\n')
    (tmp_path / 'labels.csv').write_text('Image,Id\n1,2\n2,NA\n')
    assert score_submission(tmp_path / 'submission.csv', tmp_path / 'labels.csv')['top1'] == 1


@pytest.mark.filterwarnings('error')
def test_without_a_named_image_there_is_no_score_of_the_named(tmp_path):
    score = score_command(tmp_path, GOOD, labels='Image,Id\na.jpg,new_whale\nb.jpg,new_whale\nc.jpg,new_whale\n')
    assert score['named'] == 0 and np.isnan(score['named_top1']) and score['map5'] == pytest.approx(0.5)


@pytest.mark.parametrize('old, new, sentence', [
    ('c.jpg,y x\n', '', "submission.csv has no row for 'c.jpg'"),
    ('c.jpg', 'd.jpg', "submission.csv has an image that is not asked for: 'd.jpg'"),
    ('c.jpg', 'b.jpg', "more than one row for 'b.jpg'"),
    ('y x\n', ' \n', "no label for 'c.jpg'"),
    ('z w', 'z w v', "more than 5 labels for 'a.jpg'"),
    ('z w', 'z z', "the same label twice for 'a.jpg'"),
    ('Image,Id', 'Image,Label', 'no column Id but'),
    ('Image,Id', 'File,Id', 'no column Image but'),
    (GOOD, '', 'cannot be read as a CSV'),
])
def test_a_wrong_submission_is_not_scored(tmp_path, old, new, sentence):
    with pytest.raises(UserError, match=sentence):
        score_command(tmp_path, GOOD.replace(old, new))


def test_swapped_files_and_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match='labels.csv has ids with a space in them'):
        score_command(tmp_path, GOOD, labels=GOOD)
    with pytest.raises(UserError, match='absent.csv cannot be read .*No such file'):
        score_submission(tmp_path / 'absent.csv', tmp_path / 'labels.csv')


def test_the_command_prints_the_score(tmp_path):
    score_command(tmp_path, GOOD)
    command = [sys.executable, '-m', 'utils.metrics', tmp_path / 'submission.csv', tmp_path / 'labels.csv']
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.stdout == 'MAP@5 0.500   top-1 0.000   named-only top-1 0.500   (3 images, 2 named)\n'


def test_the_command_ends_mistakes_with_2(tmp_path, capsys):
    for argv in ([], ['absent.csv', 'labels.csv']):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2
        out, err = capsys.readouterr()
        assert not out and err.startswith('error: ') and err.count('\n') == 1
