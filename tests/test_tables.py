import os
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from data.tables import (
    NEW_WHALE,
    add_boxes_and_masks,
    load_tables,
    read_photographs,
    training_rows,
    unlabelled_playground,
    validation_fold,
)
from utils.errors import UserError


def write_set(folder, rows, test=(), submission=True):
    """A data_dir in Kaggle's layout with empty image files; `rows` are (Image, Id)."""
    for name, images in {'train': [image for image, _ in rows], 'test': test}.items():
        (folder / name).mkdir(parents=True)
        for image in images:
            (folder / name / image).touch()
    pd.DataFrame(rows, columns=['Image', 'Id']).to_csv(folder / 'train.csv', index=False)
    if submission:
        pd.DataFrame({'Image': test, 'Id': NEW_WHALE}).to_csv(folder / 'sample_submission.csv', index=False)
    return folder


ROWS = [('d.jpg', 'w_b'), ('a.jpg', NEW_WHALE), ('c.png', 'w_a'), ('b.jpg', 'w_b'), ('e.jpg', '001'),
        ('f.jpg', 'NA')]


@pytest.fixture
def folder(tmp_path):
    return write_set(tmp_path, ROWS, ['z.jpg', 'y.jpg'])


@pytest.fixture(scope='module')
def kaggle(tmp_path_factory):
    """The competition's shape of class sizes: 25,361 images, 5,004 ids, 9,664 new_whale."""
    sizes = np.repeat([1, 10, 20, 4, 3], [2073, 100, 173, 1190, 1468])
    ids = [f'w_{k:07x}' for k in np.random.default_rng(1).permutation(len(sizes))]
    labels = np.random.default_rng(2).permutation(np.concatenate([np.repeat(ids, sizes), [NEW_WHALE] * 9664]))
    folder = tmp_path_factory.mktemp('kaggle')
    names = [f'{k:09x}.jpg' for k in range(len(labels))]
    pd.DataFrame({'Image': names, 'Id': labels}).to_csv(folder / 'train.csv', index=False)
    return load_tables(folder, check_files=False)


def test_columns_labels_and_order(folder):
    tables = load_tables(folder)
    assert tables.ids == ['001', 'NA', 'w_a', 'w_b'] and tables.num_ids == 4
    train, common = tables.train, ['path', 'x0', 'y0', 'x1', 'y1', 'mask_path', 'mask_rle']
    assert list(train.columns) == ['Image', 'Id', 'label', *common, 'source']
    assert train['Image'].tolist() == [image for image, _ in ROWS]
    assert train['label'].tolist() == [3, 8, 2, 3, 0, 1] and train['label'].dtype == np.int64
    assert train['path'].tolist() == [str(folder / 'train' / image) for image, _ in ROWS]
    assert train[['x0', 'y0', 'x1', 'y1']].dtypes.eq('float64').all() and train['x0'].isna().all()
    assert train['mask_path'].tolist() == train['mask_rle'].tolist() == [None] * 6
    assert (train['source'] == 'train').all() and tables.group is None
    assert tables.test['Image'].tolist() == ['z.jpg', 'y.jpg']
    assert list(tables.test.columns) == ['Image', *common]
    assert tables.notes == [
        'playground/train.csv: absent, no playground images', 'reviewed.csv: absent, no reviewed images',
        'bboxes.csv: absent, each box is the whole image', 'masks/ and masks.csv: absent, each mask is zeros',
        'duplicate_ids.csv: absent, each id is a whale of its own']
    assert load_tables(folder, flip_is_new_id=False).train['label'].tolist() == [3, 4, 2, 3, 0, 1]


