"""The configurations that ship with the package; ``intarsia.cli.find_config`` finds them by name."""
