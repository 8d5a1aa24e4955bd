"""Print the results of commands for people; `--json` prints the result itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vmla_convert.console import out
from vmla_convert.errors import CheckpointError
from vmla_convert.results import Metric, Row, read_rows

if TYPE_CHECKING:
    from vmla_convert.doctor.machine import Machine
    from vmla_convert.doctor.stages import Need, Room
    from vmla_convert.fitting.convert import Conversion
    from vmla_convert.fitting.inspect import Inspection
    from vmla_convert.fitting.plan import PlannedOutput
    from vmla_convert.generating.clip_cost import PlannedWork
    from vmla_convert.layers.memory import Memory
    from vmla_convert.loading.publish import Push
    from vmla_convert.loading.verify import Verified
    from vmla_convert.recipe.plan import PlannedRun
    from vmla_convert.recovery.plan import PlannedRecovery

SAID_SECONDS = 60


def show_decision(rows_file: Path) -> None:
    """Print the report's first table, if the rows hold its figures."""
    from vmla_convert.report.tables import decisive_table

    header, *rows = decisive_table(read_rows(rows_file))
    if rows:
        out.table("What each setting costs and loses", header, rows)


def show_conversion(done: Conversion, folder: Path, next_command: str) -> None:
    """Print the size and the folder of a conversion, and the next command."""
    out.data(
        {
            "bytes cached per token and layer": done.config.cache_bytes_per_token(),
            "cache cut": done.config.cache_cut(),
            "seconds": done.convert_seconds,
        }
    )
    out.path("wrote", folder)
    if not out.json:
        out.say(f"next: {next_command}")


def show_recovery(rows: Sequence[Row], folder: Path) -> None:
    """Print the curve of a recovery, and which step of each stage was kept."""
    from vmla_convert.loading.load import read_provenance

    errors = {(row.metric, row.step): row.value for row in rows}
    curve = [
        [step, errors[Metric.FLOW_LOSS, step], error]
        for (metric, step), error in errors.items()
        if metric == Metric.VELOCITY_ERROR
    ]
    out.table("Recovery", ["step", "flow_loss", "velocity_error"], curve)
    recovered = read_provenance(folder)["recovered"]
    kept: dict[str, int] = recovered["kept_steps"]
    shown = {"kept steps": kept, "learning rate": recovered["learning_rate"]}
    if curve:
        shown["flow loss of the dense model"] = errors[Metric.FLOW_LOSS, None]
    if skipped := {stage: n for stage, n in recovered["skipped_steps"].items() if n}:
        shown["skipped steps"] = skipped
    out.data(shown)
    if not any(kept.values()):
        out.say("no stage measured better than its start: the weights are those of the conversion")
    out.path("wrote", folder)


def show_work(work: PlannedWork) -> None:
    """Say how many clips are made and how long it takes, if it takes long."""
    if work.clips_to_sample:
        out.say(
            f"clips to sample: {work.clips_to_sample}, about {duration(work.seconds_per_clip)} "
            f"each, at most {work.clip_bytes / 1e9:.2f} GB in {work.clips_dir}"
        )
    if work.passing_seconds >= SAID_SECONDS:
        out.say(f"passing clips through the model: about {duration(work.passing_seconds)}")
    if work.clips_to_sample or work.passing_seconds >= SAID_SECONDS:
        for name, amount in peak_facts(work.memory).items():
            out.say(f"{name}: {amount}")


def peak_facts(memory: Memory) -> dict[str, str]:
    """Peak memory by formula, of the GPU and of the host where there is a GPU."""
    import torch

    if not torch.cuda.is_available():
        return {"peak memory": gigabytes(memory.without_gpu)}
    host = gigabytes(memory.host + memory.staging)
    return {"peak memory of the GPU": gigabytes(memory.device), "peak memory of the host": host}


def work_facts(work: PlannedWork) -> dict[str, str | int]:
    """Memory, clips and time that planned work takes, for a table of facts."""
    return {
        **peak_facts(work.memory),
        "clips to sample": work.clips_to_sample,
        "bytes of these clips, at most": f"{work.clip_bytes:,}",
        "sampling takes about": duration(work.sampling_seconds),
        "passing clips through the model takes about": duration(work.passing_seconds),
    }