def test_boxes_and_masks_are_matched_by_name(folder):
    rows = 'b.jpg,1,2,30.5,40\nother.jpg,0,0,1,1\ny.jpg,5,6,7,8\n'
    (folder / 'bboxes.csv').write_text('Image,x0,y0,x1,y1\n' + rows)
    (folder / 'masks').mkdir()
    (folder / 'masks' / 'c.png').touch()
    (folder / 'masks' / 'z.jpg').touch()
    (folder / 'masks.csv').write_text('id,rle_mask\na.jpg,1 3 9 2\nd,5 5\nc.png,1 1\ne.jpg,\n')
    tables = load_tables(folder)
    train, test = tables.train.set_index('Image'), tables.test.set_index('Image')
    assert train.loc['b.jpg', ['x0', 'y0', 'x1', 'y1']].tolist() == [1, 2, 30.5, 40]
    assert train['x0'].notna().sum() == 1 and test.loc['y.jpg', 'y1'] == 8 and test['x0'].notna().sum() == 1
    assert train['mask_path'].dropna().to_dict() == {'c.png': str(folder / 'masks' / 'c.png')}
    assert train['mask_rle'].dropna().to_dict() == {'a.jpg': '1 3 9 2', 'd.jpg': '5 5', 'e.jpg': ''}
    assert test['mask_path'].tolist() == [str(folder / 'masks' / 'z.jpg'), None]
    assert 'bboxes.csv: boxes of 1 of 6 training and 1 of 2 test images' in tables.notes
    assert 'masks: of 4 of 6 training and 1 of 2 test images' in tables.notes
    (folder / 'masks.csv').unlink()
    assert 'masks: of 1 of 6 training and 1 of 2 test images' in load_tables(folder).notes


def test_boxes_and_masks_find_their_rows_whatever_their_index(tmp_path):
    (tmp_path / 'bboxes.csv').write_text('Image,x0,y0,x1,y1\nb.jpg,1,2,3,4\n')
    (tmp_path / 'masks').mkdir()
    for name in ('b.png', 'b.jpg', 'b.txt', 'c.d.jpg'):
        (tmp_path / 'masks' / name).touch()
    (tmp_path / 'masks.csv').write_text('id,rle_mask\na.jpg,1 3\nb.jpg,1 3\n')
    frame = pd.DataFrame({'Image': ['a.jpg', 'b.jpg', 'c.d.png']}, index=[7, 3, 5])
    add_boxes_and_masks((frame,), tmp_path, [])
    assert frame['x1'].tolist()[1] == 3 and frame['x1'].isna().tolist() == [True, False, True]
    assert frame['mask_path'].tolist() == [None, str(tmp_path / 'masks/b.png'), str(tmp_path / 'masks/c.d.jpg')]
    assert frame['mask_rle'].tolist() == ['1 3', None, None]


def test_duplicate_ids_join_across_rows(folder):
    rows = f'group_0,001 w_a\ngroup_1,w_x w_a {NEW_WHALE}\nNA,{NEW_WHALE}\n'
    (folder / 'duplicate_ids.csv').write_text('Id,SubId\n' + rows)
    tables = load_tables(folder)
    group = tables.group
    assert group.dtype == np.int64 and group[0] == group[2] and len(set(group)) == 3
    assert tables.notes[-1] == 'duplicate_ids.csv: 1 ids are another name of a whale'
    (folder / 'duplicate_ids.csv').write_text('Id,SubId\nw_b,NA\nw_b,w_a\n')
    group = load_tables(folder).group
    assert group[1] == group[2] == group[3] != group[0]


def test_playground_joins_by_known_id_only(folder):
    listed = [(name, 'w_a') for name in ('a.jpg', 'b.jpg', 'c.png', 'd.jpg')]
    rows = [('p.jpg', 'w_b'), ('q.jpg', 'w_2018'), ('r.jpg', 'w_2018'), *((f'n{k}.jpg', NEW_WHALE) for k in range(3)), *listed]
    write_set(folder / 'playground', rows, submission=False)
    tables = load_tables(folder)
    joined = tables.train[tables.train['source'] == 'playground']
    assert joined['Image'].tolist() == ['p.jpg'] and joined['label'].tolist() == [3]
    assert joined['path'].tolist() == [str(folder / 'playground' / 'train' / 'p.jpg')]
    assert len(tables.train) == 7 and tables.train.index.tolist() == list(range(7))
    assert tables.notes[0] == ('playground/train.csv: 1 images join training; left out 3 of new_whale, 2 of ids not in '
                               'train.csv, 4 that train.csv lists already')
    (folder / 'playground' / 'train' / 'p.jpg').unlink()
    with pytest.raises(UserError, match='p.jpg'):
        load_tables(folder)
    assert len(load_tables(folder, check_files=False).train) == 7


