"""Compiles the CPU kernels into `kernels/cpu/_native.so` when kvferry is built or installed.

`python hatch_build.py` does the same in a working tree. Without a C compiler, the one in the `ziglang` wheel is used;
where nothing compiles, the installation works without the native kernels, and says so.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = Path("kernels") / "cpu"
LIBRARY = FOLDER / "_native.so"
FLAGS = (
    "-O3",
    "-std=c11",
    "-mavx2",
    "-mfma",
    "-mf16c",
    "-ffp-contract=off",  # every fused multiply-add is explicit: the same bits from every compiler
    "-fno-math-errno",
    "-shared",
    "-s",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
)


class NativeBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Adds the compiled library to wheels and editable installations."""

    def dependencies(self) -> list[str]:
        return ["ziglang>=0.14"] if supported() and system_compiler() is None else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        if not supported():
            self.app.display_warning(
                f"kvferry: no native CPU kernels for {sys.platform} {platform.machine()}; "
                "attention on packed blocks will run on the slow reference path"
            )
            return
        try:
            library = compile_library(Path(self.root))
        except CompileError as error:
            self.app.display_warning(
                f"kvferry: the native CPU kernels were not built ({error}); "
                "attention on packed blocks will run on the slow reference path"
            )
            return
        self.app.display_info(f"kvferry: native CPU kernels in {library}")
        build_data["artifacts"].append(f"/{LIBRARY.as_posix()}")
        build_data["pure_python"] = False
        build_data["infer_tag"] = True


class CompileError(Exception):
    """No compiler, or it failed."""


def supported() -> bool:
    return sys.platform == "linux" and platform.machine().lower() in ("x86_64", "amd64")


def system_compiler() -> list[str] | None:
    """$CC, or the first of cc, gcc and clang."""
    if os.environ.get("CC"):
        return shlex.split(os.environ["CC"])
    return next(([path] for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)


def compile_library(root: Path) -> Path:
    """Compiles `root`/kernels/cpu unless its library is of these sources, flags and compiler already."""
    compiler = system_compiler() or [sys.executable, "-m", "ziglang", "cc"]
    sources = sorted((root / FOLDER).glob("*.c"))
    digest = hashlib.sha256()
    for part in (*compiler, *FLAGS):
        digest.update(part.encode() + b"\0")
    for path in (*sources, *sorted((root / FOLDER).glob("*.h"))):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    build_id = digest.hexdigest()
    library = root / LIBRARY
    if library.exists() and f"kvferry-build:{build_id}".encode() in library.read_bytes():
        return library
    library.unlink(missing_ok=True)  # better none than one that native.py does not match
    # Beside its final place, so that the rename is atomic.
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=".build-") as folder:
        fresh = Path(folder) / library.name
        define = f'-DKVFERRY_BUILD_ID="{build_id}"'
        command = [*compiler, *FLAGS, define, *map(str, sources), "-o", str(fresh)]
        try:
            result = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            raise CompileError(f"{compiler[0]}: {error.strerror}") from error
        if result.returncode:
            raise CompileError(f"{shlex.join(compiler)} failed:\n{result.stderr.strip()}")
        fresh.replace(library)
    return library


if __name__ == "__main__":
    print(compile_library(Path(__file__).parent))
