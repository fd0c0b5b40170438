"""What converting costs: memory and time on a synthetic checkpoint of any size, and what a killed run leaves.

    python benchmarks/convert.py --gigabytes 4 --folder /tmp/convert

Makes a file of four parts (kept for the next call), converts it in a process that is killed (SIGKILL) in the middle of the
third part, again to its end, and once more without interruption, and prints one line of JSON: peak memory above that of the
interpreter with its libraries, and whether both results are the same, file by file.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

PARTS, TENSORS = 4, 8


def make(file: Path, gigabytes: float) -> None:
    """Write the checkpoint by way of a mapped file, so that it need not fit into memory."""
    import torch

    columns = 1024
    rows = max(1, round(gigabytes * 1e9 / PARTS / TENSORS / columns / 4))
    raw = file.with_suffix(".raw")
    values = torch.from_file(str(raw), shared=True, size=PARTS * TENSORS * rows * columns).view(
        PARTS, TENSORS, rows, columns
    )
    noise = torch.randn(rows, columns)
    for number, tensor in enumerate(values.flatten(0, 1)):
        torch.add(noise, number, out=tensor)
    torch.save({f"{part}.{name}": values[part, name] for part in range(PARTS) for name in range(TENSORS)}, file)
    raw.unlink()


def memory(what: str) -> int:
    """Return a line of /proc/self/status ("VmRSS", "VmHWM") in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(what)).split()[1])


def convert(file: Path, target: Path, die: str | None) -> None:
    """Convert in this process, which kills itself before the tensor ``die``; prints the peak."""
    import transformers  # so that its own memory is not counted
    from transformers import AutoConfig, AutoModelForCausalLM

    from mmbridge import published
    from mmbridge.conversion.keymap import KeyMap, Target

    def target_of(name: str) -> Target:
        def made(tensor):
            if name == die and not tensor.is_meta:
                os.kill(os.getpid(), signal.SIGKILL)
            return tensor

        return Target((name,), made)

    system = types.ModuleType("mmbridge.conversion.onellm")
    system.keymap = lambda state: KeyMap(
        {
            f"inputs.{part}.projection": {f"w{name}": target_of(f"{part}.{name}") for name in range(TENSORS)}
            for part in range(PARTS)
        }
    )
    system.beside = lambda folder: {}
    system.base_configs = lambda state: {}
    system.bridge_config = lambda state, base: {"backbone": {"name": "causal_lm", "source": "nobody/nothing"}}
    sys.modules[system.__name__] = system
    assert transformers and AutoConfig and AutoModelForCausalLM
    start, began = memory("VmRSS"), time.perf_counter()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here
    published.convert("onellm", file, target)
    print(json.dumps({"peak": memory("VmHWM") - start, "seconds": time.perf_counter() - began}))


def hashes(folder: Path) -> dict[str, str]:
    """Return the hashes of a converted folder's parts."""
    entries = json.loads((folder / "manifest.json").read_text())["parts"]
    return {name: entry["sha256"] for name, entry in entries.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--target", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--die", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    file = arguments.folder / f"{arguments.gigabytes:g}.pt"
    if arguments.target is not None:
        convert(file, arguments.target, arguments.die)
        return
    if not file.exists():
        make(file, arguments.gigabytes)

    def child(target: str, *more: str) -> subprocess.CompletedProcess:
        command = [sys.executable, __file__, "--folder", str(arguments.folder), "--gigabytes", str(arguments.gigabytes)]
        command += ["--target", str(arguments.folder / target), *more]
        return subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=subprocess.PIPE, text=True)

    killed = child("killed", "--die", f"{PARTS // 2}.{TENSORS // 2}")
    left = sorted(path.name for path in (arguments.folder / ".killed.unfinished" / "parts").glob("*.safetensors"))
    results = [child(name) for name in ("killed", "whole")]
    resumed, whole = (json.loads(result.stdout.splitlines()[-1]) for result in results)
    found = [hashes(arguments.folder / name) for name in ("killed", "whole")]
    part = sum(path.stat().st_size for path in (arguments.folder / "whole" / "parts").iterdir()) // PARTS
    result = {
        "file": file.stat().st_size, "largest_part": part, "killed_by": -killed.returncode, "kept": len(left),
        "same_hashes": found[0] == found[1], "peak": max(resumed["peak"], whole["peak"]),
        "seconds": whole["seconds"], "seconds_resumed": resumed["seconds"],
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
