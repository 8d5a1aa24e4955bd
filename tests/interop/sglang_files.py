"""Single files of SGLang-Diffusion, without installing SGLang and its dependencies.

The files come from an installed SGLang, or from the wheel that `make test-hosts` downloads. Other
modules of SGLang are stubs: whatever is imported from them is an empty class.
"""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest

FOLDER = Path(__file__).parents[2] / "build" / "test-hosts"
RUNTIME = "sglang.multimodal_gen.runtime"
DENSE = f"{RUNTIME}.layers.kvcache.causal_attention_cache"
PACKED = f"{RUNTIME}.layers.kvcache.qvg_packed_cache"
STAGE = f"{RUNTIME}.pipelines_core.stages.causal_denoising"


def read_source(module: str) -> str | None:
    """The text of a module of SGLang; None where SGLang is not here."""
    path = Path(*module.split(".")).with_suffix(".py")
    for wheel in FOLDER.glob("sglang-*.whl"):
        with zipfile.ZipFile(wheel) as files:
            return files.read(path.as_posix()).decode()
    installed = find_spec("sglang")
    if installed is None or not installed.submodule_search_locations:
        return None
    return (Path(installed.submodule_search_locations[0]).parent / path).read_text("utf-8")


class Files(MetaPathFinder, Loader):
    """Imports some modules of SGLang from their text, and all others as stubs."""

    def __init__(self, texts: Mapping[str, str], stubs: Mapping[str, Any]) -> None:
        self._texts, self._stubs = texts, stubs

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:  # noqa: ARG002
        ours = fullname.partition(".")[0] == "sglang"
        return spec_from_loader(fullname, self, is_package=True) if ours else None

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        if name in self._texts:
            code = compile(self._texts[name], name, "exec", dont_inherit=True)
            exec(code, vars(module))
            return

        def stub(attribute: str) -> Any:
            if attribute.startswith("__"):
                raise AttributeError(attribute)
            return self._stubs.get(attribute, type(attribute, (), {}))

        vars(module)["__getattr__"] = stub


@contextmanager
def files_of_sglang(stubs: Mapping[str, Any]) -> Iterator[Callable[[str], Any]]:
    """Import single modules of SGLang; the test is skipped where SGLang's files are not here."""
    texts = {name: read_source(name) for name in (DENSE, PACKED, STAGE)}
    found = {name: text for name, text in texts.items() if text is not None}
    if len(found) < len(texts):
        pytest.skip("SGLang's files are not here; `make test-hosts` downloads them")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in sys.modules if name.partition(".")[0] == "sglang"]:
            patch.delitem(sys.modules, name)
        finder = Files(found, {"init_logger": MagicMock(), **stubs})
        patch.setattr(sys, "meta_path", [finder, *sys.meta_path])
        try:
            yield import_module
        finally:
            for name in [name for name in sys.modules if name.partition(".")[0] == "sglang"]:
                del sys.modules[name]


@pytest.fixture(scope="module")
def dense_module() -> Iterator[Any]:
    """The module of SGLang's dense cache."""
    with files_of_sglang({}) as load:
        yield load(DENSE)


@pytest.fixture(scope="module")
def packed_module() -> Iterator[Any]:
    """The module of SGLang's quantised cache; its quantiser is not there."""
    with files_of_sglang({}) as load:
        yield load(PACKED)
