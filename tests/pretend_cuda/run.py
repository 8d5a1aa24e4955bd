"""Run scenarios in this process, and print one line of JSON: what each gave, or how it failed.

    python run.py MODULE OUT SCENARIO... [--plain]

With `--plain` there is no pretend device. A module with `OPENS_DEVICE` opens the device itself.
"""

from __future__ import annotations

import json
import sys
import traceback
from importlib import import_module
from pathlib import Path
from time import process_time
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))


def main(module: str, out: str, *scenarios: str) -> None:
    """Run the scenarios in their order; one that fails does not stop the next."""
    names = [name for name in scenarios if name != "--plain"]
    if plain := len(names) < len(scenarios):
        device = None
    else:
        import device

        device.install()
    known = vars(import_module(module))
    results = dict[str, Any]()
    for name in names:
        started = process_time()
        try:
            if plain or known.get("OPENS_DEVICE"):
                result = known[name](Path(out))
            else:
                assert device is not None
                with device.pretend(computes=True) as card:
                    result = known[name](Path(out))
                results[f"{name}: kernels"] = card.kernels.total()
                results[f"{name}: peak"] = card.peak
        except BaseException as error:
            result = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
        results[name], results[f"{name}: seconds"] = result, process_time() - started
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
