"""A token appears nowhere, and text from files stays text."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from checkpoints import Ran, Vmla
from codec_files import edit_record
from hub_stub import Hub, Refusal

from vmla_convert.loading.card import model_card
from vmla_convert.loading.load import load, read_provenance
from vmla_convert.report.report import write_report
from vmla_convert.results import Metric, Row, put_rows

pytest_plugins = ["checkpoints", "codec_files", "hub_stub"]

MARK = "hf_MarkedTokenThatMustNotAppear"
HOSTILE = "<script>alert(1)</script>"


def test_a_token_appears_in_no_output_and_no_file(
    teacher: Path, codec: Path, vmla: Vmla, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", MARK)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = tmp_path / "out"
    ran = [
        vmla("inspect", teacher),
        vmla("convert", teacher, "-o", out, "--no-calibration"),
        vmla("convert", teacher, "-o", out, "--no-calibration"),  # the folder is taken
        vmla("verify", out),
        vmla("export", codec, "-o", tmp_path / "whole", "--json"),
        vmla("inspect", "nobody/nothing"),
        vmla("generate", codec, "--prompt", "no digit", "-o", tmp_path / "a.mp4"),
        vmla("eval", codec, "--set", "evaluate.clips=x"),
        vmla("recover", codec, "-o", tmp_path / "r", "--data", "nowhere"),
        vmla("sweep", "no recipe", "-o", tmp_path / "s"),
        vmla("run", "no recipe", "-o", tmp_path / "s"),
        vmla("report", tmp_path),
        vmla("recipes"),
        vmla("push", tmp_path / "nowhere", "owner/name"),
    ]
    assert {each.code for each in ran} == {0, 2}
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert files
    assert not any(MARK in each.out + each.err for each in ran)
    assert not any(MARK.encode() in file.read_bytes() for file in files)


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_a_token_stays_secret_when_the_hub_fails(
    teacher: Path,
    codec: Path,
    vmla: Vmla,
    tmp_path: Path,
    stub: Hub,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every verb that asks the Hub, while the Hub refuses, repeats the token, or is gone."""
    monkeypatch.setenv("HF_TOKEN", MARK)
    made = tmp_path / "made"
    shown = [
        vmla("doctor"),
        vmla("recipes"),
        vmla("demo", "-o", teacher / "config.json" / "no folder"),
    ]
    failed = list[Ran]()
    for status in (401, 403, 500, None):
        if status is None:
            stub.shutdown()
            stub.server_close()
        else:
            words = f"token {MARK} is wrong"
            stub.refusals = [Refusal(m, "*", status, words) for m in ("GET", "HEAD", "POST")]
        failed += [
            vmla("push", codec, "user/kv"),
            vmla("inspect", "user/kv"),
            vmla("verify", "user/kv"),
            vmla("convert", "user/kv", "-o", made),
            vmla("generate", "user/kv", "--prompt", "a seven", "-o", made / "a.mp4"),
            vmla("doctor", "user/kv"),
        ]
    assert all(ran.code for ran in failed)
    assert not any(MARK in ran.out + ran.err for ran in (*shown, *failed))
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert not any(MARK.encode() in file.read_bytes() for file in files)


def test_a_report_shows_hostile_text_as_text(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"run": HOSTILE, "init": HOSTILE, "latent": HOSTILE, "note": HOSTILE}
    rows = [
        Row(Metric.FLOW_LOSS, 0.1, "1", "dense"),
        *(
            Row(metric, 0.1, HOSTILE, product="mla", point="a", step=0, **fields)
            for metric in (Metric.VELOCITY_ERROR, Metric.FLOW_LOSS, Metric.FAILED)
        ),
    ]
    put_rows(tmp_path / "rows.jsonl", rows)
    pages = write_report(tmp_path, HOSTILE)
    [page] = [path for path in pages if path.suffix == ".html"]
    assert HOSTILE not in page.read_text()
    assert "&lt;script&gt;" in page.read_text()


def test_a_card_cannot_be_given_other_settings_by_a_name(codec: Path) -> None:
    config, record = load(codec).config, read_provenance(codec)
    hostile = f"a\n---\nlicense: mit\n---\n{HOSTILE}"
    card = model_card(config, record | {"source": record["source"] | {"name": hostile}})
    head = card.split("---")[1]
    assert "license: mit" not in head
    assert HOSTILE not in card


def test_a_record_cannot_name_files_outside_its_folder(pair_copy: Path, vmla: Vmla) -> None:
    edit_record(
        pair_copy, lambda record: record["weights"]["files"].update({"../../secret": "0" * 64})
    )
    ran = vmla("verify", pair_copy)
    assert ran.code == 2 and "secret" in ran.err


@pytest.fixture
def pair_copy(codec: Path, tmp_path: Path) -> Path:
    return shutil.copytree(codec, tmp_path / "kv")