def test_a_playground_that_adds_nothing_needs_no_photographs(folder):
    write_set(folder / 'playground', [('q.jpg', 'w_2018')], submission=False)
    os.rename(folder / 'playground' / 'train', folder / 'elsewhere')
    assert len(load_tables(folder).train) == 6


def test_playground_photographs_without_a_label(folder):
    write_set(folder / 'playground', [('p.jpg', 'w_b'), ('q.jpg', 'w_2018'), ('n.jpg', NEW_WHALE), ('y.jpg', 'w_2018')],
              submission=False)
    (folder / 'playground' / 'train' / '.DS_Store').touch()
    (folder / 'bboxes.csv').write_text('Image,x0,y0,x1,y1\nq.jpg,1,2,3,4\n')
    frame = unlabelled_playground(load_tables(folder))  # p.jpg joined training, y.jpg is a test image
    assert frame['Image'].tolist() == ['n.jpg', 'q.jpg'] and frame.index.tolist() == [0, 1]
    assert frame['path'].tolist() == [str(folder / 'playground' / 'train' / name) for name in ('n.jpg', 'q.jpg')]
    assert frame['y1'].tolist()[1] == 4 and frame['mask_path'].isna().all() and frame['bad'].tolist() == [False, False]
    assert list(frame.columns) == ['Image', 'path', 'x0', 'y0', 'x1', 'y1', 'mask_path', 'mask_rle', 'bad']


def test_without_a_playground_none_of_its_photographs_lacks_a_label(folder):
    frame = unlabelled_playground(load_tables(folder))
    assert frame.empty and {'path', 'x0', 'mask_path', 'bad'} <= set(frame)


def test_pseudo_labels_join_from_test_and_playground(folder):
    write_set(folder / 'playground', [('p.jpg', 'w_2018'), ('z.jpg', 'w_2018')], submission=False)
    rows = ['z.jpg,w_b,0.9', 'p.jpg,new_whale,0.8', 'y.jpg,001,0.9', 'a.jpg,w_a,1', 'b.jpg,w_a,1', 'c.png,w_a,1']
    (folder / 'pseudo_labels.csv').write_text('\n'.join(['Image,Id,score', *rows]))
    assert len(load_tables(folder).train) == 6  # unless they are asked for
    tables = load_tables(folder, pseudo=True)
    assert tables.train.index.tolist() == list(range(9))
    joined = tables.train[6:]
    assert (joined['source'] == 'pseudo').all() and joined['label'].tolist() == [3, 8, 0]
    assert joined['Image'].tolist() == ['z.jpg', 'p.jpg', 'y.jpg']
    assert joined['path'].tolist() == [str(folder / path) for path in ('test/z.jpg', 'playground/train/p.jpg', 'test/y.jpg')]
    assert tables.notes[2] == ('pseudo_labels.csv: 2 images of ids and 1 of new_whale join training; '
                               '3 left out that have a label already')


