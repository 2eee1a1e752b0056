"""The review page, in a real browser; and what it exports, as labels of a training."""
import json
import os
import shutil
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pytest
import torch

from data.tables import NEW_WHALE
from tests.conftest import cut, draw, snapshot
from utils import review
from utils.member import Member
from utils.scores import Gallery

EVIL = '<img/src=x/onerror=alert(1)>'
EVIL_FILE = '</script><script>alert(2)<!--, "x".jpg'
EVIL_ROW = '"</script><script>alert(2)<!--, ""x"".jpg",w_other,accepted'
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)


def page_data(queries, **changes):
    """As write_review makes it. `queries`: (file name, new_whale first, score of the first id)."""
    names = ['w_a', 'w_b', 'w_c', 'w_d', 'w_e', 'W_f', EVIL]
    rows = [[image, new, [(row + k) % len(names) for k in range(5)], [score, 0.2, 0.1, 0.05, 0.0], [0, 1, -1, 2, 0]]
            for row, (image, new, score) in enumerate(queries)]
    return dict(run='r', key='k', threshold=0.3, ids=names, aspect=2.0, photographs=['p.jpg', EVIL_FILE, 'q.jpg'],
                reviewed=[], queries=rows, stamp=7) | changes


FEW = page_data([('a.jpg', False, 1.0), ('b.jpg', True, 0.25), (EVIL_FILE, False, 0.5), ('d.jpg', False, 0.6),
                 ('e.jpg', True, -1)])


@pytest.fixture(scope='module')
def chromium():
    playwright = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
    if not CHROMIUM:
        pytest.skip('there is no Chromium on this machine')  # pip cannot install it; .ci/run does, where it may
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'] * (os.getuid() == 0))
        yield browser
        browser.close()


@pytest.fixture
def browse(chromium, tmp_path):
    """browse(data) opens such a page as a file, in a browser of its own or in `context`. No script of a name may run, no
    error appear, and nothing be fetched but files."""
    said, asked, contexts = [], [], []

    def browse(data=FEW, context=None):
        file = tmp_path / 'matches.html'
        if isinstance(data, dict):
            file.write_text(review.fill(review.TEMPLATE.read_text(), data))
            (tmp_path / 'matches').mkdir(exist_ok=True)
            for number in range(len(data['queries']) + len(data['photographs'])) if len(data['queries']) < 100 else ():
                draw(tmp_path / f'matches/7_{number}.jpg', number, np.random.default_rng(0))
        else:
            file = data
        context = context or chromium.new_context(viewport=dict(width=1280, height=800))
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10000)
        page.on('dialog', lambda dialog: (said.append(f'dialog {dialog.message}'), dialog.dismiss()))
        page.on('pageerror', lambda error: said.append(str(error)))
        page.on('console', lambda line: said.append(line.text) if 'ERR_FILE_NOT_FOUND' not in line.text else None)
        page.on('request', lambda request: asked.append(request.url))
        page.goto(file.as_uri())
        return page

    yield browse
    for context in contexts:
        context.close()
    assert said == []
    assert asked and all(url.startswith(('file:', 'blob:')) for url in asked)


def press(page, *keys):
    for key in keys:
        page.keyboard.press(key)


def text(page, name):
    return page.locator(f'#{name}').inner_text()


def image(page):
    """The file name of the query that is shown."""
    return text(page, 'query').split('\n')[-1]


def export(page, folder):
    with page.expect_download() as download:
        page.click('#export')
    download.value.save_as(folder / 'reviewed.csv')
    assert download.value.suggested_filename == 'reviewed.csv'
    return folder / 'reviewed.csv'


def rows_of(csv):
    return pd.read_csv(csv, dtype=str, na_filter=False).values.tolist()


