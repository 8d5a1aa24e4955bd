"""Prompts are read from files, cleaned and encoded once."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

import vmla_convert.media
from vmla_convert.errors import ConfigError
from vmla_convert.media.prompts import Split, clean_prompt, read_prompts, shipped_prompts

SPLITS: dict[Split, int] = {"calibration": 96, "held_out": 32}


def test_shipped_prompts_are_distinct_english_sentences_of_20_to_60_words() -> None:
    prompts = [prompt for split in SPLITS for prompt in shipped_prompts(split)]
    assert {split: len(shipped_prompts(split)) for split in SPLITS} == SPLITS
    assert len(set(prompts)) == 128
    for prompt in prompts:
        assert prompt.isascii() and prompt[0].isupper() and prompt.endswith("."), prompt
        assert 20 <= len(prompt.split()) <= 60, prompt
        assert prompt == clean_prompt(prompt)


@pytest.mark.parametrize("tag", ["subject", "camera", "style"])
def test_each_subject_camera_movement_and_style_is_in_both_splits(tag: str) -> None:
    file = Path(vmla_convert.media.__path__[0]) / "prompts.toml"
    tables = tomllib.loads(file.read_text("utf-8"))
    calibration, held_out = ({entry[tag] for entry in tables[split]} for split in SPLITS)
    assert calibration == held_out and len(calibration) >= 7


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
