"""A package, so that tests of several operators may have files of one name."""