def test_photographs_in_folders_named_as_ids(tmp_path):
    for name in ('w_1/b.jpg', 'w_1/a.jpg', 'w_1/.DS_Store', 'w_0/a.jpg'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / 'bboxes.csv').write_text('Image,x0,y0,x1,y1\nw_1/a.jpg,1,2,3,4\na.jpg,0,0,9,9\n')
    (tmp_path / 'masks.csv').write_text('id,rle_mask\nw_0/a.jpg,1 3\n')
    frame = read_photographs(str(tmp_path))
    assert frame['Image'].tolist() == ['w_0/a.jpg', 'w_1/a.jpg', 'w_1/b.jpg'] and frame['Id'].tolist() == ['w_0', 'w_1', 'w_1']
    assert frame['path'].tolist() == [str(tmp_path / image) for image in frame['Image']]
    assert frame['x1'].fillna(0).tolist() == [0, 3, 0] and frame['mask_rle'].tolist() == ['1 3', None, None]


def test_photographs_listed_in_a_csv_beside_them(tmp_path):
    for name in ('b.jpg', 'a.jpg', 'unlisted.jpg'):
        (tmp_path / name).touch()
    (tmp_path / 'animals.csv').write_text('Image,Id\n\nb.jpg,w_1\na.jpg,w_0\n')
    (tmp_path / 'bboxes.csv').write_text('Image,x0,y0,x1,y1\na.jpg,1,2,3,4\n')
    frame = read_photographs(tmp_path / 'animals.csv')
    assert frame['Image'].tolist() == ['b.jpg', 'a.jpg'] and frame['Id'].tolist() == ['w_1', 'w_0']
    assert frame['path'].tolist() == [str(tmp_path / 'b.jpg'), str(tmp_path / 'a.jpg')] and frame.index.tolist() == [0, 1]
    assert frame['y1'].fillna(0).tolist() == [0, 4]
    assert list(frame.columns) == ['Image', 'Id', 'path', 'x0', 'y0', 'x1', 'y1', 'mask_path', 'mask_rle']


@pytest.mark.parametrize('name, text, sentence', [
    ('a b/a.jpg', '', 'has ids with a space in them (*a b/a.jpg,*): write _ in its place*'),
    ('new_whale/a.jpg', '', 'has photographs of animals without a name (*new_whale/a.jpg,*): leave them out*'),
    ('Unknown/a.jpg', '', 'has photographs of animals without a name*'),
    ('a.jpg', '', 'holds no folders with photographs: make one for each id, named as the id'),
    ('animals.csv', 'Image,Id\na.jpg,new_whale\n', 'has photographs of animals without a name (line 2: a.jpg,new_whale,*)*'),
    ('animals.csv', 'Image,Id\nb.jpg,w_1\n', '1 of the 1 images that s/animals.csv lists are not in s (b.jpg): *'),
    ('nowhere', None, 'is not there: name a folder of folders, or a CSV with the columns Image and Id'),
])
def test_photographs_that_cannot_be_named_are_refused(tmp_path, monkeypatch, name, text, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 's').mkdir()
    (tmp_path / 's/a.jpg').touch()
    source = Path('s') if text == '' else Path('s') / name
    if text is not None:
        Path('s', name).parent.mkdir(exist_ok=True)
        Path('s', name).write_text(text)
    with pytest.raises(UserError) as caught:
        read_photographs(source)
    assert fnmatchcase(str(caught.value), sentence if 'lists' in sentence else f'{source} {sentence}')


@pytest.mark.parametrize('absent', ['sample_submission.csv', 'test'])
def test_test_images_are_optional(folder, absent):
    os.rename(folder / absent, folder / 'elsewhere')
    tables = load_tables(folder)
    assert len(tables.test) == 0 and {'path', 'mask_path', 'x0'} <= set(tables.test.columns)
    assert f'{absent}: absent, no test images' in tables.notes


def test_the_sample_submission_needs_no_ids(folder):
    (folder / 'sample_submission.csv').write_text('Image\ny.jpg\n')
    tables = load_tables(folder)
    assert tables.test['Image'].tolist() == ['y.jpg'] and tables.test['path'].tolist() == [str(folder / 'test/y.jpg')]
    assert "test/: 1 files, 'z.jpg' the first, are not in sample_submission.csv" in tables.notes


