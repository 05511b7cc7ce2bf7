"""The run-time type checker of the tests: an int is a float, as Python's type system says."""

try:
    from beartype import BeartypeConf, beartype
except ImportError:  # benchmarks on a borrowed GPU machine do without
    pass
else:
    check = beartype(conf=BeartypeConf(is_pep484_tower=True))
