"""How Sphinx builds the site of the documentation: ``nox -s docs``.

The tree of sources begins at the root of the repository, so a link between Markdown files, as GitHub shows them, is a link
of the site as it stands; one to any other file is a download. What must hold: no warning with ``-W -n``, and no network.
"""

from pathlib import Path

import numpy
from sphinx.application import Sphinx

import onionskin
from onionskin import volume

project = "onionskin"
version = release = onionskin.__version__
html_title = f"onionskin {release}"

root_doc = "docs/index"
include_patterns = ["*.md", "docs/**"]
exclude_patterns = [".*", "bench", "build", "csrc", "dist", "src", "tests", "tools"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click"]
html_theme = "furo"
html_copy_source = False
html_static_path = ["static"]
html_css_files = ["narrow.css"]
html_show_sphinx = False
html_show_copyright = False
smartquotes = False  # two hyphens begin an option
default_role = "literal"
myst_heading_anchors = 4  # made from headings as GitHub makes them

napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_preprocess_types = True
napoleon_type_aliases = {
    "path-like": "os.PathLike",
    "path": "os.PathLike",
    "file": "typing.BinaryIO",
    **{name: f"onionskin.{name}" for name in onionskin.__all__},
}
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100

# Public names are shown where they are public, and not in the module that happens to hold them.
for name in onionskin.__all__:
    if (public := getattr(onionskin, name)).__module__.startswith("onionskin."):
        public.__module__ = "onionskin"
volume.Array = numpy.ndarray  # a name for type checkers, which is absent when the program runs

# Names of others: nothing is fetched to resolve them.
nitpick_ignore = [
    ("py:class", name)
    for name in (
        *(
            "AnyPath",
            "Array",
            "Bytes",
            "ExtentArray",
            "LayerKind",
            "MachineState",
            "OpenMode",
            "ReadableBuffer",
            "RecordedMode",
            "Severity",
            "SnapshotMode",
            "WipePolicy",
            "WritableBuffer",
        ),  # onionskin.base.annotations
        *("array", "buffer", "mapping", "sequence", "uint8"),
        *(
            "TypeAliasForwardRef",
            "timedelta",
            "Path",
            "Configuration",
            "socket",
        ),  # what Sphinx makes of an alias and of a name in a quoted annotation
        "callable",
        "collections.abc.Callable",
        "collections.abc.Iterator",
        "collections.abc.Mapping",
        "collections.abc.Sequence",
        "datetime.datetime",
        "datetime.timedelta",
        "datetime.tzinfo",
        "io.RawIOBase",
        "numpy.dtype",
        "numpy.ndarray",
        "onionskin.Configuration",  # the class that MachineConfiguration is there
        "onionskin.aio.Result",  # a variable of types
        "os.PathLike",
        "pathlib.Path",
        "socket.socket",
        "typing.BinaryIO",
    )
]


def lead_to_index(app: Sphinx, error: Exception | None) -> None:
    """Make the root of the site lead to its first page."""
    if error is None and app.builder.format == "html":
        page = f'<!doctype html><meta http-equiv="refresh" content="0; url={root_doc}.html"><title>onionskin</title>\n'
        Path(app.outdir, "index.html").write_text(page)


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("build-finished", lead_to_index)
