"""Samples of the dense model: made once, found again, resumed, split by prompt; or refused."""

from __future__ import annotations

import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from checkpoints import PowerCut, PowerCutError, Vmla, refused
from conftest import noise
from safetensors.torch import load_file, save_file

from vmla_convert.checkpoint.families import OpenCheckpoint
from vmla_convert.config import CachePolicy, DataConfig, MediaConfig, SourceConfig
from vmla_convert.errors import ConfigError, MissingExtraError, OutputError, VmlaError
from vmla_convert.generating import make_clips, own_samples
from vmla_convert.generating.clip_cost import sampling_flops
from vmla_convert.generating.clip_sets import clip_sets
from vmla_convert.generating.generate import generate
from vmla_convert.generating.make_clips import Need, check_needs, ready_clips
from vmla_convert.generating.own_samples import split_prompts
from vmla_convert.loading.load import load, open_named
from vmla_convert.media.clips import open_clips, seeded
from vmla_convert.media.demo import DemoMedia
from vmla_convert.media.open import default_prompts
from vmla_convert.media.wan import WanMedia

pytest_plugins = ["checkpoints", "tiny_wan"]

OWN = DataConfig("self", frames=4)
NEED = Need(OWN, "train", 10)


@pytest.fixture
def media(tmp_path: Path) -> MediaConfig:
    return MediaConfig(clips_dir=str(tmp_path / "clips"))


@pytest.fixture
def opened(teacher: Path) -> OpenCheckpoint:
    return open_named(teacher)


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


def refuse(*_: object, **__: object) -> NoReturn:
    pytest.fail("work that should not have been done")


def test_a_sample_is_what_the_model_generates_from_its_own_noise(
    opened: OpenCheckpoint, teacher: Path, media: MediaConfig
) -> None:
    data = replace(OWN, prompts=("a seven", "3", "one", "two", "4"), seed=5)
    [ready] = ready_clips(opened, [Need(data, "train", 10)], media)
    stored = [load_file(file) for file in sorted(Path(ready.source).glob("*.safetensors"))]
    assert (len(stored), ready.frames, ready.clips) == (10, 4, 10)
    dense, named = load(teacher), {7: "a seven", 3: "3", 1: "one", 2: "two"}
    digits = [clip["context"].argmax().item() for clip in stored]
    assert set(digits) == set(named), "the last prompt is held out"
    assert all(digits.count(digit) in (2, 3) for digit in named), "prompts take turns"
    for clip, (tensors, digit) in enumerate(zip(stored, digits, strict=True)):
        seed = seeded(5, clip, "train clip").initial_seed()
        expected = torch.cat(list(generate(dense, named[int(digit)], 4, seed)), 1)
        assert torch.allclose(tensors["latents"], expected, atol=1e-5)


