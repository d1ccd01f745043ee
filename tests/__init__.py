"""The tests; a package, so that no other distribution's ``tests`` stands in its way."""
