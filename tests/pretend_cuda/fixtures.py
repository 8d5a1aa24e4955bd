"""Fixtures: the library that makes the pretend GPU, and processes that have one.

Test files ask for them with `pytest_plugins`. PYTEST_DONT_REWRITE, because these files import the
type before pytest sees that.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.cpp_extension import include_paths

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
Scenarios = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def guard(request: pytest.FixtureRequest) -> Path:
    """The library of `guard.cpp`, compiled once for each version of torch."""
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("the pretend GPU is compiled, and this machine has no C++ compiler for Linux")
    source, cache = HERE / "guard.cpp", request.config.cache
    assert cache is not None
    key = sha256(source.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    library = cache.mkdir("pretend_cuda") / f"guard-{key}.so"
    if not library.is_file():
        torch_libraries = Path(torch.__file__).parent / "lib"
        includes = [f"-I{folder}" for folder in (*include_paths(), sysconfig.get_path("include"))]
        draft = library.with_suffix(f".{os.getpid()}")
        # Torch's headers warn in newer compilers.
        options = ["-std=c++20", "-w", "-shared", "-fPIC", "-O1", *includes]
        libraries = [
            f"-L{torch_libraries}",
            "-ltorch_cpu",
            "-lc10",
            f"-Wl,-rpath,{torch_libraries}",
        ]
        subprocess.run([compiler, *options, source, "-o", draft, *libraries], check=True)
        draft.replace(library)
    return library


@pytest.fixture
def scenarios(guard: Path, tmp_path: Path) -> Scenarios:
    """Run scenarios of a module in a process with the device; every one must end well."""

    def run(module: str, *names: str, fails: bool = False, plain: bool = False) -> dict[str, Any]:
        out = tmp_path / ("plain" if plain else "card")
        out.mkdir(exist_ok=True)
        paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
        environment = os.environ | {
            "PRETEND_GUARD": str(guard),
            "PYTHONPATH": paths,
            "OMP_NUM_THREADS": "1",
            "VMLA_DEBUG": "1",
            "XDG_CACHE_HOME": str(tmp_path / "cache"),
        }
        command = [sys.executable, HERE / "run.py", module, out, *names]
        command += ["--plain"] if plain else []
        ran = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        results = json.loads(ran.stdout.splitlines()[-1])
        # Read with pytest -s.
        print({name: value for name, value in results.items() if ":" in name})
        failed = [v for n, v in results.items() if n in names and isinstance(v, str)]
        assert fails or not failed, failed[0]
        return results

    return run
