"""data.adopt: anyone's photographs in the competition's layout, split so that no encounter is on both sides."""
import os
import shutil

import cv2
import numpy as np
import pandas as pd
import pytest

from data import adopt
from data.tables import load_tables, validation_fold
from tests.conftest import assert_refused, cut, draw, run_main, snapshot
from utils.metrics import score_submission

SIZES = {'w_1': 1, 'w 2': 2, 'w_3': 4, 'w_4': 5, 'w_5': 10, 'w_6': 10, 'w_7': 20, 'w_8': 30, 'unknown': 10}


def picture(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((8, 8, 3), value % 256, np.uint8) + np.uint8(value // 256))
    return path


@pytest.fixture
def animals(tmp_path):
    """A folder for each animal; in each, 0.png, 1.png, ... All files differ."""
    number = 0
    for name, size in SIZES.items():
        for place in range(size):
            picture(tmp_path / 'animals' / name / f'{place}.png', number)
            number += 1
    return tmp_path / 'animals'


@pytest.fixture
def run(tmp_path, capsys):
    return lambda source, *options: run_main(adopt.main, [source, '--to', tmp_path / 'mine', *options], capsys)


def layout(folder):
    """Image -> Id of training and of test."""
    return [pd.read_csv(folder / name, index_col='Image')['Id'] for name in ('train.csv', 'test_labels.csv')]


def owners(source, made):
    """Of each photograph in `made`/train and test: the path in `source` of the file with the same bytes."""
    original = {path.read_bytes(): str(path.relative_to(source)) for path in source.rglob('*.png')}
    return [{path.name: original[path.read_bytes()] for path in (made / side).iterdir()} for side in ('train', 'test')]


def test_a_folder_of_folders_becomes_a_data_set_that_can_be_trained_and_scored(animals, run, tmp_path):
    result, made = run(animals), tmp_path / 'mine'
    assert result.code == 0
    train, test = layout(made)
    (train_owners, test_owners), total = owners(animals, made), sum(SIZES.values())
    assert set(train_owners) == set(train.index) and set(test_owners) == set(test.index)
    folder = {**train_owners, **test_owners}
    assert sorted(folder.values()) == sorted(snapshot(animals)) and len(train) + len(test) == total
    for side in (train, test):
        for image, name in side.items():
            own = folder[image].split('/')[0].replace(' ', '_')
            assert name == own or name == 'new_whale' and (own == 'unknown' or side is test and own not in set(train))
    held = {folder[image].split('/')[0] for image in test.index[test == 'new_whale']} - {'unknown'}
    assert len(held) == 1 and held <= {'w 2', 'w_3', 'w_4'}  # of those with few photographs, but no single one
    assert (train == 'w_1').sum() == 1 and 'w_1' not in set(test)
    for name, size in [('w_5', 2), ('w_6', 2), ('w_7', 4), ('w_8', 6)]:
        assert (test == name).sum() == size
    assert sum(path.startswith('unknown') for path in test_owners.values()) == 2
    tables = load_tables(made)
    assert len(tables.test) == len(test) and validation_fold(tables.train, 0).any()
    score = score_submission(made / 'sample_submission.csv', made / 'test_labels.csv')
    assert score['images'] == len(test) and score['top1'] == pytest.approx((test == 'new_whale').mean())
    assert f'{total} photographs' in result.out and "1 ids contain spaces" in result.out and "'w 2' is now 'w_2'" in result.out
    for command in (f'train.py --data_dir {made} --run mine', f'test.py --data_dir {made} --run mine',
                    f'utils.metrics results/mine/submission.csv {made}/test_labels.csv'):
        assert command in result.out
    assert next((made / 'train').iterdir()).stat().st_nlink == 2  # no second copy on the disk


def test_train_and_test_run_on_it(scripts, drawn, capsys, work):
    source, table = work / 'animals', pd.read_csv(drawn / 'train.csv')
    for number, name in table[table['Id'] != 'new_whale'].itertuples(index=False):
        (source / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(drawn / 'train' / number, source / name / number)
    for animal in (2, 3, 4, 5):
        for number in range(4):
            draw(source / f'w_{animal}' / f'more{number}.jpg', animal, np.random.default_rng(number))
    assert run_main(adopt.main, [source], capsys).code == 0
    assert scripts.train(data_dir='data/mine', max_iters=2).code == 0
    answered = scripts.answer(data_dir='data/mine')
    assert answered.code == 0
    assert score_submission(answered.folder / 'submission.csv', 'data/mine/test_labels.csv')['images'] > 5


def test_the_seed_decides_and_the_order_of_a_list_does_not(animals, run, tmp_path):
    table = pd.DataFrame([(f'{name}/{n}.png', name) for name, size in SIZES.items() for n in range(size)], columns=['file', 'id'])
    made = {}
    for key, rows, seed in [('a', table, 0), ('shuffled', table.sample(frac=1, random_state=1), 0), ('other', table, 1)]:
        rows.to_csv(animals / 'list.csv', index=False)
        assert run(animals / 'list.csv', '--seed', seed).code == 0
        made[key] = snapshot(tmp_path / 'mine')
        shutil.rmtree(tmp_path / 'mine')
    assert run(animals, '--seed', 0).code == 0
    assert made['a'] == made['shuffled'] != made['other']
    assert {name: data for name, data in snapshot(tmp_path / 'mine').items() if 'list' not in name} == made['a']


def encounters(tmp_path, dates='', column='Date', ids=8, visits=6, frames=4):
    """A CSV of photographs: `frames` at each visit; the encounter is shared by two animals, or is a day of many, as `dates`
    writes it with {0} for the day and {1} for the hour."""
    rows, folder = [], tmp_path / 'photographs/2019'
    for animal in range(ids):
        for visit in range(visits):
            for frame in range(frames):
                name = picture(folder / f'{animal}_{visit}_{frame}.png', len(rows)).name
                shared = f'e{animal // 2 if visit < 4 else animal}_{visit}'
                seen = dates.format(visit + 10, frame) or shared
                rows.append((f'2019/{name}', f'w_{animal}', seen))
    table = pd.DataFrame(rows, columns=['Photo', 'Whale ID', column if dates else 'Sighting-ID'])
    table.to_csv(tmp_path / 'list.csv', index=False)
    return tmp_path / 'list.csv'


@pytest.mark.parametrize('dates, column', [
    ('', ''), ('2019-06-{0}T0{1}:30', 'Date'), ('{0}.06.2019 0{1}.30', 'Date taken'), ('201906{0}0{1}3000', 'Timestamp'),
    ('0{1}:30 {0}/06/2019', 'Sighting date'), ('2019-06-{0} {1} PM', 'Datetime')])
def test_an_encounter_is_on_one_side(run, tmp_path, dates, column):
    result = run(encounters(tmp_path, dates, column), '--photographs', tmp_path / 'photographs')
    assert result.code == 0 and "individual in column 'Whale ID'" in result.out
    train, test = layout(tmp_path / 'mine')
    listed = pd.read_csv(tmp_path / 'list.csv')
    listed['side'] = listed['Photo'].str[5:].isin(test.index)
    key = [listed['Whale ID'], listed['Photo'].str.split('_').str[1]] if dates else [listed['Sighting-ID']]
    assert (listed.groupby(key)['side'].nunique() == 1).all()
    assert 8 * 6 * 4 == len(train) + len(test) and 0.15 < len(test) / len(listed) < 0.45  # one of eight ids is held out
    assert (test == 'new_whale').sum() == 24 and train.nunique() == 7


def test_folders_in_the_folders_are_encounters(run, tmp_path):
    for animal in range(6):
        for visit in range(5):
            for frame in range(3):
                picture(tmp_path / f'animals/w_{animal}/{visit}/{frame}.png', animal * 15 + visit * 3 + frame)
    assert run(tmp_path / 'animals', '--new_share', 0).code == 0
    made_train, made_test = owners(tmp_path / 'animals', tmp_path / 'mine')
    sides = [{path.rpartition('/')[0] for path in made.values()} for made in (made_train, made_test)]
    assert not sides[0] & sides[1] and len(sides[1]) == 6  # one of five encounters of each
    assert 'w_0__0__0.png' in {**made_train, **made_test}


def test_whoever_is_not_held_out_stays_in_training_however_encounters_are_shared():
    held_out = []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        rows = [(f'w_{rng.integers(9)}', f'e{rng.integers(15)}') for _ in range(25)]
        table = pd.DataFrame([*rows, ('alone', 'x'), ('alone', 'x'), ('single', 'y')], columns=['Id', 'encounter'])
        test, held = adopt.split(table, 0.4, 0.3, seed)
        assert set(table['Id'][~test]) == set(table['Id']) - set(held)
        assert not set(table['encounter'][test]) & set(table['encounter'][~test])
        assert all(2 <= count for count in table['Id'].value_counts()[held])
        assert test.any() and not adopt.split(table, 0.4, 0.0, seed)[1]
        held_out += held
    assert 'alone' in held_out and 30 < len(held_out) <= 3 * 30


def test_names_of_files_are_kept_where_they_can_be(run, tmp_path):
    for animal in range(5):
        for number in range(4):
            picture(tmp_path / f'animals/w_{animal}/{"IMG" if animal else "img"}_{number}.png', animal * 4 + number)
        picture(tmp_path / f'animals/w_{animal}/own_{animal}.png', 100 + animal)
    assert run(tmp_path / 'animals', '--new_share', 0).code == 0
    for made in owners(tmp_path / 'animals', tmp_path / 'mine'):
        for image, path in made.items():
            assert image == (path.split('/')[1] if 'own' in path else path.replace('/', '__'))


def test_boxes_come_along_under_the_new_names(animals, run, tmp_path):
    (animals / 'bboxes.csv').write_text('Image,x0,y0,x1,y1\nw_8/3.png,1,2,5,6\nw_5/0.png,0,0,7,8\n')
    assert run(animals).code == 0
    tables = load_tables(tmp_path / 'mine')
    boxes = pd.concat([tables.train, tables.test]).set_index('Image')[['x0', 'y0', 'x1', 'y1']].dropna()
    assert boxes.loc['w_8__3.png'].tolist() == [1, 2, 5, 6] and len(boxes) == 2


def test_what_cannot_be_read_is_said_and_left_out(animals, run, tmp_path):
    (animals / 'w_8/notes.txt').write_text('seen off the cape')
    (animals / 'w_8/.hidden').write_text('')
    cv2.imwrite(str(animals / 'w_7/3.png'), np.random.default_rng(0).integers(0, 255, (20, 20, 3), np.uint8))
    broken = cut(animals / 'w_7/3.png')
    result = run(animals)
    assert result.code == 0 and '2 more could not be read' in result.out
    assert f'w_7/{broken} (' in result.out and 'w_8/notes.txt (it is not an image)' in result.out
    assert sum(map(len, layout(tmp_path / 'mine'))) == sum(SIZES.values()) - 1


def test_a_photograph_that_cannot_be_linked_is_copied(animals, run, tmp_path, monkeypatch):
    def link(*_):
        raise OSError(18, 'Invalid cross-device link')
    monkeypatch.setattr(os, 'link', link)
    assert run(animals).code == 0 and sum(map(len, owners(animals, tmp_path / 'mine'))) == sum(SIZES.values())


REFUSALS = {
    'one id twice': (lambda a: (a / 'w 2').rename(a / 'w 3'), [], ['w 3,w_3', 'capitals and spaces']),
    'no animals': (lambda a: [shutil.rmtree(path) for path in a.iterdir()], [], ['no folders with photographs']),
    'too few': (lambda a: [shutil.rmtree(a / f'w_{n}') for n in (4, 5, 6, 7, 8)], [], ['three are needed']),
    'share': (lambda a: None, ['--test_share', '0.9'], ['--test_share']),
}


@pytest.mark.parametrize('spoil, options, words', REFUSALS.values(), ids=REFUSALS)
def test_what_is_refused_leaves_nothing(animals, run, tmp_path, spoil, options, words):
    spoil(animals)
    assert_refused(run(animals, *options), *words)
    assert os.listdir(tmp_path) == ['animals']


BAD_LISTS = {
    'no photograph there': ('file,id\ngone.png,w_1\n', [], ['line 2: gone.png,w_1', '--photographs']),
    'twice': ('file,id\nw_8/0.png,w_1\nw_8/0.png,w_8\n', [], ['line 3', 'twice']),
    'no such column': ('file,id\nw_8/0.png,w_1\n', ['--encounter', 'trip'], ['no column trip', '--encounter', 'file, id']),
    'no individual': ('file,whom\nw_8/0.png,w_1\n', [], ['no column individual or', '--individual', 'file, whom']),
    'not a CSV': ('\0\1', [], ['list.csv']),
}


@pytest.mark.parametrize('text, options, words', BAD_LISTS.values(), ids=BAD_LISTS)
def test_a_list_with_a_mistake_is_refused(animals, run, tmp_path, text, options, words):
    (animals / 'list.csv').write_text(text)
    assert_refused(run(animals / 'list.csv', *options), *words)
    assert os.listdir(tmp_path) == ['animals']


def test_a_target_that_is_there_is_left_alone(animals, run, tmp_path):
    (tmp_path / 'mine').mkdir()
    assert_refused(run(animals), 'mine is there already', '--to')
    assert os.listdir(tmp_path / 'mine') == []
    assert_refused(run(tmp_path / 'nowhere', '--to', tmp_path / 'other'), 'nowhere is not there')


@pytest.mark.parametrize('error', [OSError(28, 'No space left on device'), KeyboardInterrupt()], ids=['full disk', 'stopped'])
def test_a_layout_is_written_whole_or_not_at_all(animals, run, tmp_path, monkeypatch, error):
    def stop(*_, **__):
        raise error
    monkeypatch.setattr(pd.DataFrame, 'to_csv', stop)
    result = run(animals)
    assert result.code == (2 if isinstance(error, OSError) else 130) and 'Traceback' not in result.err
    assert os.listdir(tmp_path) == ['animals']


def test_blank_ids_and_blank_encounters_of_a_list(animals, run, tmp_path):
    rows = [(f'{name}/{n}.png', '' if name == 'unknown' else name, '' if n % 2 else f'{name} {n}')
            for name, size in SIZES.items() for n in range(size)]
    pd.DataFrame(rows, columns=['where', 'who', 'when']).to_csv(animals / 'list.csv', index=False)
    assert run(animals / 'list.csv', '--file', 'where', '--individual', 'who', '--encounter', 'when').code == 0
    train, test = layout(tmp_path / 'mine')
    assert (train == 'new_whale').sum() == 8 and len(train) + len(test) == sum(SIZES.values())


def test_without_unknown_animals_half_of_those_held_out_are_new_whale_in_training(animals, run, tmp_path):
    """A fold without new_whale would choose a threshold that names everything."""
    shutil.rmtree(animals / 'unknown')
    result = run(animals, '--new_share', '0.5')
    train, test = layout(tmp_path / 'mine')
    assert result.code == 0 and (train == 'new_whale').sum() > 0 and (test == 'new_whale').sum() > 0


def test_two_spellings_of_an_id_are_one_mistake_or_one_animal(animals, run, tmp_path):
    (animals / 'w_3').rename(animals / 'Jose\u0301')
    (animals / 'w_4').rename(animals / 'Jos\u00e9')
    result = run(animals)
    assert result.code == 0 and (pd.concat(layout(tmp_path / 'mine')) == 'Jos\u00e9').sum() == 9
    shutil.rmtree(tmp_path / 'mine')
    (animals / 'w_6').rename(animals / 'W_5')
    assert_refused(run(animals), 'W_5', 'capitals')


def test_what_is_in_no_folder_and_which_boxes_fit_is_said(animals, run):
    shutil.copy(animals / 'w_1/0.png', animals / 'loose.png')
    (animals / 'bboxes.csv').write_text('Image,x0,y0,x1,y1\nw_3/0.png,1,2,5,6\n0.png,1,2,5,6\n')
    out = run(animals).out
    assert '1 files that are in no folder of an animal, such as loose.png' in out and 'boxes of 1 of the 92' in out


def test_the_printed_commands_fit_a_small_set(run, tmp_path):
    for name in 'abcd':
        for place in range(8):
            picture(tmp_path / 'few' / name / f'{place}.png', ord(name) * 8 + place)
    assert '--batch_size 16' in run(tmp_path / 'few', '--new_share', '0').out
