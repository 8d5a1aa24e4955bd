"""The table of known models makes valid configurations, and each is found by its repository."""

from __future__ import annotations

import re

import pytest

from vmla_convert.checkpoint.known import KNOWN, known_by_repo, known_model
from vmla_convert.checkpoint.settings import DEFAULTS
from vmla_convert.config import Geometry, ModelConfig
from vmla_convert.errors import ConfigError
from vmla_convert.tables import from_dict, to_dict

GEOMETRIES = {
    1536: Geometry(1536, 8960, 12, 30, 16, 16),
    3072: Geometry(3072, 14336, 24, 30, 48, 48),
    5120: Geometry(5120, 13824, 40, 40, 16, 16),
}
TOKENS_PER_FRAME = {1536: 1560, 3072: 880, 5120: 1560}
LICENCES = {"apache-2.0", "cc-by-nc-sa-4.0", "other"}


def config_of(name: str, width: int) -> ModelConfig:
    settings = known_model(name).settings
    return from_dict(
        ModelConfig, {**DEFAULTS, **settings, "geometry": to_dict(GEOMETRIES[width])}, name
    )


@pytest.mark.parametrize("name", KNOWN)
def test_every_model_makes_a_valid_config(name: str) -> None:
    assert KNOWN[name].widths
    for width in KNOWN[name].widths:
        config = config_of(name, width)
        assert config.tokens_per_frame == TOKENS_PER_FRAME[width]
        steps = config.sampler.denoising_step_list
        assert steps[0] == 1000
        assert list(steps) == sorted(set(steps), reverse=True)
        assert steps[-1] > 0
        assert config.licence in LICENCES | {"unknown"}


@pytest.mark.parametrize("name", KNOWN)
def test_an_entry_is_well_formed_and_found_by_its_repository(name: str) -> None:
    model = KNOWN[name]
    assert re.fullmatch(r"[a-z0-9.]+(-[a-z0-9.]+)*", name)
    assert model.title
    assert model.settings.keys() <= DEFAULTS.keys()
    assert model.settings.get("licence") != "unknown", "an unknown setting is left out"
    assert model.settings.get("base_model", model.repos[0]) in model.repos
    assert not model.note.endswith(".")
    for repo in model.repos:
        assert known_by_repo(repo, model.file or "any.safetensors") == name
        assert known_by_repo(f"{repo}@v1.0", model.file) == known_by_repo(repo, model.file)
        for file in model.siblings:
            assert known_by_repo(repo, file) == name


def test_the_file_tells_two_models_of_one_repository_apart() -> None:
    repo = "zhuhz22/Causal-Forcing"
    assert known_by_repo(repo) == "causal-forcing"
    assert known_by_repo(repo, "framewise/causal_forcing.pt") == "causal-forcing-framewise"
    assert known_by_repo(repo, "chunkwise/ar_diffusion.pt") is None


@pytest.mark.parametrize(
    ("repo", "file"),
    [
        ("someone/else", None),
        ("gdhe17/self-forcing-2", None),
        ("gdhe17/Self-Forcing", "checkpoints/self_forcing_10s.pt"),
        ("tianweiy/CausVid", "bidirectional_checkpoint1/model.pt"),
    ],
)
def test_an_unknown_file_is_not_guessed(repo: str, file: str | None) -> None:
    assert known_by_repo(repo, file) is None


def test_shifted_timesteps_are_not_shifted_again() -> None:
    """CausVid and Krea use their timesteps unchanged."""
    for name, width in (("causvid", 1536), ("krea-realtime", 5120)):
        assert config_of(name, width).sampler.shift == 1.0
    ours = config_of("self-forcing", 1536).sampler
    shifted = [ours.shift * t / (1 + (ours.shift - 1) * t / 1000) for t in (1000, 750, 500, 250)]
    assert [int(t) for t in shifted] == list(
        config_of("krea-realtime", 5120).sampler.denoising_step_list
    )


@pytest.mark.parametrize(
    ("typo", "hint"),
    [
        ("self_forcing", "did you mean 'self-forcing'?"),
        ("zzz", "known: causal-forcing, "),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(typo: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=f"'{typo}'") as caught:
        known_model(typo)
    assert caught.value.hint.startswith(hint)
