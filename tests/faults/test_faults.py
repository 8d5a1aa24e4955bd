"""The short version of the fault suite; `make faults` runs the long one and writes its table."""

from __future__ import annotations

from pathlib import Path

import pytest
from faults.damage import poisoned, readers, run_damage, write_inputs
from faults.kills import Reference, commands, run_faults, run_kills
from hub_stub import Hub

from vmla_convert.errors import VmlaError

pytest_plugins = ["checkpoints", "codec_files", "hub_stub"]


def test_damaged_inputs_end_in_a_sentence(teacher: Path, codec: Path, tmp_path: Path) -> None:
    inputs = tmp_path / "inputs"
    found = run_damage(write_inputs(inputs, teacher, codec), inputs, count=3)
    assert [crash for outcome in found.values() for crash in outcome.crashes] == []


def test_files_run_no_code(teacher: Path, tmp_path: Path) -> None:
    with poisoned(tmp_path) as files:
        for read in readers(teacher).values():
            for file in files:
                with pytest.raises(VmlaError):
                    read(file)


# huggingface-hub 2.4 uploads in a way that its HTTP library calls deprecated.
@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["convert", "push"])
def test_interrupted_commands_go_on(
    name: str, teacher: Path, codec: Path, tmp_path: Path, stub: Hub
) -> None:
    command = commands(tmp_path / "commands", teacher, codec, stub)[name]
    reference = Reference(command, tmp_path / "kills")
    found = run_kills(reference, kills=2)
    assert (found.different, found.stuck) == ([], [])
    for kind in ("full disk", "read-only disk", "vanished input"):
        failed = run_faults(reference, kind, stages=2)
        assert (failed.crashed, failed.unmended) == ([], [])
