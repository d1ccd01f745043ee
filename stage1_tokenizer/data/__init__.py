"""Sources of signals: one file per kind of data, found by the registry ``SOURCES``."""
