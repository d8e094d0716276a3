"""The site: ``sphinx-build -W docs docs/_build/html``; its pages are read on a forge too."""

project = "fedsam"
html_title = "fedsam"
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_copy_source = False
exclude_patterns = ["_build"]
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

myst_heading_anchors = 3  # as forges have them: performance.md#growth
smartquotes = False  # a flag's two dashes stay two dashes

nb_execution_mode = "force"  # docs/tour.md, at every build
nb_execution_in_temp = True
nb_execution_show_tb = True  # a cell that fails is a warning, and so an error
nb_render_markdown_format = "gfm"  # for tables
nb_execution_timeout = 300  # seconds a cell

autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
napoleon_use_ivar = True
autodoc_typehints = "none"  # numpydoc sections hold types and shapes
