"""Compile the Triton kernels for GPUs that need not be here, and print what each takes.

    python -m evals.kernels

Registers and spills are those that `cuobjdump` reads from the compiled program. No kernel runs.
"""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import triton
import typer
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vmla_convert.__main__ import main as run_reporting_errors
from vmla_convert.console import out
from vmla_convert.kernels import programs, unpacking
from vmla_convert.kernels.rotary import (
    DECODE_BLOCK,
    DECODE_OPTIONS,
    DECODE_STEP,
    ROTATE_BLOCK,
    ROTATE_OPTIONS,
)

TARGETS = (80, 89, 90, 100, 120)
"""Compute capabilities: A100, RTX 4090, H100 and H200, B200, RTX 5090."""

HEAD_DIM, WARP = 128, 32
STRIDES = ("x_b", "x_s", "x_h", "channels_b", "channels_s", "weight_s", "out_b", "out_s", "out_h")
TENSORS = {"x": "*bf16", "out": "*bf16", "channels": "*bf16", "weight": "*bf16", "mean": "*bf16"}
CODES = {"stored": "*u8", "starts": "*i32", "widths": "*i32", "tables": "*fp32"}
TYPES = {
    **dict.fromkeys((*STRIDES, "stored_s", "S", "R"), "i32"),
    **TENSORS,
    **CODES,
    "table": "*fp32",
}
PROGRAMS: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "rotate": ({"D": HEAD_DIM, "BLOCK": ROTATE_BLOCK}, ROTATE_OPTIONS),
    "decode_rotated": (
        {"D": HEAD_DIM, "BLOCK": DECODE_BLOCK, "STEP": DECODE_STEP},
        DECODE_OPTIONS,
    ),
    "unpacked": ({"BLOCK": unpacking.BLOCK, "STEP": unpacking.STEP}, unpacking.OPTIONS),
}
ANY_NUMBER = ("S", "stored_s", *PROGRAMS["decode_rotated"][0])
"""Arguments that are no multiple of 16; addresses, strides and channels are."""
# Matrix instructions of a warp, of a group of warps (Hopper), and of tensor memory (Blackwell).
MATRIX = ("mma.sync", "wgmma", "tcgen05.mma")


class Compiled(NamedTuple):
    """The resources that a program takes on a GPU.

    Attributes:
        program: Name.
        target: Compute capability, times ten.
        registers: Registers of a thread.
        shared: Bytes of shared memory of a block.
        spilled: Bytes of registers that a thread keeps in memory.
        matrix: Matrix instructions in the program.
        nbytes: Bytes of the program.
    """

    program: str
    target: int
    registers: int
    shared: int
    spilled: int
    matrix: str
    nbytes: int


def main() -> None:
    """Compile every kernel for every target and print a table."""
    rows = [compiled(name, target) for name in PROGRAMS for target in TARGETS]
    out.table("Kernels, compiled but not run", Compiled._fields, rows)


@cache
def compiled(name: str, target: int) -> Compiled:
    """Compile a program for a GPU."""
    program: Any = getattr(programs, name)
    constants, options = PROGRAMS[name]
    types = {n: "constexpr" if n in constants else TYPES[n] for n in program.arg_names}
    fixed = {(program.arg_names.index(n),): value for n, value in constants.items()}
    even = {
        (place,): [["tt.divisibility", 16]]
        for place, argument in enumerate(program.arg_names)
        if argument not in ANY_NUMBER
    }
    source = ASTSource(program, types, fixed, even)
    made: Any = triton.compile(source, GPUTarget("cuda", target, WARP), options)
    usage = _usage(made.asm["cubin"])
    matrix = [each for each in MATRIX if each in made.asm["ptx"]]
    return Compiled(
        name,
        target,
        usage["REG"],
        made.metadata.shared,
        usage["LOCAL"] + usage["STACK"],
        ", ".join(matrix),
        len(made.asm["cubin"]),
    )


def _usage(program: bytes) -> dict[str, int]:
    """Resources of a compiled program, by cuobjdump's names."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with TemporaryDirectory() as folder:
        file = Path(folder) / "program.cubin"
        file.write_bytes(program)
        told = subprocess.run(
            [tool, "-res-usage", file], capture_output=True, text=True, check=True
        ).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", told)}


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: typer.run(main)))
