import pytest

LONG = (pytest.mark.fault, pytest.mark.long)  # a row of `make faults`, not in `make test`
