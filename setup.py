"""Builds the extension modules: one table says which C kernels each of them links, and each kernel is compiled once.

The pages for man(1) are made here too.

``ONIONSKIN_SANITIZE=address,undefined`` builds them for the sanitizers, as the CI does.
``ONIONSKIN_COVERAGE=1`` builds them to count the lines of C that run, for gcov.
``ONIONSKIN_ONLY=csrc/volume/flush.c`` builds only the modules that are made of that file, as the crash tests do.

The links of the project in the metadata lead to the repository whose workflow builds (``GITHUB_REPOSITORY``): the sources
name no place of their own, so a copy of the repository that publishes says where it is itself.
"""

import os
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Distribution, Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group


def _all_of(room: str, but: str = "") -> list[str]:
    """All kernels of a room of csrc, but one."""
    found = sorted(file.stem for file in Path(__file__).parent.glob(f"csrc/{room}/*.c"))
    return [f"{room}/{kernel}" for kernel in found if kernel != but]


# Extension module -> the kernels in csrc/ that it links.
_INDEX = ["index/blockmap", "index/bulk_build"]
_EXTENTS = ["base/extents"]
_MAP = [
    *_INDEX,
    *_EXTENTS,
    "layer/layer_map",
    "layer/map_log",
    "base/crc32c",
    "base/linux_io",
    "base/store_file",
    "base/whole_io",
]
_BASE = [f"base/{kernel}" for kernel in ("barrier", "epoch", "mappings", "sigbus", "site", "turns")]
_VOLUME = [*_all_of("volume", but="read_plan"), *_BASE, "bulk/wipe", *_MAP]
EXTENSIONS = {
    "kernels._blockmap": _INDEX,
    "kernels._copy": ["bulk/copy", "bulk/zero_runs", "base/linux_io", "base/whole_io"],
    "kernels._extents": [*_EXTENTS, "base/cells"],
    "kernels._ram": ["machine/pages", "machine/tracking"],
    "base._names": ["base/names"],
    "kernels._maplog": [*_MAP, "layer/provenance"],
    # Its own copy of the volume's code, which keeps all state in the volumes that _volume makes.
    "nbd._nbd": [*_all_of("nbd"), "volume/read_plan", *_VOLUME],
    "kernels._volume": _VOLUME,
    "kernels._wipe": ["bulk/wipe", "base/linux_io", "base/whole_io"],
}


def project_links(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the links of the project: those of the package index, and of the repository that is built, if one is."""
    index = "https://pypi.org/project/onionskin/"
    if not environment.get("GITHUB_REPOSITORY"):
        return {"Homepage": index, "Documentation": f"{index}#description", "Source": f"{index}#files"}
    server = environment.get("GITHUB_SERVER_URL", "https://github.com")
    repository = f"{server}/{environment['GITHUB_REPOSITORY']}"
    return {
        "Homepage": repository,
        "Documentation": f"{repository}/blob/HEAD/docs/index.md",
        "Source": repository,
        "Changelog": f"{repository}/blob/HEAD/CHANGELOG.md",
        "Issues": f"{repository}/issues",
    }


if sys.platform != "linux":
    raise SystemExit("onionskin runs on Linux only for now; csrc/base/linux_io.h says what a port must replace")

sanitize = os.environ.get("ONIONSKIN_SANITIZE", "")
coverage = os.environ.get("ONIONSKIN_COVERAGE")
only = os.environ.get("ONIONSKIN_ONLY")
compile_args = ["-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-fvisibility=hidden", "-pthread", "-MMD"]
if sanitize:
    compile_args += [f"-fsanitize={sanitize}", "-fno-omit-frame-pointer", "-O1"]
link_args = ["-pthread"] + ([f"-fsanitize={sanitize}"] if sanitize else [])
if coverage:
    # Counters of threads that run side by side must not lose counts; without optimization each line is one.
    compile_args += ["--coverage", "-fprofile-update=atomic", "-O0"]
    link_args += ["--coverage"]


class BuildObjectsOnce(build_ext):
    """Compiles each file once for all modules that link it, and as many at a time as there are processors.

    Objects stay in the build directory, those for the sanitizers and for gcov apart from others, and are made anew when a
    file is newer that they were compiled from.
    """

    def build_extensions(self) -> None:
        self.parallel = self.parallel or os.cpu_count()
        self.build_temp = str(Path(self.build_temp, sanitize, "coverage" if coverage else ""))
        sources = list(dict.fromkeys(source for extension in self.extensions for source in extension.sources))
        with ThreadPoolExecutor(self.parallel) as pool:
            objects = dict(zip(sources, pool.map(self.object_of, sources), strict=True))
        for extension in self.extensions:  # what is left to do for setuptools is to link
            extension.extra_objects = extension.depends = [objects[source] for source in extension.sources]
            extension.sources = []
        super().build_extensions()

    def object_of(self, source: str) -> str:
        """Compile a file, unless its object is there and newer than the files that the compiler (-MMD) listed then."""
        (made,) = self.compiler.object_filenames([source], output_dir=self.build_temp)
        listed = Path(made).with_suffix(".d")
        before = listed.read_text().replace("\\\n", "").split()[1:] if listed.exists() else []
        if self.force or not before or newer_group(before, made, missing="newer"):
            self.compiler.compile([source], self.build_temp, include_dirs=["csrc"], extra_postargs=compile_args)
        return made


class MakeManPages(Distribution().get_command_class("install_data")):
    """Makes the pages for man(1) from the command line in the source, which needs click and nothing that is built."""

    def run(self) -> None:
        source = Path(__file__).parent / "src"
        sys.path.insert(0, str(source))
        try:
            from onionskin import __version__
            from onionskin.cli.man_pages import pages
        finally:
            sys.path.remove(str(source))
        directory = Path("build/man")
        directory.mkdir(parents=True, exist_ok=True)
        for name, page in pages(__version__).items():
            (directory / name).write_text(page, encoding="utf-8")
        self.data_files = [("share/man/man1", sorted(str(directory / name) for name in pages(__version__)))]
        super().run()


extensions = [
    Extension(f"onionskin.{module}", sources=sources, extra_link_args=link_args)
    for module, kernels in EXTENSIONS.items()
    for sources in [[f"src/onionskin/{module.replace('.', '/')}.pyx", *(f"csrc/{kernel}.c" for kernel in kernels)]]
    if only is None or only in sources
]
if only is None and not sanitize:
    # No module: a library that the hypervisor loads before it starts. It links nothing of the others, and no sanitizer.
    extensions.append(Extension("onionskin.machine._preload", sources=["csrc/machine/preload.c"], libraries=["dl"]))
setup(
    cmdclass={"build_ext": BuildObjectsOnce, "install_data": MakeManPages},
    data_files=[("share/man/man1", [])],  # MakeManPages says which
    project_urls=project_links(os.environ),
    ext_modules=cythonize(
        extensions,
        compiler_directives={"language_level": 3, "binding": True, "freethreading_compatible": False},
    ),
)