def test_byte_order_mark_is_no_part_of_a_name(folder):
    (folder / 'train.csv').write_bytes(b'\xef\xbb\xbf' + (folder / 'train.csv').read_bytes())
    assert load_tables(folder).num_ids == 4


def test_files_that_no_row_lists_are_noted(folder):
    (folder / 'train' / 'extra.jpg').touch()
    (folder / 'train' / '.DS_Store').touch()
    (folder / 'train' / 'other.jpg').touch()
    assert load_tables(folder).notes[0] == "train/: 2 files, 'extra.jpg' the first, are not in train.csv"


def test_missing_files_are_counted_and_named(folder):
    for name in ('b.jpg', 'd.jpg'):
        (folder / 'train' / name).unlink()
    with pytest.raises(UserError, match=r'2 of the 6 images that .*/train.csv lists are not in .*/train \(d.jpg, b.jpg\): '
                                        'unpack them right there, or delete their rows$'):
        load_tables(folder)
    assert len(load_tables(folder, check_files=False).train) == 6
    for name in ('a.jpg', 'c.png', 'e.jpg'):
        (folder / 'train' / name).unlink()
    with pytest.raises(UserError, match=r'5 of .*\(d.jpg, a.jpg, c.png, b.jpg, e.jpg\): unpack'):
        load_tables(folder)
    (folder / 'train' / 'f.jpg').unlink()
    with pytest.raises(UserError, match=r'6 of .*\(d.jpg, a.jpg, c.png, b.jpg, e.jpg ...\): unpack'):
        load_tables(folder)
    (folder / 'train').rmdir()
    with pytest.raises(UserError, match='/train is not there, yet .*/train.csv lists its images: unpack the images into it$'):
        load_tables(folder)


def test_missing_test_images_are_named(folder):
    (folder / 'test' / 'y.jpg').unlink()
    with pytest.raises(UserError, match=r'1 of the 2 images that .*/sample_submission.csv lists are not in .*/test \(y.jpg\)'):
        load_tables(folder)
    assert len(load_tables(folder, check_files=False).test) == 2


@pytest.mark.parametrize('text, said', [
    (b'Image,Name\na.jpg,w_1\n', ['no column Id', 'Image,Id']),
    (b'Image;Id\na.jpg;w_1\n', ['no column Image and Id']),
    (b'Image,Id\n', ['no rows']),
    (b'', ['cannot be read as a CSV']),
    (b'Image,Id\na.jpg,w_1,x\n', ['cannot be read as a CSV']),
    (b'Image,Id\na.jpg,w_1\na,b,c\n', ['cannot be read as a CSV', 'line 3']),
    (b'\xff\xd8\xff\xe0\x00\x10JFIF', ['cannot be read as a CSV', 'UTF-8']),
    (b'Image,Id\na.jpg,w_1\n\nb.jpg,\nc.jpg\n', ['without an image or an id', 'line 4', 'line 5']),
    (b'Image,Id\n ,w_1\n', ['without an image', 'line 2']),
    (b'Image,Id\na.jpg,w_1\nb.jpg,w_2\na.jpg,w_2\n', ['more than once', 'line 2', 'line 4']),
    (b'Image,Id\na.jpg,w_1\nb.jpg,w_1\na.jpg,w_1\n', ['more than once']),
    (b'Image,Id\na.jpg,white fluke\n', ['space', 'line 2', '_']),
    (b'Image,Id\n../a.jpg,w_1\n', ['paths', '../a.jpg']),
    (b'Image,Id\n/etc/a.jpg,w_1\n', ['paths']),
    (b'Image,Id\nsub\\a.jpg,w_1\n', ['paths']),
    (b'Image,Id\n..,w_1\n', ['paths']),
    (b'Image,Id\na.jpg,new_whale\n', ['no id']),
])
def test_bad_train_csv_is_refused_in_one_sentence(folder, text, said):
    (folder / 'train.csv').write_bytes(text)
    with pytest.raises(UserError) as caught:
        load_tables(folder, check_files=False)
    message = str(caught.value)
    assert all(words in message for words in ['train.csv', *said]) and '\n' not in message


