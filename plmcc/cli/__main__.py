"""`python -m plmcc.cli`."""

from plmcc.cli import main

main()
