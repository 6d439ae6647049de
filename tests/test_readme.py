"""The README's tree: every file that it names is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_tree_names_files_that_are_there():
    text = (ROOT / "README.md").read_text()
    tree = text[text.index("## The tree") : text.index("## Limits")]
    named = set(re.findall(r"\b[a-z]\w*\.py\b", tree))
    there = {path.name for folder in ("solver", "adapeft", "cluster") for path in (ROOT / folder).rglob("*.py")}
    assert len(named) > 50
    assert named <= there, sorted(named - there)


def test_links_lead_to_files():
    text = (ROOT / "README.md").read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