@pytest.mark.parametrize('name, text, said', [
    ('sample_submission.csv', 'Image,Id\nz.jpg,x\nz.jpg,x\n', 'more than once'),
    ('bboxes.csv', 'Image,x0,y0,x1,y1\na.jpg,0,0,9,9\nb.jpg,0,zero,9,9\n', 'line 3'),
    ('bboxes.csv', 'Image,x0,y0,x1,y1\na.jpg,0,0,inf,9\n', 'line 2'),
    ('bboxes.csv', 'Image,x0,y0,x1,y1\na.jpg,9,0,9,9\n', 'x0 < x1'),
    ('bboxes.csv', 'Image,x0,y0,x1,y1\na.jpg,0,9,9,8\n', 'x0 < x1'),
    ('bboxes.csv', 'Image,x0,y0,x1\na.jpg,0,9,9\n', 'no column y1'),
    ('bboxes.csv', 'Image,x0,y0,x1,y1\na.jpg,0,0,9,9\na.jpg,0,0,8,8\n', 'more than once'),
    ('masks.csv', 'id,rle_mask\na.jpg,1 2 3\n', 'pairs'),
    ('masks.csv', 'id,rle_mask\na.jpg,' + 99 * '123 45 ' + '6\n', 'pairs'),
    ('masks.csv', 'id,rle_mask\na.jpg,1 2\na.jpg,1 2\n', 'more than once'),
    ('duplicate_ids.csv', 'a,b\nw_a,w_b\n', 'no column Id and SubId'),
])
def test_bad_optional_csv_is_refused(folder, name, text, said):
    (folder / name).write_text(text)
    with pytest.raises(UserError) as caught:
        load_tables(folder)
    assert name in str(caught.value) and said in str(caught.value)


SPACE = 'write _ in its place, since a submission separates ids by spaces'
FIVE = 'line 2: a,w; line 3: a,w; line 4: a,w; line 5: a,w; line 6: a,w'


@pytest.mark.parametrize('name, text, sentence', [
    ('train.csv', 'Image;Id\na;w\n', "has no column Image and Id but 'Image;Id': its first line must be Image,Id, with commas"),
    ('train.csv', 'Image,Name\na,w\n', "has no column Id but 'Image,Name': its first line must be Image,Id, with commas"),
    ('train.csv', 'Image,Id\n\n', 'has no rows: it needs one line for each image'),
    ('train.csv', 'Image,Id\na,new_whale\n', 'names no id but new_whale: label some images with their ids'),
    ('train.csv', 'Image,Id\na,w\n\n,w\n', 'has rows without an image or an id (line 4: ,w): fill in (new_whale if unknown)'),
    ('train.csv', 'Image,Id\na,w\na/b,w\n.,w\n', 'has image names that are paths (line 3: a/b,w; line 4: .,w): '
                                                 'write bare names of files in the folder'),
    ('train.csv', 'Image,Id\na,w\nb,w 1\n', f'has ids with a space in them (line 3: b,w 1): {SPACE}'),
    ('train.csv', 'Image,Id\na,w\nb,w\na,w\n', 'lists an image more than once (line 2: a,w; line 4: a,w): '
                                             'keep one row for each'),
    ('train.csv', 'Image,Id\n' + 5 * 'a,w\n', f'lists an image more than once ({FIVE}): keep one row for each'),
    ('train.csv', 'Image,Id\n' + 6 * 'a,w\n', f'lists an image more than once ({FIVE}; ...): keep one row for each'),
    ('bboxes.csv', 'Image,x0,y0,x1,y1\na,0,0,9,9\nb,0,0,9,no\nc,0,9,9,9\n',
     'has boxes without x0 < x1 and y0 < y1 in pixels (line 3: b,0,0,9,no; line 4: c,0,9,9,9): mend or delete them'),
    ('masks.csv', 'id,rle_mask\na,1 2\nb,1 2 3\n', 'has masks that are not pairs of numbers (line 3: b,1 2 3): '
                                                   'write start length ...'),
    ('pseudo_labels.csv', 'Image,Id\nz.jpg,w_b\ny.jpg,w_z\n', 'has ids that train.csv has not (line 3: y.jpg,w_z*): '
                                                              'write the file anew'),
    ('pseudo_labels.csv', 'Image,Id\nz.jpg,w_b\nx.jpg,w_b\n',
     'has images that are neither in test/ nor in playground/train/ (line 3: x.jpg,w_b*): write it anew'),
    ('pseudo_labels.csv', None, 'is not there: write it with test.py (pseudo_label_min_score), or set pseudo_label_weight = 0'),
])
def test_a_refusal_names_the_file_the_lines_and_the_remedy(folder, name, text, sentence):
    if text is not None:
        (folder / name).write_text(text)
    with pytest.raises(UserError) as caught:
        load_tables(folder, check_files=False, pseudo=name == 'pseudo_labels.csv')
    assert fnmatchcase(str(caught.value), f'{folder / name} {sentence}')