def show_planned_run(planned: PlannedRun) -> None:
    """Print what a recipe would do."""
    out.data(
        {
            "recipe": planned.recipe,
            "stages": planned.stages,
            **({"points": planned.points} if planned.points else {}),
            "would write": planned.out,
            **work_facts(planned.work),
        }
    )


def show_planned_recovery(planned: PlannedRecovery) -> None:
    """Print what a recovery would do."""
    if out.json:
        out.data(planned)
        return
    steps = ", ".join(f"{stage} {count}" for stage, count in planned.steps.items() if count)
    out.data(
        {
            "dense model": planned.teacher,
            "steps": steps,
            "numbers that train": f"{planned.trains:,} of {planned.of:,}",
            "processes": planned.processes,
            "would write": planned.out,
            "bytes": f"{planned.nbytes:,}",
            **work_facts(planned.work),
        }
    )


def gigabytes(nbytes: int) -> str:
    """Bytes for people."""
    return f"{nbytes / 1e9:.1f} GB"


def duration(seconds: float) -> str:
    """A time for people, in the unit that fits."""
    if seconds < 100:
        return f"{seconds:.2g} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"


def show_planned_output(planned: PlannedOutput) -> None:
    """Print what a conversion would write."""
    if out.json:
        out.data(planned)
        return
    out.data(
        {
            "would write": planned.out,
            "bytes cached per token and layer": planned.cache_bytes_per_token,
            "cache cut": f"{planned.cache_cut:.1%}",
            "working files beside it (bytes)": f"{planned.working_bytes:,}",
            **work_facts(planned.work),
        }
    )
    files = [[name, f"{nbytes:,}"] for name, nbytes in planned.files.items()]
    out.table("Weights", ["file", "bytes"], [*files, ["together", f"{planned.nbytes:,}"]])


def show_push(push: Push, dry_run: bool) -> None:
    """Print what went up, or would."""
    if out.json:
        out.data(push)
        return
    out.data(
        {
            "repository": f"{push.url} ({'private' if push.private else 'public'})",
            "commit": push.commit or ("none yet: it would be made" if dry_run else "-"),
            **({"tag": push.tag} if push.tag else {}),
            **({"removed": ", ".join(push.removed)} if push.removed else {}),
        }
    )
    words = ["would go up", "would stay as it is"] if dry_run else ["uploaded", "there already"]
    files = [
        [name, f"{nbytes:,}", word]
        for word, group in zip(words, (push.uploaded, push.kept), strict=True)
        for name, nbytes in group.items()
    ]
    total = sum(push.uploaded.values())
    out.table("Files", ["file", "bytes", ""], [*files, ["together", f"{total:,}", words[0]]])
    if not dry_run:
        name = f"{push.repo}@{push.tag}" if push.tag else push.repo
        out.say(f'next: vmla generate {name} --prompt "…" -o clip.mp4')


def show_verified(found: Verified) -> None:
    """Print what was checked and what is wrong.

    Raises:
        CheckpointError: Something is wrong.
    """
    agree = {f"SHA-256 of {name} agrees with": whom for name, whom in found.files.items()}
    out.data(
        {"checkpoint": found.path, "base model": found.base, "tensors": found.tensors, **agree}
    )
    if not found.faults:
        out.say("every tensor is whole and finite")
        return
    out.table(
        "Faults", ["file or tensor", "what is wrong"], [[f.place, f.what] for f in found.faults]
    )
    raise CheckpointError(
        f"{found.path} has {len(found.faults)} faults", "copy, download or convert it again"
    )


def show_inspection(inspection: Inspection) -> None:
    """Print facts about a checkpoint, and the size of its caches."""
    out.data(_facts(inspection))
    model, converted = inspection.model, inspection.converted
    cached = [["this checkpoint", model, inspection.window_cache_bytes]]
    if converted is not model:
        cached.append(["with a codec", converted, inspection.converted_window_cache_bytes])
    out.table(
        "KV cache",
        ["", "bytes per token and layer", "bytes per token", "full window (bytes)", "cut"],
        [
            [
                name,
                f"{c.cache_bytes_per_token():.4g}",
                f"{round(c.cache_bytes_per_token() * model.geometry.num_layers):,}",
                f"{nbytes:,}",
                f"{c.cache_cut():.1%}",
            ]
            for name, c, nbytes in cached
        ],
    )
    for title, names in (
        ("Unknown tensors: convert will refuse them", inspection.unknown),
        ("Missing tensors: convert will refuse this checkpoint", inspection.missing),
    ):
        if names:
            out.table(title, ["name"], [[name] for name in names])
    if inspection.spectrum:
        _show_spectrum(inspection)


