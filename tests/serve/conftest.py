from __future__ import annotations

import pytest

from tests.serve.toys import Toy


@pytest.fixture
def make():
    """Makes toys, and closes them."""
    made = []

    def make_toy(**values):
        made.append(Toy(**values))
        return made[-1]

    yield make_toy
    for toy in made:
        toy.close()
