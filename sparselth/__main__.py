"""`python -m sparselth`."""

from sparselth.cli.main import main

if __name__ == "__main__":
    main()
