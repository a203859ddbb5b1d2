"""`python -m buquet` is the command `buquet`."""

from buquet.cli.main import main

main()
