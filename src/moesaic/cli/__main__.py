"""`python -m moesaic.cli`."""

from . import main

main()
