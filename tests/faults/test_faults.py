"""The short version of the fault suite; `make faults` runs the long one and writes its table."""

from __future__ import annotations

from pathlib import Path

import pytest
from faults.damage import poisoned, run_damage, write_inputs
from faults.kills import commands, run_kills

from vmla_convert.errors import VmlaError
from vmla_convert.loading.load import load

pytest_plugins = ["checkpoints", "codec_files"]


def test_damaged_inputs_end_in_a_sentence(teacher: Path, codec: Path, tmp_path: Path) -> None:
    inputs = tmp_path / "inputs"
    found = run_damage(write_inputs(inputs, teacher, codec), inputs, count=4)
    assert [crash for outcome in found.values() for crash in outcome.crashes] == []
    assert all(outcome.slowest < 20 for outcome in found.values())


def test_pickles_run_no_code(tmp_path: Path) -> None:
    with poisoned(tmp_path) as files:
        for file in files:
            with pytest.raises(VmlaError, match=file.name):
                load(file)


def test_a_killed_conversion_goes_on(teacher: Path, codec: Path, tmp_path: Path) -> None:
    command = commands(tmp_path, teacher, codec)["convert"]
    place = tmp_path / "kills"
    place.mkdir()
    found = run_kills(command, place, kills=2, seconds=60)
    assert (found.different, found.stuck) == (0, 0)