def test_keys_decide_and_what_was_decided_is_exported(browse, tmp_path):
    page = browse()
    assert image(page) == 'a.jpg' and 'Undecided' in text(page, 'verdict') and '1: w_a' in text(page, 'match')
    press(page, '3')
    assert '3: w_c' in text(page, 'match') and image(page) == 'a.jpg' and 'w_c' in text(page, 'accept')
    press(page, 'Enter')
    assert image(page) == 'b.jpg' and '1: w_b' in text(page, 'match')  # the next one begins with its first answer again
    press(page, 'n')
    assert image(page) == EVIL_FILE
    press(page, 'x')
    press(page, 'Enter')
    assert text(page, 'decided') == '4 of 5 decided'
    press(page, 'u')
    assert image(page) == 'd.jpg' and text(page, 'decided') == '3 of 5 decided' and 'Undecided' in text(page, 'verdict')
    press(page, 'ArrowLeft', 'ArrowLeft')
    assert image(page) == 'b.jpg' and 'Decided: new_whale' in text(page, 'verdict')
    press(page, 'ArrowLeft')
    assert 'Decided: w_c' in text(page, 'verdict') and '3: w_c' in text(page, 'match')  # what was chosen stands there again
    press(page, 'ArrowRight', 'ArrowRight')
    assert 'Skipped' in text(page, 'verdict')
    table = rows_of(export(page, tmp_path))
    assert table == [['a.jpg', 'w_c', 'accepted'], ['b.jpg', 'new_whale', 'new_whale'], [EVIL_FILE, '', 'rejected']]


def test_enter_says_what_the_network_says_until_a_person_chooses(browse, tmp_path):
    page = browse()
    assert page.locator('#export').is_disabled()
    page.click('.row >> nth=1')
    assert image(page) == 'b.jpg' and 'Enter' in text(page, 'whale') and 'Enter' not in text(page, 'accept')
    press(page, 'Enter')  # the network says new_whale, whose best id is w_b
    page.click('.row >> nth=4')
    assert page.locator('#accept').is_disabled()
    press(page, 'Enter')  # it could not be read, so nothing is suggested
    assert image(page) == 'e.jpg'
    page.click('.row >> nth=1')
    press(page, '1')
    assert 'Enter' in text(page, 'accept')
    press(page, 'Enter')
    page.fill('#other', '  '), press(page, 'Enter')
    page.fill('#other', ' w other '), press(page, 'Enter')
    assert export(page, tmp_path).read_text().splitlines()[1:] == ['b.jpg,w_b,accepted', EVIL_ROW]
    page.fill('#id', 'w_othe')
    assert text(page, 'count') == '1 of 5 photographs'


def test_a_mouse_does_the_same(browse, tmp_path):
    page = browse()
    page.click('.card >> nth=1'), page.click('#previous')  # there is none
    press(page, 'Enter')  # not taken by the button that was clicked
    page.click('#whale'), page.click('#reject'), page.click('#accept'), page.click('#undo'), page.click('#previous')
    assert image(page) == EVIL_FILE
    page.click('#next'), page.click('.row >> nth=0')
    assert image(page) == 'a.jpg' and text(page, 'decided') == '3 of 5 decided'
    assert [row[1] for row in rows_of(export(page, tmp_path))] == ['w_b', 'new_whale', '']


def test_keys_that_are_held_or_typed_into_a_box_decide_nothing(browse):
    page = browse()
    page.keyboard.down('Enter'), page.keyboard.down('Enter'), page.keyboard.down('Enter')
    page.keyboard.up('Enter')
    assert text(page, 'decided') == '1 of 5 decided'
    page.locator('#id').press_sequentially('xn1u')
    press(page, 'Enter')
    assert text(page, 'decided') == '1 of 5 decided' and text(page, 'count') == '0 of 5 photographs'
    page.fill('#id', '')
    press(page, 'Escape', 'Control+u', 'x')
    assert text(page, 'decided') == '2 of 5 decided'


def test_what_could_not_be_read_can_be_skipped_and_has_no_answer(browse):
    page = browse()
    press(page, *['ArrowRight'] * 9)
    assert image(page) == 'e.jpg' and page.locator('.card').count() == 0 and page.locator('#accept').is_disabled()
    press(page, 'Enter', '2')
    assert text(page, 'decided') == '0 of 5 decided'
    press(page, 'x')
    assert text(page, 'decided') == '1 of 5 decided'


def test_filters_and_their_counts(browse):
    page = browse()
    for name, value, names in [('least', '0.55', 'ad'), ('most', '0.55', 'bce'), ('id', 'w_F', 'bcd'), ('id', EVIL[:9], 'cd')]:
        before = page.locator(f'#{name}').input_value()
        page.fill(f'#{name}', value)
        assert text(page, 'count') == f'{len(names)} of 5 photographs' and page.locator('.row').count() == len(names)
        assert image(page) == {'a': 'a.jpg', 'b': 'b.jpg', 'c': EVIL_FILE}[names[0]]
        page.fill(f'#{name}', before)
    page.check('#new')
    assert text(page, 'count') == '2 of 5 photographs' and image(page) == 'b.jpg'
    page.check('#open')
    press(page, 'Enter')
    assert text(page, 'count') == '1 of 5 photographs' and image(page) == 'e.jpg'
    press(page, 'x')
    assert text(page, 'count') == '0 of 5 photographs' and 'No photograph passes' in text(page, 'verdict')
    assert not page.locator('#pair').is_visible()
    press(page, 'Enter', 'n', '1', 'ArrowLeft', 'u')
    assert text(page, 'count') == '1 of 5 photographs' and image(page) == 'e.jpg'


