"""The README shows what is there, in English and in Chinese."""
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FENCED = re.compile(r'^```.*?^```$', re.M | re.S)
READMES = pytest.mark.parametrize('name', ['README.md', 'README.zh.md'])


def read(name):
    """The text without its code blocks, and those."""
    text = (ROOT / name).read_text(encoding='utf-8')
    return FENCED.sub('', text), FENCED.findall(text)


def headings(prose):
    return re.findall(r'^(#+) (.+)$', prose, re.M)


def anchors(prose):
    """GitHub's names of the headings: lower case, '-' for a space, no punctuation; the second of a name ends in -1."""
    names = [re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-') for _, title in headings(prose)]
    before = [names[:i].count(name) for i, name in enumerate(names)]
    return [f'{name}-{count}' if count else name for name, count in zip(names, before)]


def links(prose):
    return re.findall(r'\]\(([^)\s]+)\)', prose)


def pictures(prose):
    return re.findall(r'!\[[^]]+\]\(([^)\s]+)\)', prose)


def test_anchors_are_named_as_github_does():
    prose = '# A `x`: five, twice\n## 走一遍：五条命令，五张图\n### 1. MAP@5\n## 多张 GPU，多台机器\n# Go on\n# Go on\n'
    assert anchors(prose) == ['a-x-five-twice', '走一遍五条命令五张图', '1-map5', '多张-gpu多台机器', 'go-on', 'go-on-1']


@READMES
def test_the_readme_is_filled_in(name):
    assert '{{' not in (ROOT / name).read_text(encoding='utf-8')


@READMES
def test_links_lead_somewhere(name):
    prose, _ = read(name)
    files = [link.partition('#')[0] for link in links(prose) if ':' not in link and not link.startswith('#')]
    assert 'figs/model.png' in files
    assert [path for path in files if not (ROOT / path).is_file()] == []
    assert [link for link in links(prose) if link.startswith('#') and link[1:] not in anchors(prose)] == []


def test_both_languages_show_the_same():
    (english, blocks), (chinese, same_blocks) = read('README.md'), read('README.zh.md')
    assert len(blocks) > 3 and same_blocks == blocks
    assert len(pictures(english)) > 5 and pictures(chinese) == pictures(english)
    assert [level for level, _ in headings(chinese)] == [level for level, _ in headings(english)]
    cells = [[line.count('|') for line in prose.splitlines() if line.startswith('|')] for prose in (english, chinese)]
    assert cells[0] == cells[1]
