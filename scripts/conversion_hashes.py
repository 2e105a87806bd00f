"""Hash the weights that conversions of `tiny` and a short training give: a refactoring changes no bit of them.

    python scripts/conversion_hashes.py                    # compare all with tests/data/conversion_hashes.json
    python scripts/conversion_hashes.py --only static      # those whose name contains this
    python scripts/conversion_hashes.py --write            # after a change that is meant to change weights
    python scripts/conversion_hashes.py --also             # of a processor that rounds otherwise, before any change

Every partition with every recovery and two plans, and four steps of `finetune`; float32, seed 0, one thread. Libraries
are held to instructions that every x86 processor has, so that the same bits come out on nearly all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

PORTABLE = {
    "OMP_NUM_THREADS": "1", "ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "DNNL_MAX_CPU_ISA": "SSE41",
    "OPENBLAS_CORETYPE": "Prescott", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
}  # fmt: skip
RECORDED = Path(__file__).parent.parent / "tests" / "data" / "conversion_hashes.json"
DISJOINT, OVERLAPPING = ("S3A3E8", "S1A1E4"), ("S1A1E4", "S2A1E6")
SHORT = {"dtype": "float32", "tokens": 4_096, "held_out_tokens": 512}
TUNED = "finetune-lora-4-steps"


def cases() -> dict[str, dict[str, str]]:
    """Settings of every conversion by name."""
    from moesaic import registry

    found = {}
    for partition in registry.names("partition"):
        partitioner = registry.build("partition", partition)
        if partitioner.whole_experts:
            found[partition] = {"partition": partition}
            continue
        for recovery in registry.names("recovery"):
            for plan in OVERLAPPING if partitioner.overlapping else DISJOINT:
                settings = {"partition": partition, "recovery": recovery, "plan": plan}
                extra = {"router": "linear"} if partition == "paths" else {}  # a router ahead learns by gradients
                found["-".join(settings.values())] = settings | extra
    return found


def weights_sha256(folder: Path) -> str:
    """Over all tensors by name: name, dtype, shape and bytes; which file holds them does not matter."""
    import hashlib

    from safetensors import safe_open

    digest = hashlib.sha256()
    files = {name: path for path in folder.glob("*.safetensors") for name in safe_open(path, "pt").keys()}  # noqa: SIM118
    for name in sorted(files):
        with safe_open(files[name], "pt") as file:
            tensor = file.get_tensor(name).contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.view(-1).numpy().tobytes())
    return digest.hexdigest()


def measure(only: str = "") -> dict[str, str]:
    """The hash of every case whose name contains `only`."""
    import torch

    import moesaic

    torch.set_num_threads(1)
    hashes = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, settings in cases().items():
            if only in name:
                out = Path(scratch) / name
                moesaic.convert("tiny", out, moesaic.ConvertConfig(**SHORT, **settings), force=True)
                hashes[name] = weights_sha256(out)
                print(name, hashes[name][:12], file=sys.stderr)
        if only in TUNED:
            out = Path(scratch) / "source"
            settings = {"partition": "coactivation", "plan": "S3A3E8"}
            moesaic.convert("tiny", out, moesaic.ConvertConfig(**SHORT, **settings))
            moesaic.finetune(out, Path(scratch) / TUNED, moesaic.FinetuneConfig(steps=4, samples=32, window=128))
            hashes[TUNED] = weights_sha256(Path(scratch) / TUNED)
    return hashes


def main() -> None:
    """Compare, or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--also", action="store_true", help="keep what other processors gave")
    options = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in PORTABLE.items()):  # libraries read them when they start
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | PORTABLE)
    found = measure(options.only)
    known = json.loads(RECORDED.read_text()) if RECORDED.is_file() else {}
    if options.write or options.also:
        kept = known if options.also else {}
        known |= {name: sorted({*kept.get(name, []), value}) for name, value in found.items()}
        RECORDED.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")
        return
    changed = [name for name, value in found.items() if value not in known.get(name, [])]
    print(f"{len(found) - len(changed)} of {len(found)} as recorded")
    if changed:
        sys.exit(f"changed: {', '.join(changed)}")


if __name__ == "__main__":
    main()
