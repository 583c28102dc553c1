"""``python -m agentkd`` is the command line."""

from agentkd.cli import main

main()
