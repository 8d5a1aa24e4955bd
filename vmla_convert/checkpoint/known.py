"""Released models, with settings that tensors cannot tell: window, chunk, timesteps, licence.

Comments below abbreviate the repositories that state a setting:

    SF       guandeh17/Self-Forcing 33593df        LL1    NVlabs/LongLive v1.0, e52d9ef
    CausVid  tianweiy/CausVid ca21150              LL2    NVlabs/LongLive main, 7860ad9
    CF       thu-ml/Causal-Forcing 1fc7bbc         RF     TencentARC/RollingForcing a1477d0
    IR       yesiltepe-hidir/infinity-rope 63d7b84 Krea   krea-ai/realtime-video acf4b7b
    SKY      SkyworkAI/SkyReels-V2 abed76f         scope  daydreamlive/scope 68b0f95
    Wan21    Wan-Video/Wan2.1 9737cba              Wan22  Wan-Video/Wan2.2 42bf4cf
    DIFF     huggingface/diffusers 58eb52c
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vmla_convert.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class KnownModel:
    """One released model.

    Attributes:
        title: Name of the model, as its authors write it.
        repos: Hub repositories that hold the model.
        widths: Model widths (dim) that were released.
        settings: Values that override `settings.DEFAULTS`, under the same keys; a setting that no
            source states is left out. The licence is the one of the weights.
        file: File of the repository; None where the repository holds only this model.
        siblings: Other files of the repository with the same settings.
        terms: Name and address of the terms, where the licence is `other`.
        note: A caveat for users, without a final period; empty when there is none.
    """

    title: str
    repos: tuple[str, ...]
    widths: tuple[int, ...]
    settings: Mapping[str, Any]
    file: str | None = None
    siblings: tuple[str, ...] = ()
    terms: tuple[str, str] | None = None
    note: str = ""


# SF configs/self_forcing_dmd.yaml, pipeline/causal_inference.py:27-31, utils/scheduler.py:106-141.
_SELF_FORCING_STEPS = {
    "denoising_step_list": (1000, 750, 500, 250),
    "shift": 5.0,
    "renoise": True,
}

# 50 steps as in SF pipeline/causal_diffusion_inference.py, which uses UniPC; we use Euler.
_FIFTY_STEPS = tuple(range(1000, 0, -20))

_NEEDS_GUIDANCE = "trained for classifier-free guidance, which this program does not do"

# Keys are the names for `--model`. Of two models in one repository, the first is the default.
KNOWN: dict[str, KnownModel] = {
    "self-forcing": KnownModel(
        title="Self-Forcing",
        repos=("gdhe17/Self-Forcing",),
        widths=(1536,),
        file="checkpoints/self_forcing_dmd.pt",
        # self_forcing_10s.pt is left out: its config is not known (Self-Forcing issue 60).
        siblings=("checkpoints/self_forcing_sid.pt", "checkpoints/ode_init.pt"),
        settings={
            # SF pipeline/causal_inference.py:278-298 (32,760 tokens: 21 frames),
            # wan/modules/causal_model.py:194-235.
            "chunk_frames": 3,
            "cache": {"window_frames": 21, "sink_frames": 0, "frame_positions": "absolute"},
            "sampler": _SELF_FORCING_STEPS,
            "licence": "cc-by-nc-sa-4.0",
            "base_model": "gdhe17/Self-Forcing",
        },
        note="the model card says cc-by-nc-sa-4.0, the code apache-2.0; the card's licence is used",
    ),
    "causal-forcing": KnownModel(
        title="Causal-Forcing, chunk by chunk",
        repos=("zhuhz22/Causal-Forcing",),
        widths=(1536,),
        file="chunkwise/causal_forcing.pt",
        settings={
            # CF inference.py:70-84, README:115-156; else as SF.
            "chunk_frames": 3,
            "cache": {"window_frames": 21, "sink_frames": 0, "frame_positions": "absolute"},
            "licence": "apache-2.0",
            "base_model": "zhuhz22/Causal-Forcing",
        },
    ),
    "causal-forcing-framewise": KnownModel(
        title="Causal-Forcing, frame by frame",
        repos=("zhuhz22/Causal-Forcing",),
        widths=(1536,),
        file="framewise/causal_forcing.pt",
        settings={
            # CF README:115-156 (num_frame_per_block 1); else as SF.
            "chunk_frames": 1,
            "cache": {"window_frames": 21, "sink_frames": 0, "frame_positions": "absolute"},
            "licence": "apache-2.0",
            "base_model": "zhuhz22/Causal-Forcing",
        },
    ),
    "rolling-forcing": KnownModel(
        title="Rolling Forcing",
        repos=("TencentARC/RollingForcing",),
        widths=(1536,),
        file="checkpoints/rolling_forcing_dmd.pt",
        settings={
            # RF configs/rolling_forcing_dmd.yaml, pipeline/rolling_forcing_inference.py:170-291,
            # wan/modules/causal_model.py:76, 208-303: attention attends to 21 frames, and the sink
            # is rotated to stand just before them, as `relative` does.
            "chunk_frames": 3,
            "cache": {"window_frames": 21, "sink_frames": 3, "frame_positions": "relative"},
            "sampler": {
                "denoising_step_list": (1000, 800, 600, 400, 200),
                "shift": 5.0,
                "renoise": True,
            },
            # RF LICENSE: academic use only, weights included.
            "licence": "other",
            "base_model": "TencentARC/RollingForcing",
        },
        terms=(
            "license-terms-of-rollingforcing",
            "https://github.com/TencentARC/RollingForcing/blob/a1477d0/LICENSE",
        ),
        note="its five chunks at five noise levels are denoised one after the other",
    ),
    "causvid": KnownModel(
        title="CausVid",
        repos=("tianweiy/CausVid",),
        widths=(1536,),
        file="autoregressive_checkpoint/model.pt",
        settings={
            # CausVid causvid/models/wan/causal_model.py:135-143.
            "chunk_frames": 3,
            "cache": {"window_frames": 21, "sink_frames": 0, "frame_positions": "absolute"},
            # causal_inference.py:23-32 uses these timesteps unchanged. They come from a schedule
            # of shift 8, so the shift here is 1.
            "sampler": {
                "denoising_step_list": (1000, 757, 522),
                "shift": 1.0,
                "renoise": True,
            },
            "base_model": "tianweiy/CausVid",
        },
        note="its code is cc-by-nc-sa-4.0; the licence of its weights is not known",
    ),
    "longlive": KnownModel(
        title="LongLive 1.0",
        repos=("Efficient-Large-Model/LongLive-1.3B",),
        widths=(1536,),
        file="models/longlive_base.pt",
        settings={
            # LL1 wan/modules/causal_model.py:207-230, 228-343.
            "chunk_frames": 3,
            "cache": {"window_frames": 12, "sink_frames": 3, "frame_positions": "absolute"},
            "base_model": "Efficient-Large-Model/LongLive-1.3B",
        },
        # LL1 utils/lora_utils.py:31-69, configs/longlive_inference.yaml.
        note="released with a LoRA, models/lora.pt, which has to be merged with --lora",
    ),
    "longlive-2": KnownModel(
        title="LongLive 2.0",
        repos=("Efficient-Large-Model/LongLive-2.0-5B",),
        widths=(3072,),
        file="model_bf16.pt",
        settings={
            # LL2 configs/inference.yaml, pipeline/causal_diffusion_inference.py:76-130,
            # wan_5b/modules/causal_model.py:477-487, 726-779 (relative is an option there).
            "latent_size": (44, 80),
            "chunk_frames": 8,
            "cache": {"window_frames": 32, "sink_frames": 8, "frame_positions": "absolute"},
            "base_model": "Efficient-Large-Model/LongLive-2.0-5B",
        },
        note="it takes four steps; their timesteps are not known, Self-Forcing's are assumed",
    ),
    "infinity-rope": KnownModel(
        title="Infinity-RoPE",
        repos=("SOTAMak1r/Infinite-Forcing",),
        widths=(1536,),
        file="ema_model.pt",
        settings={
            # IR inference.py:172-185, wan/modules/causal_model.py:229-296.
            "chunk_frames": 3,
            "cache": {"window_frames": 6, "sink_frames": 1, "frame_positions": "relative"},
            "base_model": "SOTAMak1r/Infinite-Forcing",
        },
        note="a copy of its card says apache-2.0; the licence of its weights is not known",
    ),
    "reward-forcing": KnownModel(
        title="Reward-Forcing",
        # scope src/scope/core/pipelines/artifacts.py
        repos=("JaydenLu666/Reward-Forcing-T2V-1.3B",),
        widths=(1536,),
        file="rewardforcing.pt",
        settings={
            # scope src/scope/core/pipelines/reward_forcing/model.yaml
            "chunk_frames": 3,
            "cache": {"window_frames": 9, "sink_frames": 3},
            "base_model": "JaydenLu666/Reward-Forcing-T2V-1.3B",
        },
        note="the frame positions in its window are not known, absolute is assumed",
    ),
    "memflow": KnownModel(
        title="MemFlow",
        # scope src/scope/core/pipelines/artifacts.py
        repos=("KlingTeam/MemFlow",),
        widths=(1536,),
        file="base.pt",
        settings={
            # scope src/scope/core/pipelines/memflow/model.yaml
            "chunk_frames": 3,
            "cache": {"window_frames": 12, "sink_frames": 3},
            "base_model": "KlingTeam/MemFlow",
        },
        note="released with a LoRA, lora.pt, for --lora; its memory bank is not reproduced",
    ),
    "krea-realtime": KnownModel(
        title="Krea Realtime",
        repos=("krea/krea-realtime-video",),
        widths=(5120,),
        file="krea-realtime-video-14b.safetensors",
        settings={
            # Krea release_server.py:543, 563-627: three past frames, encoded again from position 0
            # for each chunk of three.
            "chunk_frames": 3,
            "cache": {"window_frames": 6, "sink_frames": 0, "frame_positions": "relative"},
            # SF's timesteps after its shift, so the shift here is 1.
            "sampler": {
                "denoising_step_list": (1000, 937, 833, 625),
                "shift": 1.0,
                "renoise": True,
            },
            "base_model": "krea/krea-realtime-video",
        },
        note="its code is cc-by-nc-sa-4.0; the licence of its weights is not known",
    ),
    "skyreels-v2-df": KnownModel(
        title="SkyReels-V2 Diffusion Forcing",
        repos=("Skywork/SkyReels-V2-DF-1.3B-540P", "Skywork/SkyReels-V2-DF-1.3B-540P-Diffusers"),
        widths=(1536,),
        settings={
            # SKY pipelines/diffusion_forcing_pipeline.py:115-151, 221-297 (97 pixel frames are 25
            # latent ones), modules/transformer.py:659-670: each window starts at position 0.
            "cache": {"window_frames": 25, "sink_frames": 0, "frame_positions": "relative"},
            "sampler": {"denoising_step_list": _FIFTY_STEPS, "renoise": False},
            "licence": "other",
        },
        # The model card uses this name for the Skywork Community License.
        terms=(
            "skywork-license",
            "https://github.com/SkyworkAI/SkyReels-V2/blob/main/LICENSE.txt",
        ),
        note=_NEEDS_GUIDANCE,
    ),
    "wan-2.1": KnownModel(
        title="Wan 2.1 text-to-video",
        repos=(
            "Wan-AI/Wan2.1-T2V-1.3B",
            "Wan-AI/Wan2.1-T2V-14B",
            "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
            "Wan-AI/Wan2.1-T2V-14B-Diffusers",
        ),
        widths=(1536, 5120),
        settings={
            "sampler": {"denoising_step_list": _FIFTY_STEPS, "renoise": False},
            "licence": "apache-2.0",  # Wan21 README:663-664
        },
        note=f"bidirectional: it streams only after causal training; {_NEEDS_GUIDANCE}",
    ),
    "wan-2.2-5b": KnownModel(
        title="Wan 2.2 TI2V-5B",
        repos=("Wan-AI/Wan2.2-TI2V-5B", "Wan-AI/Wan2.2-TI2V-5B-Diffusers"),
        widths=(3072,),
        settings={
            # Wan22 wan/configs/wan_ti2v_5B.py:12-36; LL2 pipeline/causal_diffusion_inference.py.
            "latent_size": (44, 80),
            "sampler": {"denoising_step_list": _FIFTY_STEPS, "shift": 5.0, "renoise": False},
            "licence": "apache-2.0",  # Wan22 README:495-496
        },
        note=f"bidirectional: it streams only after causal training; {_NEEDS_GUIDANCE}",
    ),
    "wan-2.2-a14b": KnownModel(
        title="Wan 2.2 T2V-A14B",
        repos=("Wan-AI/Wan2.2-T2V-A14B", "Wan-AI/Wan2.2-T2V-A14B-Diffusers"),
        widths=(5120,),
        settings={
            # Wan22 wan/configs/wan_t2v_A14B.py:12-37.
            "sampler": {"denoising_step_list": _FIFTY_STEPS, "shift": 12.0, "renoise": False},
            "licence": "apache-2.0",  # Wan22 README:495-496
        },
        note="bidirectional, and one of two experts: each covers its share of noise levels",
    ),
}


def known_model(name: str) -> KnownModel:
    """The model with this name.

    Raises:
        ConfigError: There is none; the hint names the nearest.
    """
    if name not in KNOWN:
        raise ConfigError(f"no known model is called '{name}'", did_you_mean(name, KNOWN))
    return KNOWN[name]


def known_by_repo(repo: str, file: str | None = None) -> str | None:
    """The key in `KNOWN` of a file in a Hub repository; None when the file is not known.

    Args:
        repo: "owner/name", with or without "@revision".
        file: Path in the repository; None for the default file.
    """
    name = repo.partition("@")[0]
    for key, model in KNOWN.items():
        files = (model.file, *model.siblings)
        if name in model.repos and (file is None or model.file is None or file in files):
            return key
    return None
