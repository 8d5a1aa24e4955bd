"""Prompts are read from files, cleaned and encoded once."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmla_convert.errors import ConfigError
from vmla_convert.media.prompts import clean_prompt, read_prompts


def test_prompts_are_lines_without_blank_ones_and_comments(tmp_path: Path) -> None:
    text = "# digits\r\n\r\n  a seven \r\nein Gefäß mit 3 #1\r\n"
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / "prompts.txt").write_bytes(text.encode(encoding))
        assert read_prompts(tmp_path / "prompts.txt") == ("a seven", "ein Gefäß mit 3 #1")


@pytest.mark.parametrize("content", [None, b"# none\n\n", b"\xff7"])
def test_a_file_without_prompts_is_refused(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"prompts\.txt"):
        read_prompts(file)


def test_a_prompt_is_cleaned_as_in_wan() -> None:
    assert clean_prompt("  a\n\tcat &amp;lt;3 dâ€™oh ") == "a cat <3 d'oh"
