"""reviewed.csv, which the review page exports: what a person decided, as labels of a training."""
# ruff: noqa: F811  an imported fixture looks redefined where a test asks for it
import json
import shutil

import pandas as pd
import pytest

from data.tables import NEW_WHALE, load_tables, validation_fold
from tests.conftest import assert_refused, fold_images, owner_of, spy_on_batches, write_frame
from tests.test_review import browse, chromium, data_of, export, page_data, press, rows_of, text  # noqa: F401, some are fixtures
from utils.errors import UserError


def review_csv(photos, rows):
    pd.DataFrame(rows, columns=['Image', 'Id', 'decision']).to_csv(photos / 'reviewed.csv', index=False)
    return load_tables(photos)


def test_an_export_is_read_as_labels(browse, photos, tmp_path):
    page = browse(page_data([('t00.jpg', False, 0.9), ('t01.jpg', True, 0.1), ('t02.jpg', False, 0.8), ('t03.jpg', False, 0.8)],
                            ids=['w_1', 'w_7', 'a,"b"', 'w_3', 'w_4', 'w_5', 'w_6']))
    press(page, '2', 'Enter', 'n', 'Enter', 'x')
    export(page, photos)
    tables = load_tables(photos)
    table = tables.train[tables.train['source'] == 'reviewed'].set_index('Image')
    assert table['Id'].to_dict() == {'t00.jpg': 'w_7', 't01.jpg': NEW_WHALE, 't02.jpg': 'a,"b"'}
    assert table['path'].tolist() == [str(photos / 'test' / name) for name in table.index]
    assert tables.ids[0] == 'a,"b"' and tables.num_ids == 11
    assert table['label'].tolist() == [tables.ids.index('w_7'), 22, 0]


def test_train_csv_beats_reviewed_csv_which_beats_pseudo_labels(photos):
    listed = sorted(path.name for path in (photos / 'train').iterdir())[0]
    write_frame(photos / 'pseudo_labels.csv', Image=['t00.jpg', 't01.jpg'], Id=['w_1', 'w_2'], score=[1, 1])
    review_csv(photos, [('t00.jpg', 'w_9', ''), (listed, 'w_x', '')])
    tables = load_tables(photos, pseudo=True)
    table = tables.train.set_index('Image')
    assert table.loc[['t00.jpg', 't01.jpg', listed], ['Id', 'source']].values.tolist() == [
        ['w_9', 'reviewed'], ['w_2', 'pseudo'], [owner_of(photos, listed), 'train']]
    assert table.index.is_unique and 'w_x' not in tables.ids
    note, = [note for note in tables.notes if 'reviewed.csv' in note]
    assert '1 images of ids and 0 of new_whale join' in note and '1 left out' in note


def test_reviewed_csv_is_optional_and_checked(photos):
    assert any('reviewed.csv: absent' in note for note in load_tables(photos).notes)
    assert (review_csv(photos, [('t00.jpg', '', 'rejected')]).train['source'] == 'train').all()
    for rows, words in [
            ([('gone.jpg', 'w_1', '')], 'neither in test/'), ([('t00.jpg', 'w 1', '')], 'space'),
            ([('../t00.jpg', 'w_1', '')], 'paths'), ([('t00.jpg', 'w_1', ''), ('t00.jpg', 'w_2', '')], 'more than once'),
            ([('', 'w_1', '')], 'without an image')]:
        with pytest.raises(UserError, match=f'reviewed.csv .*{words}'):
            review_csv(photos, rows)


def test_reviewed_photographs_never_validate_and_leave_the_fold_as_it_is(photos):
    before = load_tables(photos).train
    after = review_csv(photos, [(f't{number:02d}.jpg', name, '') for number, name in enumerate(
        ['w_0', 'w_0', 'a_new_one', 'a_new_one', NEW_WHALE, 'w_3', 'w_1'])]).train
    for fold in range(5):
        images = [set(table['Image'][validation_fold(table, fold)]) for table in (before, after)]
        assert images[0] == images[1] and len(images[0]) == 3


def test_a_training_learns_from_them_and_goes_on_but_never_from_a_twin_of_the_fold(scripts, photos, monkeypatch):
    scripts.train(data_dir=photos, max_iters=2, eval_every=2)
    fold, twin = fold_images('r'), photos / 'test/t03.jpg'
    shutil.copy(photos / 'train' / fold[0], twin)
    review_csv(photos, [('t00.jpg', 'w_1', ''), ('t03.jpg', 'w_2', '')])
    spy = spy_on_batches(monkeypatch)
    result = scripts.train(data_dir=photos, max_iters=40, eval_every=20, lr=1e-4, checkPoint_start='best')
    assert result.code == 0 and fold_images('r') == fold
    learned = set(spy.data.train['Image'].iloc[spy.rows])
    assert 't00.jpg' in learned and 't03.jpg' not in learned
    assert (spy.data.weight == 1).all()


def test_what_is_decided_stays_so_on_the_next_page_and_a_photograph_is_not_its_own_match(trained, photos, browse, tmp_path):
    review_csv(photos, [('t00.jpg', 'w_3', ''), ('t01.jpg', NEW_WHALE, '')])
    result = trained.answer(data_dir=photos)
    data = data_of(result.folder)
    assert data['reviewed'] == [['t00.jpg', 'w_3'], ['t01.jpg', NEW_WHALE]]
    query = next(query for query in data['queries'] if query[0] == 't00.jpg')
    shown = dict(zip((data['ids'][one] for one in query[2]), (data['photographs'][one] for one in query[4])))
    assert shown['w_3'] != 't00.jpg' and owner_of(photos, shown['w_3']) == 'w_3'
    page = browse(result.folder / 'matches.html')
    assert text(page, 'decided') == '2 of 12 decided'
    press(page, 'n')
    assert len(rows_of(export(page, tmp_path))) == 3
    review_csv(photos, [('t00.jpg', 'a_new_name', '')])
    assert_refused(trained.answer(data_dir=photos), 'other ids', 'reviewed.csv', 'a_new_name')


def test_decisions_are_of_the_photographs_whatever_network_answers(trained, photos):
    write_frame(photos / 'reviewed.csv', Image=['t00.jpg', 't01.jpg'], Id=['w_1', ''])
    keys = []
    for views in (1, 3):
        page = (trained.answer(data_dir=photos, views=views).folder / 'matches.html').read_text()
        data = json.loads(page.split('id="data">')[1].split('</script>')[0])
        assert data['reviewed'] == [['t00.jpg', 'w_1'], ['t01.jpg', '']]  # what was skipped stays so
        keys.append(data['key'])
    assert keys[0] == keys[1]


def test_an_export_without_a_decision_changes_nothing(trained, photos):
    (photos / 'reviewed.csv').write_text('Image,Id,decision\n')
    assert trained.answer(data_dir=photos).code == 0