def test_decisions_outlive_a_reload_and_belong_to_one_training(browse, tmp_path):
    page = browse()
    press(page, '2', 'Enter', 'n', 'x')
    page.reload()
    assert text(page, 'decided') == '3 of 5 decided' and image(page) == 'd.jpg'  # the first that is undecided
    press(page, 'ArrowLeft', 'ArrowLeft', 'ArrowLeft')
    assert 'Decided: w_b' in text(page, 'verdict')
    other = browse(FEW | dict(key='another'), page.context)
    assert text(other, 'decided') == '0 of 5 decided'


def test_an_edited_reviewed_csv_beats_what_the_browser_remembers(browse):
    page = browse(FEW | dict(reviewed=[]))
    press(page, 'Enter', 'n')
    name = image(page)
    page = browse(FEW | dict(reviewed=[['a.jpg', 'w_corrected']]), page.context)
    assert text(page, 'decided') == '2 of 5 decided' and image(page) == name
    press(page, 'ArrowLeft', 'ArrowLeft')
    assert image(page) == 'a.jpg' and 'Decided: w_corrected' in text(page, 'verdict')
    press(page, 'n')  # and what is decided after that beats the file
    page.reload()
    press(page, 'ArrowLeft', 'ArrowLeft')
    assert 'Decided: new_whale' in text(page, 'verdict')


def test_what_an_earlier_page_remembers_is_kept(browse):
    page = browse()
    page.evaluate("localStorage.setItem(`review ${data.key}`, JSON.stringify([['a.jpg', 'w_kept']]))")
    page.reload()
    assert text(page, 'decided') == '1 of 5 decided'
    press(page, 'ArrowLeft')
    assert 'Decided: w_kept' in text(page, 'verdict')


def test_two_windows_keep_each_others_decisions(browse):
    one = browse()
    other = browse(context=one.context)
    press(one, 'n')
    other.wait_for_selector('text="1 of 5 decided"')
    press(other, 'ArrowRight', 'n')
    one.wait_for_selector('text="2 of 5 decided"')


def test_an_export_can_be_imported_elsewhere(browse, tmp_path):
    page = browse()
    press(page, '2', 'Enter', 'n', 'x')
    csv = export(page, tmp_path)
    with csv.open('a', newline='') as file:
        file.write('elsewhere.jpg,w_z,accepted\r\n')
    page = browse()
    assert text(page, 'decided') == '0 of 5 decided'
    page.set_input_files('#file', csv)
    page.wait_for_selector('text="4 decisions imported, 1 of other photographs"')
    assert text(page, 'decided') == '3 of 5 decided'
    assert rows_of(export(page, tmp_path)) == [['a.jpg', 'w_b', 'accepted'], ['b.jpg', 'new_whale', 'new_whale'],
                                               [EVIL_FILE, '', 'rejected'], ['elsewhere.jpg', 'w_z', 'accepted']]
    press(page, 'u')
    assert text(page, 'decided') == '0 of 5 decided'
    for wrong in ('Image,Name\na.jpg,w_a\n', 'Image,Id\na.jpg,new_whale w_a w_b\n', 'Image,Id\na.jpg\n'):
        csv.write_text(wrong)
        page.set_input_files('#file', csv)
        page.wait_for_selector('text=Nothing imported')
        assert text(page, 'decided') == '0 of 5 decided'
        page.evaluate('document.getElementById("message").textContent = ""')


@pytest.mark.parametrize('content', ['', 'foo', 'Image\na.jpg', 'Id\nw_a'])
def test_what_is_no_list_of_labels_is_not_imported(browse, tmp_path, content):
    (tmp_path / 'x.csv').write_text(content)
    page = browse()
    page.set_input_files('#file', tmp_path / 'x.csv')
    page.wait_for_function("document.getElementById('message').textContent")
    assert 'Nothing imported' in text(page, 'message') and text(page, 'decided') == '0 of 5 decided'


