"""The larger commands of the command line, a module each; :mod:`agentkd.cli` registers them."""
