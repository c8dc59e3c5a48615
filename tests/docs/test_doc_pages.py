"""What can be checked without running a page: links, lengths, the index."""

import re
import urllib.parse

import pytest

from tests.conftest import REPOSITORY
from tests.docs.pages import DOCS, PAGES, anchors, blocks, links, name_of

MOST_WORDS = 10_600
MOST_README_BYTES = 8 * 1024
MOST_COLUMNS = 92


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    broken = []
    for link in links(page):
        url = urllib.parse.urlsplit(link)
        if url.scheme:
            assert url.scheme == "https", link
        elif not leads_somewhere(page, url.path, url.fragment):
            broken.append(link)
    assert not broken


def leads_somewhere(page, path, fragment):
    target = (page.parent / path).resolve() if path else page
    return target.exists() and (not fragment or fragment in anchors(target))


def test_the_docs_stay_short():
    counts = {page.name: len(page.read_text().split()) for page in DOCS.glob("*.md")}
    assert sum(counts.values()) <= MOST_WORDS, counts
    assert (REPOSITORY / "README.md").stat().st_size <= MOST_README_BYTES


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_code_fits_the_width_of_the_site(page):
    lines = [line for block in blocks(page) for line in block.text.splitlines()]
    assert not [line for line in lines if len(line) > MOST_COLUMNS]


def test_the_start_page_links_to_every_page():
    linked = {link.partition("#")[0] for link in links(DOCS / "README.md")}
    pages = {str(page.relative_to(DOCS)) for page in PAGES if DOCS in page.parents}
    not_linked = {page for page in pages - linked if "python_" not in page}
    assert not_linked == {"README.md"}


def test_every_figure_of_the_readme_names_its_result():
    text = (REPOSITORY / "README.md").read_text()
    section = text.partition("## What was measured")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    assert rows
    for row in rows:
        is_result = re.search(r"\]\(benchmarks/(results/|notes)", row)
        assert is_result or "not measured" in row or "the same" in row, row
