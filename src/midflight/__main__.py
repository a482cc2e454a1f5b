"""`python -m midflight` is the command `midflight`."""

from midflight.cli import main

if __name__ == "__main__":
    main()
