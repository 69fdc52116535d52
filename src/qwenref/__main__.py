"""`python -m qwenref`."""

from qwenref.cli import main

main()
