"""`python -m fedinfer.cli` is `fedinfer`."""

from fedinfer.cli.main import main

main()
