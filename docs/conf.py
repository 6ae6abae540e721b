"""Sphinx settings. `sphinx-build -W -b html docs docs/_build/html`; scripts/test.sh does it with every test run."""

from nemohybrid import __version__

project = "nemohybrid"
author = "the nemohybrid authors"
copyright = "2026, the nemohybrid authors"
release = version = __version__

extensions = ["myst_parser"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3  # so that pages can link to each other's headings, checked by -W

html_theme = "furo"
html_title = f"nemohybrid {version}"
exclude_patterns = ["_build"]
