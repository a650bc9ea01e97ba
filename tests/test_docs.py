"""README, README_cn and docs/: links lead somewhere, and the Chinese page has the same commands and pictures."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("resources/*.md"), *ROOT.glob("tests/**/*.md")]


def anchors(page):
    """GitHub's names of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?://)([^)]+)\)", page.read_text("utf-8")):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


def test_the_readme_in_chinese_is_in_step():
    english, chinese = ((ROOT / name).read_text("utf-8") for name in ("README.md", "README_cn.md"))
    for pattern in (r"^(?:python|pip|visualdl) [^#\n]+", r"\]\((?!https?://|README)([^)]+)\)", r"^(##) "):
        assert [x.strip() for x in re.findall(pattern, english, re.M)] == [
            x.strip() for x in re.findall(pattern, chinese, re.M)
        ]