def test_names_are_text_and_never_markup(browse):
    data = FEW | dict(run=EVIL, reviewed=[['__proto__', EVIL]])
    assert '</script>' not in json.dumps(data['ids']) and EVIL_FILE in json.dumps(data, ensure_ascii=False).replace('\\"', '"')
    page = browse(data)
    assert text(page, 'title') == f'Review of {EVIL}' == page.title()
    press(page, 'ArrowRight', 'ArrowRight', '5')
    assert image(page) == EVIL_FILE and all(EVIL in text(page, name) for name in ('match', 'cards', 'accept'))
    press(page, 'Enter', 'ArrowLeft')
    assert f'Decided: {EVIL}' in text(page, 'verdict') and EVIL in text(page, 'rows')
    assert page.evaluate('[...document.images].every(one => /matches.7_[0-9]+.jpg$/.test(one.src))')
    assert page.evaluate('document.scripts.length') == 2


def test_the_policy_lets_no_other_script_run(chromium, tmp_path):
    html = review.fill(review.TEMPLATE.read_text(), FEW).replace('<aside>', '<script>document.title = "hit"</script><aside>')
    (tmp_path / 'other.html').write_text(html)
    context = chromium.new_context()
    lines, other = [], context.new_page()
    other.on('console', lambda line: lines.append(line.text))
    other.goto((tmp_path / 'other.html').as_uri())
    assert other.title() == 'Review of r' and any('Content Security Policy' in line for line in lines)
    with pytest.raises(Exception, match='TrustedHTML'):
        other.evaluate('document.body.innerHTML = "<b>"')
    context.close()


def test_thousands_of_queries_are_few_elements(browse):
    page = browse(page_data([(f'{number}.jpg', False, 0.5) for number in range(8000)]))
    assert text(page, 'count') == '8000 of 8000 photographs'
    assert page.evaluate('document.querySelectorAll("*").length') < 500
    page.evaluate('document.getElementById("list").scrollTop = 60 * 5000')
    page.wait_for_selector('text="5003.jpg"')
    assert page.locator('.row').count() < 60
    page.click('text="5003.jpg"')
    press(page, 'ArrowRight')
    assert image(page) == '5004.jpg' and page.evaluate('document.querySelectorAll("*").length') < 500
    assert page.evaluate('[...document.images].every(one => one.loading === "lazy")')


def test_a_wide_and_a_narrow_window_show_all_without_scrolling_sideways(browse):
    for width, height in [(1280, 800), (1024, 700), (1920, 1080)]:
        page = browse()
        page.set_viewport_size(dict(width=width, height=height))
        assert page.evaluate('document.documentElement.scrollWidth <= innerWidth')
        assert page.evaluate('[...document.querySelectorAll("main, form")].every(one => one.scrollWidth <= one.clientWidth)')
        assert page.locator('.card >> nth=4').bounding_box()['y'] < height


def test_every_control_has_a_name(browse):
    page = browse()
    assert page.get_by_label('least score').count() == page.get_by_label('new_whale answered first').count() == 1
    assert page.evaluate('''[...document.querySelectorAll("button, input, figure img")].every(one =>
        one.ariaLabel || one.alt || one.textContent.trim() || one.labels?.length)''')
    for key in ('1', '5', 'Enter', 'N', 'X', 'U', '←', '→'):
        assert key in text(page, 'help')


# The page of a run

def data_of(folder):
    html = (folder / 'matches.html').read_text()
    return json.loads(html.split('id="data">')[1].split('</script>')[0])


def test_the_page_of_a_run(trained, drawn, browse, tmp_path):
    result = trained.answer()
    data, table = data_of(result.folder), pd.read_csv(result.folder / 'submission.csv')
    assert 'matches.html' in result.out and [query[0] for query in data['queries']] == table['Image'].tolist()
    owner = pd.read_csv(drawn / 'train.csv').set_index('Image')['Id']
    for (_, is_new, ids, scores, shown), labels in zip(data['queries'], table['Id'].str.split()):
        names = [data['ids'][one] for one in ids]
        assert [owner[data['photographs'][one]] for one in shown] == names and sorted(scores, reverse=True) == scores
        assert is_new == (labels[0] == NEW_WHALE)
        assert [one for one in labels if one != NEW_WHALE] == names[:5 - (NEW_WHALE in labels)]
    thumbnails = {path.name for path in (result.folder / 'matches').iterdir()}
    assert thumbnails == {f'{data["stamp"]}_{number}.jpg' for number in range(12 + len(set(data['photographs'])))}
    page = browse(result.folder / 'matches.html')
    page.evaluate('Promise.all([...document.querySelectorAll("main img")].map(one => one.decode()))')  # fails if one is not there
    press(page, 'Enter', 'n')
    assert rows_of(export(page, tmp_path))[1][1] == NEW_WHALE
    before = snapshot(result.folder)
    again = snapshot(trained.answer().folder)
    assert again['matches.html'] == before['matches.html'] and set(again) == set(before)