def _facts(inspection: Inspection) -> dict[str, object]:
    model, geometry = inspection.model, inspection.model.geometry
    # A checkpoint with a licence has a config.json of ours, which holds the other settings too.
    is_known = model.licence != "unknown"
    unnamed = "" if is_known else "none named; --model brings what tensors lack"
    known = {"known model": inspection.known_model or unnamed, "note": inspection.note}
    return {
        "checkpoint": inspection.path,
        "family": inspection.family,
        **({name: text for name, text in known.items() if text} if model.is_dense else {}),
        "parameters": f"{inspection.parameters:,}",
        "weights (bytes)": f"{inspection.nbytes:,} as {', '.join(inspection.dtypes)}",
        "layers, width, heads": f"{geometry.num_layers}, {geometry.dim}, {geometry.num_heads}",
        "feed-forward, channels": f"{geometry.ffn_dim}, {geometry.in_dim}",
        "latent size, tokens per frame": (
            f"{model.latent_size[0]} x {model.latent_size[1]}, {model.tokens_per_frame}"
        ),
        "chunk, window, sink (frames)": (
            f"{model.chunk_frames}, {model.cache.window_frames}, {model.cache.sink_frames}"
        ),
        "pixel frames per second": model.frames_per_second,
        "sampler steps, shift": (
            f"{', '.join(map(str, model.sampler.denoising_step_list))}; {model.sampler.shift:g}"
        ),
        "licence": model.licence,
        "base model": model.base_model,
    }


def _show_spectrum(inspection: Inspection) -> None:
    dim = inspection.model.geometry.dim
    header = ["layer", f"99 %-energy rank of {dim}", f"energy at R = {dim // 8}"]
    layers = [
        [str(s.layer), str(s.effective_rank_99), f"{s.energy_at_rank:.1%}"]
        for s in inspection.spectrum
    ]
    out.table("Joint key and value weights", header, layers)


def show_machine(machine: Machine) -> None:
    """Print what is installed and what the machine has."""
    versions = {name: text or "not installed" for name, text in machine.versions.items()}
    devices = [f"{each.name}, {_gigabytes(each.nbytes)}" for each in machine.devices]
    disks = {
        f"disk free for {name}": _gigabytes(nbytes) if nbytes is not None else "unknown"
        for name, nbytes in machine.free_disk_bytes.items()
    }
    out.data(
        {
            **versions,
            **{f"to add [{extra}]": how for extra, how in machine.missing_extras.items()},
            "GPUs": "; ".join(devices) or "none: the processor computes",
            "host memory": f"{_gigabytes(machine.host_bytes)}, "
            f"{_gigabytes(machine.free_host_bytes)} free",
            **disks,
            "Hub": machine.hub,
        }
    )


def show_needs(needs: Sequence[Need], room: Room) -> None:
    """Print a table of models and stages, and the settings that make stages fit."""
    place = "GPU" if room.device is not None else "host"
    has = _gigabytes(room.device if room.device is not None else room.host)
    stages = list(dict.fromkeys(need.stage for need in needs))
    notes = list(dict.fromkeys(need.changes for need in needs if need.changes))
    rows: dict[str, list[str]] = {}
    for need in needs:
        nbytes = need.device_bytes if room.device is not None else need.host_bytes
        fits = "yes" if need.fits else "no"
        mark = f"with {notes.index(need.changes) + 1}" if need.changes else fits
        rows.setdefault(need.model, [need.model]).append(f"{nbytes / 1e9:.1f} {mark}")
    title = f"Peak GB of {place} memory by formula, and whether it fits in {has}"
    out.table(title, ["model", *stages], list(rows.values()))
    settings = {
        f"with {number}": " ".join(f"--set {change}" for change in changes)
        for number, changes in enumerate(notes, 1)
    }
    disk = {
        f"disk to convert {need.model}": _gigabytes(need.disk_bytes)
        for need in needs
        if need.disk_bytes
    }
    out.data(settings | disk)


def _gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB"
