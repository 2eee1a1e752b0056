"""The README shows what is there."""
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_readme_is_filled_in_and_its_links_lead_somewhere():
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    assert '{{' not in text
    links = re.findall(r'\]\(([^)#:]+)\)', text)
    assert 'figs/model.png' in links
    assert [path for path in links if not (ROOT / path).is_file()] == []
