"""`python -m gi_lib.cli`."""

from gi_lib.cli import main

main()