def test_a_long_row_is_shown_by_its_beginning(folder):
    (folder / 'masks.csv').write_text('id,rle_mask\na.jpg,' + 99 * '12 45 ' + '6\n')
    with pytest.raises(UserError, match=r'\(line 2: a.jpg,(12 45 ){9}\): '):
        load_tables(folder)


def test_missing_data_says_where_to_get_it(tmp_path):
    for data_dir in (tmp_path / 'nowhere', tmp_path):
        with pytest.raises(UserError) as caught:
            load_tables(data_dir)
        assert str(caught.value) == (
            f'data_dir = {data_dir} holds no train.csv: unpack https://www.kaggle.com/c/humpback-whale-identification/data so '
            'that train.csv and train/ lie in it, or draw the sample with `python -m data.make_sample`')


def test_kaggles_label_space(kaggle):
    assert kaggle.num_ids == 5004 and len(kaggle.train) == 25361
    assert kaggle.train['label'].max() == 10008 and (kaggle.train['label'] == 10008).sum() == 9664
    count = kaggle.train['Id'][kaggle.train['Id'] != NEW_WHALE].value_counts()
    assert (count >= 10).sum() == 273 and (count == 1).sum() == 2073


def test_training_rows_count_images_outside_validation(kaggle):
    train = kaggle.train
    count = train['Id'].map(train['Id'].value_counts())
    first = ~train['Id'].duplicated()
    valid = np.zeros(len(train), bool)
    valid[train.index[first & (count == 10)][:9]] = True    # nine ids fall below ten images
    valid[train.index[first & (count == 20)][:50]] = True   # these stay
    valid[train.index[train['Id'] == NEW_WHALE][:230]] = True
    keep = training_rows(train, valid, 10)
    kept = train['Id'][keep]
    assert kept.nunique() == 264 + 1 and (kept == NEW_WHALE).sum() == 9664 - 230
    assert not (keep & valid).any() and keep.sum() == 91 * 10 + 173 * 20 - 50 + 9434
    assert (training_rows(train, valid, 0) == ~valid).all()
    with pytest.raises(UserError, match='min_num_class = 99 .* largest has 20: lower min_num_class'):
        training_rows(train, valid, 99)
    for rows, all_valid in (train[:9], np.ones(9, bool)), (train[:0], np.zeros(0, bool)):
        with pytest.raises(UserError, match='largest has 0'):
            training_rows(rows, all_valid, 0)