def test_clips_are_made_once_and_a_set_grows(
    opened: OpenCheckpoint, media: MediaConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    real = own_samples.rollout

    def counted(*args: Any) -> Any:
        made.append(len(args[2](0).context))
        return real(*args)

    monkeypatch.setattr(own_samples, "rollout", counted)
    [first] = ready_clips(opened, [Need(OWN, "train", 8)], media)
    [again] = ready_clips(opened, [Need(OWN, "train", 3)], media)
    assert (made, first.source, again.clips) == ([8], again.source, 3)
    before = files(Path(first.source))
    [more] = ready_clips(opened, [Need(OWN, "train", 12)], media)
    after = files(Path(more.source))
    assert made == [8, 4] and len(after) == 12
    assert {name: after[name] for name in before} == before
    monkeypatch.setattr(make_clips, "build", refuse)
    monkeypatch.setattr(DemoMedia, "encode_prompts", refuse)
    assert ready_clips(opened, [Need(OWN, "train", 12)], media) == [more]
    # A stage with fewer clips reads the same ones, whatever else was made meanwhile.
    short, long = (open_clips(replace(more, clips=n)).batch(0, 3) for n in (3, 12))
    assert {int(clip.sum() * 1e3) for clip in short.latents} <= {
        int(clip.sum() * 1e3) for clip in open_clips(more).batch(0, 12).latents
    }
    assert short.latents.shape == long.latents.shape


def test_every_clip_is_used_once_before_one_comes_again(
    opened: OpenCheckpoint, media: MediaConfig
) -> None:
    [ready] = ready_clips(opened, [NEED], media)
    clips = open_clips(ready)
    first = torch.cat([clips.batch(0, 4).latents, clips.batch(4, 6).latents])
    assert len(first.flatten(1).unique(dim=0)) == 10
    assert len(clips.batch(5, 10).latents.flatten(1).unique(dim=0)) > 5


def test_interrupted_sampling_continues_to_the_same_bytes(
    opened: OpenCheckpoint, tmp_path: Path
) -> None:
    whole, cut = (MediaConfig(clips_dir=str(tmp_path / name)) for name in ("whole", "cut"))
    [expected] = ready_clips(opened, [NEED], whole)
    for steps in (1, 2, 3):
        with pytest.raises(PowerCutError):
            ready_clips(opened, [NEED], cut, PowerCut("sampling clips", steps))
    [ready] = ready_clips(opened, [NEED], cut)
    assert Path(ready.source).name == Path(expected.source).name
    assert files(Path(ready.source)) == files(Path(expected.source))


def test_a_set_belongs_to_everything_that_its_clips_depend_on(
    opened: OpenCheckpoint, media: MediaConfig, tmp_path: Path, teacher: Path
) -> None:
    def place(checkpoint: OpenCheckpoint = opened, split: Any = "train", **change: Any) -> str:
        [work] = check_needs(checkpoint, [Need(replace(OWN, **change), split, 2)], media)
        assert isinstance(work, own_samples.OwnSamples)
        return work.folder.name

    copy = tmp_path / "copy"
    shutil.copytree(teacher, copy)
    assert place() == place(open_named(copy)), "the path of the weights does not matter"
    short = {"cache": {"window_frames": 4, "sink_frames": 0}}
    other = open_named(SourceConfig(str(teacher), overrides=short))
    places = [
        place(),
        place(seed=1),
        place(frames=6),
        place(latent_size=(6, 6)),
        place(prompts=("1", "2")),
        place(split="held_out"),
        place(other),
    ]
    assert len(set(places)) == len(places)


def test_clips_may_be_smaller_than_the_model_s(opened: OpenCheckpoint, media: MediaConfig) -> None:
    [ready] = ready_clips(opened, [Need(replace(OWN, latent_size=(6, 8)), "train", 2)], media)
    assert open_clips(ready).batch(0, 2).latents.shape == (2, 4, 12, 6, 8)
    with pytest.raises(ConfigError):
        ready_clips(opened, [Need(replace(OWN, latent_size=(7, 8)), "train", 2)], media)


def test_held_out_clips_come_from_other_prompts_and_other_noise(
    opened: OpenCheckpoint, media: MediaConfig
) -> None:
    needs = [NEED, Need(OWN, "held_out", 4)]
    train, held_out = ready_clips(opened, needs, media)
    assert train.source != held_out.source
    records = [open_clips(data).record() for data in (train, held_out)]
    assert set(records[0]["prompts"]).isdisjoint(records[1]["prompts"])
    assert records[1]["held_out"] == [0, 4] and "train" not in records[1]
    other = open_clips(held_out).batch(0, 4, "held_out").latents
    assert not torch.equal(open_clips(train).batch(0, 4).latents, other)


def test_prompts_are_split_disjointly(opened: OpenCheckpoint) -> None:
    wan = replace(opened.config, media="wan")
    shipped = default_prompts(wan)
    assert len(shipped) == len(set(shipped)) == 128
    for prompts in (shipped, default_prompts(opened.config), ("a", "b"), tuple("abcde")):
        train, held_out = (split_prompts(prompts, split) for split in ("train", "held_out"))
        assert train and held_out and (*train, *held_out) == prompts
    with pytest.raises(ConfigError):
        split_prompts(("one",), "train")


def test_training_clips_have_spare_ones_that_are_held_out(
    opened: OpenCheckpoint, media: MediaConfig
) -> None:
    [ready] = ready_clips(opened, [Need(replace(OWN, clips=10), "train", 99, spare=True)], media)
    record = open_clips(ready).record()
    assert (record["train"], record["held_out"]) == ([0, 10], [10, 11])


@pytest.mark.parametrize("damage", ["prompts", "one prompt", "media", "disk", "short"])
def test_samples_that_cannot_be_made_are_refused_before_any_work(
    damage: str, opened: OpenCheckpoint, media: MediaConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_clips, "build", refuse)
    data, kind = OWN, {"disk": OutputError}.get(damage, VmlaError)
    if damage == "prompts":
        data = replace(OWN, prompts=("a cat", "7"))
    elif damage == "one prompt":
        data = replace(OWN, prompts=("7",))
    elif damage == "media":
        opened = replace(opened, config=replace(opened.config, media="wan"))
    elif damage == "disk":
        usage = shutil.disk_usage(".")._replace(free=100)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    else:
        data = replace(OWN, frames=3)
    with pytest.raises(kind) as caught:
        ready_clips(opened, [Need(data, "train", 2)], media)
    words = {"prompts": "a cat", "one prompt": "--prompts", "media": "media.base",
             "disk": "--clips-dir", "short": "4"}  # fmt: skip
    assert words[damage] in f"{caught.value} {caught.value.hint}"
    assert media.clips_dir and not Path(media.clips_dir).exists()


def test_samples_of_another_model_are_refused(opened: OpenCheckpoint, media: MediaConfig) -> None:
    [ready] = ready_clips(opened, [NEED], media)
    identity = Path(ready.source) / "identity.json"
    record = json.loads(identity.read_text())
    record["weights"]["sha256"] = "another"
    identity.write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="another model"):
        ready_clips(opened, [Need(DataConfig(ready.source), "train", 2)], media)