def test_thumbnails_show_what_they_are_named_for_and_old_ones_go(trained, drawn):
    folder = trained.answer().folder
    first = data_of(folder)
    (folder / 'matches/3_0.jpg').touch()
    trained.answer(threshold=0.9, gallery_weight=1.0)
    data = data_of(folder)
    assert data['stamp'] != first['stamp']
    assert {path.name.split('_')[0] for path in (folder / 'matches').iterdir()} == {str(data['stamp'])}
    files = [drawn / 'test' / query[0] for query in data['queries']] + [drawn / 'train' / name for name in data['photographs']]
    thumbnails = [folder / f'matches/{data["stamp"]}_{number}.jpg' for number in range(len(files))]
    alike = np.corrcoef([cv2.resize(cv2.imread(str(path)), (64, 32)).ravel() for path in thumbnails + files])
    assert (alike[:len(files), len(files):].argmax(1) == np.arange(len(files))).all()


def test_a_run_that_fails_leaves_the_page_as_it_was(trained, monkeypatch):
    folder = trained.answer().folder
    before = snapshot(folder)
    monkeypatch.setattr(review, 'fill', lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trained.answer(threshold=0.9)
    after = snapshot(folder)
    assert {name: after[name] for name in before if name.startswith('matches')} == \
        {name: content for name, content in before.items() if name.startswith('matches')}


def test_no_page_when_it_is_not_wanted_or_there_are_no_photographs(trained, work):
    assert not (trained.answer(review=False).folder / 'matches.html').exists()
    trained.answer(run='results/r/scores.npz')
    assert not (work / 'results/ensemble/matches.html').exists()
    trained.answer(run='r,results/r/scores.npz')
    assert data_of(work / 'results/ensemble')['run'] == 'ensemble'


def test_enrolled_photographs_have_no_picture(trained, tmp_path, photos):
    (tmp_path / 'season' / 'w_enrolled').mkdir(parents=True)
    shutil.copy(photos / 'test/t05.jpg', tmp_path / 'season/w_enrolled/1.jpg')
    trained.answer(data_dir=photos, enrol=tmp_path / 'season')
    data = data_of(trained.answer(data_dir=photos, gallery_weight=1.0).folder)
    query = next(query for query in data['queries'] if query[0] == 't05.jpg')
    assert data['ids'][query[2][0]] == 'w_enrolled' and query[4][0] == -1 and min(query[4][1:]) >= 0


def test_photographs_that_cannot_be_read_have_no_answer(trained, photos):
    bad = cut(photos / 'test/t03.jpg')
    data = data_of(trained.answer(data_dir=photos, skip_bad_images=True).folder)
    assert [query[0] for query in data['queries'] if query[3][0] < 0] == [bad]


def test_the_nearest_photograph_of_each_id():
    """Against a loop over all photographs; neither enrolled ones nor the query itself count."""
    rng = np.random.default_rng(0)
    owners = torch.from_numpy(rng.integers(0, 9, 60))
    owners[owners == 4] = 5  # an id without photographs
    embeddings = torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(1200 + 60, 2, 8))).float(), dim=2)
    queries, embeddings = embeddings[:1200].half(), embeddings[1200:]
    enrolled, itself = rng.random(60) < 0.3, np.where(rng.random(1200) < 0.5, rng.integers(0, 60, 1200), -1)
    member = SimpleNamespace(gallery=Gallery(embeddings, owners, 10), queries=queries.numpy(), enrolled=enrolled, itself=itself,
                             c=SimpleNamespace(device='cpu'))
    member.likeness = lambda rows: Member.likeness(member, rows)
    order = torch.from_numpy(rng.permuted(np.tile(np.arange(10), (1200, 1)), axis=1)[:, :5].copy())
    found = review.nearest_photographs(member, order)
    alike = (queries.float().flatten(1) @ embeddings.flatten(1).T).numpy()
    for query in range(0, 1200, 7):
        for id, place in zip(order[query].tolist(), found[query]):
            own = [g for g in range(60) if owners[g] == id and not enrolled[g] and g != itself[query]]
            assert place == (max(own, key=lambda g: alike[query, g]) if own else -1)