def test_fold_is_512_ids_and_230_new_whales(kaggle):
    train, folds = kaggle.train, []
    count = train['Id'].map(train['Id'].value_counts())
    for fold in range(5):
        valid = validation_fold(train, fold)
        ids = train['Id'][valid]
        assert valid.dtype == bool and valid.shape == (25361,)
        assert (ids == NEW_WHALE).sum() == 230 and ids[ids != NEW_WHALE].is_unique and valid.sum() == 742
        assert count[valid].min() >= 2
        folds.append(valid)
    assert all((folds[a] != folds[b]).any() for a in range(5) for b in range(a))
    assert (validation_fold(train, 0) == folds[0]).all()
    assert (validation_fold(train, 0, seed=1) != folds[0]).any()


def test_fold_takes_any_image_of_an_id(kaggle):
    """Of an id's images, sorted by name, each is chosen about equally often."""
    train = kaggle.train
    place = train.groupby('Id').cumcount()[(train['Id'].map(train['Id'].value_counts()) == 4)]
    chosen = np.concatenate([place[validation_fold(train, fold)[place.index]] for fold in range(5)])
    assert (np.bincount(chosen, minlength=4) > 0.15 * len(chosen)).all()


def test_fold_depends_on_neither_row_order_nor_id_names(kaggle):
    train = kaggle.train
    images = set(train['Image'][validation_fold(train, 2)])
    shuffled = train.sample(frac=1, random_state=0)
    assert set(shuffled['Image'][validation_fold(shuffled, 2)]) == images
    renamed = train.assign(Id=train['Id'].where(train['Id'] == NEW_WHALE, 'x' + train['Id']))
    assert set(train['Image'][validation_fold(renamed, 2)]) == images


def test_fold_of_a_small_set():
    """30 ids with two images each, one with a second image in the playground only, five new_whale."""
    rows = [(f'{k:03}{n}', f'w_{k}', k, 'train') for k in range(30) for n in range(2)]
    rows += [(f'p{k}', f'w_{k}', k, 'playground') for k in range(31)] + [('single', 'w_30', 30, 'train')]
    rows += [(f'n{n}', NEW_WHALE, 62, 'train') for n in range(5)]
    train = pd.DataFrame(rows, columns=['Image', 'Id', 'label', 'source'])
    for fold in range(5):
        chosen = train[validation_fold(train, fold)]
        assert (chosen['source'] == 'train').all() and 'single' not in set(chosen['Image'])
        assert (chosen['Id'] == NEW_WHALE).sum() == 2 and len(chosen) == 10 + 2
    with pytest.raises(UserError, match='2 ids with two images'):
        validation_fold(train[:4], 0)


def test_pipes_and_devices_are_no_photographs(folder):
    """Opened, they would keep their reader waiting for ever."""
    os.remove(folder / 'train' / 'b.jpg')
    os.mkfifo(folder / 'train' / 'b.jpg')
    with pytest.raises(UserError, match=r'1 of the 6 images .* are not in .*b.jpg'):
        load_tables(folder)
    (folder / 'playground' / 'train').mkdir(parents=True)
    os.symlink('/dev/zero', folder / 'playground' / 'train' / 'p.jpg')
    (folder / 'playground' / 'train' / 'q.jpg').touch()
    assert unlabelled_playground(load_tables(folder, check_files=False))['Image'].tolist() == ['q.jpg']


def test_masks_may_have_other_suffixes(folder):
    (folder / 'masks').mkdir()
    for name in ('d.JPEG', 'a.PNG', 'a.jpg', 'z.Jpg'):
        (folder / 'masks' / name).touch()
    tables = load_tables(folder)
    paths = tables.train.set_index('Image')['mask_path']
    assert paths['d.jpg'].endswith('d.JPEG') and paths['a.jpg'].endswith('a.PNG')
    assert tables.test['mask_path'].notna().tolist() == [True, False]


def test_a_test_photograph_named_as_a_labelled_one_is_refused(folder):
    """Cameras count from 1 each season; boxes, masks and a person's labels go by the name."""
    write_set(folder / 'x', ROWS, ['z.jpg', 'd.jpg'])
    with pytest.raises(UserError, match=r'sample_submission.csv names photographs as train.csv does .line 3: d.jpg'):
        load_tables(folder / 'x')
