"""`python -m sparselth`."""

from sparselth.cli.main import main

main()