def test_the_demo_world_and_latents_stay_as_they_are(
    opened: OpenCheckpoint, media: MediaConfig, tmp_path: Path
) -> None:
    save_file({"latents": noise(4, 4, 12, 4, 4), "context": noise(4, 1, 10)}, tmp_path / "x")
    for source in ("demo", str(tmp_path / "x")):
        data = DataConfig(source, frames=4)
        assert ready_clips(opened, [Need(data, "train", 2)], media) == [data]
    assert not (tmp_path / "clips").exists()
    with pytest.raises(ConfigError, match=r"nowhere\.mp4"):
        ready_clips(opened, [Need(DataConfig("nowhere.mp4"), "train", 2)], media)


def test_the_text_encoder_is_gone_before_the_model_comes(
    wan_source: SourceConfig, media: MediaConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoders: list[weakref.ref[Any]] = []
    encode, build = WanMedia.encode_prompts, make_clips.build

    def encoded(own: WanMedia, prompts: list[str]) -> torch.Tensor:
        contexts = encode(own, prompts)
        encoders.append(weakref.ref(own.text_encoder))
        return contexts

    def built(*args: Any) -> Any:
        assert encoders and all(encoder() is None for encoder in encoders)
        return build(*args)

    monkeypatch.setattr(WanMedia, "encode_prompts", encoded)
    monkeypatch.setattr(make_clips, "build", built)
    needs = [Need(OWN, "train", 2), Need(OWN, "held_out", 2)]
    ready_clips(open_named(wan_source), needs, media)
    assert len(encoders) == 2


def test_a_missing_extra_is_named(
    wan_source: SourceConfig, media: MediaConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmla_convert.media.wan.find_spec", lambda _: None)
    with pytest.raises(MissingExtraError) as caught:
        ready_clips(open_named(wan_source), [NEED], media)
    assert "[wan]" in caught.value.hint


def test_the_operations_of_a_sample_are_those_of_its_passes(opened: OpenCheckpoint) -> None:
    wide = replace(opened.config, cache=CachePolicy(window_frames=100))
    one, two, four = (sampling_flops(wide, frames) for frames in (2, 4, 8))
    assert 2 * one < two and 2 * two < four, "later chunks attend to more"
    short = replace(opened.config, cache=CachePolicy(window_frames=2))
    assert sampling_flops(short, 8) == 4 * sampling_flops(short, 2)


def test_sets_are_listed(
    opened: OpenCheckpoint, media: MediaConfig, vmla: Vmla, tmp_path: Path
) -> None:
    assert media.clips_dir is not None
    ready_clips(opened, [NEED, Need(OWN, "held_out", 2)], media)
    (tmp_path / "clips" / "other").mkdir()
    (tmp_path / "clips" / "other" / "identity.json").write_text("{}")
    sets = {each.split: each for each in clip_sets(Path(media.clips_dir))}
    assert {split: (each.clips, each.frames) for split, each in sets.items()} == {
        "train": (10, 4),
        "held_out": (2, 4),
    }
    rows = json.loads(vmla("clips", "--clips-dir", media.clips_dir, "--json").out)
    assert sorted(row["clips"] for row in rows) == [2, 10]
    nothing = vmla("clips", "--clips-dir", tmp_path / "none")
    assert nothing.code == 0
    assert not refused(nothing)
