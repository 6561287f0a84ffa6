"""Builds the extension modules: one table says which C kernels each of them links.

``ONIONSKIN_SANITIZE=address,undefined`` builds them for the sanitizers, as the CI does.
``ONIONSKIN_COVERAGE=1`` builds them to count the lines of C that run, for gcov.
``ONIONSKIN_ONLY=head`` builds only what is made of that kernel (or the module of that name), as the crash tests do.
"""

import os
import sys
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

# Extension module -> the kernels in csrc/ that it links.
_MAP = ["blockmap", "mapbuild", "layermap", "maplog", "crc32c"]
_VOLUME = ["volume", "opening", "head", "barrier", "epoch", "fault", "segment", "wipe", "linux_io", *_MAP]
_NBD = ["server", "negotiate", "transmit", "send", "batch", "helper", "status", "wire"]
EXTENSIONS = {
    "_blockmap": ["blockmap", "mapbuild"],
    "_copy": ["copy", "linux_io"],
    "_maplog": [*_MAP, "owners"],
    # Its own copy of the volume's code, which keeps all state in the volumes that _volume makes.
    "_nbd": [*(f"nbd_{part}" for part in _NBD), "plan", *_VOLUME],
    "_volume": _VOLUME,
    "_wipe": ["wipe", "linux_io"],
}

if sys.platform != "linux":
    raise SystemExit("onionskin runs on Linux only for now; csrc/linux_io.h says what a port must replace")

sanitize = os.environ.get("ONIONSKIN_SANITIZE", "")
only = os.environ.get("ONIONSKIN_ONLY")
compile_args = ["-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-fvisibility=hidden", "-pthread"]
if sanitize:
    compile_args += [f"-fsanitize={sanitize}", "-fno-omit-frame-pointer", "-O1"]
link_args = ["-pthread"] + ([f"-fsanitize={sanitize}"] if sanitize else [])
if os.environ.get("ONIONSKIN_COVERAGE"):
    # Counters of threads that run side by side must not lose counts; without optimization each line is one.
    compile_args += ["--coverage", "-fprofile-update=atomic", "-O0"]
    link_args += ["--coverage"]

csrc = Path("csrc")
extensions = [
    Extension(
        f"onionskin.{module}",
        sources=[f"src/onionskin/{module}.pyx", *(str(csrc / f"{kernel}.c") for kernel in kernels)],
        include_dirs=[str(csrc)],
        depends=sorted(str(header) for header in csrc.glob("*.h")),
        extra_compile_args=compile_args,
        extra_link_args=link_args,
    )
    for module, kernels in EXTENSIONS.items()
    if only is None or only in (module, *kernels)
]
setup(
    ext_modules=cythonize(
        extensions,
        compiler_directives={"language_level": 3, "binding": True, "freethreading_compatible": False},
    )
)
