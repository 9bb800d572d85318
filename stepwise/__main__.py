"""python -m stepwise: the command line."""

from stepwise.cli import main

main()
